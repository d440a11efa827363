"""What a LoRA file holds: whose names its layers have, and its pairs by these names."""

import re

from torch import Tensor

from .layer_names import (
    diffusers_from_underscores,
    from_underscores,
    networks_naming,
    networks_of,
    xlabs_parts,
)
from .networks import NETWORKS
from .pairs import Pair
from .peft_metadata import peft_alpha

FORMS = ("comfyui", "diffusers")
ENDINGS = {
    "up": (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", ".up.weight"),
    "down": (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", ".down.weight"),
    "alpha": (".alpha",),
}
KOHYA, ONETRAINER = "lora_unet_", "lora_transformer_"  # before the names with underscores in their files
PREFIX = re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|transformer\.|base_model\.model\.)+")
TEXT_ENCODER = re.compile(r"^(text_encoders?(_\d)?\.|lora_te\d?_)")
MODELS = ", ".join(network.title for network in NETWORKS.values())


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
