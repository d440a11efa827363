"""LoRA adapters that are injected into a network's Linear layers and ejected again, without touching its weights."""
import math
import re
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Over module names of ComfyUI's and diffusers' FLUX and SD3.
_ATTENTION = r"\.(img_attn|txt_attn|attn2?)\.(qkv|q|k|v|proj|to_q|to_k|to_v|to_out\.0|to_add_out|add_[qkv]_proj)$|\.(linear1|linear2|proj_mlp|proj_out)$"
_MLP = r"\.(img_mlp|txt_mlp|mlp)\.(\d|fc1|fc2)$|\.(ff|ff_context)\.net\.(0\.proj|2)$"
TARGETS = {"attention": _ATTENTION, "attention+mlp": f"{_ATTENTION}|{_MLP}", "all linear": r""}


class LoRA(nn.Module):
    """The low-rank addition to one Linear layer: (alpha / rank) up(down(x)). Zero until it has learned something."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, dtype: torch.dtype, generator: torch.Generator):
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform(a=sqrt(5)), the usual start
        self.down = nn.Parameter(((torch.rand(rank, inputs, generator=generator) * 2 - 1) * bound).to(dtype))
        self.up = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype))
        self.alpha = float(alpha)
        self.scale = float(alpha) / rank

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], computed in the adapter's dtype, returned in x's."""
        hidden = nn.functional.linear(x.to(self.down.dtype), self.down)
        return (nn.functional.linear(hidden, self.up) * self.scale).to(x.dtype)


def target_names(root: nn.Module, targets: str) -> list[str]:
    """Names of the Linear modules of `root` that a preset of TARGETS, or a regular expression, selects."""
    linear = [name for name, module in root.named_modules() if isinstance(module, nn.Linear)]
    try:
        pattern = re.compile(TARGETS.get(targets, targets))
    except re.error as error:
        raise ValueError(f"The target pattern '{targets}' is not a regular expression: {error}.") from error
    chosen = [name for name in linear if pattern.search(name)]
    if not chosen:
        raise ValueError(f"The target pattern '{targets}' matches none of the model's {len(linear)} linear layers; some of them: "
                         f"{', '.join(linear[:: max(1, len(linear) // 5)][:5])}.")
    return chosen


class Adapters:
    """The LoRAs of one network, by module name."""

    def __init__(self, loras: dict[str, LoRA]):
        self.loras = loras
        self.enabled = True
        self._restore: list[tuple[nn.Module, object]] = []  # (module, what its __dict__ had under "forward")

    @classmethod
    def create(cls, root: nn.Module, rank: int, alpha: float, targets: str = "attention", dtype: torch.dtype = torch.float32,
               seed: int = 0) -> "Adapters":
        """Fresh adapters for `root`; the same seed gives the same values on every machine."""
        generator = torch.Generator("cpu").manual_seed(seed)
        modules = dict(root.named_modules())
        return cls({name: LoRA(modules[name].in_features, modules[name].out_features, rank, alpha, dtype, generator)
                    for name in target_names(root, targets)})

    @property
    def names(self) -> list[str]:
        return list(self.loras)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for lora in self.loras.values() for parameter in (lora.down, lora.up)]

    def count(self) -> int:
        """Number of trainable values."""
        return sum(parameter.numel() for parameter in self.parameters())

    def to(self, device) -> "Adapters":
        for lora in self.loras.values():
            lora.to(device)
        return self

    def inject(self, root: nn.Module) -> None:
        """Make the network's layers add their LoRA. Twice is once."""
        if self._restore:
            return
        modules = dict(root.named_modules())
        for name, lora in self.loras.items():
            module = modules[name]
            self._restore.append((module, module.__dict__.get("forward")))
            module.forward = self._with_lora(module.forward, lora)

    def _with_lora(self, plain, lora: LoRA):
        def forward(x, *args, **kwargs):
            output = plain(x, *args, **kwargs)
            return output + lora(x) if self.enabled else output
        return forward

    def eject(self) -> None:
        """Give every layer back the forward it had. Twice is once."""
        while self._restore:
            module, forward = self._restore.pop()
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward

    @contextmanager
    def disabled(self):
        """The reference policy: the network without its adapters."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def state_dict(self, prefix: str = "diffusion_model.") -> dict[str, Tensor]:
        """The adapters as a LoRA file of ComfyUI: contiguous copies on the CPU, no two sharing memory."""
        state = {}
        for name, lora in self.loras.items():
            state[f"{prefix}{name}.lora_up.weight"] = lora.up.detach().to("cpu", copy=True).contiguous()
            state[f"{prefix}{name}.lora_down.weight"] = lora.down.detach().to("cpu", copy=True).contiguous()
            state[f"{prefix}{name}.alpha"] = torch.tensor(lora.alpha)
        return state

    def load_state_dict(self, state: dict[str, Tensor], prefix: str = "diffusion_model.") -> None:
        """Take over the values of state_dict(). Anything missing, unknown or of another size is refused, and nothing changed."""
        own = self.state_dict(prefix)
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ValueError(f"The LoRA does not fit this model and its targets: {len(missing)} keys are missing ({', '.join(missing[:2]) or 'none'}), "
                             f"{len(unknown)} are unknown ({', '.join(unknown[:2]) or 'none'}).")
        wrong = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in own if state[key].shape != own[key].shape]
        if wrong:
            raise ValueError(f"The LoRA has other sizes than this model's adapters: {'; '.join(wrong[:2])}.")
        with torch.no_grad():
            for name, lora in self.loras.items():
                lora.up.copy_(state[f"{prefix}{name}.lora_up.weight"])
                lora.down.copy_(state[f"{prefix}{name}.lora_down.weight"])
                lora.alpha = float(state[f"{prefix}{name}.alpha"])
                lora.scale = lora.alpha / lora.down.shape[0]
