"""The training loop: N iterations of rollout, scores, credit and update, and what keeps a long run safe.

A host gives the model: `sigmas` [T+1], `session(prompts)` -> a context manager with a velocity model whose conditioning
rows are these prompts, `roots(velocity, noise)` -> latents to start from, `decode(velocity, leaves)` -> images
[B, H, W, 3] in 0..1 on the CPU. ComfyUI's is in nodes/trainer.py, diffusers' in core/hosts/diffusers_models.py.

With several processes (core.method.ranks) each grows, decodes and scores its share of the trees. Scores and
log-probabilities, a number per image and edge, then go to all of them, and every process works out all advantages, the
whole update and all metrics by itself.
"""

import importlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..lora.ema import Ema
from ..method import noise, replay
from ..method.advantage import total_reward
from ..method.iteration import Credit, credit, learn, learned_nothing, sample, score
from ..method.memory import MicroBatch
from ..method.noise import NoiseSchedule
from ..method.objective import Objective
from ..method.ranks import ALONE, Ranks
from ..method.rollout import grow
from ..method.tree import Forest, TreeShape
from ..method.update import NOTHING_TO_RETAIN
from ..pictures.distance import SIDE, diversity, small
from ..references import key_of
from ..rewards.combine import parts, scores
from ..rewards.self_test import doubts
from .evaluation import HeldOut, keep_strip
from .health import Skips, Watch
from .prompts import PromptList, order
from .run import Run, finite

log = logging.getLogger("treerpo")


@dataclass
class Settings:
    """How a run is trained.

    All of it may change when the run goes on; what is part of the adapters themselves is not in here.
    """

    per_iteration: int = 1  # prompts per iteration; 0 = all
    shuffle: bool = True  # prompts in a new order every epoch; off = in turn
    seed: int = 0  # of every noise and of the prompts' order
    new_noise: bool = True  # new noise every iteration
    learning_rate: float = 3e-4  # higher = learns faster, then falls apart
    decay: str = "none"  # of the learning rate: none | cosine (to 0 at the run's last iteration)
    weight_decay: float = 0.0  # pulls the LoRA towards zero; higher = stays closer to the base model
    max_grad_norm: float = 1.0  # 0 = off
    inner_updates: int = 1  # optimizer steps per iteration
    optimizer: str = "adamw"  # adamw | adamw8bit (bitsandbytes)
    estimator: str = "treegrpo"  # see core.method.advantage
    weights: str = "mean-logprob"  # of siblings: mean-logprob | uniform | sum-logprob
    advantage_clip: float = 5.0  # largest advantage of a single image
    shaping: str = "z-score"  # rewards become advantages by their group's z-score | slas (our reading of SLAS)
    gamma: float = 0.5  # slas: advantages grow like distance^(1 + gamma); higher = outliers count more
    only_good: bool = True  # LayerTuning-RL: imitate only a best image as good as the best ones were on average
    micro_batch: int = 0  # latents per model call; 0 = all at once
    retain_share: float = 0.0  # share of the free memory for graphs kept from sampling; 0 = none
    ema: float = 0.0  # decay of the adapters' moving average; 0 = none
    replay: float = 0.0  # weight of imitating the prompts' remembered pictures (core.method.replay); 0 = none
    replay_from: float = 0.0  # reward from which on a picture is good enough to be remembered
    replay_pictures: int = 4  # remembered per prompt, the first ones that were good enough
    save_every: int = 1  # iterations between two saved states
    keep_last: int = 3  # checkpoints kept beside the newest state
    keep_every: int = 20  # iterations between two checkpoints
    evaluate_every: int = 0  # iterations between two evaluations on held-out prompts; 0 = none
    most_skips: int = 5  # iterations in a row in which nothing could be learned, before the run stops
    on_alarm: str = "pause"  # what to do when the health watch speaks: pause | warn | off
    shape: dict = field(default_factory=dict)  # the tree's, the noise's and the objective's settings, for the record
    schedule: dict = field(default_factory=dict)
    objective: dict = field(default_factory=dict)


DECAYS = ("none", "cosine")


def decayed(kind: str, iteration: int, iterations: int) -> float:
    """What the learning rate is multiplied by in this iteration (0 is the first) of so many; 1 where their number is
    not known (0). cosine: from 1 to nearly 0 (Loshchilov & Hutter, arXiv 1608.03983, without restarts).
    """
    if kind not in DECAYS:
        raise ValueError(f"Unknown decay '{kind}' of the learning rate: choose one of {', '.join(DECAYS)}.")
    if kind == "none" or iterations <= 0:
        return 1.0
    return (1 + math.cos(math.pi * min(iteration / iterations, 1.0))) / 2


@dataclass
class Event:
    """What the trainer tells after every iteration, for bars and pictures.

    With several processes, of this one's trees, apart from the row.
    """

    row: dict  # the iteration's metrics
    forest: Forest
    credit: Credit  # who earned what
    images: Tensor  # [P * K, H, W, 3]
    total: Tensor  # [P * K] their rewards
    prompts: list[str]  # one per image
    message: str = ""  # what the health watch says
    note: str = ""  # what else there is to say, such as that the memory ran out


class Trainer:
    """Trains a run's adapters on a host. `step()` is one iteration; `train(n)` goes on until the run has n."""

    def __init__(
        self,
        run: Run,
        host,
        prompts: PromptList,
        shape: TreeShape,
        schedule: NoiseSchedule,
        objective: Objective,
        reward,
        settings: Settings,
        *,
        judge=None,
        images: Callable | None = None,
        check: Callable[[], None] | None = None,
        progress=None,
        ranks: Ranks = ALONE,
    ):
        """judge: a reward that is not trained on. images: velocity -> [P, C, H, W], for the objective's target
        "images". check: called between all pieces of work, may raise to stop. progress(done, total, denoised): model
        forwards of this iteration's rollout. ranks: the job's processes.
        """
        self.run, self.host, self.prompts, self.shape, self.schedule = run, host, prompts, shape, schedule
        self.objective, self.reward, self.settings, self.judge, self.images = objective, reward, settings, judge, images
        self.check, self.progress, self.ranks = check or (lambda: None), progress, ranks
        self.micro_batch = MicroBatch(settings.micro_batch, fixed=ranks.lockstep)
        if settings.retain_share and not objective.on_window:
            raise ValueError(NOTHING_TO_RETAIN)
        refuse_split(ranks, shape, objective, reward, settings, len(prompts.train))
        settings.shape, settings.schedule, settings.objective = asdict(shape), asdict(schedule), asdict(objective)
        self.changes = run.change_settings(asdict(settings))
        run.ema = Ema(run.adapters, settings.ema) if settings.ema else None
        if run.extra.pop("paused", False):  # the user has read why, and goes on: the watch begins anew
            run.extra.pop("watch", None)
        self.watch = Watch.from_dict(run.extra["watch"]) if "watch" in run.extra else Watch()
        self.skips = Skips(**run.extra.get("skips", {}))
        self._base: HeldOut | None = None
        self.doubts = ""  # of the reward models, from their self-tests
        self.iterations = 0  # of the run in all, as far as `train` was told
        decayed(settings.decay, 0, 0)
        if settings.replay < 0 or settings.replay_pictures < 1:
            raise ValueError("Replay needs a strength of 0 or more, and at least 1 picture per prompt to remember.")
        if settings.evaluate_every:
            refuse_unheld(prompts)
        refuse_prompts(reward, prompts.train)
        for scorer in (reward, judge) if settings.evaluate_every else ():
            refuse_prompts(scorer, prompts.held_out)

    def train(
        self,
        iterations: int | Callable[[], int],
        report: Callable[[Event], None] = lambda event: None,
        minutes: float = 0.0,
    ) -> str:
        """Go on until the run has `iterations` in all, or for `minutes` (0 = no limit; at least one iteration); a
        sentence on how it ended. iterations: also a function, asked after each, where the end is not known before.

        The run is saved on every way out, and nobody else can train it meanwhile (Run.training).
        """
        with self.run.training():
            return self._train(iterations if callable(iterations) else lambda: iterations, report, minutes)

    def _train(self, iterations: Callable[[], int], report: Callable[[Event], None], minutes: float) -> str:
        began = time.monotonic()
        self.doubts = doubts(self.reward, self.judge) if self.run.iteration < iterations() else ""
        try:
            if self._due():
                self._assess()
            while self.run.iteration < (total := iterations()):
                self.iterations = total
                event = self.step()
                event.note = " ".join(filter(None, (event.note, self.doubts)))
                report(event)
                if event.message and self.settings.on_alarm == "pause":
                    self.run.extra["paused"] = True
                    self.run.save()
                    how = "Finished early" if self.watch.finished else "Paused"
                    return f"{how} after iteration {self.run.iteration}. {event.message}"
                if self.skips.too_many(self.settings.most_skips):
                    raise RuntimeError(f"{self.skips.sentence()} The run is saved at iteration {self.run.iteration}.")
                if 0 < minutes * 60 <= time.monotonic() - began and self.run.iteration < iterations():
                    return f"{minutes:g} minutes are over, at {self.run.iteration} of {iterations()} iterations."
            return f"{self.run.iteration} iteration{'s' if self.run.iteration > 1 else ''} done."
        finally:
            if self.run.iteration and self.run.unsaved:
                self.run.save()

    def step(self) -> Event:
        """One iteration: sample, score, learn, write down. If it is interrupted the policy is what it was before it."""
        if self.ranks.lockstep:
            self._agree_to_go_on()
        row, event = self._iterate()
        if (settings := self.settings).replay:
            good, most = settings.replay_from, settings.replay_pictures
            keys = [key_of(prompt) for prompt in event.prompts[:: event.forest.leaves_per_prompt]]
            replay.remember(self.run.remembered, event.forest, keys, event.total, good, most)
        with self.ranks.together():
            event.message = self._write(row)
        self.ranks.refuse_drift(self.run.adapters.parameters())
        return event

    def _iterate(self) -> tuple[dict, Event]:
        settings, run, ranks = self.settings, self.run, self.ranks
        began, size, iteration = time.perf_counter(), self.micro_batch.size, run.iteration
        turn = order(len(self.prompts.train), settings.per_iteration, iteration, settings.seed, settings.shuffle)
        chosen = [self.prompts.train[i] for i in turn]
        own = ranks.prompts(len(chosen))
        with self.host.session(chosen, self.micro_batch) as velocity:
            with ranks.together():
                sampled = sample(
                    velocity,
                    lambda drawn: self.host.roots(velocity, drawn),
                    self.host.sigmas,
                    self.shape,
                    self.schedule,
                    iteration=iteration,
                    seed=settings.seed,
                    prompts=own,
                    new_noise=settings.new_noise,
                    micro_batch=self.micro_batch,
                    retain_share=settings.retain_share,
                    progress=self._progress,
                    ranks=ranks,
                )
                forest, sampled_at = sampled.forest, time.perf_counter()
                texts = [chosen[number] for number in own for _ in range(forest.leaves_per_prompt)]
                images = self.host.decode(velocity, forest.leaves)
                decoded_at = time.perf_counter()
                self._check()
                found = score(scores(self.reward, images.nan_to_num(0.0), texts), forest)
                scored_at = time.perf_counter()
            spread = self._diversity(images, len(own), len(chosen))  # before learning: what fails now loses nothing
            earned = credit(
                sampled,
                found,
                estimator=settings.estimator,
                weights=settings.weights,
                clip=settings.advantage_clip,
                shaping=settings.shaping,
                gamma=settings.gamma,
                ranks=ranks,
            )
            goals = self.images(velocity, forest) if self.images is not None else None
            again = None
            if settings.replay:
                most, keys = settings.replay_pictures, [key_of(prompt) for prompt in chosen]
                again = replay.states(
                    run.remembered, keys, self.host.sigmas, settings.replay, most, settings.seed, iteration
                )
            row = learn(
                velocity,
                sampled,
                earned,
                self.optimizer(),
                self.objective,
                only_good=settings.only_good,
                history=run.metrics,
                images=goals,
                replayed=again,
                ema=run.ema,
                micro_batch=self.micro_batch,
                max_grad_norm=settings.max_grad_norm,
                inner_updates=settings.inner_updates,
                check=self._check,
                ranks=ranks,
            )
        self.skips.note(learned_nothing(row, settings.inner_updates))
        now = time.perf_counter()
        row |= {
            "seconds": now - began,
            "seconds/rollout": sampled_at - began,
            "seconds/decode": decoded_at - sampled_at,
            "seconds/reward": scored_at - decoded_at,
            "seconds/update": now - scored_at,
            "diversity": spread,
        }
        event = Event(row, forest, earned, images, total_reward(found.values, found.weights), texts)
        if self.micro_batch.size != size:
            event.note = f"The memory ran out: going on with {self.micro_batch.size} latents at a time."
        return row, event

    def _progress(self, done: int, total: int, denoised: Tensor) -> None:
        self._check()
        if self.progress is not None:
            self.progress(done, total, denoised)

    def _diversity(self, images: Tensor, own: int, prompts: int) -> float:
        """health.diversity over the images of all processes; `own` of the prompts are this one's."""
        ranks = self.ranks
        if ranks.size == 1:
            return diversity(images, prompts)
        if ranks.per_prompt == 1:
            groups = torch.tensor([diversity(group, 1) for group in images.unflatten(0, (own, -1))])
            return float(ranks.join([groups], own)[0].nanmean())
        return diversity(ranks.join([small(images)], own)[0].view(-1, 3, SIDE, SIDE).movedim(1, -1), prompts)

    def _check(self) -> None:
        if not self.ranks.lockstep:  # the others would wait for this process inside a model call
            self.check()

    def _agree_to_go_on(self) -> None:
        """In lockstep the one place to stop: all processes or none."""
        error = None
        try:
            self.check()
        except BaseException as raised:
            error = raised
        if any(self.ranks.gather(error is not None)):
            raise error or KeyboardInterrupt()

    def optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        return self.run.adamw(
            settings.learning_rate * decayed(settings.decay, self.run.iteration, self.iterations),
            weight_decay=settings.weight_decay,
            kind=adamw8bit() if settings.optimizer == "adamw8bit" else torch.optim.AdamW,
        )

    def _write(self, row: dict) -> str:
        """Count the iteration, evaluate if it is time to, save what is due; what the health watch says."""
        run, settings = self.run, self.settings
        self.watch.see(row)
        self._remember()
        run.record(row)  # from here on the update counts, whatever happens to the evaluation
        best = self._assess() if self._due() else False
        keep = settings.keep_last if run.iteration % settings.keep_every == 0 else 0
        if best or keep:
            run.keep(keep, best)  # which saves; a kill between the two is mended when the run is opened
        elif run.iteration % settings.save_every == 0:
            run.save()
        return (self.watch.verdict() or "") if settings.on_alarm != "off" else ""

    def _due(self) -> bool:
        """Whether the newest iteration is to be evaluated and was not yet, which an interrupt may have kept it from."""
        every, rows = self.settings.evaluate_every, self.run.metrics
        return bool(every and rows and self.run.iteration % every == 0 and "eval/reward" not in rows[-1])

    def _assess(self) -> bool:
        """Evaluate the policy and add that to the newest iteration's metrics; whether it is the best so far."""
        run, base, found = self.run, self._baseline(), self.evaluate()
        if run.writes:
            keep_strip(run.folder, 0, base.images)
            keep_strip(run.folder, run.iteration, found.images)
        measured = found.row(base)
        if not self.watch.evaluations:
            self.watch.evaluate(base.evaluation(0, base.row(base)))
        self.watch.evaluate(found.evaluation(run.iteration, measured))
        row = finite(measured)
        judged, best = row.get("eval/judge", row.get("eval/reward", -math.inf)), run.extra.get("best", -math.inf)
        run.extra["best"] = max(judged, best)
        self._remember()
        run.amend({"eval/reward": None, **row})
        return judged > best

    def _remember(self) -> None:
        self.run.extra |= {"watch": self.watch.to_dict(), "skips": self.skips.to_dict()}

    def _baseline(self) -> HeldOut:
        """The base model on the held-out prompts; worked out once per trainer, since it never changes."""
        if self._base is None:
            self._base = self.evaluate(base=True)
        return self._base

    def evaluate(self, base: bool = False) -> HeldOut:
        """The held-out prompts on fixed noise, one image each, by ODE over the whole schedule; with the average where
        there is one.
        """
        texts, sigmas = self.prompts.held_out, self.host.sigmas
        straight, still = TreeShape(branching=1, depth=1, window="fixed"), NoiseSchedule("ode", 0.0)
        seed = noise.seed_for(self.settings.seed, "held out")
        own = self.ranks.turns(len(texts))
        with self.host.session(texts, self.micro_batch) as velocity:
            roots = self.host.roots(velocity, noise.roots(velocity.shape, seed, 0, own, 1))
            average = self.run.ema.applied() if self.run.ema is not None else nullcontext()
            with self.ranks.together():
                with velocity.reference() if base else average:
                    forest = grow(
                        velocity,
                        roots,
                        sigmas,
                        straight,
                        still,
                        start=0,
                        prompts=own,
                        micro_batch=self.micro_batch,
                        progress=lambda *_: self._check(),
                    )
                images = self.host.decode(velocity, forest.leaves)
                self._check()
                asked = [texts[number] for number in own]
                reward = score(scores(self.reward, images.nan_to_num(0.0), asked), forest)
                judge = (
                    score(scores(self.judge, images.nan_to_num(0.0), asked), forest) if self.judge is not None else None
                )
        totals = [total_reward(found.values, found.weights) for found in (reward, judge) if found is not None]
        if self.ranks.size > 1:
            joined = [torch.cat(shares)[: len(texts)] for shares in zip(*self.ranks.gather([small(images), *totals]))]
            images, totals = joined[0].view(-1, 3, SIDE, SIDE).movedim(1, -1), joined[1:]
        return HeldOut(images, totals[0], totals[1] if judge is not None else None)


def refuse_unheld(prompts: PromptList) -> None:
    """Raises ValueError where there is no prompt to evaluate."""
    if not prompts.held_out:
        raise ValueError(
            "Evaluation needs held-out prompts: raise held_out in Prompt List, or set evaluate_every to 0."
        )


def refuse_prompts(reward, prompts: list[str]) -> None:
    """ValueError where a reward cannot score one of the prompts."""
    for model, _ in parts(reward) if reward is not None else ():
        model.refuse(prompts)


def refuse_split(
    ranks: Ranks, shape: TreeShape, objective: Objective, reward, settings: Settings, prompts: int
) -> None:
    """ValueError where the trees cannot be shared out over these processes."""
    ranks.refuse(min(settings.per_iteration or prompts, prompts), shape.trees)
    if ranks.per_prompt > 1 and (objective.sft > 0 or objective.sensitivity > 0):
        raise ValueError(
            "LayerTuning-RL and a clip range with sensitivity compare all images of a prompt with its best one, which "
            "another process may hold: set processes.per_prompt to 1."
        )
    if ranks.size > 1 and settings.replay > 0:
        raise ValueError("Replay remembers the pictures of one process: set settings.replay to 0.")
    grouped = [model.name for model, _ in parts(reward) if model.group_wise]
    if ranks.per_prompt > 1 and grouped:
        raise ValueError(
            f"The reward '{grouped[0]}' compares all images of a prompt with each other: set processes.per_prompt to 1."
        )
    if ranks.lockstep and settings.retain_share:
        raise ValueError("A sharded model (FSDP) cannot keep graphs from sampling: set settings.retain_share to 0.")


def adamw8bit():
    """bitsandbytes' AdamW with moments of 8 bits."""
    try:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The optimizer adamw8bit needs the package bitsandbytes, which cannot be used here ({error}): pip install "
            "bitsandbytes, or choose adamw."
        ) from error
