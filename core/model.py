"""The two seams: what rollout, update and Trainer ask of a model, and what the Trainer asks of its host.

Both hosts (`core/hosts`) and the tests' toy model subclass these; tests/test_contracts.py checks them.
"""

from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

DECODED_AT_ONCE = 8  # images between two looks at the stop button


class Velocity(Protocol):
    """A flow-matching network with a trainable LoRA, and a fixed set of prompts: `velocity(x, sigma, rows) -> v`."""

    shape: tuple[int, ...]  # of a latent: (C, H, W), or (C, 1, H, W) where the model's have a time
    device: torch.device
    forwards: int  # latents that went through the network so far, twice where CFG runs a second pass

    def __call__(self, x: Tensor, sigma, rows) -> Tensor:
        """x: [B, *shape] latents as the network sees them. sigma: number or [B], in (0, 1]. rows: prompt of each
        latent [B].

        -> velocity eps - x0, [B, *shape] in float32. Without gradient unless called inside grad().
        """

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """What is trained."""

    def weights(self) -> list[Tensor]:
        """Every tensor of the network and the adapters that outlives a forward."""

    def grad(self) -> AbstractContextManager:
        """Gradients of the parameters are recorded inside; call backward inside as well."""

    def reference(self) -> AbstractContextManager:
        """The untuned model: the adapters do nothing inside."""

    def fingerprint(self) -> int:
        """Changes when any weight has been moved, replaced or trained: graphs recorded before are then of no use."""
        return hash(tuple((p.data_ptr(), p._version) for p in self.weights()))

    def graph_bytes(self) -> float | None:
        """Bytes that the graph of one latent keeps where that cannot be measured (checkpointing); None = measure it."""
        return None

    def free_memory(self) -> float:
        """Bytes that may still be used on the device; 0 where that is not known."""


def by_kind(kinds: list[Hashable], call: Callable[[list[int]], Tensor]) -> Tensor:
    """One call for the latents of each kind, and the results in the latents' order: [B, ...].

    Texts of different length do not fit into one call; padded, they would change each other's images.
    kinds: of each latent [B]. call: places of some latents -> their results.
    """
    places: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    parts = [call(own) for own in places.values()]
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([place for own in places.values() for place in own]).argsort()
    return torch.cat(parts)[order.to(parts[0].device)]


class Host(Protocol):
    """Where a model lives: ComfyUI (hosts/comfy_host.py) or diffusers (hosts/diffusers_models.py)."""

    sigmas: Tensor  # [T+1] the sampling schedule, falling to 0, on the CPU

    def session(self, prompts: list[str], micro_batch) -> AbstractContextManager[Velocity]:
        """The policy with these prompts as conditioning rows, ready to sample and to train; the model is left as it
        was.

        micro_batch: core.method.memory.MicroBatch, for the memory estimate.
        """

    def roots(self, velocity: Velocity, noise: Tensor) -> Tensor:
        """Noise [B, *shape] -> latents at sigmas[0], on the model's device."""

    def decode(self, velocity: Velocity, leaves: Tensor) -> Tensor:
        """Denoised latents [B, *shape] as the network sees them -> images [B, H, W, 3] in 0..1 on the CPU."""
