"""The tree's settings, and the trees of one iteration as flat tensors per layer."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import noise, windows

ABSURD = 100.0  # a latent's root mean square beyond which nothing is learned; it is about 1 from noise to image


@dataclass
class TreeShape:
    """Branching of the trees and the place of their window."""

    branching: int = 3  # children of every node inside the window
    depth: int = 3  # tree layers = sampling steps inside the window
    trees: int = 1  # independent roots per prompt
    window: str = "random"  # random | sliding | fixed
    ratio: float = 0.5  # random: lower = earlier windows
    stride: int = 1  # sliding: steps per move
    interval: int = 25  # sliding: iterations between moves
    fixed: int = 0  # fixed: first step of the window
    siblings: str = "independent"  # noise among siblings: independent | antithetic | orthogonal
    tail: float = 1.0  # share of the ODE steps after the window that are taken; 1 = all

    def __post_init__(self):
        if self.branching < 1 or self.depth < 1 or self.trees < 1:
            raise ValueError("Branching, depth and trees must each be at least 1.")
        if not 0 < self.tail <= 1:
            raise ValueError(f"The tail must be above 0 and at most 1, not {self.tail}.")

    @property
    def leaves(self) -> int:
        """Leaves per prompt."""
        return self.trees * self.branching**self.depth

    def start(self, iteration: int, steps: int, seed: int) -> int:
        """First step of this iteration's window; the same for every prompt."""
        return windows.start(
            self.window,
            iteration,
            steps,
            self.depth,
            ratio=self.ratio,
            stride=self.stride,
            interval=self.interval,
            fixed=self.fixed,
            generator=noise.generator(seed, "window", iteration),
        )


@dataclass
class Forest:
    """All trees of one iteration: P prompts x `trees` roots, grown together.

    Rows are ordered prompt, tree, path: at layer k row r belongs to prompt r // (trees * branching^k), and its
    children at layer k+1 are rows r*branching .. r*branching + branching-1.
    """

    prompts: list[int]  # row of the conditioning of each prompt: [P]
    trees: int
    branching: int
    start: int  # first step of the window
    sigmas: Tensor  # [T+1] the sampling schedule
    kind: str  # step kind inside the window
    levels: list[float]  # noise level per layer: [depth]
    rho_min: float
    states: list[Tensor]  # depth+1 layers of latents: [P * trees * branching^k, C, H, W], fp32
    log_probs: list[Tensor]  # depth layers of edges under the sampling policy: [P * trees * branching^(k+1)]
    velocities: list[Tensor]  # depth layers: the sampling policy's velocity at every window node, no gradient
    leaves: Tensor  # [P * K, C, H, W] denoised
    forwards: int  # model forwards spent on growing it
    iteration: int = 0
    # (layer, first node of a slice) -> velocity with its graph
    graphs: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return len(self.log_probs)

    @property
    def leaves_per_prompt(self) -> int:
        return self.trees * self.branching**self.depth

    def sigma(self, layer: int) -> tuple[float, float]:
        """(sigma, sigma_next) of the edges below the nodes of `layer`."""
        return float(self.sigmas[self.start + layer]), float(self.sigmas[self.start + layer + 1])

    def rows(self, layer: int) -> Tensor:
        """Conditioning row of every node of a layer: [P * trees * branching^layer]."""
        return torch.tensor(self.prompts).repeat_interleave(self.trees * self.branching**layer)

    def leaves_below(self, layer: int, nodes: slice) -> slice:
        """Rows of the leaves that hang below these nodes of a layer."""
        below = self.branching ** (self.depth - layer)
        return slice(nodes.start * below, nodes.stop * below)

    def only(self, keep: Tensor) -> "Forest":
        """The trees of these prompts [P], without retained graphs."""

        def part(layer: Tensor) -> Tensor:
            return layer.unflatten(0, (len(self.prompts), -1))[keep.to(layer.device)].flatten(0, 1)

        return replace(
            self,
            prompts=[row for row, kept in zip(self.prompts, keep.tolist()) if kept],
            states=[part(x) for x in self.states],
            log_probs=[part(x) for x in self.log_probs],
            velocities=[part(x) for x in self.velocities],
            leaves=part(self.leaves),
            graphs={},
        )


def sound(latents: Tensor) -> Tensor:
    """Latents that are finite, and of a size that latents have [B]."""
    return (latents.flatten(1).square().mean(1) <= ABSURD**2).cpu()  # not so for NaN and infinity
