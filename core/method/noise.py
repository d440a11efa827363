"""Random numbers of a tree: seeds, root noise, sibling noise, and the noise level of each tree layer."""

import hashlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

SIBLINGS = ("independent", "antithetic", "orthogonal")
SHAPES = ("constant", "linear", "cosine", "exponential", "list")


def seed_for(*path) -> int:
    """A 63-bit seed for a path such as (seed, "node", iteration, prompt, tree, step, node, child).

    Every noise has its own seed, so a tree is the same on any batch split and in any order.
    """
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*path) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed_for(*path))


def roots(shape, seed: int, iteration: int, prompts: list[int], trees: int) -> Tensor:
    """Initial noise [len(prompts) * trees, *shape], N(0, I), fp32 on the CPU.

    In iteration 0 the first prompt gets the noise ComfyUI itself draws for this seed, so the first pictures are
    those of a KSampler with the same seed. `prompts` are the prompts' numbers in the whole run, not in this batch.
    """
    drawn = []
    for prompt in prompts:
        key = seed if iteration == 0 and prompt == 0 else seed_for(seed, "root", iteration, prompt)
        own = torch.Generator("cpu").manual_seed(key)
        drawn.append(torch.randn((trees, *shape), generator=own, dtype=torch.float32))
    return torch.cat(drawn)


def noised(start, drawn: Tensor, sigma: float) -> Tensor:
    """A latent (or 0) at noise level sigma, with the drawn noise [B, C, H, W]: x = sigma * eps + (1 - sigma) * x0."""
    return sigma * drawn + (1 - sigma) * start


def siblings(mode: str, branching: int, shape, *path) -> Tensor:
    """Noise [branching, *shape] for the children of one node; each child's marginal is N(0, I) (in norm for
    orthogonal).

    independent: own draw per child. antithetic: pairs z, -z (an odd last child is independent).
    orthogonal: the draws' directions made orthogonal by QR, their lengths kept: more spread at no model cost.
    path: (seed, iteration, prompt, tree, step, node).
    """
    draws = [torch.randn(shape, generator=generator(*path, child), dtype=torch.float32) for child in range(branching)]
    z = torch.stack(draws)
    if mode == "independent":
        return z
    if mode == "antithetic":
        for child in range(1, branching, 2):
            z[child] = -z[child - 1]
        return z
    if mode == "orthogonal":
        flat = z.flatten(1)
        if branching > flat.shape[1]:
            raise ValueError(f"{branching} orthogonal siblings do not fit into a latent of {flat.shape[1]} elements.")
        q, r = torch.linalg.qr(flat.T)
        directions = (q * torch.sign(torch.diagonal(r))).T
        return (directions * flat.norm(dim=1, keepdim=True)).reshape(z.shape)
    raise ValueError(f"Unknown sibling noise '{mode}': choose one of {', '.join(SIBLINGS)}.")


@dataclass
class NoiseSchedule:
    """How much noise each layer of the tree gets: level(k) = level * shape(k), layers counted from the root."""

    kind: str = "cps"  # step kind inside the window: flow_sde, dance_sde, cps or exact
    level: float = 0.7  # `a` (flow_sde, cps, exact) or `eta` (dance_sde); 0 = deterministic
    shape: str = "constant"  # how it changes with the layer
    beta: float = 0.0  # strength of the change: > 0 more noise in deeper layers, < 0 less
    count_from: int = 1  # layers counted 1..d (default) or 0..d-1: not published, so a setting
    values: list[float] = field(default_factory=list)  # for shape "list": the level of each layer itself
    rho_min: float = 0.0  # floor of the exact step's correlation where sigma is 1

    def levels(self, depth: int) -> list[float]:
        """Noise level of each of the `depth` tree layers, root side first.

        linear is Dynamic-TreeRPO's eq. 6 (arXiv 2509.23352), g (1 + beta k/d); the others are ours.
        """
        if self.shape == "list":
            if len(self.values) != depth:
                raise ValueError(
                    f"The noise list has {len(self.values)} values for {depth} tree layers: give one per layer."
                )
            levels = list(self.values)
        else:
            levels = [self.level * self._factor((k + self.count_from) / depth) for k in range(depth)]
        for k, level in enumerate(levels):
            if not math.isfinite(level) or level < 0:
                raise ValueError(
                    f"The noise level of tree layer {k + 1} is {level:.3g}: it must be 0 or more. Use a beta above -1."
                )
            if self.kind == "cps" and level > 1:
                raise ValueError(
                    f"The noise level of tree layer {k + 1} is {level:.3g}: 'cps' noise goes up to 1. Use a lower "
                    "level or beta."
                )
        return levels

    def _factor(self, fraction: float) -> float:
        if self.shape == "constant":
            return 1.0
        if self.shape == "linear":
            return 1 + self.beta * fraction
        if self.shape == "cosine":
            return 1 + self.beta * (1 - math.cos(math.pi * fraction)) / 2
        if self.shape == "exponential":
            if self.beta <= -1:
                raise ValueError("Exponential noise needs a beta above -1.")
            return (1 + self.beta) ** fraction
        raise ValueError(f"Unknown noise shape '{self.shape}': choose one of {', '.join(SHAPES)}.")
