"""Training runs for benchmarks/learning.py: methods as configurations of the same core functions, in one open session
each.

The text features of all captions are encoded once and cut to their first 12 tokens: captions have 9, and the embedded
models were mostly trained on 12, so this only saves time. Cost is counted in forwards: one latent through the network
is 1, one that is also back-propagated `unit` (measured). Evaluations are not counted: 48 plain ODE samples of captions
that no run is trained on, from fixed noise, looked at by embedded/judge.py, which shares nothing with a reward. The VAE
decodes in bfloat16 and chunks of 4, 3x faster on a CPU: one image would otherwise cost as much as 28 forwards.
"""

import contextlib
import copy
import importlib
import math
import time
from dataclasses import asdict, dataclass, field, replace

import host
from iteration import network_passes

TOKENS, STEPS = 12, 10  # text tokens kept; sampling steps
RANK, ALPHA, TARGETS = 8, 16, "all linear"
EVALUATED = 48  # pictures per evaluation
COMMON = {"palette": "pastel", "backdrop": "dotted", "face": "smiling"}  # a tenth of the base's pictures
RARE = {"palette": "vivid", "fill": "outline", "backdrop": "dotted", "frame": "framed", "face": "smiling"}  # a fortieth
WISHES = {"size": {}, "taste": COMMON, "rare": RARE, "follow": {}, "demo": COMMON}  # demo: as the templates, and follow


MIDDLE = {"window": "fixed", "fixed": 4}  # steps 5 and 6 of 10 branch, as in the template `trainer`
ANYWHERE = {"ratio": 1.0}  # all windows are as likely


@dataclass
class Method:
    """How one iteration is sampled and learned from; everything that is not named is the pack's default."""

    prompts: int  # per iteration
    shape: dict  # TreeShape settings
    retain: bool = True
    noise: dict = field(default_factory=dict)  # NoiseSchedule settings
    objective: dict = field(default_factory=dict)  # Objective settings
    estimator: str = "treegrpo"
    weights: str = "mean-logprob"
    inner: int = 1
    learning_rate: float = 1e-3
    average: float = 0.0  # decay of the moving average of the weights that is evaluated; 0 = the weights themselves

    def but(self, **changes) -> "Method":
        return replace(
            self,
            **{
                key: {**getattr(self, key), **value} if isinstance(value, dict) else value
                for key, value in changes.items()
            },
        )


def methods() -> dict[str, Method]:
    """About 420 cost units per iteration each, so that the baselines get fewer images and the trees more prompts; those
    called *_inner2 take two optimizer steps on the same images, those called *_1prompt cost about 105 and so take four
    times as many iterations; tree_b8w1_1prompt, eight siblings that part at the first step, costs 36.

    middle_*: the trees of the template `trainer`, which branch at steps 5 and 6 of 10, by policy gradient and by tree
    regression, and what is left of them without a tree: as many independent images of the same windows and tails
    (middle_flat_regression), and GRPO on three steps from there (window_middle). early_*: the same where the window is
    drawn anew in every iteration and starts early more often, as Simple Trainer has it (without a tree:
    flat_regression); anywhere_*: where all windows are as likely.

    The field's own: flat_nft and flat_awm, DiffusionNFT and AWM as they are published but for flat_regression's images,
    with as many re-noised states per image as its window has; all_steps, GRPO on every step of independent images but
    the last two, as Flow-GRPO and DanceGRPO have it; treegrpo_code, what TreeGRPO's public code does (published.py),
    its clip range scaled from 512x512 latents to these.
    """
    tree = {"tail": 0.4}
    early = {"tail": 0.3, "ratio": 0.3}
    middle, anywhere = {"tail": 0.3, **MIDDLE}, {"tail": 0.3, **ANYWHERE}
    tree_4x2, alone = {"branching": 4, "depth": 2}, {"branching": 1, "depth": 2, "trees": 16}
    flat = {**early, **alone}
    regression = {"loss": "regression", "anchor": 0.05, "step_weight": "layer"}
    return {
        "independent": Method(2, {"branching": 1, "depth": STEPS - 2, "trees": 7}, retain=False),
        "window": Method(2, {"branching": 1, "depth": 3, "trees": 12}, retain=False),
        "tree_b3w3": Method(4, {**tree, "branching": 3, "depth": 3}),
        "tree_b4w2": Method(6, {**tree, "branching": 4, "depth": 2}),
        "window_inner2": Method(2, {"branching": 1, "depth": 3, "trees": 8}, retain=False, inner=2, learning_rate=3e-3),
        "tree_b3w3_inner2": Method(3, {**tree, "branching": 3, "depth": 3}, inner=2, learning_rate=3e-3),
        "window_1prompt": Method(1, {"branching": 1, "depth": 3, "trees": 6}, retain=False),
        "tree_b3w3_1prompt": Method(1, {**tree, "branching": 3, "depth": 3}),
        "early_b4w2": Method(4, {**early, **tree_4x2}),
        "early_b4w2_regression": Method(4, {**early, **tree_4x2}, objective=regression),
        "middle_b4w2": Method(4, {**middle, **tree_4x2}),
        "middle_b4w2_regression": Method(4, {**middle, **tree_4x2}, objective=regression),
        "middle_b4w2_regression_inner2": Method(4, {**middle, **tree_4x2}, objective=regression, inner=2),
        "middle_flat_regression": Method(4, {**middle, **alone}, retain=False, objective=regression),
        "anywhere_b4w2_regression": Method(4, {**anywhere, **tree_4x2}, objective=regression),
        "window_middle": Method(2, {"branching": 1, "depth": 3, "trees": 12, **MIDDLE}, retain=False),
        "flat_regression": Method(4, flat, retain=False, objective=regression),
        "flat_nft": Method(4, flat, retain=False, objective={"loss": "nft", "per_image": 2}),
        "flat_awm": Method(4, flat, retain=False, objective={"loss": "awm", "per_image": 2}),
        "all_steps": Method(1, {"branching": 1, "depth": STEPS - 2, "trees": 16}, retain=False),
        "treegrpo_code": published("treegrpo_code", prompts=2),
        "tree_b8w1_1prompt": Method(1, {**tree, "branching": 8, "depth": 1, "window": "fixed", "fixed": 0}),
    }


def presets() -> dict[str, Method]:
    """Simple Trainer's presets as it trains a tiny model with them, `normal` first, and what was tried in place of
    `strong` and of its windows.
    """
    simple = importlib.import_module("treerpo_pack.nodes.simple")

    def method(speed, anchor, prompts=simple.PER_ITERATION):
        return methods()["early_b4w2_regression"].but(
            prompts=prompts, objective={"anchor": anchor}, learning_rate=1.2e-3 * speed, average=0.97
        )

    named = {name: method(*simple.PRESETS[name]) for name in ("normal", "gentle", "strong")}
    return {
        **named,
        "normal_anywhere": named["normal"].but(shape=ANYWHERE),
        "normal_middle": named["normal"].but(shape=MIDDLE),
        "rate_2.5": method(2.5, 0.05),
        "prompts_1": method(1.0, 0.05, 1),
    }


def published(name: str, prompts: int) -> Method:
    """A preset of core/method/published.py on latents of 8x8, whose clip range is that of 64x64 by 1/sqrt(elements)."""
    found = importlib.import_module("treerpo_pack.core.method.published").PRESETS[name]
    settings, objective = found["settings"], found["objective"]
    return Method(
        prompts,
        asdict(found["shape"]),
        retain=False,
        noise={"kind": found["noise"].kind, "level": found["noise"].level},
        objective={"clip_low": 8 * objective.clip_low, "clip_high": 8 * objective.clip_high},
        estimator=settings["estimator"],
        weights=settings["weights"],
        inner=settings.get("inner_updates", 1),
    )


class Lab:
    """One embedded model and one reward; `open(seed)` gives a fresh LoRA policy to train."""

    def __init__(self, pack, model: str, reward: str):
        import torch

        self.core, self.shapes = pack.core, pack.embedded.shapes
        self.graph = host.graph(pack, model)
        texts = self.shapes.captions()
        wanted = torch.arange(len(texts))
        shape, colour, background = self.shapes.labels(wanted)
        held_out = (shape + colour) % 4 == 0  # 24 of the 96: two colours of every shape, on all backgrounds
        self.index = torch.cat([wanted[~held_out], wanted[held_out]])
        self.training = int((~held_out).sum())
        positive, _ = self.graph.prompts("\n".join(texts[i] for i in self.index))
        with torch.inference_mode():
            self.positive = [[context[:, :TOKENS], options] for context, options in positive]
        self.sigmas = self.graph.sigmas(STEPS).clone().float()
        self.texts = [texts[i] for i in self.index]
        self.wish, load = WISHES[reward], pack.core.rewards.load
        self.scorer = (
            load("measure", "foreground size")
            if reward == "size"
            else load(
                "drawing",
                wish=self.wish,
                follow=reward in ("follow", "demo"),
                each="all" if reward == "demo" else "mean",
            )
        )
        self.figures = pack.core.rewards.drawing.embedded("judge").figures
        with torch.inference_mode():
            self.decoder = copy.deepcopy(self.graph.vae.first_stage_model).to(
                torch.bfloat16, memory_format=torch.channels_last
            )
        self.unit, self.untrained = 2.5, None
        with self.open(0) as policy:
            self.seconds_forward, self.unit = policy.unit_cost()

    def open(self, seed: int, scale: float = 0.0) -> "Policy":
        return Policy(self, seed, scale)

    def decode(self, latents):
        """[B, 16, 8, 8] -> [B, 64, 64, 3] in 0..1."""
        import torch

        with torch.inference_mode():
            parts = [
                self.decoder.decode(part.to(torch.bfloat16, memory_format=torch.channels_last))
                for part in latents.cpu().split(4)
            ]
            return self.graph.vae.process_output(torch.cat(parts).float()).movedim(1, -1).clone()

    def score(self, velocity, leaves, rows):
        """Rewards [B] of denoised latents; the pictures are not kept. rows: number of each one's caption among this
        lab's.
        """
        return self.scorer.score(self.decode(velocity.process_out(leaves)), [self.texts[i] for i in rows]).clone()

    def look(self, images, rows) -> dict[str, float]:
        """Means over pictures [B, H, W, 3], by the judge and not by the reward: embedded/judge.py, figures."""
        return self.figures(images, [self.texts[i] for i in rows], self.wish)


class Policy:
    """A LoRA on the embedded model inside one session: `step` is one training iteration, `evaluate` the mean reward."""

    def __init__(self, lab: Lab, seed: int, scale: float):
        """scale: standard deviation of what is added to a fresh LoRA's weights; 0 = nothing, so that it does not change
        the model yet.
        """
        import torch
        from treerpo_pack.core.hosts.comfy import ComfyPolicy

        self.lab, self.seed, self.iteration = lab, seed, 0
        self.cost = self.seconds = self.cpu_seconds = 0.0
        with torch.inference_mode(False), torch.no_grad():
            self.policy = ComfyPolicy.create(lab.graph.model, RANK, ALPHA, TARGETS, seed=seed)
            if scale:
                draw = torch.Generator().manual_seed(seed)
                for parameter in self.policy.adapters.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
        self.best, self.optimizer, self.average = -math.inf, None, None

    def __enter__(self):
        import torch

        self.stack = contextlib.ExitStack()
        self.stack.enter_context(torch.inference_mode(False))
        self.stack.enter_context(torch.no_grad())
        self.velocity = self.stack.enter_context(
            self.policy.session(self.lab.positive, shape=(16, 8, 8), memory_batch=64)
        )
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def unit_cost(self, batch: int = 24, repeats: int = 20) -> tuple[float, float]:
        """(seconds of a forward per latent, cost of a forward with backward in forwards).

        Fastest of many: other work on the machine only adds.
        """
        import torch

        x, rows, parameters = (
            torch.ones(batch, 16, 8, 8, device=self.velocity.device),
            [0] * batch,
            list(self.velocity.parameters()),
        )
        forward, unit = [], []

        def learn():
            with self.velocity.grad():
                torch.autograd.grad(self.velocity(x, 0.9, rows).square().sum(), parameters, allow_unused=True)

        for _ in range(repeats):
            forward.append(host.timed(lambda: self.velocity(x, 0.9, rows)))
            unit.append(host.timed(learn))
        return min(forward) / batch, min(unit) / min(forward)

    def pictures(self, seed: int = 12345):
        """(EVALUATED pictures [B, H, W, 3] of held-out captions, their rows): plain ODE samples of one noise."""
        import torch

        count = range(EVALUATED)
        x = self.lab.core.method.noise.roots((16, 8, 8), seed, 0, list(count), 1).to(self.velocity.device)
        rows = [self.lab.training + i % (len(self.lab.index) - self.lab.training) for i in count]
        table = [float(s) for s in self.lab.sigmas]
        for s, n in zip(table, table[1:]):
            x = x + (n - s) * self.velocity(x, s, rows)
        return self.lab.decode(self.velocity.process_out(x)), torch.tensor(rows)

    def evaluate(self) -> dict[str, float]:
        """Mean reward of `pictures`, and what the judge sees in them; of the moving average where there is one."""
        with self.average.applied() if self.average else contextlib.nullcontext():
            images, rows = self.pictures()
        reward = self.lab.scorer.score(images, [self.lab.texts[i] for i in rows])
        return {"reward": float(reward.mean()), **self.lab.look(images, rows)}

    def grow(self, method: Method, start: int):
        """(forest, caption of every leaf) of this iteration; prompts and noise depend on seed and iteration alone."""
        import torch

        core = self.lab.core
        shape = core.method.tree.TreeShape(**method.shape)
        order = torch.randperm(
            self.lab.training, generator=core.method.noise.generator(self.seed, "prompts", self.iteration)
        )
        prompts = order[: method.prompts].tolist()
        roots = core.method.noise.roots((16, 8, 8), self.seed, self.iteration + 1, prompts, shape.trees).to(
            self.velocity.device
        )
        noise = core.method.noise.NoiseSchedule(**method.noise)
        forest = core.method.rollout.grow(
            self.velocity,
            roots,
            self.lab.sigmas,
            shape,
            noise,
            start=start,
            prompts=prompts,
            seed=self.seed,
            iteration=self.iteration,
            retain=math.inf if method.retain else 0,
        )
        return forest, torch.tensor(prompts).repeat_interleave(forest.leaves_per_prompt)

    def learn(self, method: Method, gradient_only: bool = False) -> dict:
        """One iteration: sample, score, and update (or only add up the gradient). Counts its cost and seconds."""
        import torch

        core, began, cpu_began = self.lab.core, time.perf_counter(), time.process_time()
        shape = core.method.tree.TreeShape(**method.shape)
        objective = core.method.objective.Objective(**{"clip_low": 1e-2, "clip_high": 1e-2, **method.objective})
        with network_passes(self.lab.graph.model.model.diffusion_model) as count:
            forest, rows = self.grow(method, shape.start(self.iteration, STEPS, self.seed))
            rewards, prompts = self.lab.score(self.velocity, forest.leaves, rows), len(forest.prompts)
            leaf, _ = core.method.advantage.leaf_advantages({"reward": rewards}, prompts)
            layers = core.method.advantage.edge_advantages(
                method.estimator, [p.cpu() for p in forest.log_probs], leaf, forest.branching, prompts, method.weights
            )
            best = rewards.view(prompts, -1).amax(1)
            options = {"allowed": best >= self.best}
            if objective.on_renoised:
                options["renoised"] = core.method.matching.renoise(forest, objective.per_image, self.seed)
            if gradient_only:
                metrics = core.method.update.policy_gradient(self.velocity, forest, layers, objective, **options)
            else:
                self.optimizer = self.optimizer or torch.optim.AdamW(
                    self.velocity.parameters(), lr=method.learning_rate, weight_decay=0.0
                )
                if method.average and self.average is None:
                    self.average = core.lora.ema.Ema(self.velocity.parameters(), method.average)
                metrics = core.method.update.update(
                    self.velocity,
                    forest,
                    layers,
                    self.optimizer,
                    objective,
                    inner_updates=method.inner,
                    ema=self.average,
                    **options,
                )
        self.best = float(best.mean()) if self.best == -math.inf else 0.9 * self.best + 0.1 * float(best.mean())
        cost = count.forwards - count.backwards + count.backwards * self.lab.unit
        self.iteration += 1
        self.cost += cost
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu_began
        return {**metrics, "cost": cost, "start": forest.start, "images": len(forest.leaves)}


def train(lab: Lab, method: Method, seed: int, budget: float, evaluations: int = 3) -> dict:
    """Train until `budget` cost units are spent. Lists of cost, seconds by the clock, processor seconds (which other
    jobs on the machine change less) and what `evaluate` gives: before the training, where a fresh LoRA is the base
    model whatever the seed, and `evaluations` times on the way.
    """
    with lab.open(seed) as policy:
        lab.untrained = lab.untrained or policy.evaluate()
        rows = [{"cost": 0.0, "seconds": 0.0, "cpu_seconds": 0.0, **lab.untrained}]
        for mark in range(1, evaluations + 1):
            while policy.cost < budget * mark / evaluations - 1e-9:
                policy.learn(method)
            rows.append(
                {
                    "cost": policy.cost,
                    "seconds": policy.seconds,
                    "cpu_seconds": policy.cpu_seconds,
                    **policy.evaluate(),
                }
            )
        return {**{key: [row[key] for row in rows] for key in rows[0]}, "iterations": policy.iteration}
