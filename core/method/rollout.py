"""Grow the trees of one iteration with a velocity model."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import noise
from .cost import forwards, nodes, tail_steps
from .memory import MicroBatch, Retained
from .noise import NoiseSchedule
from .steps import step
from .tree import Forest, TreeShape

# (forwards done, forwards in all, newest denoised predictions [B, C, H, W])
Progress = Callable[[int, int, Tensor], None]


def check_sigmas(sigmas: Tensor) -> None:
    if sigmas.dim() != 1 or len(sigmas) < 2 or bool((sigmas[1:] >= sigmas[:-1]).any()) or float(sigmas[0]) > 1 + 1e-6:
        raise ValueError("SIGMAS must fall from at most 1 to 0, as flow-matching schedulers give them.")
    if float(sigmas[-1]) != 0:
        raise ValueError(
            f"SIGMAS end at {float(sigmas[-1]):.4g}, so the leaves would still be noisy: use a schedule that ends at 0."
        )


def shorten(sigmas: Tensor, tail: float) -> Tensor:
    """The sigmas of the remaining steps [r+1], re-spaced to ceil(tail * r) steps, interpolated by step number."""
    remaining = len(sigmas) - 1
    taken = tail_steps(remaining, tail)
    if taken == remaining:
        return sigmas
    position = torch.linspace(0, remaining, taken + 1, dtype=torch.float64)
    below = position.floor().long().clamp(max=remaining - 1)
    share = (position - below).to(sigmas.dtype)
    return sigmas[below] * (1 - share) + sigmas[below + 1] * share


class _Calls:
    """The model calls of one rollout: sliced, counted, reported, and kept with their graphs where asked for."""

    def __init__(
        self, velocity, micro_batch: MicroBatch, total: int, progress: Progress | None, retained: Retained | None
    ):
        self.velocity, self.micro_batch, self.total, self.progress, self.retained = (
            velocity,
            micro_batch,
            total,
            progress,
            retained,
        )
        self.done = 0

    def __call__(self, x: Tensor, sigma: float, rows: Tensor, layer: int | None = None) -> Tensor:
        parts = []

        def call(first: int, last: int) -> None:
            part = x[first:last]
            if self.retained is not None and layer is not None and self.retained.wanted:
                with self.velocity.grad():
                    v = self.retained.call(layer, first, lambda: self.velocity(part, sigma, rows[first:last]))
            else:
                v = self.velocity(part, sigma, rows[first:last])
            parts.append(v)
            self.done += last - first
            if self.progress is not None:
                self.progress(self.done, self.total, part - sigma * v)

        self.micro_batch.run(len(x), call)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def grow(
    velocity,
    roots: Tensor,
    sigmas: Tensor,
    shape: TreeShape,
    schedule: NoiseSchedule,
    *,
    start: int,
    prompts: list[int],
    seed: int = 0,
    iteration: int = 0,
    numbers: list[int] | None = None,
    first_tree: int = 0,
    micro_batch: MicroBatch | None = None,
    retain: float | bool = 0,
    progress: Progress | None = None,
) -> Forest:
    """Trees for P prompts, siblings sharing their parent's forward.

    velocity: `velocity(x[B,C,H,W], sigma, rows[B]) -> v[B,C,H,W]`; the sum of B over its calls equals
    core.method.cost.forwards.
    roots: [P * trees, C, H, W] latents at sigmas[0]. sigmas: [T+1], falling to 0, kept on the CPU.
    prompts: conditioning row of each prompt; numbers: its number in the run, which seeds its noise (default: the same).
    first_tree: number of the first of these trees, where other processes have the prompts' other trees.
    retain: bytes of memory for the window nodes' graphs: if they fit, the first update needs no forward of its own
    (LeanGRPO's "retain"); 0 = none are kept, True = all, whatever they need. Nothing but those graphs carries
    gradients.
    """
    check_sigmas(sigmas)
    numbers = prompts if numbers is None else numbers
    steps = len(sigmas) - 1
    levels = schedule.levels(shape.depth)
    table = [float(s) for s in sigmas]
    tail = [float(s) for s in shorten(sigmas[start + shape.depth :], shape.tail)]
    total = len(prompts) * forwards(steps, start, shape.depth, shape.branching, shape.trees, shape.tail)[0]
    budget = math.inf if retain is True else retain
    retained = (
        Retained(
            budget,
            len(prompts) * shape.trees * nodes(shape.depth, shape.branching),
            velocity.weights(),
            velocity.graph_bytes(),
        )
        if budget
        else None
    )
    model = _Calls(velocity, micro_batch or MicroBatch(), total, progress, retained)

    rows = torch.tensor(prompts).repeat_interleave(shape.trees)
    x = roots
    for i in range(start):
        x = step("ode", x, model(x, table[i], rows), table[i], table[i + 1], 0.0, table[1]).latent

    states, log_probs, velocities = [x], [], []
    for layer, level in enumerate(levels):
        i = start + layer
        v = model(x, table[i], rows, layer)
        z = _layer_noise(shape, x, seed, iteration, numbers, first_tree, i)
        edge = step(
            schedule.kind,
            x.repeat_interleave(shape.branching, 0),
            v.repeat_interleave(shape.branching, 0),
            table[i],
            table[i + 1],
            level,
            table[1],
            noise=z,
            rho_min=schedule.rho_min,
        )
        x, rows = edge.latent, rows.repeat_interleave(shape.branching)
        states.append(x)
        velocities.append(v)
        log_probs.append(edge.log_prob)

    for sigma, sigma_next in zip(tail, tail[1:]):
        x = step("ode", x, model(x, sigma, rows), sigma, sigma_next, 0.0, table[1]).latent

    return Forest(
        prompts=list(prompts),
        trees=shape.trees,
        branching=shape.branching,
        start=start,
        sigmas=sigmas,
        kind=schedule.kind,
        levels=levels,
        rho_min=schedule.rho_min,
        states=states,
        log_probs=log_probs,
        velocities=velocities,
        leaves=x,
        forwards=model.done,
        iteration=iteration,
        graphs=retained.graphs if retained else {},
    )


def _layer_noise(
    shape: TreeShape, x: Tensor, seed: int, iteration: int, numbers: list[int], first_tree: int, i: int
) -> Tensor:
    """Sibling noise below every node of a layer, on x's device: [len(x) * branching, C, H, W]."""
    per_tree = len(x) // (len(numbers) * shape.trees)
    draws = [
        noise.siblings(shape.siblings, shape.branching, x.shape[1:], seed, iteration, number, tree, i, node)
        for number in numbers
        for tree in range(first_tree, first_tree + shape.trees)
        for node in range(per_tree)
    ]
    return torch.cat(draws).to(x.device)
