"""Names of a network's layers: as ComfyUI's files have them, and as diffusers does. The tables are in networks.py.

Strings and tensors only; neither of the two is imported.
"""

import re
from functools import cache
from itertools import combinations

from torch import Tensor

from .networks import FLUX_DOUBLE, FLUX_SINGLE, NETWORKS

# XLabs' processors -> diffusers' modules of that block, in the order of their rows. Image is 1, text 2.
XLABS = {
    ("double_blocks", "qkv_lora1"): FLUX_DOUBLE["img_attn.qkv"],
    ("double_blocks", "qkv_lora2"): FLUX_DOUBLE["txt_attn.qkv"],
    ("double_blocks", "proj_lora1"): FLUX_DOUBLE["img_attn.proj"],
    ("double_blocks", "proj_lora2"): FLUX_DOUBLE["txt_attn.proj"],
    ("single_blocks", "qkv_lora"): "attn.to_q attn.to_k attn.to_v",  # of linear1 the rows without the MLP's
    ("single_blocks", "proj_lora"): FLUX_SINGLE["linear2"],
}
XLABS_STACKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}


def _found(name: str, templates, separator: str = ".") -> tuple[str, tuple[str, ...]] | None:
    """The template that a name is made from, and the numbers that stand for its "#"."""
    parts = name.split(separator)
    places = [place for place, part in enumerate(parts) if part.isdigit()]
    for count in range(len(places) + 1):
        for chosen in combinations(places, count):
            template = separator.join("#" if place in chosen else part for place, part in enumerate(parts))
            if template in templates:
                return template, tuple(parts[place] for place in chosen)
    return None


def _filled(template: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        template = template.replace("#", number, 1)
    return template


@cache
def _places(network: str) -> dict[str, tuple[str, int]]:
    """diffusers' template -> ComfyUI's, and which of the parts that share its rows it is."""
    table = NETWORKS[network].layers.items()
    return {part: (module, place) for module, parts in table for place, part in enumerate(parts.split())}


def parts_of(module: str, network: str) -> list[str]:
    """diffusers' module(s) for one of ComfyUI's, e.g. in "flux"

    double_blocks.0.img_attn.qkv -> to_q, to_k, to_v of that block; [] for no layer of that network.
    """
    found = _found(module, NETWORKS[network].layers)
    return [_filled(part, found[1]) for part in NETWORKS[network].layers[found[0]].split()] if found else []


def networks_of(module: str) -> set[str]:
    """The networks that have this module of ComfyUI's."""
    return {network for network in NETWORKS if _found(module, NETWORKS[network].layers)}


def networks_naming(name: str) -> set[str]:
    """The networks that have this module of diffusers'."""
    return {network for network in NETWORKS if _found(name, _places(network))}


def comfy_name(name: str, network: str) -> tuple[str, int] | None:
    """ComfyUI's module for one of diffusers' in that network, and which of the parts that share its rows it is; None
    for no layer of it.
    """
    found = _found(name, _places(network))
    if found is None:
        return None
    module, place = _places(network)[found[0]]
    return _filled(module, found[1]), place


def from_underscores(flat: str) -> str | None:
    """ComfyUI's module from its name in kohya's files: double_blocks_0_img_attn_qkv -> double_blocks.0.img_attn.qkv;
    None for no layer of any network.
    """
    return _from_flat(flat, _flat_modules())


def diffusers_from_underscores(flat: str) -> str | None:
    """diffusers' module from its name in OneTrainer's files: transformer_blocks_0_attn_to_q ->
    transformer_blocks.0.attn.to_q; None for no layer of any network.
    """
    return _from_flat(flat, _flat_names())


@cache
def _flat_modules() -> dict[str, str]:
    return {name.replace(".", "_"): name for network in NETWORKS for name in NETWORKS[network].layers}


@cache
def _flat_names() -> dict[str, str]:
    return {name.replace(".", "_"): name for network in NETWORKS for name in _places(network)}


def _from_flat(flat: str, names: dict[str, str]) -> str | None:
    found = _found(flat, names, "_")
    return _filled(names[found[0]], found[1]) if found else None


def xlabs_parts(module: str) -> list[str]:
    """diffusers' module(s) for one of XLabs' FLUX LoRAs, double_blocks.0.processor.qkv_lora1; [] for none of them."""
    block = re.fullmatch(r"(\w+)\.(\d+)\.processor\.(\w+)", module)
    inners = XLABS.get((block[1], block[3]), "").split() if block else []
    return [f"{XLABS_STACKS[block[1]]}.{block[2]}.{inner}" for inner in inners]


def shape_of(module: str, network: str) -> float | None:
    """Rows per column of ComfyUI's layer, where the network's table has them."""
    found = _found(module, NETWORKS[network].layers)
    return NETWORKS[network].shapes.get(found[0]) if found else None


def is_swapped(module: str, network: str, rows: int, width: int) -> bool:
    """Whether this modulation of ComfyUI's is (shift, scale) and (scale, shift) in diffusers: those of two parts."""
    found = _found(module, NETWORKS[network].layers)
    return found is not None and found[0] in NETWORKS[network].swapped and rows == 2 * width


def part_rows(parts: int, rows: int, width: int) -> list[int]:
    """How many of a layer's rows belong to each of the parts that share it: q, k and v, and the MLP's where there are
    four.

    width: of its input. k and v may be narrower than q (heads that share them).
    """
    if parts == 3:
        return [width, (rows - width) // 2, (rows - width) // 2]
    return [width] * (parts - 1) + [rows - width * (parts - 1)]


def network_class(transformer) -> str:
    """The name, a key of NETWORKS, of a transformer of diffusers; "" where it has no table."""
    kinds = {kind.__name__ for kind in type(transformer).__mro__}  # FSDP2 gives it a class of its own
    return next((name for name, network in NETWORKS.items() if network.transformer in kinds), "")


def rename(state_dict: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    """ComfyUI's weights under diffusers' names, fused layers split. ValueError for one that the network has not."""
    renamed, tensors = {}, NETWORKS[network].tensors
    for key, tensor in state_dict.items():
        alone = _found(key, tensors)
        if alone is not None:
            renamed[_filled(tensors[alone[0]], alone[1])] = tensor
            continue
        module, _, leaf = key.rpartition(".")
        names = parts_of(module, network)
        if not names:
            raise ValueError(
                f"The weight '{module or key}' belongs to no layer of {NETWORKS[network].title} that diffusers knows: "
                "this model cannot run through diffusers."
            )
        width = state_dict[f"{module}.weight"].shape[-1] if f"{module}.weight" in state_dict else len(tensor)
        if is_swapped(module, network, len(tensor), width):
            tensor = swap_halves(tensor)
        parts = tensor.split(part_rows(len(names), len(tensor), width))
        renamed.update({f"{name}.{'weight' if leaf == 'scale' else leaf}": part for name, part in zip(names, parts)})
    return renamed


def swap_halves(tensor: Tensor) -> Tensor:
    """Rows (shift, scale) -> (scale, shift), and back."""
    return tensor.roll(len(tensor) // 2, 0)
