"""The loss of a set of edges."""
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Objective:
    """Clipped GRPO. Clip ranges are in units of the mean log-probability per latent element (docs/method.md)."""
    clip_low: float = 1e-4   # the ratio may fall to 1 - clip_low before a negative-advantage edge stops pulling
    clip_high: float = 1e-4  # ... and rise to 1 + clip_high before a positive-advantage edge stops


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_low: float,
                      clip_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """-min(r A, clip(r, 1-clip_low, 1+clip_high) A) per edge [E], the ratios r [E], and which edges were clipped [E]."""
    ratio = torch.exp(log_prob - old_log_prob)
    plain = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    return -torch.minimum(plain, clipped), ratio.detach(), (clipped < plain).detach()
