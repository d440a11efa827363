"""LoRA files in ComfyUI's form and in the PEFT form that diffusers loads, for the networks in networks.py, and from one
to the other without loss.

- ComfyUI: diffusion_model.<module>.lora_up.weight [out, rank], .lora_down.weight [rank, in] and .alpha;
  delta = up @ down * alpha / rank
- diffusers: transformer.<module>.lora_B.weight [out, rank] and .lora_A.weight [rank, in]; delta = B @ A

In the diffusers form alpha / rank is multiplied into lora_B, so that alpha = rank: a scale of 1 is what every reader
agrees on. ComfyUI and older diffusers (0.31) read no adapter metadata; diffusers' SD3 loader refuses a file with alpha
keys, and its FLUX loader one with alpha keys and metadata. The metadata is written all the same, for files of several
ranks: without it diffusers 0.35 scales the layers of all but one rank wrongly.

One layer of ComfyUI may be several of diffusers' (q, k, v; FLUX's linear1 adds the MLP): its lora_down goes to each
part, the rows of its lora_up are shared out. Back, parts with the same down become one pair of the same rank again;
others become the blocks of one pair of the summed rank. What is exact: every down; every up, where alpha / rank is a
power of two or none has to be multiplied in; else up is rounded once, in float32.
"""

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import write_atomically
from .file_forms import (
    FORMS,
    KOHYA,
    ONETRAINER,
    TEXT_ENCODER,
    foreign,
    form_of,
    from_xlabs,
    lora_keys,
    module_and_role,
    read_pairs,
)
from .find_network import check_sizes, find_network
from .layer_names import comfy_name, diffusers_from_underscores, from_underscores, parts_of
from .pairs import Pair, folded, fuse, split
from .peft_metadata import ADAPTER_METADATA, peft_config, peft_metadata

NETWORK = "treerpo.network"  # ours: a key of networks.NETWORKS, which names and sizes do not always tell


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
