"""A layer's LoRA, and what becomes of it where one layer of ComfyUI is several of diffusers'."""

from typing import NamedTuple

import torch
from torch import Tensor

from .layer_names import is_swapped, part_rows, parts_of, shape_of, swap_halves


class Pair(NamedTuple):
    """One layer's LoRA: delta = up @ down * alpha / rank."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)


def split(module: str, pair: Pair, network: str) -> dict[str, Pair]:
    """A pair of ComfyUI's layer as pairs of diffusers' modules; a part whose rows are zero gets none, unless all are.

    The parts share the down as it is. Only where lora_up is block-diagonal, as fuse makes it, does each part get its
    own block back.
    """
    names, width = parts_of(module, network), pair.down.shape[1]
    if len(names) == 1:
        return {names[0]: swapped(module, pair, network)}
    blocks = pair.up.split(part_rows(len(names), len(pair.up), width))
    used = torch.stack([block.any(dim=0) for block in blocks])  # [parts, rank]
    owner = used.int().argmax(0)
    blockwise = bool((used.sum(0) == 1).all() and (owner.diff() >= 0).all())
    result = {}
    for name, block, own in zip(names, blocks, used):
        if blockwise and own.any():
            result[name] = Pair(pair.down[own], block[:, own], pair.scale * int(own.sum()))
        elif own.any() or not used.any():
            result[name] = pair._replace(up=block)
    return result


def swapped(module: str, pair: Pair, network: str) -> Pair:
    """The pair for the other world, of a layer that is one in both."""
    other = is_swapped(module, network, len(pair.up), pair.down.shape[1])
    return pair._replace(up=swap_halves(pair.up)) if other else pair


def fuse(module: str, parts: list[Pair | None], network: str) -> Pair:
    """Pairs of the diffusers modules that are one layer in ComfyUI as one pair for it; the rows of a part without a
    pair are zero.
    """
    present = [part for part in parts if part is not None]
    width = present[0].down.shape[1]
    if len(parts) == 1:
        return swapped(module, present[0], network)
    # k and v may be narrower than q; FLUX's MLP is four times as wide
    narrow = round(width * ((shape_of(module, network) or 3) - 1) / 2) if len(parts) == 3 else width
    if narrow != width:
        narrow = next((len(part.up) for part in parts[1:] if part is not None), narrow)
    heights = [width, narrow, narrow, None][: len(parts)]
    for height, name, part in zip(heights, parts_of(module, network), parts):
        if part is not None and (part.down.shape[1] != width or height not in (None, len(part.up))):
            raise ValueError(
                f"The LoRA of '{name}' is for a layer of {part.down.shape[1]} to {len(part.up)}, where {width} to "
                f"{height or 4 * width} was expected: the file is damaged, or of another model."
            )
    dtype = widest([part.down for part in present])
    downs, places = [], []  # the different downs, and which of them each part has
    for part in present:
        down = part.down.to(dtype)
        places.append(next((i for i, known in enumerate(downs) if torch.equal(down, known)), len(downs)))
        downs += [down] if places[-1] == len(downs) else []
    same = len({part.scale for part in present}) == 1
    ups = [None if part is None else part.up if same else folded(part) for part in parts]
    rows = [len(up) if up is not None else height or 4 * width for up, height in zip(ups, heights)]
    fused = torch.zeros(sum(rows), sum(map(len, downs)), dtype=widest([up for up in ups if up is not None]))
    used = [(block, up) for block, up in zip(fused.split(rows), ups) if up is not None]
    for (block, up), place in zip(used, places):
        start = sum(map(len, downs[:place]))
        block[:, start : start + len(downs[place])] = up
    down = torch.cat(downs)
    return Pair(down, fused, len(down) * (present[0].scale if same else 1.0))


def widest(tensors: list[Tensor]) -> torch.dtype:
    """The narrowest dtype that holds all of them exactly."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def folded(pair: Pair) -> Tensor:
    """The up with alpha / rank multiplied in; float32 where a narrower type would round it."""
    if pair.scale == 1:
        return pair.up
    wide = pair.up.to(torch.promote_types(pair.up.dtype, torch.float32)) * pair.scale
    narrow = wide.to(pair.up.dtype)
    return narrow if torch.equal(narrow.to(wide.dtype), wide) else wide
