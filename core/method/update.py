"""One policy update over the trees of an iteration: a forward and a backward per parent, shared by all below it."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .memory import MicroBatch
from .objective import (
    Objective,
    clip_ranges,
    clipped_surrogate,
    dppo,
    gaussian_kl,
    log_ratio,
    node_values,
    regression_targets,
    relative,
    sft_targets,
    sft_weights,
    softmax_tb,
    softmax_tb_advantage,
    softmax_tb_shares,
    step_weights,
)
from .ranks import ALONE, Ranks
from .steps import Step, step
from .tree import Forest


def children_of(layer_below: Tensor, parents: slice, branching: int) -> Tensor:
    """The rows of the next layer that hang below these parents, in order."""
    return layer_below[parents.start * branching : parents.stop * branching]


def score_edges(forest: Forest, layer: int, parents: slice, v: Tensor) -> Step:
    """The edges below these parents under a policy that predicts velocity v for them: log_prob [n * branching].

    v: [n, C, H, W], one per parent, or [n * branching, C, H, W], one per edge.
    """
    b = forest.branching
    sigma, sigma_next = forest.sigma(layer)
    x = forest.states[layer][parents].repeat_interleave(b, 0)
    return step(
        forest.kind,
        x,
        v if len(v) == len(x) else v.repeat_interleave(b, 0),
        sigma,
        sigma_next,
        forest.levels[layer],
        float(forest.sigmas[1]),
        next_latent=children_of(forest.states[layer + 1], parents, b),
        rho_min=forest.rho_min,
    )


class _Loss:
    """The loss of slices of window nodes; everything that is known before the forward is worked out once, here."""

    def __init__(
        self,
        velocity,
        forest: Forest,
        advantages: list[Tensor],
        objective: Objective,
        allowed: Tensor,
        images: Tensor | None,
        edges: int,
    ):
        self.velocity, self.forest, self.objective, self.images = velocity, forest, objective, images
        self.advantages = [a.cpu() for a in advantages]
        self.leaf = self.advantages[-1]
        self.edges, self.nodes = edges, edges // forest.branching
        self.shares = relative(node_values(self.leaf, forest), forest)
        group = self.leaf.view(len(forest.prompts), -1)
        self.told = group.any(1)  # prompts whose leaves differ, and so have advantages
        self.allowed = allowed.cpu() & (group.amax(1) > group.amin(1))
        blank = forest.states[0].new_zeros(1, 1)
        stds = [
            float(
                step(
                    forest.kind,
                    blank,
                    blank,
                    *forest.sigma(k),
                    forest.levels[k],
                    float(forest.sigmas[1]),
                    noise=blank,
                    rho_min=forest.rho_min,
                ).std
            )
            for k in range(forest.depth)
        ]
        self.layer_weights = step_weights(objective.step_weight, forest, stds)
        self.wanted_sft = (
            [sft_weights(share, self.allowed) for share in self.shares[: forest.depth]] if objective.sft > 0 else None
        )
        self.targets: dict[int, Tensor] = {}
        if objective.loss == "softmax_tb":
            if forest.branching < 2:
                raise ValueError(
                    "Softmax-TB compares siblings, and these trees have none: raise branching in Tree Shape to at "
                    "least 2."
                )
            self.tb_shares = softmax_tb_shares(objective, forest, self.leaf)

    def learned(self, layer: int, parents: slice) -> Tensor:
        """Which of these nodes belong to prompts whose leaves differ [n]."""
        return self.told.repeat_interleave(len(self.forest.states[layer]) // len(self.told))[parents]

    def is_empty(self, layer: int, parents: slice) -> bool:
        """Nothing to learn from these nodes: groups without spread cost nothing."""
        objective = self.objective
        if objective.loss in ("regression", "softmax_tb"):
            learned = self.learned(layer, parents)
        else:
            learned = children_of(self.advantages[layer], parents, self.forest.branching)
        if objective.needs_reference or bool(learned.any()):
            return False
        return self.wanted_sft is None or not bool(self.wanted_sft[layer][parents].any())

    def __call__(self, layer: int, parents: slice, v: Tensor) -> tuple[Tensor, Tensor]:
        """(loss of the slice, its share of the whole, diagnostics [6]: loss, ratio, clipped, edges, kl, sft sums).

        The loss's sum counts edges: a node's regression loss counts once for each of its edges.
        """
        forest, objective, b = self.forest, self.objective, self.forest.branching
        new = score_edges(forest, layer, parents, v)
        reference = None
        if objective.needs_reference:
            with torch.no_grad(), self.velocity.reference():
                reference = self.velocity(
                    forest.states[layer][parents], forest.sigma(layer)[0], forest.rows(layer)[parents]
                )
        if objective.loss == "regression":
            goal = regression_targets(objective, forest, self.leaf, layer, parents, reference)
            each = b * ((v - goal) ** 2).flatten(1).mean(1)
            if not objective.needs_reference:  # as in a slice of its own, which costs nothing
                each = torch.where(self.learned(layer, parents).to(each.device), each, 0.0)
            ratio = torch.exp(new.log_prob.detach() - children_of(forest.log_probs[layer], parents, b))
            clipped = torch.zeros_like(ratio)
        else:
            each, ratio, clipped = self._surrogate(new, layer, parents)
        loss = self.layer_weights[layer] * each.sum() / self.edges
        kl = sft = torch.zeros((), device=v.device)
        if objective.kl > 0:
            with torch.no_grad():
                reference_mean = score_edges(forest, layer, parents, reference).mean
            kl = gaussian_kl(new.mean, reference_mean, new.std).sum()
            loss = loss + objective.kl * kl / self.edges
        if self.wanted_sft is not None:
            if layer not in self.targets:
                self.targets[layer] = sft_targets(objective, forest, self.leaf, layer, self.images)
            distance = ((v - self.targets[layer][parents]) ** 2).flatten(1).mean(1)
            sft = (self.wanted_sft[layer][parents].to(distance) * distance).sum()
            loss = loss + objective.sft * sft / self.nodes
        return loss, torch.stack(
            [
                each.detach().sum(),
                ratio.sum(),
                clipped.to(ratio).sum(),
                torch.ones_like(ratio).sum(),
                kl.detach().to(ratio),
                sft.detach().to(ratio),
            ]
        )

    def _surrogate(self, new: Step, layer: int, parents: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of every edge, the ratios, and which edges were clipped: each [E]."""
        forest, objective, b = self.forest, self.objective, self.forest.branching
        old_mean = None
        if objective.ratio == "guard" or objective.loss == "dppo":
            with torch.no_grad():
                old_mean = score_edges(forest, layer, parents, forest.velocities[layer][parents]).mean
        old_log_prob = children_of(forest.log_probs[layer], parents, b)
        ratio = log_ratio(objective.ratio, new, old_log_prob, old_mean)
        if objective.loss == "softmax_tb":
            return self._softmax_tb(new, ratio, layer, parents)
        advantage = children_of(self.advantages[layer], parents, b).to(new.log_prob)
        if objective.loss == "dppo":
            return dppo(ratio, advantage, gaussian_kl(new.mean, old_mean, new.std), objective.trust_range)
        low, high = clip_ranges(objective, children_of(self.shares[layer + 1], parents, b).to(new.log_prob.device))
        return clipped_surrogate(ratio, advantage, low, high)

    def _softmax_tb(self, new: Step, ratio: Tensor, layer: int, parents: slice) -> tuple[Tensor, Tensor, Tensor]:
        objective, b = self.objective, self.forest.branching
        share, onward = (children_of(values[layer], parents, b).to(new.log_prob) for values in self.tb_shares)
        each, ratio, clipped = softmax_tb(
            ratio,
            softmax_tb_advantage(new.log_prob, share, onward, b),
            b,
            objective.trust_range,
            objective.reference,
        )
        learned = self.learned(layer, parents).repeat_interleave(b).to(each.device)
        return torch.where(learned, each, 0.0), ratio, clipped & learned


def policy_gradient(
    velocity,
    forest: Forest,
    advantages: list[Tensor],
    objective: Objective,
    *,
    micro_batch: MicroBatch | None = None,
    allowed: Tensor | None = None,
    images: Tensor | None = None,
    shared: bool = True,
    check: Callable[[], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Add the gradient of the loss over all window edges to the parameters; returns the loss and its diagnostics.

    advantages: per layer, [P * trees * branching^(layer+1)]; the last layer's are also the leaves' values for clip
    ranges and LayerTuning-RL. With the rollout's micro_batch the slices are the rollout's own, so that a bf16 model
    scores with the batch shapes it sampled with. Slices with nothing to learn are skipped. Graphs the rollout retained
    are used up.
    allowed: prompts whose best leaf may be imitated [P], default all. images: [P, C, H, W], for target "images".
    shared: one forward per parent; False forwards every edge on its own, `branching` times the cost for the same
    gradient: for comparison only, and not with LayerTuning-RL. check: called before each slice; may raise.
    ranks: the processes that have the prompts' other trees. The loss is of all edges of all of them; this one adds its
    own edges' gradient, and the metrics are of all. A forest without prompts is one process's share of which nothing
    could be learned from.
    """
    parameters = list(velocity.parameters())
    copies = 1 if shared else forest.branching
    if allowed is None:
        allowed = torch.ones(len(forest.prompts), dtype=torch.bool)
    edges = int(ranks.total(sum(a.numel() for a in advantages)))
    loss_of = _Loss(velocity, forest, advantages, objective, allowed, images, edges) if forest.prompts else None
    totals = []  # diagnostics per slice, on the device until the end

    def learn(layer: int, first: int, last: int) -> None:
        parents = slice(first, last)
        kept = forest.graphs.pop((layer, first), None)
        if first == last or loss_of.is_empty(layer, parents):
            if ranks.lockstep:
                _idle(velocity, forest, objective, parameters)
            return
        if check is not None:
            check()
        with velocity.grad():
            if kept is None or len(kept) != last - first:
                kept = velocity(
                    forest.states[layer][parents].repeat_interleave(copies, 0),
                    forest.sigma(layer)[0],
                    forest.rows(layer)[parents].repeat_interleave(copies),
                )
            loss, diagnostics = loss_of(layer, parents, kept)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients):  # only now: a slice that failed has left nothing behind
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        totals.append(diagnostics)

    batch = micro_batch or MicroBatch()
    with ranks.together():
        for layer in range(forest.depth):
            count = len(forest.states[layer])
            calls = -(-count // (batch.size or max(count, 1)))
            missing = ranks.most(calls) - calls if ranks.lockstep else 0
            batch.run(count, lambda first, last: learn(layer, first, last))
            for _ in range(missing):  # as many model calls as the process with the most nodes
                learn(layer, 0, 0)
    forest.graphs.clear()
    own = torch.stack(totals).double().sum(0).tolist() if totals else [0.0] * 6
    total, ratio, clipped, scored, kl, sft = map(sum, zip(*ranks.gather(own)))
    nodes = edges // forest.branching
    return {
        "loss": total / edges,
        "ratio_mean": ratio / scored if scored else 1.0,
        "clip_frac": clipped / scored if scored else 0.0,
        "kl": kl / edges,
        "sft_loss": sft / nodes,
        "edges": edges,
        "edges_trained": int(scored),
    }


def _idle(velocity, forest: Forest, objective: Objective, parameters: list) -> None:
    """The model calls of a slice, on nothing, for the other processes' sake; they are not counted."""
    blank, row, counted = torch.zeros((1, *forest.states[0].shape[1:])), [0], velocity.forwards
    if objective.needs_reference:
        with torch.no_grad(), velocity.reference():
            velocity(blank, 0.5, row)
    with velocity.grad():
        torch.autograd.grad(velocity(blank, 0.5, row).sum(), parameters, allow_unused=True)
    velocity.forwards = counted


def update(
    velocity,
    forest: Forest,
    advantages: list[Tensor],
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    *,
    max_grad_norm: float = 1.0,
    inner_updates: int = 1,
    ema=None,
    ranks: Ranks = ALONE,
    **options,
) -> dict[str, float]:
    """`inner_updates` optimizer steps on the same trees; metrics of the last one, `ratio_first` of the first.

    Whatever ends it early, an error or an interrupt at any moment, leaves parameters, optimizer and average as they
    were before. A gradient that is not finite changes nothing: the step is skipped and counted in `skipped`. ema: the
    parameters' moving average (core.lora.ema.Ema), moved on by every step that is taken. options: as policy_gradient.
    """
    parameters = list(velocity.parameters())
    before = velocity.forwards
    ratio_first, skipped, metrics, restore = 1.0, 0, {}, None
    try:
        for inner in range(inner_updates):
            optimizer.zero_grad(set_to_none=True)
            metrics = policy_gradient(velocity, forest, advantages, objective, ranks=ranks, **options)
            ranks.add_gradients(parameters)
            metrics["grad_norm"] = 0.0
            if inner == 0:
                ratio_first = metrics["ratio_mean"]
            if metrics["edges_trained"]:
                metrics["grad_norm"] = float(
                    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else math.inf)
                )
                if math.isfinite(metrics["grad_norm"]):
                    restore = restore or restore_point(parameters, optimizer, ema)
                    optimizer.step()
                    if ema is not None:
                        ema.update()
                else:
                    skipped += 1
    except BaseException:
        if restore is not None:
            restore()
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)
    return {
        **metrics,
        "ratio_first": ratio_first,
        "skipped": skipped,
        "update_forwards": int(ranks.total(velocity.forwards - before)),
    }


def restore_point(
    parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, ema=None
) -> Callable[[], None]:
    """A function that puts parameters, optimizer and average back to what they are now; copies in main memory."""

    def copied(value):
        if torch.is_tensor(value):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, dict):
            return {key: copied(entry) for key, entry in value.items()}
        return copy.deepcopy(value)

    values, state = copied(dict(enumerate(parameters))), copied(optimizer.state_dict())
    average = ema.state_dict() if ema is not None else None

    def restore() -> None:
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.copy_(values[number])
        optimizer.load_state_dict(state)
        if ema is not None:
            ema.load_state_dict(average)

    return restore
