"""The loss on the trees: of the edges (GRPO, Flow-DPPO, Softmax-TB), tree regression of the nodes, KL, and
LayerTuning-RL's supervised term.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .steps import Step
from .tree import Forest

LOSSES = ("grpo", "dppo", "softmax_tb", "regression", "nft", "awm")
MATCHING = ("regression", "nft", "awm")  # losses that need a state and an image, and no step's probability
STATES = ("auto", "window", "renoised", "both")
WEIGHTINGS = ("ghuber", "uniform", "t")
RATIOS = ("plain", "guard")
STEP_WEIGHTS = ("none", "layer", "tau", "guard", "flash")
LEAF_WEIGHTS = ("group", "node")
TARGETS = ("best-path", "best-leaf", "images")
TRUST = {"dppo": 1e-5, "softmax_tb": 0.2, "awm": 1.0}  # as published; of objective.trust
BETA = {"softmax_tb": 15.0, "nft": 1.0}  # as published; of objective.beta


@dataclass
class Objective:
    """Which loss. Clip ranges are in units of the mean log-probability per latent element (docs/method.md)."""

    clip_low: float = 1e-4  # the ratio may fall to 1 - clip_low before a negative-advantage edge stops pulling
    clip_high: float = 1e-4  # ... and rise to 1 + clip_high before a positive-advantage edge stops
    sensitivity: float = 0.0  # eta: how much an edge's reward widens its own clip range; 0 = fixed ranges (our reading)
    ratio: str = "plain"  # plain | guard: GRPO-Guard's normalised ratio
    step_weight: str = "none"  # none | layer | tau | guard | flash: see step_weights
    kl: float = 0.0  # coefficient of the KL divergence from the base model
    sft: float = 0.0  # lambda of LayerTuning-RL; 0 = plain GRPO
    target: str = "best-path"  # LayerTuning-RL's target: best-path | best-leaf | images
    loss: str = "grpo"  # grpo | dppo | softmax_tb | regression | nft | awm: see the functions of these names
    eta: float = 1.0  # regression: how far one update aims from the old velocity, in leaves of advantage 1
    anchor: float = 0.0  # regression: share of the base model's velocity in what is aimed from; 0 = only the old one's
    leaf_weights: str = "group"  # regression: a leaf's advantage, or that less the mean of the leaves of its node
    trust: float = 0.0  # dppo: KL that an edge may reach; softmax_tb, awm: clip range of the ratio; 0 = as published
    beta: float = 0.0  # softmax_tb: how sharply better leaves are preferred; nft: guidance strength; 0 = as published
    reference: float = 0.1  # softmax_tb: coefficient of what holds log-probabilities to the sampling policy's

    states: str = "auto"  # regression, nft, awm: window nodes | renoised images | both; auto = renoised for nft and awm
    per_image: int = 1  # renoised: states of every image, each a forward and backward
    weighting: str = "ghuber"  # awm: ghuber (its published runs) | uniform | t: see awm_log_prob

    def __post_init__(self):
        if not 0 <= self.anchor <= 1:
            raise ValueError(f"The anchor is a share between 0 and 1, not {self.anchor:g}.")
        for name, value, options in (
            ("loss", self.loss, LOSSES),
            ("leaf weights", self.leaf_weights, LEAF_WEIGHTS),
            ("ratio", self.ratio, RATIOS),
            ("step weight", self.step_weight, STEP_WEIGHTS),
            ("target", self.target, TARGETS),
            ("states", self.states, STATES),
            ("weighting", self.weighting, WEIGHTINGS),
        ):
            if value not in options:
                raise ValueError(f"Unknown {name} '{value}': choose one of {', '.join(options)}.")
        if self.per_image < 1:
            raise ValueError(f"Every image needs at least 1 noisy state, not {self.per_image}.")
        if self.on_renoised and self.loss not in MATCHING:
            raise ValueError(
                f"The loss '{self.loss}' needs a tree's branches, which re-noised images do not have: set states to "
                f"window, or choose one of {', '.join(MATCHING)}."
            )
        if self.sft > 0 and not self.on_window:
            raise ValueError(
                "LayerTuning-RL's term needs the tree's nodes, and re-noised images are none: set states to window or "
                "both."
            )

    @property
    def on_renoised(self) -> bool:
        """Whether finished images with fresh noise are learned from."""
        return self.states in ("renoised", "both") or (self.states == "auto" and self.loss in ("nft", "awm"))

    @property
    def on_window(self) -> bool:
        """Whether the window's nodes are learned from."""
        return self.states == "both" or not self.on_renoised

    @property
    def trust_range(self) -> float:
        return self.trust or TRUST[self.loss]

    @property
    def sharpness(self) -> float:
        return self.beta or BETA[self.loss]

    @property
    def needs_reference(self) -> bool:
        """Whether every state costs one more forward, of the base model."""
        return self.kl > 0 or (self.loss == "regression" and self.anchor > 0)


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


def dppo(log_ratio: Tensor, advantage: Tensor, kl: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Flow-DPPO (UniRL's public code, flowdppo.py): -r A per edge [E], but 0 where the policy has already moved further
    than `threshold` and the edge would take it further still; the ratios r [E], and which edges were dropped [E].

    kl: of the step from the sampling policy's, per latent element [E].
    """
    ratio = torch.exp(log_ratio)
    dropped = ((kl >= threshold) & ((ratio - 1) * advantage > 0)).detach()
    return torch.where(dropped, 0.0, -ratio * advantage), ratio.detach(), dropped


def log_masses(values: Tensor, forest: Forest) -> list[Tensor]:
    """log of the sum of e^value over the leaves below every node, layers 0 (roots) to depth (leaves):
    [P * trees * branching^k].
    """
    return [
        torch.logsumexp(values.view(-1, forest.branching ** (forest.depth - k)), 1) for k in range(forest.depth + 1)
    ]


def path_log_probs(log_probs: list[Tensor], branching: int) -> Tensor:
    """log-probability of every leaf's path from its root, the sum over its edges: [P * K]."""
    path = torch.zeros_like(log_probs[0][::branching])
    for layer in log_probs:
        path = path.repeat_interleave(branching) + layer
    return path


def softmax_tb_shares(objective: Objective, forest: Forest, leaf: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Softmax-TB of every edge, per layer: the log of its share of its parent's e^(beta R), and the log of the
    probability, under the sampling policy, of all paths on from it, each [P * trees * branching^(k+1)].

    TMPO's residual of a path, log_softmax(beta R) - log_softmax(log p) over a tree's leaves, is the sum over its edges
    of what `softmax_tb_advantage` makes of the two (docs/method_learning.md). leaf: R of every leaf [P * K], which in
    TMPO's code are z-scores too.
    """
    b, mass = forest.branching, log_masses(objective.sharpness * leaf, forest)
    paths = path_log_probs([p.cpu().to(leaf) for p in forest.log_probs], b)
    reached, onward = log_masses(paths, forest), []
    so_far = torch.zeros_like(reached[0])
    for k, log_probs in enumerate(forest.log_probs):
        so_far = so_far.repeat_interleave(b) + log_probs.cpu().to(leaf)
        onward.append(reached[k + 1] - so_far)
    return [below - above.repeat_interleave(b) for above, below in zip(mass, mass[1:])], onward


def softmax_tb_advantage(log_prob: Tensor, share: Tensor, onward: Tensor, branching: int) -> Tensor:
    """An edge's share of TMPO's residual [E], without gradient: log-share of its parent's e^(beta R), less log-share of
    the probability of its siblings' paths. log_prob: of the policy that learns [E].
    """
    siblings = (log_prob + onward).detach().view(-1, branching)
    return share - torch.log_softmax(siblings, 1).flatten()


def softmax_tb(
    log_ratio: Tensor, advantage: Tensor, branching: int, clip: float, reference: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax-TB (TMPO): the clipped surrogate with the ratio exp(d - mean d), d = log r and the mean over siblings,
    plus reference d^2; per edge [E], the ratios r [E], and which edges were clipped [E].

    TMPO takes sums over a path where this takes edges: the same on a tree of one layer. Its reference is meant to be
    the base model; its public code takes the sampling policy, and so does this. That code also stops the mean's
    gradient, and so has no baseline against advantages that are all negative: not so here, where it cost two thirds of
    the signal-to-noise.
    """
    siblings = log_ratio.view(-1, branching)
    loss, _, clipped = clipped_surrogate((siblings - siblings.mean(1, keepdim=True)).flatten(), advantage, clip, clip)
    return loss + reference * log_ratio**2, torch.exp(log_ratio.detach()), clipped


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
    """Weight of each window layer, mean 1. tau: TempFlow-GRPO (arXiv 2508.04324). guard: 1/-dt (GRPO-Guard). flash:
    sqrt(-dt)/tau + tau sqrt(-dt) (1 - sigma) / (2 sigma) (Flash-GRPO's public code).

    The published code of tau and guard does not scale to mean 1; we do, so that the learning rate keeps its meaning.
    layer (ours): every layer counts as much as every other, as its edges' mean; a mean over all edges weighs a layer by
    its number of edges, which on a tree is branching times that of the layer above.
    """
    if kind == "none":
        return [1.0] * forest.depth
    if kind == "layer":
        counts = [forest.branching**k for k in range(forest.depth)]
        return [sum(counts) / (forest.depth * count) for count in counts]
    steps = [forest.sigma(k) for k in range(forest.depth)]
    if kind == "tau":
        raw = stds
    elif kind == "guard":
        raw = [1 / (sigma - below) for sigma, below in steps]
    elif any(std <= 0 for std in stds):
        raw = [0.0]  # no noise, no weight that means anything: all alike
    else:
        raw = [
            (sigma - below) ** 0.5 * (1 / std + std * (1 - sigma) / (2 * sigma))
            for (sigma, below), std in zip(steps, stds)
        ]
    scale = sum(raw) / len(raw)
    return [value / scale for value in raw] if scale > 0 else [1.0] * forest.depth


def regression_targets(
    objective: Objective, forest: Forest, leaf: Tensor, layer: int, parents: slice, reference: Tensor | None = None
) -> Tensor:
    """Tree regression's goal for the velocity of these nodes, [n, C, H, W], without gradient (ours,
    docs/method_learning.md):

        v* = anchor + eta * mean over the node's leaves of a_l (u_l - v_old),   u_l = (x_j - x0_l) / sigma_j

    u_l leads from the node's noisy state x_j straight to the leaf l, so that one forward of the node serves all its
    leaves, and no log-probability is needed. anchor = v_old is DiffusionNFT (arXiv 2509.16117) on the tree's own
    states, without its adaptive weight; anchor = the base model's velocity is RAM's (arXiv 2605.10759, inferred from
    its summary); `objective.anchor` mixes the two. leaf: a_l of every leaf [P * K]. reference: the base model's
    velocities [n, C, H, W].
    """
    x, v_old = forest.states[layer][parents], forest.velocities[layer][parents]
    rows = forest.leaves_below(layer, parents)
    weight = leaf[rows].view(len(x), -1).to(x)
    if objective.leaf_weights == "node":
        weight = weight - weight.mean(1, keepdim=True)
    mean = weight.mean(1).view(-1, *[1] * (x.dim() - 1))
    goal = torch.einsum("nk,nk...->n...", weight, forest.leaves[rows].unflatten(0, weight.shape)) / weight.shape[1]
    return aim(objective, v_old, (mean * x - goal) / forest.sigma(layer)[0] - mean * v_old, reference)


def aim(objective: Objective, v_old: Tensor, pull: Tensor, reference: Tensor | None) -> Tensor:
    """v_old + eta pull, moved towards the base model's velocity by `anchor`: each [n, C, H, W]."""
    target = v_old + objective.eta * pull
    return target if reference is None else target + objective.anchor * (reference - v_old)


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
