"""Exponential moving average of the policy's adapters: the steadier policy that is looked at and saved (flow_grpo's,
METHOD 7).
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """shadow += (1 - d) * (parameter - shadow) at every update, in float32, with d = min(decay, (1 + n) / (10 + n)).

    n counts the updates before this one, so that a young average follows fast. decay: higher = steadier, slower. Each
    average lies on the device that its parameter was on last.
    """

    def __init__(self, adapters_or_parameters, decay: float = 0.9):
        if not 0 <= decay < 1:
            raise ValueError(f"The moving average needs a decay from 0 to below 1, not {decay}.")
        parameters = getattr(adapters_or_parameters, "parameters", None)
        self.parameters: list[nn.Parameter] = list(parameters() if parameters else adapters_or_parameters)
        self.decay = decay
        self.active = False  # inside applied()
        self.reset()

    def reset(self) -> None:
        """Begin anew from the parameters as they are."""
        self.steps = 0
        with torch.inference_mode(False), torch.no_grad():
            self.shadow: list[Tensor] = [p.detach().to(torch.float32, copy=True) for p in self.parameters]

    def update(self) -> None:
        """Count one optimizer step, and move the average."""
        if self.active:
            raise RuntimeError("The moving average cannot learn from itself: update() was called inside applied().")
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        with torch.inference_mode(False), torch.no_grad():
            self.shadow = [
                shadow.to(p.device).lerp_(p.float(), 1 - decay) for shadow, p in zip(self.shadow, self.parameters)
            ]

    @contextmanager
    def applied(self):
        """The parameters have the averaged values inside, and exactly their own again after it, however it ends."""
        with torch.inference_mode(False), torch.no_grad():
            own, before = [p.detach().clone() for p in self.parameters], self.active
        try:
            self.active = True
            _fill(self.parameters, self.shadow)
            yield
        finally:
            _fill(self.parameters, own)
            self.active = before

    def state_dict(self) -> dict:
        return {"steps": self.steps, "shadow": [shadow.to("cpu", copy=True) for shadow in self.shadow]}

    def load_state_dict(self, state: dict) -> None:
        """Take over average and count, not the settings.

        Raises ValueError, and changes nothing, unless every shape fits.
        """
        found, wanted = ([list(t.shape) for t in tensors] for tensors in (state["shadow"], self.parameters))
        if found != wanted:
            raise ValueError(
                f"The moving average does not fit these adapters: {len(found)} tensors for {len(wanted)} parameters, "
                "or of other sizes."
            )
        with torch.inference_mode(False), torch.no_grad():
            self.steps, self.shadow = (
                state["steps"],
                [t.to(p.device, torch.float32, copy=True) for t, p in zip(state["shadow"], self.parameters)],
            )


def _fill(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for parameter, value in zip(parameters, values):
            parameter.copy_(value)
