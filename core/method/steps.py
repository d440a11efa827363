"""One step from sigma to sigma_next: the Euler ODE step and four Gaussian steps, each with its log-probability.

Notation: x = (1-s) x0 + s eps, velocity v = eps - x0, so that x0h = x - s v is the denoised prediction and
eh = x + (1-s) v the noise prediction. s = sigma, n = sigma_next, dt = n - s < 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("ode", "flow_sde", "dance_sde", "cps", "exact")
ONE = 1 - 1e-5  # a sigma from here on is 1: float32 schedules begin with 0.99999994 at many sizes of FLUX


@dataclass
class Step:
    latent: Tensor  # [B, ...] the sampled (or given) next latent
    mean: Tensor  # [B, ...]
    std: Tensor  # [B, 1, ...] standard deviation of the step; zero where the step is deterministic
    log_prob: Tensor  # [B] log-density per latent element, averaged over the elements; zero where std is zero


def step(
    kind: str,
    x: Tensor,
    v: Tensor,
    sigma,
    sigma_next,
    noise_level,
    sigma_max,
    noise: Tensor | None = None,
    next_latent: Tensor | None = None,
    rho_min: float = 0.0,
) -> Step:
    """Sample the next latent, or score a given one. One function does both, so the ratio starts at exactly 1.

    x, v: [B, ...] latent and velocity. sigma, sigma_next, noise_level: number or [B].
    sigma_max: sigmas[1] of the schedule; stands in for sigma in `1 - sigma` where sigma is 1 (flow_sde).
    noise: standard normal, shape of x; drawn from torch's global generator when neither it nor next_latent is given.
    next_latent: score this one instead of sampling.
    rho_min: floor of the `exact` step's correlation where sigma is 1 (there the exact value is 0: a fresh start).

    Works in float64 when x is float64, else in float32.

    kinds: `ode` Euler; `flow_sde` Flow-GRPO (arXiv 2505.05470); `dance_sde` DanceGRPO (2505.07818), where
    noise_level is eta; `cps` coefficient-preserving sampling (2509.05952); `exact` the exact transition of
    flow_sde for a frozen x0h (derived in docs/method.md; since published as PRECISE, arXiv 2605.23522).
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown step kind '{kind}': choose one of {', '.join(KINDS)}.")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, v = x.to(dtype), v.to(dtype)
    s, n, a = (_column(value, x) for value in (sigma, sigma_next, noise_level))
    mean, std = _moments(kind, x, v, s, n, a, float(sigma_max), rho_min)
    if next_latent is None:
        if noise is None:
            noise = torch.randn_like(x)
        latent = mean + std * noise.to(dtype)
    else:
        latent = next_latent.to(dtype)
    return Step(latent, mean, std, log_prob(latent, mean, std))


def log_prob(latent: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density with constants, mean over all but the first dimension: [B]. Zero where std is zero.

    The mean (not the sum) over elements is the convention of Flow-GRPO and its descendants; clip ranges are in
    this unit.
    """
    random = std > 0
    safe = torch.where(random, std, torch.ones_like(std))
    density = -(((latent - mean) / safe) ** 2) / 2 - torch.log(safe) - math.log(2 * math.pi) / 2
    return torch.where(random, density, torch.zeros_like(density)).flatten(1).mean(1)


def _moments(kind, x, v, s, n, a, sigma_max, rho_min) -> tuple[Tensor, Tensor]:
    dt = n - s
    if kind == "ode":
        return x + v * dt, torch.zeros_like(s)
    noise_prediction = x + (1 - s) * v
    if kind in ("flow_sde", "dance_sde"):
        if kind == "flow_sde":
            g = a * torch.sqrt(s / (1 - torch.where(s >= ONE, torch.full_like(s, sigma_max), s)))
        else:
            g = a
        return x + dt * (v + g**2 / (2 * s) * noise_prediction), g * torch.sqrt(-dt)
    rho = torch.cos(a * (math.pi / 2)) if kind == "cps" else exact_correlation(s, n, a, rho_min)
    denoised = x - s * v
    return (1 - n) * denoised + n * rho * noise_prediction, n * torch.sqrt(1 - rho**2)


def exact_correlation(s: Tensor, n: Tensor, a: Tensor, rho_min: float = 0.0) -> Tensor:
    """rho = exp(-a^2 h / 2), h the fall of log(s/(1-s)): how much of the old noise the exact step keeps.

    At s = 1 the fall is infinite and rho would be 0 for every a > 0: rho_min is its floor there.
    """
    h = torch.logit(torch.where(s >= ONE, torch.ones_like(s), s)) - torch.logit(n)
    rho = torch.exp(-(a**2) * h / 2)
    rho = torch.where((n == 0) | (a == 0), torch.ones_like(rho), rho)
    return torch.where(s >= ONE, rho.clamp_min(rho_min), rho)


def _column(value, x: Tensor) -> Tensor:
    """A number or [B] as a tensor that broadcasts against x: [B, 1, ...]."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return value.reshape(-1, *[1] * (x.dim() - 1))
