"""Where the SDE window stands in this iteration. One window serves all prompts (and ranks) of an iteration."""

import torch

MODES = ("random", "sliding", "fixed")


def last_start(steps: int, width: int) -> int:
    """The last step a window of `width` steps may start at: the last two sampling steps are never inside.

    Their noise is tiny, so one log-probability there outweighs all others (see docs/method.md).
    """
    if width < 1:
        raise ValueError(f"The window must be at least 1 step wide, not {width}.")
    last = steps - width - 2
    if last < 0:
        raise ValueError(
            f"A window of {width} steps does not fit into {steps} sampling steps: the last two steps are never "
            f"trained, so use at least {width + 2} steps or a smaller tree depth."
        )
    return last


def probabilities(steps: int, width: int, ratio: float) -> torch.Tensor:
    """Truncated geometric distribution over the window's start, `Pr[i] ~ ratio^i` (TreeGRPO, arXiv 2512.08153).

    The paper's support is i <= steps-width-1; ours ends one earlier (see last_start) and is renormalised.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"The window ratio must be above 0 and at most 1, not {ratio}: lower = earlier windows.")
    weights = torch.tensor(ratio, dtype=torch.float64) ** torch.arange(last_start(steps, width) + 1)
    return weights / weights.sum()


def start(
    mode: str,
    iteration: int,
    steps: int,
    width: int,
    *,
    ratio: float = 0.5,
    stride: int = 1,
    interval: int = 25,
    fixed: int = 0,
    generator: torch.Generator | None = None,
) -> int:
    """First step of the window, 0 .. steps-width-2.

    random: truncated geometric with `ratio`, drawn from `generator` (TreeGRPO).
    sliding: begins at 0, moves by `stride` every `interval` iterations, wraps (MixGRPO, arXiv 2507.21802;
    Dynamic-TreeRPO).
    fixed: always `fixed`.
    """
    last = last_start(steps, width)
    if mode == "random":
        return int(torch.multinomial(probabilities(steps, width, ratio), 1, generator=generator))
    if mode == "sliding":
        if stride < 1 or interval < 1:
            raise ValueError("A sliding window needs a stride and an interval of at least 1.")
        return (iteration // interval) * stride % (last + 1)
    if mode == "fixed":
        if not 0 <= fixed <= last:
            raise ValueError(
                f"The window starts at step {fixed}, outside 0..{last}: {steps} sampling steps with a window of "
                f"{width} leave no other start, since the last two steps are never trained."
            )
        return fixed
    raise ValueError(f"Unknown window mode '{mode}': choose one of {', '.join(MODES)}.")
