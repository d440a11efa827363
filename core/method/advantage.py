"""From leaf rewards to edge advantages: group normalisation and backup through the tree."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

ESTIMATORS = ("treegrpo", "branchgrpo", "trajectory")
WEIGHTS = ("mean-logprob", "uniform", "sum-logprob")
SHAPINGS = ("z-score", "slas")


def check_rewards(rewards: dict[str, Tensor], prompts: int) -> None:
    """Refuse what cannot be normalised: no reward, a group of one, no finite score at all."""
    if not rewards:
        raise ValueError("There is no reward: connect Score Images to Tree Advantages.")
    for name, values in rewards.items():
        group = len(values) // prompts
        if group * prompts != len(values):
            raise ValueError(
                f"Reward '{name}' has {len(values)} scores for {prompts} prompts: it must score every leaf once."
            )
        if group < 2:
            raise ValueError(
                "A group of one leaf has no advantage: raise branching, depth or trees in Tree Shape so that each "
                "prompt has at least 2 leaves."
            )
        if not torch.isfinite(values).any():
            raise ValueError(
                f"Reward '{name}' is not a number for any of the {len(values)} images: check the reward model; nothing "
                "was trained."
            )


def total_reward(rewards: dict[str, Tensor], weights: dict[str, float] | None = None) -> Tensor:
    """The weighted sum of raw scores, [B]; NaN where any of them is missing."""
    total = sum((weights or {}).get(name, 1.0) * values.float() for name, values in rewards.items())
    return torch.where(torch.isfinite(total), total, torch.nan)


def leaf_advantages(
    rewards: dict[str, Tensor],
    prompts: int,
    weights: dict[str, float] | None = None,
    clip: float = 5.0,
    raw: bool = False,
    shaping: str = "z-score",
    gamma: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """A(leaf) = sum_m w_m (R_m - mean_m) / (std_m + 1e-8), per prompt group and reward model (TreeGRPO, arXiv
    2512.08153); with shaping "slas" the terms are those of `super_linear`.

    rewards: scores [P * K] by reward name, leaves in forest order. weights: by name, default 1. raw: sum the weighted
    scores first and normalise the sum (flow_grpo), so that the reward with the larger numbers counts more. gamma: of
    super_linear.
    A score that is not finite is masked: it counts for nothing, neither in its group's mean nor as an advantage.
    Returns the advantages [P * K], clipped to +-clip, and which groups have zero spread in every reward [P].
    """
    check_rewards(rewards, prompts)
    if shaping not in SHAPINGS:
        raise ValueError(f"Unknown shaping '{shaping}': choose one of {', '.join(SHAPINGS)}.")
    if raw:
        rewards, weights = {"sum": total_reward(rewards, weights)}, None
    total, flat = 0.0, True
    for name, values in rewards.items():
        group = values.float().view(prompts, -1)
        z, constant = group_z(group) if shaping == "z-score" else super_linear(group, gamma)
        total = total + (weights or {}).get(name, 1.0) * z
        flat = constant & flat
    return total.clamp(-clip, clip).flatten(), flat


def centred(group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances from each row's mean over its finite entries, 0 elsewhere [P, K]; the rows' population std [P, 1]; and
    which rows have no spread [P, 1].
    """
    known = torch.isfinite(group)
    count = known.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(known, group, 0.0).sum(1, keepdim=True) / count
    distance = torch.where(known, group - mean, 0.0)
    std = (distance.square().sum(1, keepdim=True) / count).sqrt()
    # A spread of the size of a rounding error is no spread: dividing by it would train on noise.
    return distance, std, std <= 1e-6 * torch.where(known, group.abs(), 0.0).amax(1, keepdim=True)


def group_z(group: Tensor) -> tuple[Tensor, Tensor]:
    """z-scores [P, K] of each row over its finite entries, 0 elsewhere, and which rows have no spread [P]."""
    distance, std, constant = centred(group)
    return torch.where(constant, 0.0, distance / (std + 1e-8)), constant[:, 0]


def super_linear(group: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """SLAS (arXiv 2605.10937): sign(D) |D|^(1 + gamma), D the distance from the row's mean, all divided by their std
    over the whole batch, so that prompts with more spread count more; [P, K], and which rows have no spread [P].

    Inferred from the paper's abstract and a summary: the power law and the division by the batch's std; gamma's value
    is not known to us. Entries that are not finite are 0 and do not count in the std.
    """
    if gamma < 0:
        raise ValueError(f"The power gamma must be 0 or more, not {gamma:g}: 0 = linear in the distance.")
    distance, _, constant = centred(group)
    shaped = torch.where(constant, 0.0, distance.sign() * distance.abs() ** (1 + gamma))
    known = shaped[torch.isfinite(group)]
    return shaped / (known.std(correction=0) + 1e-8), constant[:, 0]


def backup(
    edge_log_probs: list[Tensor],
    leaf_advantages: Tensor,
    branching: int,
    weights: str = "mean-logprob",
    elements: int = 1,
) -> list[Tensor]:
    """Edge advantages per window layer, root side first: A(parent edge) = sum_c p_c A_c (TreeGRPO).

    edge_log_probs: one tensor per layer, [n * branching^(k+1)], children of a parent adjacent.
    leaf_advantages: [n * branching^depth], also the advantages of the last layer's edges.
    weights: p = softmax over siblings of the mean log-prob per element (default), of its sum over `elements` latent
    elements (one-hot in practice: see docs/method.md), or uniform.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"Unknown weights '{weights}': choose one of {', '.join(WEIGHTS)}.")
    layers = [leaf_advantages]
    for log_probs in reversed(edge_log_probs[1:]):
        children = layers[0].view(-1, branching)
        if weights == "uniform":
            layers.insert(0, children.mean(1))
            continue
        scale = elements if weights == "sum-logprob" else 1
        p = torch.softmax(scale * log_probs.to(children.dtype).view(-1, branching), dim=1)
        layers.insert(0, (p * children).sum(1))
    return layers


def branch_advantages(values: Tensor, depth: int, branching: int, prompts: int) -> list[Tensor]:
    """BranchGRPO (arXiv 2509.06040): a node's value is its leaves' mean; z-scored over all nodes of a depth, per
    prompt.

    values: [P * K] combined leaf rewards. Unbiased std; zero advantage where it is below 1e-6.
    """
    layers = []
    for k in range(depth):
        node = values.view(-1, branching ** (depth - 1 - k)).mean(1).view(prompts, -1)
        std, mean = torch.std_mean(node, dim=1, keepdim=True)
        layers.append(torch.where(std < 1e-6, 0.0, (node - mean) / (std + 1e-8)).flatten())
    return layers


def edge_advantages(
    estimator: str,
    edge_log_probs: list[Tensor],
    leaf: Tensor,
    branching: int,
    prompts: int,
    weights: str = "mean-logprob",
    elements: int = 1,
) -> list[Tensor]:
    """Advantages of every window edge, one tensor per layer, by the chosen credit estimator.

    treegrpo: log-prob-weighted backup. branchgrpo: z-score per depth. trajectory: mean leaf advantage below the edge,
    as plain GRPO gives each step of a trajectory its leaf's advantage.
    """
    if estimator == "treegrpo":
        return backup(edge_log_probs, leaf, branching, weights, elements)
    if estimator == "branchgrpo":
        return branch_advantages(leaf, len(edge_log_probs), branching, prompts)
    if estimator == "trajectory":
        return backup(edge_log_probs, leaf, branching, "uniform")
    raise ValueError(f"Unknown credit estimator '{estimator}': choose one of {', '.join(ESTIMATORS)}.")


@dataclass
class Scores:
    """Per-image scores by reward name, and how they count together. NaN = no score for this image."""

    values: dict[str, Tensor]  # each [B]
    weights: dict[str, float] = field(default_factory=dict)  # by reward name
    raw: bool = False  # sum the raw scores instead of z-scoring each first
