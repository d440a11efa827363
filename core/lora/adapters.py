"""Trainable low-rank adapters on a frozen network's Linear layers, and their file form (LoRA, arXiv 2106.09685)."""

import math
import re
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..patterns import search

# Presets: a layer is adapted where the pattern is found in its name, as ComfyUI or diffusers name it. FLUX's single
# blocks fuse attention and MLP into one layer each (linear1, linear2), so "attention" has to take them whole.
ATTENTION = r"(attn\d*|attention)\.|single_blocks\.\d+\.linear[12]$|single_transformer_blocks\.\d+\.proj_(mlp|out)$"
MLP = r"(blocks|layers|refiner)\.\d+\.(.+[._])?(mlp(C|X|_x|_y)?|ff|ffn|ff_[it]|ff_context|feed_forward)\."
TARGETS = {"attention": ATTENTION, "attention+mlp": f"{ATTENTION}|{MLP}", "all linear": r""}


class LoRA(nn.Module):
    """The delta `alpha/rank * up(down(x))` of one Linear layer; zero until trained."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dtype: torch.dtype,
        generator: torch.Generator,
    ):
        super().__init__()
        bound = 1 / math.sqrt(in_features)  # kaiming-uniform with a = sqrt(5), as the peers start
        self.down = nn.Parameter(torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator).to(dtype))
        self.up = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype))
        self.alpha = float(alpha)  # a constant: were it trainable, the saved file would not mean what was trained

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], computed in the adapter's dtype, returned in x's."""
        return F.linear(_down(x, self.down) * self.scale, self.up).to(x.dtype)

    def added_to(self, output: Tensor, x: Tensor) -> Tensor:
        """output + forward(x) for a layer's fresh output, in one pass over it where the dtypes allow."""
        if output.dtype != self.up.dtype or x.dtype != self.up.dtype:
            delta = self(x).to(output.dtype)
            return output + delta if torch.is_grad_enabled() else output.add_(delta)
        hidden = F.linear(x, self.down)
        flat, hidden = output.flatten(0, -2), hidden.flatten(0, -2)
        add = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_  # the same numbers, bit for bit
        return add(flat, hidden, self.up.t(), alpha=self.scale).view(output.shape)


def _down(x: Tensor, down: Tensor) -> Tensor:
    """x [..., in] -> [..., rank] in down's dtype. For the backward pass x is kept as it is: a float32 copy of every
    adapted layer's input would be a fifth of what FLUX in bfloat16 keeps.
    """
    if x.dtype == down.dtype or not torch.is_grad_enabled():
        return F.linear(x.to(down.dtype), down)
    return _KeepsInput.apply(x, down)


class _KeepsInput(torch.autograd.Function):
    """F.linear(x.to(down.dtype), down)."""

    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, down)
        return F.linear(x.to(down.dtype), down)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, down = ctx.saved_tensors
        of_x = (gradient @ down).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_down = gradient.flatten(0, -2).t() @ x.flatten(0, -2).to(down.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_down


class Adapters:
    """One LoRA per chosen Linear layer of a network, by the layer's name.

    The network holds nothing of them but forward hooks, and those only between `inject` and `eject`.
    """

    def __init__(self, loras: dict[str, LoRA]):
        self.loras = loras
        self.enabled = True
        self._handles: list = []

    @classmethod
    def create(
        cls,
        root: nn.Module,
        rank: int,
        alpha: float,
        targets: str = "attention",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        presets: dict[str, str] = TARGETS,
    ) -> "Adapters":
        """Fresh adapters for `root`. targets: a key of presets, or a regular expression searched in layer names."""
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.inference_mode(False):  # ComfyUI runs nodes in inference mode; tensors of it could never be trained
            return cls(
                {
                    name: LoRA(layer.in_features, layer.out_features, rank, alpha, dtype, generator)
                    for name, layer in choose_layers(root, targets, presets).items()
                }
            )

    @property
    def names(self) -> list[str]:
        return list(self.loras)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for lora in self.loras.values() for parameter in (lora.down, lora.up)]

    def count(self) -> int:
        """Number of trainable values."""
        return sum(p.numel() for p in self.parameters())

    def to(self, device) -> "Adapters":
        """Moves the values and their gradients; the Parameters stay the objects that an optimizer holds."""
        with torch.inference_mode(False), torch.no_grad():
            for parameter in self.parameters():
                if parameter.device != torch.device(device):
                    parameter.data = parameter.data.to(device)
                    parameter.grad = None if parameter.grad is None else parameter.grad.to(device)
        return self

    def inject(self, root: nn.Module) -> None:
        """Add the adapters to the layers of `root`; injecting again moves them there.

        By hooks, not by swapping forwards: whatever else is put on or taken off a layer, and in whatever order, taking
        these off leaves exactly the rest.
        """
        self.eject()
        layers = dict(root.named_modules())
        absent = [name for name in self.loras if name not in layers]
        if absent:
            raise ValueError(
                f"This model has no layer '{absent[0]}' ({len(absent)} of {len(self.loras)} adapted layers are "
                "absent): the adapters belong to another model."
            )
        for name, lora in self.loras.items():
            self._handles.append(layers[name].register_forward_hook(self._hook(lora)))

    def eject(self) -> None:
        """Take the adapters off again; nothing happens where they are not on."""
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, lora: LoRA):
        def add_delta(layer, args, output):
            return lora.added_to(output, args[0]) if self.enabled else None

        return add_delta

    @contextmanager
    def disabled(self):
        """The network is its untuned self inside: the reference policy."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def state_dict(self, prefix: str = "diffusion_model.") -> dict[str, Tensor]:
        """The file form that ComfyUI's LoRA loaders read: contiguous CPU copies, no two sharing memory."""
        state = {}
        with torch.inference_mode(False), torch.no_grad():
            for name, lora in self.loras.items():
                state[f"{prefix}{name}.lora_up.weight"] = lora.up.detach().to("cpu", copy=True).contiguous()
                state[f"{prefix}{name}.lora_down.weight"] = lora.down.detach().to("cpu", copy=True).contiguous()
                state[f"{prefix}{name}.alpha"] = torch.tensor(lora.alpha)
        return state

    def load_state_dict(self, state: dict[str, Tensor], prefix: str = "diffusion_model.") -> None:
        """Take over the values of `state_dict`.

        Raises ValueError, and changes nothing, unless every key and shape fits.
        """
        weights, alphas = {}, {}
        for name, lora in self.loras.items():
            weights[f"{prefix}{name}.lora_up.weight"] = lora.up
            weights[f"{prefix}{name}.lora_down.weight"] = lora.down
            alphas[f"{prefix}{name}.alpha"] = lora
        own = weights.keys() | alphas.keys()
        resized = {
            f"{key} {list(state[key].shape)} instead of {list(p.shape)}"
            for key, p in weights.items()
            if key in state and state[key].shape != p.shape
        }
        problems = [
            f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (
                ("missing", own - state.keys()),
                ("unknown", state.keys() - own),
                ("of another size", resized),
            )
            if keys
        ]
        if problems:
            raise ValueError(f"The LoRA does not fit this model and its targets; keys: {'; '.join(problems)}.")
        with torch.inference_mode(False), torch.no_grad():
            for key, parameter in weights.items():
                parameter.copy_(state[key])
            for key, lora in alphas.items():
                lora.alpha = float(state[key])


def choose_layers(root: nn.Module, targets: str, presets: dict[str, str] = TARGETS) -> dict[str, nn.Module]:
    """The Linear layers of `root` that `targets` names, or a ValueError that shows what there is.

    A layer counts by its in_features and out_features: packed weights (fp8, GGUF) have other classes and shapes.
    """
    linear = {
        name: layer
        for name, layer in root.named_modules()
        if isinstance(getattr(layer, "in_features", None), int)
        and isinstance(getattr(layer, "out_features", None), int)
    }
    examples = ", ".join(list(linear)[:: max(1, len(linear) // 5)][:5]) or "none"
    if targets in presets:
        chosen = {name: layer for name, layer in linear.items() if re.search(presets[targets], name)}
    else:
        try:
            _, found = search(targets, list(linear))
        except ValueError as error:
            raise ValueError(
                f"The target pattern '{targets[:60]}' is not a regular expression that can be used ({error}); layers "
                f"here are, for example: {examples}."
            ) from None
        chosen = {name: linear[name] for name, matches in zip(linear, found) if matches.count}
    if not chosen:
        raise ValueError(
            f"The target pattern '{targets[:60]}' matches no Linear layer; layers here are, for example: {examples}."
        )
    return chosen
