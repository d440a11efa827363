"""The loss of the trees' edges: clipped GRPO and its variants, KL, and LayerTuning-RL's supervised term."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .steps import Step
from .tree import Forest

RATIOS = ("plain", "guard")
STEP_WEIGHTS = ("none", "tau", "guard")
TARGETS = ("best-path", "best-leaf", "images")


@dataclass
class Objective:
    """Which loss. Clip ranges are in units of the mean log-probability per latent element (docs/method.md)."""

    clip_low: float = 1e-4  # the ratio may fall to 1 - clip_low before a negative-advantage edge stops pulling
    clip_high: float = 1e-4  # ... and rise to 1 + clip_high before a positive-advantage edge stops
    sensitivity: float = 0.0  # eta: how much an edge's reward widens its own clip range; 0 = fixed ranges (our reading)
    ratio: str = "plain"  # plain | guard: GRPO-Guard's normalised ratio
    step_weight: str = "none"  # none | tau (TempFlow-GRPO) | guard (1/-dt); scaled to mean 1 over the window
    kl: float = 0.0  # coefficient of the KL divergence from the base model
    sft: float = 0.0  # lambda of LayerTuning-RL; 0 = plain GRPO
    target: str = "best-path"  # LayerTuning-RL's target: best-path | best-leaf | images

    def __post_init__(self):
        for name, value, options in (
            ("ratio", self.ratio, RATIOS),
            ("step weight", self.step_weight, STEP_WEIGHTS),
            ("target", self.target, TARGETS),
        ):
            if value not in options:
                raise ValueError(f"Unknown {name} '{value}': choose one of {', '.join(options)}.")


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip_low, clip_high) -> tuple[Tensor, Tensor, Tensor]:
    """-min(r A, clip(r, 1-clip_low, 1+clip_high) A) per edge [E], the ratios r [E], and which edges were clipped [E].

    clip_low, clip_high: numbers, or one per edge [E].
    """
    ratio = torch.exp(log_ratio)
    plain = ratio * advantage
    clipped = (
        torch.clamp(ratio, 1 - torch.as_tensor(clip_low).to(ratio), 1 + torch.as_tensor(clip_high).to(ratio))
        * advantage
    )
    return -torch.minimum(plain, clipped), ratio.detach(), (clipped < plain).detach()


def log_ratio(kind: str, new: Step, old_log_prob: Tensor, old_mean: Tensor | None) -> Tensor:
    """log r per edge [E]. old_mean: the sampling policy's means, which only `guard` needs.

    guard is GRPO-Guard's: (logp_new - logp_old + mean(dmu^2) / (2 tau^2)) tau, which equals mean(z dmu) and so has mean
    0 whatever tau is. Means are over the elements of a sample, never over the batch.
    """
    plain = new.log_prob - old_log_prob
    if kind == "plain":
        return plain
    return (plain + gaussian_kl(new.mean, old_mean, new.std)) * new.std.flatten()


def gaussian_kl(mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """mean((mu - mu')^2) / (2 tau^2) per sample: the KL of two Gaussians of one std, per latent element. 0 where tau is
    0.
    """
    std = std.flatten()
    squared = ((mean - other) ** 2).flatten(1).mean(1)
    return torch.where(std > 0, squared / (2 * torch.where(std > 0, std, 1.0) ** 2), 0.0)


def step_weights(kind: str, forest: Forest, stds: list[float]) -> list[float]:
    """Weight of each window layer, mean 1. tau: TempFlow-GRPO (arXiv 2508.04324). guard: 1/-dt (GRPO-Guard).

    The published code does not scale to mean 1; we do, so that the learning rate keeps its meaning.
    """
    if kind == "none":
        return [1.0] * forest.depth
    if kind == "tau":
        raw = stds
    else:
        raw = [1 / (forest.sigma(k)[0] - forest.sigma(k)[1]) for k in range(forest.depth)]
    scale = sum(raw) / len(raw)
    return [value / scale for value in raw] if scale > 0 else [1.0] * forest.depth


def node_values(leaf: Tensor, forest: Forest) -> list[Tensor]:
    """Mean leaf value below every node, layers 0 (roots) to depth (leaves): [P * trees * branching^k]."""
    return [leaf.view(-1, forest.branching ** (forest.depth - k)).mean(1) for k in range(forest.depth + 1)]


def relative(values: list[Tensor], forest: Forest) -> list[Tensor]:
    """Node values as 0 .. 1 between the worst and the best leaf of their prompt; 0.5 in groups without spread."""
    prompts = len(forest.prompts)
    leaves = values[-1].view(prompts, -1)
    low, high = leaves.amin(1, keepdim=True), leaves.amax(1, keepdim=True)
    spread = high - low
    return [
        torch.where(spread > 0, (v.view(prompts, -1) - low) / spread.clamp_min(1e-12), 0.5).flatten() for v in values
    ]


def clip_ranges(objective: Objective, share: Tensor) -> tuple[Tensor, Tensor]:
    """Reward-conditioned clip range per edge (Dynamic-TreeRPO; this form is our reading, the paper's is not public).

    share: the edge's subtree reward as 0 .. 1 within its prompt. Better edges may rise further, worse ones fall
    further.
    """
    eta = objective.sensitivity
    return objective.clip_low * (1 + eta * (1 - share)), objective.clip_high * (1 + eta * share)


def best_leaves(leaf: Tensor, forest: Forest) -> Tensor:
    """Row of the best leaf of every prompt: [P]."""
    per_prompt = leaf.view(len(forest.prompts), -1)
    return per_prompt.argmax(1) + torch.arange(len(forest.prompts)) * per_prompt.shape[1]


def sft_targets(objective: Objective, forest: Forest, leaf: Tensor, layer: int, images: Tensor | None = None) -> Tensor:
    """Target velocity of every node of a window layer, [P * trees * branching^layer, C, H, W], without gradient.

    best-path (Dynamic-TreeRPO, V_t*): the sampling policy's velocity at the same step on the path to the prompt's best
    leaf. best-leaf (ours): (x_j - x0*) / sigma, the flow-matching target that leads from *this* state to the best leaf
    x0*.
    images: the same with the user's own latents [P, C, H, W] as x0*.
    """
    per_prompt = len(forest.states[layer]) // len(forest.prompts)
    best = best_leaves(leaf, forest)
    if objective.target == "best-path":
        on_path = best // forest.branching ** (forest.depth - layer)
        target = forest.velocities[layer][on_path.to(forest.velocities[layer].device)]
        return target.repeat_interleave(per_prompt, 0)
    if objective.target == "best-leaf":
        goal = forest.leaves[best.to(forest.leaves.device)]
    elif images is None:
        raise ValueError(
            "The target is set to 'images', but no images are connected: connect a LATENT, or choose best-path or "
            "best-leaf."
        )
    else:
        goal = images.to(forest.leaves)
    return (forest.states[layer] - goal.repeat_interleave(per_prompt, 0)) / forest.sigma(layer)[0]


def sft_weights(share: Tensor, allowed: Tensor) -> Tensor:
    """w_j = (R_max - R_j) / (R_max - R_min) per node: the worse a node did, the more it learns from the best.

    share: node values as 0 .. 1 [P * n]. allowed: prompts whose best leaf is good enough to be imitated [P].
    """
    weights = (1 - share).view(len(allowed), -1)
    return (weights * allowed[:, None]).flatten()
