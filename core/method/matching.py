"""Losses of the noising process, which match velocities to finished images and need no step's probability:
DiffusionNFT, AWM, and tree regression on the same states.

Their states are a tree's window nodes, each with all the leaves below it, or re-noised images: a finished image with
fresh noise, as both were published. One state costs one forward and one backward, however many leaves it has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import noise
from .objective import Objective, aim, clipped_surrogate
from .tree import Forest

ADVANTAGE = 5.0  # the advantage at which DiffusionNFT's r is 1, as in its public code


@dataclass
class Renoised:
    """Finished images with fresh noise, `per_image` states of every leaf, leaves in forest order."""

    x: Tensor  # [M, C, H, W]
    sigmas: Tensor  # [M] noise levels, steps of the sampling schedule
    rows: Tensor  # [M] conditioning rows
    leaves: Tensor  # [M] rows of the images among the forest's leaves
    old: Tensor  # [M, C, H, W] velocities before the first optimizer step, filled in as its forwards come
    known: Tensor  # [M] whether `old` is filled in

    def remember(self, chosen: Tensor, v: Tensor) -> Tensor:
        """`old` of these states; what is not known yet is v [n, C, H, W], from the first forward of theirs."""
        new = ~self.known[chosen]
        if new.any():
            self.old[chosen[new]] = v.detach()[new.to(v.device)]
            self.known[chosen] = True
        return self.old[chosen]


def renoise(forest: Forest, per_image: int, seed: int, first_tree: int = 0) -> Renoised:
    """`per_image` noisy states of every leaf. Their levels are steps of the sampling schedule, each at most once per
    image while there are enough (DiffusionNFT's public code: all but one; AWM's: 6 of 14).

    Level and noise are drawn from (seed, iteration, prompt, tree, leaf), as everything else in a tree. first_tree:
    number of the first of these trees, where other processes have the prompts' others.
    """
    levels, shape = forest.sigmas[:-1], forest.leaves.shape[1:]
    picked, drawn = [], []
    for number in forest.prompts:
        for tree in range(first_tree, first_tree + forest.trees):
            for leaf in range(forest.branching**forest.depth):
                draw = noise.generator(seed, "renoise", forest.iteration, number, tree, leaf)
                picked.append(torch.randperm(len(levels), generator=draw)[torch.arange(per_image) % len(levels)])
                drawn.append(torch.randn((per_image, *shape), generator=draw, dtype=torch.float32))
    leaves = torch.arange(len(forest.leaves)).repeat_interleave(per_image)
    sigmas, images = levels[torch.cat(picked)], forest.leaves[leaves]
    x = noise.noised(images, torch.cat(drawn).to(images), sigmas.to(images).view(-1, *[1] * len(shape)))
    rows = torch.tensor(forest.prompts).repeat_interleave(len(leaves) // len(forest.prompts))
    return Renoised(x, sigmas, rows, leaves, torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool))


def nft(v: Tensor, old: Tensor, goal: Tensor, advantage: Tensor, sigma: Tensor, beta: float) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117; public code 24af555), per state and image [n, k]: an implicit positive policy
    v_old + beta (v - v_old), drawn to the image by r, and a negative one v_old - beta (v - v_old), by 1 - r.

    v, old: [n, C, H, W]. goal: velocities from the state straight to each image [n, k, C, H, W]. advantage: [n, k];
    r = 1/2 + advantage / 10, within 0 .. 1. sigma: [n]. In terms of denoised images, as published, a policy's error is
    sigma (v' - goal), its loss the mean square divided by the mean absolute error (the adaptive weight, without
    gradient). beta: 1 as published, 0.1 in its OCR runs. The code's sampling policy lags behind as a moving average
    where this one's is the learned one.
    """
    r, sigma = (0.5 + advantage / (2 * ADVANTAGE)).clamp(0, 1), sigma.view(-1, 1)
    old, moved = old.unsqueeze(1), beta * (v - old).unsqueeze(1)

    def distance(velocity: Tensor) -> Tensor:
        error = (velocity - goal).flatten(2)
        return sigma**2 * error.square().mean(2) / adaptive_weight(error, sigma)

    return ADVANTAGE * (r * distance(old + moved) + (1 - r) * distance(old - moved)) / beta


def adaptive_weight(error: Tensor, sigma: Tensor) -> Tensor:
    """What DiffusionNFT divides a squared error by: the denoised image's mean absolute error, without gradient [n, k].

    error: of the velocity [n, k, D]. sigma: [n, 1].
    """
    return (sigma * error.detach().abs().mean(2)).clamp_min(1e-5)


def awm_log_prob(v: Tensor, goal: Tensor, sigma: Tensor, weighting: str) -> Tensor:
    """AWM's log-probability of an image (arXiv 2509.25050; public code be51372), per state and image [n, k]:
    -w(sigma) mean (v - goal)^2. Shapes as in nft.

    weighting: uniform, w = 1; t, w = sigma; ghuber, as its published runs have it: -4 sigma (mean^(1/4) - 1e-10^(1/4)).
    """
    error = (v.unsqueeze(1) - goal).square().flatten(2).mean(2)
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -sigma.view(-1, 1) * error
    return -4 * sigma.view(-1, 1) * ((error + 1e-10) ** 0.25 - 1e-10**0.25)


def awm(
    v: Tensor, old: Tensor, goal: Tensor, advantage: Tensor, sigma: Tensor, weighting: str, clip: float
) -> tuple[Tensor, Tensor]:
    """AWM's PPO surrogate with that log-probability, and which were clipped: each [n, k]. Shapes as in nft."""
    new, before = (awm_log_prob(velocity, goal, sigma, weighting) for velocity in (v, old.detach()))
    each, _, clipped = clipped_surrogate(new - before, advantage, clip, clip)
    return each, clipped


def matched(
    objective: Objective, v: Tensor, old: Tensor, goal: Tensor, advantage: Tensor, sigma: Tensor, reference=None
) -> tuple[Tensor, Tensor]:
    """The objective's loss of every state, the mean over its images, and the share of them that was clipped: each [n].

    Shapes as in nft; reference: the base model's velocities [n, C, H, W], for regression's anchor.
    """
    if objective.loss == "awm":
        each, clipped = awm(v, old, goal, advantage, sigma, objective.weighting, objective.trust_range)
        return each.mean(1), clipped.to(each).mean(1)
    if objective.loss == "nft":
        each = nft(v, old, goal, advantage, sigma, objective.sharpness).mean(1)
        return each, torch.zeros_like(each)
    pull = (advantage.view(*advantage.shape, *[1] * (v.dim() - 1)) * (goal - old.unsqueeze(1))).mean(1)
    each = (v - aim(objective, old, pull, reference)).square().flatten(1).mean(1)
    return each, torch.zeros_like(each)
