"""What an iteration costs, counted in closed form before anything runs."""

import math

from . import windows


def nodes(depth: int, branching: int) -> int:
    """Window nodes that need a model forward: N = 1 + b + ... + b^(w-1) = (b^w - 1)/(b - 1)."""
    return sum(branching**k for k in range(depth))


def tail_steps(remaining: int, tail: float) -> int:
    """ODE steps taken after the window when `remaining` are scheduled: ceil(tail * remaining)."""
    return math.ceil(round(tail * remaining, 9))


def forwards(
    steps: int, window_start: int, depth: int, branching: int, trees: int = 1, tail: float = 1.0, shared: bool = True
) -> tuple[int, int]:
    """(rollout, update) model forwards per prompt without CFG (with CFG: twice as many).

    An update forward has a backward of its own. shared: siblings share their parent's forward (N of them);
    otherwise every edge is forwarded again (branching * N). A forest of one-leaf trees (branching 1, trees = K) is
    the independent baseline.
    """
    n = nodes(depth, branching)
    leaves = branching**depth
    rollout = window_start + n + tail_steps(steps - window_start - depth, tail) * leaves
    return trees * rollout, trees * (n if shared else branching * n)


def learning_forwards(shape, objective, inner_updates: int = 1, retained: bool = False) -> int:
    """Update forwards per prompt without CFG, of all inner updates of an objective; a prompt whose images all score
    alike costs nothing where the objective needs no reference.

    A state is a window node or a re-noised image, and has a backward of its own; with a reference (KL, or an anchor)
    it also costs a forward without. retained: the window's graphs were kept from sampling, so that the first of the
    inner updates need not forward its nodes.
    """
    window = shape.trees * nodes(shape.depth, shape.branching) * objective.on_window
    renoised = shape.leaves * objective.per_image * objective.on_renoised
    return inner_updates * (window + renoised) * (2 if objective.needs_reference else 1) - window * retained


def expected_forwards(shape, steps: int) -> tuple[float, int]:
    """(rollout, update) forwards per prompt, the rollout averaged over the window's distribution."""
    last = windows.last_start(steps, shape.depth)
    if shape.window == "random":
        share = windows.probabilities(steps, shape.depth, shape.ratio).tolist()
    elif shape.window == "fixed":
        share = [float(i == windows.start("fixed", 0, steps, shape.depth, fixed=shape.fixed)) for i in range(last + 1)]
    else:
        share = [1 / (last + 1)] * (last + 1)
    costs = [forwards(steps, i, shape.depth, shape.branching, shape.trees, shape.tail) for i in range(last + 1)]
    return sum(p * cost[0] for p, cost in zip(share, costs)), costs[0][1]


def summary(shape, steps: int) -> str:
    """One readable line on what a tree shape costs, against independent samples with as many leaves and the same
    window.
    """
    rollout, update = expected_forwards(shape, steps)
    independent = shape.leaves * steps, shape.leaves * shape.depth
    return (
        f"{shape.leaves} images per prompt; {steps} steps: about {rollout:.0f} model forwards to sample and {update} "
        f"to learn per prompt. Independent images: {independent[0]} and {independent[1]}, "
        f"{sum(independent) / (rollout + update):.1f}x as many (CFG doubles both)."
    )
