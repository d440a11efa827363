"""One policy update over the trees of an iteration: one forward and backward per parent node, shared by its children."""
import math
from typing import Callable

import torch
from torch import Tensor

from .objective import Objective, clipped_surrogate
from .steps import step
from .tree import Forest


def edge_log_probs(velocity, forest: Forest, layer: int, parents: Tensor) -> Tensor:
    """Log-probabilities [len(parents) * branching] of the edges below these nodes under the current policy.

    Siblings differ only in their noise, so each parent is forwarded once.
    """
    b = forest.branching
    sigma, sigma_next = forest.sigma(layer)
    x = forest.states[layer][parents.to(forest.states[layer].device)]
    v = velocity(x, sigma, forest.rows(layer)[parents])
    children = children_of(forest.states[layer + 1], parents, b)
    return step(forest.kind, x.repeat_interleave(b, 0), v.repeat_interleave(b, 0), sigma, sigma_next, forest.levels[layer],
                float(forest.sigmas[1]), next_latent=children, rho_min=forest.rho_min).log_prob


def children_of(layer_below: Tensor, parents: Tensor, branching: int) -> Tensor:
    """The rows of the next layer that hang below these parents, in order."""
    return layer_below.view(-1, branching, *layer_below.shape[1:])[parents.to(layer_below.device)].flatten(0, 1)


def policy_gradient(velocity, forest: Forest, advantages: list[Tensor], objective: Objective, *, micro_batch: int = 0,
                    check: Callable[[], None] | None = None) -> dict[str, float]:
    """Add the gradient of the mean loss over all window edges to the parameters; returns the loss and its diagnostics.

    advantages: per layer, [P * trees * branching^(layer+1)]. micro_batch: at most so many parents per forward; with the
    rollout's micro_batch the slices are the rollout's own, so that a bf16 model scores with the batch shapes it
    sampled with. Slices without any advantage are skipped. check: called before each slice; may raise.
    """
    b = forest.branching
    edges = sum(a.numel() for a in advantages)
    totals = []  # per slice: loss, sum of ratios, clipped edges, scored edges; kept on the device until the end
    for layer, advantage in enumerate(advantages):
        advantage = advantage.cpu()
        count = len(forest.states[layer])
        for parents in torch.arange(count).split(micro_batch or count):
            wanted = children_of(advantage, parents, b)
            if not bool(wanted.any()):
                continue
            if check is not None:
                check()
            with velocity.grad():
                new = edge_log_probs(velocity, forest, layer, parents)
                old = children_of(forest.log_probs[layer], parents, b)
                loss, ratio, clipped = clipped_surrogate(new, old, wanted.to(new), objective.clip_low, objective.clip_high)
                (loss.sum() / edges).backward()
            totals.append(torch.stack([loss.detach().sum(), ratio.sum(), clipped.to(ratio).sum(), torch.ones_like(ratio).sum()]))
    loss, ratio, clipped, scored = torch.stack(totals).double().sum(0).tolist() if totals else (0.0, 0.0, 0.0, 0.0)
    return {"loss": loss / edges, "ratio_mean": ratio / scored if scored else 1.0, "clip_frac": clipped / scored if scored else 0.0,
            "edges": edges, "edges_trained": int(scored)}


def update(velocity, forest: Forest, advantages: list[Tensor], optimizer: torch.optim.Optimizer, objective: Objective, *,
           micro_batch: int = 0, max_grad_norm: float = 1.0, inner_updates: int = 1,
           check: Callable[[], None] | None = None) -> dict[str, float]:
    """`inner_updates` optimiser steps on the same trees; metrics of the last one, `ratio_mean` of the first.

    A gradient that is not finite changes nothing: the step is skipped and reported as `skipped`.
    """
    parameters = list(velocity.parameters())
    before = velocity.forwards
    ratio_first, skipped, metrics = None, 0, {}
    for _ in range(inner_updates):
        optimizer.zero_grad(set_to_none=True)
        metrics = policy_gradient(velocity, forest, advantages, objective, micro_batch=micro_batch, check=check)
        ratio_first = metrics["ratio_mean"] if ratio_first is None else ratio_first
        metrics["grad_norm"] = 0.0
        if metrics["edges_trained"]:
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else math.inf))
            metrics["grad_norm"] = norm
            if math.isfinite(norm):
                optimizer.step()
            else:
                skipped += 1
    optimizer.zero_grad(set_to_none=True)
    return {**metrics, "ratio_first": ratio_first, "skipped": skipped, "update_forwards": velocity.forwards - before}
