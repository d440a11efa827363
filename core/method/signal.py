"""How much of an iteration's gradient is signal: |E g|^2 / tr var g, from what Adam keeps anyway."""

import math

import torch

OVER = 20  # iterations whose gradients are averaged


def power(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """{"grad_signal": mean gradient of the iterations before, times this one, "grad_power": |g|^2} of the gradients
    that the parameters have now; empty before Adam's second step, and where its moments are not kept in full.

    The noise of earlier iterations is independent of this one's, so that the product is an unbiased estimate of
    |E g|^2 as far as E g stays what it was over Adam's memory (some 10 iterations); |g|^2 is one of |E g|^2 + tr var g.
    No forward, no backward and no memory of its own (ours; the gradient noise scale of McCandlish et al., arXiv
    1812.06162, compares batches of two sizes instead).
    """
    products, powers = [], []
    betas = {id(p): group["betas"][0] for group in optimizer.param_groups for p in group["params"] if "betas" in group}
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if parameter.grad is None or not {"exp_avg", "step"} <= state.keys():
            continue
        gradient, unbiased = parameter.grad.float(), 1 - betas[id(parameter)] ** float(state["step"])
        products.append((state["exp_avg"].float() * gradient).sum() / unbiased)
        powers.append(gradient.square().sum())
    if not products:
        return {}
    signal, total = torch.stack([torch.stack(products), torch.stack(powers)]).double().sum(1).tolist()
    return {"grad_signal": signal, "grad_power": total}


def snr(rows: list[dict]) -> float:
    """|E g|^2 / tr var g of one iteration's gradient, over the newest metrics rows (`power`); NaN where that cannot be
    told. Around 0, and also below, where the signal is too weak to be seen in so few iterations.

    A gradient over n times as many prompts has n times the ratio, so that it is 1 at prompts per iteration / ratio:
    the noise scale in prompts, beyond which larger iterations are wasted.
    """
    seen = [row for row in rows[-OVER:] if math.isfinite(row.get("grad_power", math.nan))]
    signal, total = (sum(row[key] for row in seen) for key in ("grad_signal", "grad_power"))
    return signal / (total - signal) if total > signal else math.nan
