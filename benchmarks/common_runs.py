"""Training runs for benchmarks/learning.py: methods as configurations of the same core functions, in one open session
each.

The text features of all captions are encoded once and cut to their first 12 tokens: captions have 9, and the embedded
models were mostly trained on 12, so this only saves time. Cost is counted in forwards: one latent through the network
is 1, one that is also back-propagated `unit` (measured). Evaluations are not counted: 32 plain ODE samples of the
training captions from fixed noise. The VAE decodes in bfloat16 and chunks of 4, 3x faster on a CPU: one image would
otherwise cost as much as 28 forwards.
"""

import copy
import math
import time
from dataclasses import dataclass, field, replace

import host
from iteration import network_passes

TOKENS, STEPS = 12, 10  # text tokens kept; sampling steps
RANK, ALPHA, TARGETS = 8, 16, "attention+mlp"


@dataclass
class Method:
    """How one iteration is sampled and learned from; everything that is not named is the pack's default."""

    prompts: int  # per iteration
    shape: dict  # TreeShape settings
    retain: bool = True
    noise: dict = field(default_factory=dict)  # NoiseSchedule settings
    objective: dict = field(default_factory=dict)  # Objective settings
    estimator: str = "treegrpo"
    inner: int = 1
    learning_rate: float = 1e-3

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
    times as many iterations.
    """
    tree = {"tail": 0.4}
    return {
        "independent": Method(2, {"branching": 1, "depth": STEPS - 2, "trees": 7}, retain=False),
        "window": Method(2, {"branching": 1, "depth": 3, "trees": 12}, retain=False),
        "tree_b3w3": Method(4, {**tree, "branching": 3, "depth": 3}),
        "tree_b4w2": Method(6, {**tree, "branching": 4, "depth": 2}),
        "window_inner2": Method(2, {"branching": 1, "depth": 3, "trees": 8}, retain=False, inner=2, learning_rate=3e-3),
        "tree_b3w3_inner2": Method(3, {**tree, "branching": 3, "depth": 3}, inner=2, learning_rate=3e-3),
        "window_1prompt": Method(1, {"branching": 1, "depth": 3, "trees": 6}, retain=False),
        "tree_b3w3_1prompt": Method(1, {**tree, "branching": 3, "depth": 3}),
    }


class Lab:
    """One embedded model and one reward; `open(seed)` gives a fresh LoRA policy to train."""

    def __init__(self, pack, model: str, reward: str):
        import torch

        self.core, self.shapes = pack.core, pack.embedded.shapes
        self.graph, self.reward = host.graph(pack, model), reward
        texts = self.shapes.captions()
        wanted = torch.arange(len(texts))
        shape, colour, background = self.shapes.labels(wanted)
        if reward == "size":  # every shape in every colour
            self.index = wanted[background == (shape + colour) % len(self.shapes.BACKGROUNDS)]
        else:  # what the models draw worst; the other captions are at .99 and leave nothing to learn
            self.index = wanted[(background == 1) & (shape % 2 == 1)]
        positive, _ = self.graph.prompts("\n".join(texts[i] for i in self.index))
        with torch.inference_mode():
            self.positive = [[context[:, :TOKENS], options] for context, options in positive]
        self.sigmas = self.graph.sigmas(STEPS).clone().float()
        self.classifier = self.shapes.load_classifier()
        self.size = pack.core.rewards.measure.Measure("foreground size")
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

    def judge(self, images, rows, reward: str):
        """Rewards [B]. rows: number of each image's caption among this lab's."""
        if reward == "size":
            return self.size.score(images, [""] * len(images)).clone()
        return self.shapes.score(images, self.index[rows], self.classifier)["shape_probability"].clone()

    def score(self, velocity, leaves, rows):
        """Rewards [B] of denoised latents; the pictures are not kept."""
        return self.judge(self.decode(velocity.process_out(leaves)), rows, self.reward)


class Policy:
    """A LoRA on the embedded model inside one session: `step` is one training iteration, `evaluate` the mean reward."""

    def __init__(self, lab: Lab, seed: int, scale: float):
        """scale: standard deviation of what is added to a fresh LoRA's weights; 0 = nothing, so that it does not change
        the model yet.
        """
        import torch
        from treerpo_pack.core.hosts.comfy import ComfyPolicy

        self.lab, self.seed, self.iteration, self.cost, self.seconds = lab, seed, 0, 0.0, 0.0
        with torch.inference_mode(False), torch.no_grad():
            self.policy = ComfyPolicy.create(lab.graph.model, RANK, ALPHA, TARGETS, seed=seed)
            if scale:
                draw = torch.Generator().manual_seed(seed)
                for parameter in self.policy.adapters.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
        self.best, self.optimizer = -math.inf, None

    def __enter__(self):
        from contextlib import ExitStack

        import torch

        self.stack = ExitStack()
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

    def evaluate(self) -> tuple[float, float]:
        """(mean reward, share that still has the asked colours) of 32 plain ODE samples, from noise that is always the
        same.
        """
        import torch

        x = self.lab.core.method.noise.roots((16, 8, 8), 12345, 0, list(range(32)), 1).to(self.velocity.device)
        rows = torch.arange(32) % len(self.lab.index)
        table = [float(s) for s in self.lab.sigmas]
        for s, n in zip(table, table[1:]):
            x = x + (n - s) * self.velocity(x, s, rows)
        images = self.lab.decode(self.velocity.process_out(x))
        scores = self.lab.shapes.score(images, self.lab.index[rows], self.lab.classifier)
        return float(self.lab.judge(images, rows, self.lab.reward).mean()), float(
            (scores["colour"] * scores["background"]).mean()
        )

    def grow(self, method: Method, start: int):
        """(forest, caption of every leaf) of this iteration; prompts and noise depend on seed and iteration alone."""
        import torch

        core = self.lab.core
        shape = core.method.tree.TreeShape(**method.shape)
        order = torch.randperm(
            len(self.lab.index), generator=core.method.noise.generator(self.seed, "prompts", self.iteration)
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

        core, began = self.lab.core, time.perf_counter()
        shape = core.method.tree.TreeShape(**method.shape)
        objective = core.method.objective.Objective(**{"clip_low": 1e-2, "clip_high": 1e-2, **method.objective})
        with network_passes(self.lab.graph.model.model.diffusion_model) as count:
            forest, rows = self.grow(method, shape.start(self.iteration, STEPS, self.seed))
            rewards, prompts = self.lab.score(self.velocity, forest.leaves, rows), len(forest.prompts)
            leaf, _ = core.method.advantage.leaf_advantages({"reward": rewards}, prompts)
            layers = core.method.advantage.edge_advantages(
                method.estimator, [p.cpu() for p in forest.log_probs], leaf, forest.branching, prompts
            )
            best = rewards.view(prompts, -1).amax(1)
            allowed = best >= self.best
            if gradient_only:
                metrics = core.method.update.policy_gradient(self.velocity, forest, layers, objective, allowed=allowed)
            else:
                self.optimizer = self.optimizer or torch.optim.AdamW(
                    self.velocity.parameters(), lr=method.learning_rate, weight_decay=0.0
                )
                metrics = core.method.update.update(
                    self.velocity,
                    forest,
                    layers,
                    self.optimizer,
                    objective,
                    inner_updates=method.inner,
                    allowed=allowed,
                )
        self.best = float(best.mean()) if self.best == -math.inf else 0.9 * self.best + 0.1 * float(best.mean())
        cost = count.forwards - count.backwards + count.backwards * self.lab.unit
        self.iteration, self.cost, self.seconds = (
            self.iteration + 1,
            self.cost + cost,
            self.seconds + time.perf_counter() - began,
        )
        return {**metrics, "cost": cost, "start": forest.start, "images": len(forest.leaves)}


def train(lab: Lab, method: Method, seed: int, budget: float, evaluations: int = 3) -> dict:
    """Train until `budget` cost units are spent. Lists of cost, seconds, mean reward and share of intact pictures:
    before the training, where a fresh LoRA is the base model whatever the seed, and `evaluations` times on the way.
    """
    with lab.open(seed) as policy:
        lab.untrained = lab.untrained or policy.evaluate()
        rows = [(0.0, 0.0, *lab.untrained)]
        for mark in range(1, evaluations + 1):
            while policy.cost < budget * mark / evaluations - 1e-9:
                policy.learn(method)
            rows.append((policy.cost, policy.seconds, *policy.evaluate()))
        return {
            **dict(zip(("cost", "seconds", "reward", "intact"), map(list, zip(*rows)))),
            "iterations": policy.iteration,
        }
