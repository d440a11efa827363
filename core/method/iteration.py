"""One iteration of the method, the only one there is: sample -> score -> credit -> learn.

The Trainer calls the four in a row; in a graph each is a node (Tree Sampler, Tree Advantages, and the update nodes; the
scores come from the reward nodes between). TreeGRPO (arXiv 2512.08153), with Dynamic-TreeRPO's options (2509.23352).

With several processes (`ranks`) each samples and scores its share of the trees. Scores and log-probabilities, a number
per image and edge, then go to all of them in `credit`, and every process learns the same from the same numbers.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model import Velocity
from . import noise
from .advantage import Scores, edge_advantages, leaf_advantages, total_reward
from .matching import renoise
from .memory import MicroBatch
from .noise import NoiseSchedule
from .objective import Objective
from .ranks import ALONE, Ranks
from .rollout import Progress, grow
from .signal import OVER, snr
from .tree import Forest, TreeShape, sound
from .update import update


@dataclass
class Sampled:
    """This process's trees of an iteration, and what their update has to know."""

    forest: Forest
    trees: int  # per prompt, those of other processes included
    forwards: int  # latents through the network, twice with CFG
    fingerprint: int | None  # of the weights that retained graphs belong to; None = none were kept
    seed: int = 0  # of every noise of the iteration
    first_tree: int = 0  # number of the first of a prompt's trees, where other processes have the others


@dataclass
class Credit:
    """Who earned what.

    Prompts that cannot be learned from (a NaN latent, no score at all) are left out of all but `kept`.
    """

    kept: Tensor  # [P] which prompts of the iteration are learned from, of all processes
    own: Tensor  # [P_own] the same of this process's prompts
    layers: list[Tensor]  # advantages per layer, of this process's edges: [kept * trees * branching^(layer+1)]
    flat: Tensor  # [kept] groups whose images are all alike to every reward
    best: Tensor  # [kept] the best total reward of each prompt; -inf where none is whole
    rewards: dict[str, float]  # reward metrics of all prompts

    def edges(self, forest: Forest) -> list[Tensor]:
        """Advantages of all edges of this process's forest, [P_own * trees * branching^(layer+1)]: 0 where a prompt is
        left out.
        """
        if self.own.all():
            return self.layers
        every = [torch.zeros(len(self.own), layer.numel() // len(self.own)) for layer in forest.log_probs]
        for whole, layer in zip(every, self.layers):
            whole[self.own] = layer.view(int(self.own.sum()), -1).to(whole)
        return [whole.flatten() for whole in every]


def sample(
    velocity: Velocity,
    roots: Callable[[Tensor], Tensor],
    sigmas: Tensor,
    shape: TreeShape,
    schedule: NoiseSchedule,
    *,
    iteration: int,
    seed: int,
    prompts: list[int],
    new_noise: bool = True,
    micro_batch: MicroBatch | None = None,
    retain_share: float = 0.0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Sampled:
    """Grow this process's trees.

    roots: noise [B, C, H, W] -> latents at sigmas[0]. iteration: of the run; places the window and, with new_noise,
    seeds the noise. prompts: rows of the velocity's conditioning, which are also the prompts' numbers within the
    iteration.
    retain_share: of the free memory, for graphs that the first update then need not compute; 0 = none.
    """
    start = shape.start(iteration, len(sigmas) - 1, seed)
    drawn_for = iteration if new_noise else 0
    own = ranks.trees(shape.trees)
    drawn = noise.roots(velocity.shape, seed, drawn_for, prompts, shape.trees)
    forest = grow(
        velocity,
        roots(drawn.unflatten(0, (len(prompts), -1))[:, own.start : own.stop].flatten(0, 1)),
        sigmas,
        replace(shape, trees=len(own)),
        schedule,
        start=start,
        prompts=prompts,
        seed=seed,
        iteration=drawn_for,
        first_tree=own.start,
        micro_batch=micro_batch,
        retain=retain_share * velocity.free_memory() if retain_share else 0,
        progress=progress,
    )
    fingerprint = velocity.fingerprint() if forest.graphs else None
    return Sampled(forest, shape.trees, velocity.forwards, fingerprint, seed, own.start)


def score(found: Scores, forest: Forest) -> Scores:
    """The scores of the leaves' images, as rewards gave them: NaN for leaves whose latent is not sound."""
    broken = ~sound(forest.leaves)
    if not broken.any():
        return found
    return replace(found, values={name: torch.where(broken, torch.nan, given) for name, given in found.values.items()})


def credit(
    sampled: Sampled,
    found: Scores,
    *,
    estimator: str = "treegrpo",
    weights: str = "mean-logprob",
    clip: float = 5.0,
    shaping: str = "z-score",
    gamma: float = 0.5,
    ranks: Ranks = ALONE,
) -> Credit:
    """Advantages of every edge. estimator, weights, shaping, gamma: see method.advantage. clip: largest advantage of a
    single image.
    """
    forest = sampled.forest
    found, log_probs, broken = _of_all(forest, found, ranks)
    prompts, kept = len(broken), ~broken
    rewards = reward_metrics(found.values, total_reward(found.values, found.weights), prompts)
    own = kept[torch.tensor(forest.prompts)]
    if broken.all():
        nothing = torch.zeros(0)
        return Credit(kept, own, [], nothing, nothing, rewards)
    if broken.any():
        found = replace(found, values={name: _rows(given, kept) for name, given in found.values.items()})
        log_probs = [_rows(p, kept) for p in log_probs]
    left = int(kept.sum())
    leaf, flat = leaf_advantages(found.values, left, found.weights, clip, found.raw, shaping, gamma)
    layers = edge_advantages(estimator, log_probs, leaf, forest.branching, left, weights, forest.leaves[0].numel())
    best = best_rewards(total_reward(found.values, found.weights), left)
    if ranks.size > 1:
        rows = ranks.rows(kept, forest.prompts)
        layers = [ranks.part(layer, rows, left, sampled.trees) for layer in layers]
    return Credit(kept, own, layers, flat, best, rewards)


def learn(
    velocity: Velocity,
    sampled: Sampled,
    credit: Credit,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    *,
    only_good: bool = False,
    history: list[dict] = (),
    images: Tensor | None = None,
    ranks: Ranks = ALONE,
    **options,
) -> dict[str, float]:
    """One update of the policy; the iteration's metrics, timings apart. Whatever ends it early leaves the policy as it
    was.

    only_good: LayerTuning-RL imitates a prompt's best image only if it is as good as the best ones were on average over
    `history`, the rows of the iterations before. images: [P_own, C, H, W], for the objective's target "images".
    options: as method.update.update.
    """
    row = {
        **credit.rewards,
        "window_start": sampled.forest.start,
        "rollout_forwards": int(ranks.total(sampled.forwards)),
        "skipped_groups": int((~credit.kept).sum()),
        "learning_rate": optimizer.param_groups[0]["lr"],
    }
    if not credit.kept.any():
        row |= {"frac_reward_zero_std": 1.0, "skipped": 0, "update_forwards": 0, "forwards": row["rollout_forwards"]}
        return row
    forest = sampled.forest
    if not credit.own.all():
        forest = forest.only(credit.own)
        images = images[credit.own.to(images.device)] if images is not None else None
    # the weights have moved or learned since: recompute
    if forest.graphs and velocity.fingerprint() != sampled.fingerprint:
        forest.graphs.clear()
    allowed = credit.best >= running_best(history) if only_good else None
    if allowed is not None and ranks.size > 1:
        allowed = allowed[ranks.rows(credit.kept, sampled.forest.prompts)]
    states = None
    if objective.on_renoised and forest.prompts:
        states = renoise(forest, objective.per_image, sampled.seed, sampled.first_tree)
    metrics = update(
        velocity,
        forest,
        credit.layers,
        optimizer,
        objective,
        images=images,
        allowed=allowed,
        renoised=states,
        ranks=ranks,
        **options,
    )
    row |= {
        "frac_reward_zero_std": float(credit.flat.float().mean()),
        **metrics,
        "reward_best": float(credit.best[credit.best.isfinite()].mean()),
    }
    if math.isfinite(ratio := snr([*history[-OVER:], row])):
        row["gradient_snr"] = ratio
    return {**row, "forwards": row["rollout_forwards"] + row["update_forwards"]}


def learned_nothing(row: dict, inner_updates: int) -> bool:
    """Whether an iteration's row says that the policy is what it was, because nothing was finite."""
    return "loss" not in row or row["skipped"] == inner_updates


def _of_all(forest: Forest, found: Scores, ranks: Ranks) -> tuple[Scores, list[Tensor], Tensor]:
    """Scores [P * K], log-probabilities [P * edges] per layer, and which prompts cannot be learned from [P], of all
    processes.
    """
    log_probs, broken = [p.cpu() for p in forest.log_probs], broken_latents(forest)
    if ranks.size > 1:
        names = list(found.values)
        *joined, broken = ranks.join([*found.values.values(), *log_probs, broken], len(forest.prompts))
        found, log_probs = replace(found, values=dict(zip(names, joined))), joined[len(names) :]
        broken = broken.view(-1, ranks.per_prompt).any(1)
    return found, log_probs, broken | unscored(found, len(broken))


def _rows(values: Tensor, kept: Tensor) -> Tensor:
    """The rows [P * n] of the prompts that are kept [P]."""
    return values.view(len(kept), -1)[kept].flatten()


def broken_latents(forest: Forest) -> Tensor:
    """Prompts with a latent that is not sound, or a velocity that is not finite [P]."""
    prompts = len(forest.prompts)
    broken = torch.zeros(prompts, dtype=torch.bool)
    for layer in (*forest.states, forest.leaves):
        broken |= ~sound(layer).view(prompts, -1).all(1)
    for layer in forest.velocities:
        broken |= ~layer.reshape(prompts, -1).isfinite().all(1).cpu()
    return broken


def unscored(found: Scores, prompts: int) -> Tensor:
    """Prompts for which a reward has not a single finite score [P]."""
    without = torch.zeros(prompts, dtype=torch.bool)
    for values in found.values.values():
        without |= ~values.view(prompts, -1).isfinite().any(1)
    return without


def reward_metrics(values: dict[str, Tensor], total: Tensor, prompts: int) -> dict[str, float]:
    """Mean and within-group spread of the rewards of an iteration; images without a score do not count."""
    group = total.view(prompts, -1)
    spread = (group - group.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
    row = {"reward": float(group.nanmean()), "reward_std": float(spread.nanmean())}
    if len(values) > 1:
        row["rewards/opposed"] = lowest_correlation(values, prompts)
    return row | {f"rewards/{name}/mean": float(found.nanmean()) for name, found in values.items()}


def lowest_correlation(values: dict[str, Tensor], prompts: int) -> float:
    """Of any two rewards [B] each, the lowest correlation among the images of a prompt, all prompts together; NaN where
    none has two scores that differ.
    """
    lowest = math.nan
    for pair in itertools.combinations(values.values(), 2):
        groups = torch.stack([found.double().view(prompts, -1) for found in pair])
        groups = torch.where(groups.isfinite().all(0), groups, torch.nan)
        first, second = (groups - groups.nanmean(2, keepdim=True)).nan_to_num().flatten(1)
        found = float((first @ second) / (first.norm() * second.norm()))
        lowest = found if math.isnan(lowest) else min(lowest, found)
    return lowest


def best_rewards(total: Tensor, prompts: int) -> Tensor:
    """The best reward of each prompt [P]; -inf where none has a score."""
    return total.nan_to_num(-math.inf).view(prompts, -1).amax(1)


def running_best(metrics: list[dict], decay: float = 0.9) -> float:
    """Running mean of `reward_best` over the iterations so far; -inf before the first."""
    mean = -math.inf
    for row in metrics:
        if math.isfinite(best := row.get("reward_best", math.nan)):
            mean = best if mean == -math.inf else decay * mean + (1 - decay) * best
    return mean
