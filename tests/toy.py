"""A velocity model for exact checks in float64: v = W2 tanh(W1 [x, sigma, prompt]) with a trainable delta."""

from contextlib import contextmanager

import torch

from core.model import Velocity


class ToyVelocity(Velocity):
    """The interface of core's velocity models, on a latent of any shape, in float64 unless told otherwise."""

    def __init__(self, elements: int, dtype=torch.float64, hidden: int = 8, prompts: int = 4):
        make = torch.Generator().manual_seed(0)
        self.w1 = torch.randn(hidden, elements + 2, generator=make, dtype=dtype) / elements**0.5
        self.w2 = torch.randn(elements, hidden, generator=make, dtype=dtype) / hidden**0.5
        self.texts = torch.randn(prompts, generator=make, dtype=dtype)
        self.delta = (0.1 * torch.randn(elements, hidden, generator=make, dtype=dtype)).requires_grad_()
        self.enabled, self.forwards, self.calls = True, 0, []
        self.shape, self.device = (1, 1, elements), torch.device("cpu")

    def parameters(self):
        return [self.delta]

    def weights(self):
        return [self.w1, self.w2, self.texts, self.delta]

    def free_memory(self):
        return 0.0

    @contextmanager
    def grad(self):
        with torch.enable_grad():
            yield

    @contextmanager
    def reference(self):
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def __call__(self, x, sigma, rows):
        self.forwards += len(x)
        self.calls.append(len(x))
        flat = x.flatten(1).to(self.w1.dtype)
        rows = torch.as_tensor(rows)
        extra = torch.stack([torch.as_tensor(sigma, dtype=flat.dtype).expand(len(x)), self.texts[rows]], dim=1)
        weight = self.w2 + self.delta if self.enabled else self.w2
        return (torch.tanh(torch.cat([flat, extra], 1) @ self.w1.T) @ weight.T).view(x.shape)
