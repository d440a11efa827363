"""One policy update over the trees of an iteration: a forward and a backward per parent, shared by all below it."""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .matching import Renoised, matched
from .memory import MicroBatch
from .objective import (
    MATCHING,
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
from .replay import Replayed
from .signal import power
from .steps import Step, step
from .tree import Forest

NOTHING_TO_RETAIN = (
    "This objective learns from re-noised images alone, for which sampling has no graphs to keep: turn retain_graphs "
    "off, or set the objective's states to window or both."
)


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
    """The loss of slices of window nodes or re-noised images; everything that is known before the forward is worked out
    once, here.
    """

    def __init__(
        self,
        velocity,
        forest: Forest,
        advantages: list[Tensor],
        objective: Objective,
        allowed: Tensor,
        images: Tensor | None,
        edges: int,
        renoised: Renoised | None = None,
        states: int = 0,
    ):
        """edges, states: window edges and re-noised images of all processes, of which the loss is the mean."""
        self.renoised, self.states = renoised, states
        self.share = 0.5 if objective.on_window and objective.on_renoised else 1.0  # of either in the loss
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
        if objective.loss in (*MATCHING, "softmax_tb"):
            learned = self.learned(layer, parents)
        else:
            learned = children_of(self.advantages[layer], parents, self.forest.branching)
        if objective.needs_reference or bool(learned.any()):
            return False
        return self.wanted_sft is None or not bool(self.wanted_sft[layer][parents].any())

    def __call__(self, layer: int, parents: slice, v: Tensor) -> tuple[Tensor, Tensor]:
        """(loss of a slice of window nodes, its share of the whole; diagnostics, see `measured`).

        The loss is the mean over edges: a node's matching loss counts once for each of its edges.
        """
        forest, objective, b = self.forest, self.objective, self.forest.branching
        new, reference = score_edges(forest, layer, parents, v), None
        if objective.needs_reference:
            reference = self._reference(
                forest.states[layer][parents], forest.sigma(layer)[0], forest.rows(layer)[parents]
            )
        if objective.loss in MATCHING:
            each, clipped = self._matched(layer, parents, v, reference)
            ratio = torch.exp(new.log_prob.detach() - children_of(forest.log_probs[layer], parents, b))
        else:
            each, ratio, clipped = self._surrogate(new, layer, parents)
        loss = self.share * self.layer_weights[layer] * each.sum() / self.edges
        kl = sft = torch.zeros((), device=v.device)
        if objective.kl > 0:
            with torch.no_grad():
                reference_mean = score_edges(forest, layer, parents, reference).mean
            kl = self.share * gaussian_kl(new.mean, reference_mean, new.std).sum() / self.edges
            loss = loss + objective.kl * kl
        if self.wanted_sft is not None:
            if layer not in self.targets:
                self.targets[layer] = sft_targets(objective, forest, self.leaf, layer, self.images)
            distance = ((v - self.targets[layer][parents]) ** 2).flatten(1).mean(1)
            sft = (self.wanted_sft[layer][parents].to(distance) * distance).sum() / self.nodes
            loss = loss + objective.sft * sft
        return loss, measured(self.share * each.sum() / self.edges, ratio, clipped, kl, sft)

    def of_renoised(self, chosen: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same of re-noised images [n], the mean over all of them. Their KL is mean (v - v_base)^2, and their ratio
        that of AWM's log-probability with weight 1, as DiffusionNFT's and AWM's public codes have it.
        """
        forest, objective, states = self.forest, self.objective, self.renoised
        x, sigma, reference = states.x[chosen], states.sigmas[chosen], None
        if objective.needs_reference:
            reference = self._reference(x, sigma, states.rows[chosen])
        old, level = states.remember(chosen, v), sigma.to(v)
        goal = ((x - forest.leaves[states.leaves[chosen]]) / level.view(-1, *[1] * (x.dim() - 1))).unsqueeze(1)
        advantage = self.leaf[states.leaves[chosen]].to(v).unsqueeze(1)
        each, clipped = matched(objective, v, old, goal, advantage, level, reference)
        each = self._told(each, states.leaves[chosen] // forest.leaves_per_prompt)
        old_error, error = ((u.detach().unsqueeze(1) - goal).square().flatten(1).mean(1) for u in (old, v))
        loss = value = self.share * each.sum() / self.states
        kl = torch.zeros((), device=v.device)
        if objective.kl > 0:
            kl = self.share * (v - reference).square().flatten(1).mean(1).sum() / self.states
            loss = loss + objective.kl * kl
        return loss, measured(value, torch.exp(old_error - error), clipped, kl, torch.zeros_like(kl))

    def wanted_states(self) -> Tensor:
        """The re-noised images that there is something to learn from [n]: groups without spread cost nothing."""
        prompts = self.renoised.leaves // self.forest.leaves_per_prompt
        return torch.arange(len(prompts))[self.told[prompts] | self.objective.needs_reference]

    def _reference(self, x: Tensor, sigma, rows: Tensor) -> Tensor:
        with torch.no_grad(), self.velocity.reference():
            return self.velocity(x, sigma, rows)

    def _told(self, each: Tensor, prompts: Tensor) -> Tensor:
        """Losses of states of these prompts [n], 0 where the prompt's images are all alike, unless the base model pulls
        at them: as in a slice of their own, which then costs nothing.
        """
        if self.objective.loss == "regression" and self.objective.needs_reference:
            return each
        return torch.where(self.told[prompts].to(each.device), each, 0.0)

    def _matched(self, layer: int, parents: slice, v: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """The matching loss of every node and how much of it was clipped, once for each of its edges: each [n]."""
        forest, objective = self.forest, self.objective
        if objective.loss == "regression":
            target = regression_targets(objective, forest, self.leaf, layer, parents, reference)
            each = ((v - target) ** 2).flatten(1).mean(1)
            clipped = torch.zeros_like(each)
        else:
            rows, x = forest.leaves_below(layer, parents), forest.states[layer][parents]
            sigma = x.new_full((len(x),), forest.sigma(layer)[0])
            goal = (x.unsqueeze(1) - forest.leaves[rows].unflatten(0, (len(x), -1))) / forest.sigma(layer)[0]
            advantage = self.leaf[rows].view(len(x), -1).to(v)
            each, clipped = matched(objective, v, forest.velocities[layer][parents], goal, advantage, sigma, reference)
        per_prompt = len(forest.states[layer]) // len(self.told)
        each = self._told(each, torch.arange(parents.start, parents.stop) // per_prompt)
        return forest.branching * each, forest.branching * clipped

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


def measured(
    loss: Tensor, ratio: Tensor, clipped: Tensor, kl: Tensor, sft: Tensor, replay: Tensor | None = None
) -> Tensor:
    """A slice's diagnostics [7]: its parts of the loss, KL and supervised term, and the sums of the ratios, of those
    clipped, and of how many there are; last its part of the loss of what is remembered.
    """
    replay = torch.zeros_like(kl) if replay is None else replay
    values = loss, ratio.sum(), clipped.sum(), torch.ones_like(ratio).sum(), kl, sft, replay
    return torch.stack([value.detach().to(ratio) for value in values])


def policy_gradient(
    velocity,
    forest: Forest,
    advantages: list[Tensor],
    objective: Objective,
    *,
    micro_batch: MicroBatch | None = None,
    allowed: Tensor | None = None,
    images: Tensor | None = None,
    renoised: Renoised | None = None,
    replayed: Replayed | None = None,
    shared: bool = True,
    check: Callable[[], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Add the gradient of the loss over all window edges, and over all re-noised images where the objective learns from
    them, to the parameters; returns the loss and its diagnostics.

    advantages: per layer, [P * trees * branching^(layer+1)]; the last layer's are also the leaves' values for clip
    ranges and LayerTuning-RL. With the rollout's micro_batch the slices are the rollout's own, so that a bf16 model
    scores with the batch shapes it sampled with. Slices with nothing to learn are skipped. Graphs the rollout retained
    are used up.
    allowed: prompts whose best leaf may be imitated [P], default all. images: [P, C, H, W], for target "images".
    renoised: of matching.renoise, where the objective learns from them; the same of all inner updates, for it keeps the
    velocities of the first.
    replayed: remembered pictures (replay.states) to imitate besides.
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
    refuse_unusable(forest, objective, renoised)
    edges = int(ranks.total(sum(a.numel() for a in advantages))) if objective.on_window else 0
    states = int(ranks.total(len(renoised.x) if renoised is not None else 0)) if objective.on_renoised else 0
    loss_of = None
    if forest.prompts:
        loss_of = _Loss(velocity, forest, advantages, objective, allowed, images, edges, renoised, states)
    totals = []  # diagnostics per slice, on the device until the end

    def idle() -> None:
        if ranks.lockstep:
            _idle(velocity, forest, objective, parameters)

    def learn(loss: Callable[[], tuple[Tensor, Tensor]]) -> None:
        if check is not None:
            check()
        with velocity.grad():
            value, diagnostics = loss()
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients):  # only now: a slice that failed has left nothing behind
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        totals.append(diagnostics)

    def nodes(layer: int, first: int, last: int) -> None:
        parents = slice(first, last)
        kept = forest.graphs.pop((layer, first), None)
        if loss_of.is_empty(layer, parents):
            return idle()

        def loss() -> tuple[Tensor, Tensor]:
            v = kept
            if v is None or len(v) != last - first:
                v = velocity(
                    forest.states[layer][parents].repeat_interleave(copies, 0),
                    forest.sigma(layer)[0],
                    forest.rows(layer)[parents].repeat_interleave(copies),
                )
            return loss_of(layer, parents, v)

        learn(loss)

    def noisy_images(sigma: float, chosen: Tensor) -> None:
        def loss() -> tuple[Tensor, Tensor]:
            return loss_of.of_renoised(chosen, velocity(renoised.x[chosen], sigma, renoised.rows[chosen]))

        learn(loss)

    def remembered(sigma: float, chosen: Tensor) -> None:
        def loss() -> tuple[Tensor, Tensor]:
            value = replayed.loss(chosen, velocity(replayed.x[chosen], sigma, replayed.rows[chosen]))
            none, no_ratios = torch.zeros_like(value), value.new_zeros(0)
            return value, measured(none, no_ratios, no_ratios, none, none, value)

        learn(loss)

    batch = micro_batch or MicroBatch()

    def each(count: int, work: Callable[[int, int], None]) -> None:
        calls = -(-count // (batch.size or max(count, 1)))
        missing = ranks.most(calls) - calls if ranks.lockstep else 0
        batch.run(count, work)
        for _ in range(missing):  # as many model calls as the process with the most
            idle()

    def at_each(levels: Tensor, sigmas: Tensor, chosen: Tensor, work: Callable[[float, Tensor], None]) -> None:
        """One level at a time, for conditioning may begin or end at one. sigmas: of the chosen states."""
        for level in levels:
            own = chosen[sigmas == level]
            each(len(own), lambda first, last: work(float(level), own[first:last]))

    with ranks.together():
        for layer in range(forest.depth) if objective.on_window else ():
            each(len(forest.states[layer]), partial(nodes, layer))
        if objective.on_renoised:
            wanted = loss_of.wanted_states() if loss_of is not None else torch.zeros(0, dtype=torch.long)
            sigmas = renoised.sigmas[wanted] if len(wanted) else wanted
            at_each(forest.sigmas[:-1], sigmas, wanted, noisy_images)
        if replayed is not None:
            at_each(replayed.sigmas.unique(), replayed.sigmas, torch.arange(len(replayed.x)), remembered)
    forest.graphs.clear()
    own = torch.stack(totals).double().sum(0).tolist() if totals else [0.0] * 7
    loss, ratio, clipped, scored, kl, sft, replay = map(sum, zip(*ranks.gather(own)))
    return {
        "loss": loss,
        "ratio_mean": ratio / scored if scored else 1.0,
        "clip_frac": clipped / scored if scored else 0.0,
        "kl": kl,
        "sft_loss": sft,
        **({"replay_loss": replay} if replayed is not None else {}),
        "edges": edges + states,
        "edges_trained": int(scored),
    }


def refuse_unusable(forest: Forest, objective: Objective, renoised: Renoised | None) -> None:
    if forest.graphs and not objective.on_window:
        raise ValueError(NOTHING_TO_RETAIN)
    if forest.prompts and (renoised is not None) != objective.on_renoised:
        raise ValueError("Re-noised images (matching.renoise) are given to objectives that learn from them, and only.")


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
    ratio_first, skipped, metrics, restore, seen = 1.0, 0, {}, None, {}
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
                    seen = power(parameters, optimizer) if inner == 0 else seen
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
        **seen,
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
