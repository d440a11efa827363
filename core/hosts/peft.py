"""ComfyUI's LoRA on a transformer of diffusers, through PEFT's layers.

The values stay in core.lora.adapters's Adapters, under ComfyUI's names and with ComfyUI's shapes, and PEFT's layers
compute with them: parts of one fused layer (q, k, v) share its lora_down and each has its rows of its lora_up. So the
policy has the same parameters as in ComfyUI, learns the same from the same trees at every step, and its state.pt,
optimizer and average go back and forth between the two.
"""

import re
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..lora.adapters import Adapters
from ..lora.layer_names import is_swapped, network_class, parts_of
from ..lora.networks import NETWORKS

NAME = "treerpo"  # of the adapter in PEFT's layers


def new_adapters(
    transformer: nn.Module, rank: int, alpha: float, targets: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Adapters:
    """What Adapters.create gives for ComfyUI's network of the same sizes: the same names, shapes and first values."""
    return Adapters.create(skeleton(transformer), rank, alpha, targets, dtype, seed)


def skeleton(transformer: nn.Module) -> nn.Module:
    """ComfyUI's Linear layers of this transformer, in ComfyUI's order, without weights."""
    layers, root, network = dict(transformer.named_modules()), nn.Module(), network_class(transformer)
    for module in _modules(transformer, network):
        parts = [layers[name] for name in parts_of(module, network) if name in layers]
        if parts and all(isinstance(part, nn.Linear) for part in parts):
            with torch.device("meta"):
                _place(root, module, nn.Linear(parts[0].in_features, sum(part.out_features for part in parts)))
    return root


def _modules(transformer: nn.Module, network: str) -> list[str]:
    """ComfyUI's modules in order, the blocks' with their numbers."""
    found, done = [], set()
    for template, parts in NETWORKS[network].layers.items():
        stack, numbered, _ = template.partition(".#.")
        if not numbered:
            found.append(template)
        elif stack not in done:
            done.add(stack)
            count = len(transformer.get_submodule(parts.partition(".#.")[0]))
            inners = [other for other in NETWORKS[network].layers if other.startswith(f"{stack}.#.")]
            found += [inner.replace("#", str(i)) for i in range(count) for inner in inners]
    return found


def _place(root: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    root.add_module(last, layer)


class Rows(nn.Module):
    """PEFT's lora_B for one part of a fused layer: some rows of its lora_up."""

    def __init__(self, up: nn.Parameter, rows: list[slice]):
        super().__init__()
        self.up, self.rows = up, rows

    @property
    def weight(self) -> Tensor:
        parts = [self.up[rows] for rows in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def shares(module: str, layers: dict[str, nn.Module], network: str) -> dict[str, list[slice]]:
    """The rows of ComfyUI's layer that belong to each of diffusers' modules.

    Modulations of two parts have them in the other order (layer_names.is_swapped).
    """
    found, first = {}, 0
    for name in parts_of(module, network):
        last = first + layers[name].out_features
        found[name], first = [slice(first, last)], last
    if is_swapped(module, network, last, layers[name].in_features):
        found[name] = [slice(last // 2, last), slice(0, last // 2)]
    return found


class Attached:
    """Adapters at work in a transformer, until it is thrown away: what a velocity needs of them."""

    def __init__(self, adapters: Adapters, transformer: nn.Module):
        """Puts PEFT's layers around the transformer's, all at once; ImportError with the pip line where PEFT is
        missing.
        """
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError("Training through diffusers needs the package peft: pip install peft") from error
        self.adapters = adapters
        layers = dict(transformer.named_modules())
        network = network_class(transformer)
        rows = {module: shares(module, layers, network) for module in adapters.loras}
        first = next(iter(adapters.loras.values()))
        transformer.add_adapter(
            LoraConfig(
                r=len(first.down),
                lora_alpha=first.alpha,
                init_lora_weights=False,
                target_modules="|".join(re.escape(name) for found in rows.values() for name in found),
            ),
            NAME,
        )
        self.layers = []
        for module, lora in adapters.loras.items():
            for name, own in rows[module].items():
                layer = transformer.get_submodule(name)
                layer.lora_A[NAME].weight, layer.lora_B[NAME] = lora.down, Rows(lora.up, own)
                layer.scaling[NAME] = lora.scale
                self.layers.append(layer)

    def parameters(self) -> list[nn.Parameter]:
        return self.adapters.parameters()

    @contextmanager
    def disabled(self):
        """The transformer is its untuned self inside."""
        try:
            for layer in self.layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in self.layers:
                layer.enable_adapters(True)
