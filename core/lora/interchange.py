"""LoRA files in ComfyUI's form and in the PEFT form that diffusers loads, for the networks in networks.py, and from one
to the other without loss.

    ComfyUI    diffusion_model.<module>.lora_up.weight [out, rank], .lora_down.weight [rank, in], .alpha     delta = up
               @ down * alpha / rank diffusers  transformer.<module>.lora_B.weight [out, rank], .lora_A.weight [rank,
               in]                     delta = B @ A

In the diffusers form alpha / rank is multiplied into lora_B, so that alpha = rank: a scale of 1 is what every reader
agrees on. ComfyUI and older diffusers (0.31) read no adapter metadata; diffusers' SD3 loader refuses a file with alpha
keys, and its FLUX loader one with alpha keys and metadata. The metadata is written all the same, for files of several
ranks: without it diffusers 0.35 scales the layers of all but one rank wrongly.

One layer of ComfyUI may be several of diffusers' (q, k, v; FLUX's linear1 adds the MLP): its lora_down goes to each
part, the rows of its lora_up are shared out. Back, parts with the same down become one pair of the same rank again;
others become the blocks of one pair of the summed rank. What is exact: every down; every up, where alpha / rank is a
power of two or none has to be multiplied in; else up is rounded once, in float32.
"""

import json
import logging
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import write_atomically
from ..patterns import search
from .layer_names import (
    comfy_name,
    diffusers_from_underscores,
    from_underscores,
    is_swapped,
    networks_naming,
    networks_of,
    part_rows,
    parts_of,
    shape_of,
    swap_halves,
    xlabs_parts,
)
from .networks import NETWORKS

FORMS = ("comfyui", "diffusers")
ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' key in the file's header: the PEFT config as JSON
NETWORK = "treerpo.network"  # ours: a key of NETWORKS, which names and sizes do not always tell
ENDINGS = {
    "up": (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", ".up.weight"),
    "down": (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", ".down.weight"),
    "alpha": (".alpha",),
}
KOHYA, ONETRAINER = "lora_unet_", "lora_transformer_"  # before the names with underscores in their files
PREFIX = re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|transformer\.|base_model\.model\.)+")
TEXT_ENCODER = re.compile(r"^(text_encoders?(_\d)?\.|lora_te\d?_)")
# of networks whose layers' sizes are all multiples of one hidden size
BLOCK = re.compile(r"^(double_blocks|joint_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.(\d+)\.")
# Others have the same names and the size of a published one: hidden size -> its number of transformer_blocks.
FOREIGN = {3072: 20}  # HunyuanVideo
MODELS = ", ".join(network.title for network in NETWORKS.values())


class Pair(NamedTuple):
    """One layer's LoRA: delta = up @ down * alpha / rank."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)


# from one form to the other


def comfy_pairs(
    state: dict[str, Tensor], header: dict[str, str] | None = None, network: str | None = None
) -> dict[str, Pair]:
    """The pairs, by ComfyUI's modules, of a LoRA in any form that form_of knows. Text encoders are left out, with a
    line in the log.

    header: the file's metadata; the alphas of a PEFT file stand there. network: a key of NETWORKS, for a file whose
    layers several have and whose sizes are those of no published model. Raises ValueError in one sentence for what
    cannot be converted exactly.
    """
    form = form_of(state)
    pairs = read_pairs(state, peft_config(header))
    if form == "kohya":
        pairs = {from_underscores(module.removeprefix(KOHYA)): pair for module, pair in pairs.items()}
    elif form == "OneTrainer":
        pairs = {diffusers_from_underscores(module.removeprefix(ONETRAINER)): pair for module, pair in pairs.items()}
        form = "diffusers"
    elif form == "XLabs":
        pairs, form, network = from_xlabs(pairs), "diffusers", "flux"
    network = find_network(pairs, form, network or (header or {}).get(NETWORK))
    strangers = foreign(state)
    if strangers:
        logging.warning(
            "TreeRPO: %d tensors of this file are left out ('%s', ...): they belong to no layer and are no LoRA.",
            len(strangers),
            strangers[0],
        )
    text = [key for key in state if TEXT_ENCODER.match(key)]
    if text:
        logging.warning(
            "TreeRPO: %d text encoder tensors of this LoRA are left out (%s, ...): only the diffusion model's are "
            "converted.",
            len(text),
            text[0],
        )
    if form == "diffusers":
        layers = {}
        for name, pair in pairs.items():
            module, place = comfy_name(name, network)
            layers.setdefault(module, [None] * len(parts_of(module, network)))[place] = pair
        pairs = {module: fuse(module, parts, network) for module, parts in layers.items()}
    check_sizes(pairs, network)
    return pairs


def comfy_form(pairs: dict[str, Pair]) -> dict[str, Tensor]:
    """Pairs by ComfyUI's modules as the tensors of a file."""
    result = {}
    for module, pair in pairs.items():
        result |= {
            f"diffusion_model.{module}.lora_up.weight": pair.up,
            f"diffusion_model.{module}.lora_down.weight": pair.down,
            f"diffusion_model.{module}.alpha": torch.tensor(float(pair.alpha)),
        }
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in result.items()}


def diffusers_form(pairs: dict[str, Pair], network: str | None = None) -> dict[str, Tensor]:
    """Pairs by ComfyUI's modules as the tensors of a PEFT file. network: as in comfy_pairs."""
    network = find_network(pairs, "comfyui", network)
    result = {}
    for module, pair in pairs.items():
        for name, part in split(module, pair, network).items():
            down, up = part.down, folded(part)
            if name == "pos_embed.proj" and network == "sd3":  # a convolution, over patches of 2x2
                down, up = down.reshape(len(down), -1, 2, 2), up[..., None, None]
            result |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in result.items()}


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


def from_xlabs(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """Pairs by XLabs' names as pairs by diffusers': q, k and v are the rows of one, with the same down."""
    result = {}
    for module, pair in pairs.items():
        names = xlabs_parts(module)
        if len(pair.up) % len(names):
            raise ValueError(
                f"The LoRA of '{module}' has {len(pair.up)} rows for q, k and v together: the file is damaged."
            )
        result |= {name: pair._replace(up=up) for name, up in zip(names, pair.up.chunk(len(names)))}
    return result


def foreign(state: dict[str, Tensor]) -> list[str]:
    """The tensors that are no part of any LoRA and belong to no layer, such as an embedding trained along.

    What belongs to a layer and is no part of a plain LoRA is not among them: without it the file would mean another
    thing.
    """
    return [key for key in state if not TEXT_ENCODER.match(key) and role_of(key) is None and not of_a_layer(key)]


def of_a_layer(key: str) -> bool:
    """Whether a tensor's name begins with that of a layer, in any naming."""
    parts = PREFIX.sub("", key).split(".")
    beginnings = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(
        networks_of(name)
        or networks_naming(name)
        or xlabs_parts(name)
        or from_underscores(name.removeprefix(KOHYA))
        or diffusers_from_underscores(name.removeprefix(ONETRAINER))
        for name in beginnings
    )


def lora_keys(state: dict[str, Tensor]) -> list[str]:
    """The keys that are converted: no text encoder's, and nothing `foreign`."""
    strangers = set(foreign(state))
    return [key for key in state if not TEXT_ENCODER.match(key) and key not in strangers]


# what a file holds


def form_of(state: dict[str, Tensor]) -> str:
    """ "comfyui", "diffusers", "kohya" (lora_unet_...; ComfyUI's modules with underscores), "OneTrainer"
    (lora_transformer_...; diffusers' with underscores) or "XLabs" (FLUX's blocks.0.processor...). Raises ValueError for
    a LoRA of another model.
    """
    modules = list(dict.fromkeys(module_and_role(key)[0] for key in lora_keys(state)))
    if not modules:
        raise ValueError(
            "This file holds no LoRA of a diffusion model."
            if not any(map(TEXT_ENCODER.match, state))
            else "This LoRA is one of the text encoders only: nothing can be converted."
        )
    if modules[0].startswith(KOHYA):
        strangers = {"kohya": [module for module in modules if from_underscores(module.removeprefix(KOHYA)) is None]}
    elif modules[0].startswith(ONETRAINER):
        flat = {module: diffusers_from_underscores(module.removeprefix(ONETRAINER)) for module in modules}
        strangers = {"OneTrainer": [module for module, name in flat.items() if name is None]}
    elif any(map(xlabs_parts, modules)):
        strangers = {"XLabs": [module for module in modules if not xlabs_parts(module)]}
    else:
        strangers = {
            "comfyui": [module for module in modules if not networks_of(module)],
            "diffusers": [module for module in modules if not networks_naming(module)],
        }
    form, strange = min(strangers.items(), key=lambda item: len(item[1]))
    if strange:
        names = (
            f"{'ComfyUI or diffusers' if form in FORMS else form} names them"
            if len(strange) == len(modules)
            else f"the rest of this file ({form}) names them"
        )
        raise ValueError(
            f"'{strange[0]}' is no layer of {MODELS} as {names}: only LoRAs of these models are converted."
        )
    if form not in FORMS or any(strangers.values()):
        return form
    # All layers are called so in both, such as Qwen-Image's in ComfyUI and FLUX's attention in diffusers.
    if any(key.startswith(("diffusion_model.", "model.diffusion_model.")) for key in state):
        return "comfyui"
    elsewhere = any(key.startswith(("transformer.", "base_model.")) for key in state)
    return "diffusers" if elsewhere or any(module.startswith("transformer_blocks.") for module in modules) else form


def module_and_role(key: str) -> tuple[str, str]:
    """The layer a tensor belongs to, without prefixes, and what it is there: "up", "down" or "alpha"."""
    found = role_of(key)
    if found is not None:
        return PREFIX.sub("", key.removesuffix(found[1])), found[0]
    raise ValueError(
        f"The tensor '{key}' is no part of a plain LoRA (an up, a down and an alpha per layer): DoRA, LoKr, LoHa and "
        "trained biases cannot be converted."
    )


def role_of(key: str) -> tuple[str, str] | None:
    """What a tensor is in a LoRA, and the ending of its name that says so."""
    return next(
        ((role, ending) for role, endings in ENDINGS.items() for ending in endings if key.endswith(ending)), None
    )


def read_pairs(state: dict[str, Tensor], config: dict) -> dict[str, Pair]:
    """The file's pairs by its own module names.

    config: of peft_config; alpha keys come before it, and with neither alpha = rank.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for key in lora_keys(state):
        module, role = module_and_role(key)
        tensors.setdefault(module, {})[role] = state[key]
    pairs = {}
    for module, found in tensors.items():
        absent = [role for role in ("up", "down") if role not in found]
        if absent:
            raise ValueError(f"The LoRA has no {absent[0]} weight for the layer '{module}': the file is incomplete.")
        down, up = found["down"], found["up"]
        if up.dim() < 2 or down.dim() < 2 or up[0].numel() != len(down) or not len(down):
            raise ValueError(
                f"The LoRA of '{module}' has an up of {list(up.shape)} and a down of {list(down.shape)}, which do not "
                "fit together: the file is damaged."
            )
        alpha = float(found["alpha"]) if "alpha" in found else peft_alpha(config, module, len(down))
        pairs[module] = Pair(down.flatten(1), up.flatten(1), alpha)
    return pairs


def hidden_size(pairs: dict[str, Pair]) -> int | None:
    """The smallest side of any layer in a block, which is the network's hidden size; None where no block is adapted."""
    return min(
        (min(len(pair.up), pair.down.shape[1]) for module, pair in pairs.items() if BLOCK.match(module)), default=None
    )


def check_sizes(pairs: dict[str, Pair], network: str) -> None:
    """ValueError unless every layer (ComfyUI's names) has rows for all parts, and the sizes of those in a BLOCK are
    multiples of one hidden size.
    """
    width = hidden_size(pairs)
    for module, pair in pairs.items():
        rows, columns, count = len(pair.up), pair.down.shape[1], len(parts_of(module, network))
        block = BLOCK.match(module)
        uneven = block and (rows % width or columns % width or count == 3 and rows != 3 * columns)
        short = count == 3 and (rows <= columns or (rows - columns) % 2) or count == 4 and rows <= 3 * columns
        if uneven or short:
            raise ValueError(
                f"The LoRA of '{module}' is for a layer of {columns} to {rows}, which does not fit "
                + (f"the others' hidden size of {width}" if count == 1 else f"its {count} parts")
                + ": the file is damaged, or of another model."
            )


def having(pairs: dict[str, Pair], form: str) -> list[str]:
    """The networks that have all of these layers. ValueError where none has."""
    candidates = list(NETWORKS)
    for module in pairs:
        known = networks_naming(module) if form == "diffusers" else networks_of(module)
        have = [network for network in candidates if network in known]
        if not have:
            titles = " or ".join(NETWORKS[network].title for network in candidates)
            raise ValueError(
                f"'{module}' does not go with the other layers of this LoRA, which are {titles}'s: two models are "
                "mixed in one file."
            )
        candidates = have
    # Only SD3 has modulations of two parts (its last block) and of nine (where there is a second attention).
    parts = {(module.partition(".norm1")[2], len(pair.up) / pair.down.shape[1]) for module, pair in pairs.items()}
    only_sd3 = form == "diffusers" and "sd3" in candidates and parts & {("_context.linear", 2), (".linear", 9)}
    return ["sd3"] if only_sd3 else candidates


def of_these_shapes(pairs: dict[str, Pair], networks: list[str]) -> list[str]:
    """Those of the networks whose layers (ComfyUI's names) have these shapes; the first where no network's have."""
    fitting = [
        network
        for network in networks
        if all(
            abs((shape_of(module, network) or ratio) - ratio) < 1e-2
            for module, ratio in ((module, len(pair.up) / pair.down.shape[1]) for module, pair in pairs.items())
        )
    ]
    return fitting or networks[:1]


def find_network(pairs: dict[str, Pair], form: str, told: str | None) -> str:
    """The key of NETWORKS; the first of those that have all the layers, where it makes no difference which it is."""
    candidates, width = having(pairs, form), hidden_size(pairs)
    blocks = [block for block in map(BLOCK.match, pairs) if block and not block[1].startswith("single_")]
    last = max((int(block[2]) for block in blocks), default=-1)
    reached = {network: NETWORKS[network].published.get(width) for network in candidates}
    published = [network for network in candidates if reached[network]]
    within = [network for network in candidates if reached[network] is None or last < reached[network]]
    alien = last + 1 == FOREIGN.get(width) and told not in within
    if published and (alien or not any(reached[network] for network in within)):
        raise ValueError(
            f"This LoRA reaches block {last}, where {NETWORKS[published[0]].title} of this size has "
            f"{reached[published[0]]} blocks from 0 on: it is of another model, and only those of {MODELS} are "
            "converted."
        )
    if told in within:
        return told
    within = within if form == "diffusers" else of_these_shapes(pairs, within)
    if len({_outcome(pairs, form, network) for network in within}) == 1:
        return within[0]
    published = [network for network in within if reached[network]]
    if not published:
        titles = ", ".join(f"{NETWORKS[network].title} ('{network}')" for network in within)
        raise ValueError(
            f"The layers of this LoRA are in {titles}, and its size is of no published model: say which it is (network "
            f"'{within[0]}', ...)."
        )
    return published[0]


def _outcome(pairs: dict[str, Pair], form: str, network: str) -> tuple:
    """What the layers are called in the other world."""
    return tuple(
        comfy_name(module, network)
        if form == "diffusers"
        else (*parts_of(module, network), swapped(module, pair, network) is pair)
        for module, pair in pairs.items()
    )


# diffusers' adapter metadata


def peft_config(header: dict[str, str] | None) -> dict:
    """The transformer's PEFT config from a file's header; {} where there is none."""
    try:
        config = json.loads((header or {}).get(ADAPTER_METADATA) or "{}")
        config = {
            key.removeprefix("transformer."): value for key, value in config.items() if key.startswith("transformer.")
        }
        for alpha in (config.get("lora_alpha", 1), *(config.get("alpha_pattern") or {}).values()):
            float(alpha)
        return config
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"The file's {ADAPTER_METADATA} cannot be read ({error}): without it the LoRA's strength is not known."
        ) from None


def peft_alpha(config: dict, module: str, rank: int) -> float:
    """The alpha that gives the strength PEFT would give this layer."""
    patterns = config.get("alpha_pattern") or {}
    matching = (value for key, value in patterns.items() if _names(key, module))
    alpha = float(next(matching, config.get("lora_alpha", rank)))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _names(key: str, module: str) -> bool:
    """Whether a key of PEFT's patterns, a regular expression, names this layer."""
    pattern = rf"^(.*\.)?({key})$"
    if re.fullmatch(r"[\w.^-]*", key):  # a plain name, as diffusers writes it: it needs no time
        return bool(re.search(pattern, module))
    try:
        return search(pattern, [module])[1][0].count > 0
    except ValueError as error:
        raise ValueError(
            f"The file's alpha_pattern '{key[:60]}' is no expression that can be used ({error})."
        ) from None


def peft_metadata(state: dict[str, Tensor]) -> str:
    """The header's adapter metadata for a state in the diffusers form: alpha = rank in every layer."""
    ranks = {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): len(tensor)
        for key, tensor in state.items()
        if key.endswith(".lora_A.weight")
    }
    common = Counter(ranks.values()).most_common(1)[0][0]
    # "^" keeps proj_out from meaning single_transformer_blocks.0.proj_out as well.
    other = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
    config = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
    }
    return json.dumps({f"transformer.{key}": value for key, value in config.items()})


# files


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and its header's metadata.

    Raises ValueError for a file that is none, OSError where it cannot be opened.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{Path(path).name} is no whole safetensors file ({error}): only .safetensors LoRAs are read."
        ) from None


def write(
    path: Path, state: dict[str, Tensor], form: str, header: dict[str, str] | None = None, network: str | None = None
) -> dict[str, Tensor]:
    """Writes a LoRA of any known form in `form`, one of FORMS, with the header's own metadata kept; the tensors as
    written. Replaces the file.
    """
    if form not in FORMS:
        raise ValueError(f"'{form}' is no LoRA form: choose one of {', '.join(FORMS)}.")
    pairs = comfy_pairs(state, header, network)
    told = network or (header or {}).get(NETWORK)
    converted = comfy_form(pairs) if form == "comfyui" else diffusers_form(pairs, told)
    kept = {key: value for key, value in (header or {}).items() if key != ADAPTER_METADATA}
    if form == "diffusers":
        kept[ADAPTER_METADATA] = peft_metadata(converted)
    kept[NETWORK] = find_network(pairs, "comfyui", told)
    write_atomically(Path(path), save(converted, metadata={"format": "pt", **kept}))
    return converted


def convert(source: Path, target: Path, to: str, network: str | None = None) -> str:
    """Converts a file to `to`, one of FORMS, and says in one line what was done.

    Never replaces a file. Raises ValueError in one sentence.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise ValueError(f"{target} exists: choose another name, so that nothing is lost.")
    if target.suffix != ".safetensors":
        raise ValueError(f"{target.name} must end in .safetensors.")
    state, header = read(source)
    written = write(target, state, to, header, network)
    before = sum(module_and_role(key)[1] == "down" for key in lora_keys(state))
    downs = [tensor for key, tensor in written.items() if module_and_role(key)[1] == "down"]
    ranks = sorted({len(down) for down in downs})
    text, strangers = sum(bool(TEXT_ENCODER.match(key)) for key in state), foreign(state)
    return (
        f"{source.name} ({form_of(state)}, {before} layers) -> {target} ({to}, {len(downs)} layers, rank "
        f"{', '.join(map(str, ranks))})"
        + (f"; {text} text encoder tensors left out" if text else "")
        + (f"; {len(strangers)} left out that are no LoRA ('{strangers[0]}', ...)" if strangers else "")
    )
