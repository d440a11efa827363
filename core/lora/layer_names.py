"""Names of FLUX's and SD3's layers: as ComfyUI's files have them, and as diffusers does. Strings and tensors only;
neither is imported.
"""

import re

import torch
from torch import Tensor

# ComfyUI's module -> diffusers' modules. Several names share the rows of one fused layer, in this order.
MODULES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
FLUX_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
SD3_JOINT = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
STACKS = {
    "double_blocks": ("transformer_blocks", FLUX_DOUBLE),
    "single_blocks": ("single_transformer_blocks", FLUX_SINGLE),
    "joint_blocks": ("transformer_blocks", SD3_JOINT),
}

# XLabs' processors -> diffusers' modules of that block, in the order of their rows. Image is 1, text 2.
XLABS = {
    ("double_blocks", "qkv_lora1"): FLUX_DOUBLE["img_attn.qkv"],
    ("double_blocks", "qkv_lora2"): FLUX_DOUBLE["txt_attn.qkv"],
    ("double_blocks", "proj_lora1"): FLUX_DOUBLE["img_attn.proj"],
    ("double_blocks", "proj_lora2"): FLUX_DOUBLE["txt_attn.proj"],
    ("single_blocks", "qkv_lora"): "attn.to_q attn.to_k attn.to_v",  # of linear1 the rows without the MLP's
    ("single_blocks", "proj_lora"): FLUX_SINGLE["linear2"],
}


def parts_of(module: str) -> list[str]:
    """diffusers' module(s) for one of ComfyUI's, e.g.

    double_blocks.0.img_attn.qkv -> to_q, to_k, to_v of that block; [] for no layer of FLUX or SD3.
    """
    stack, _, rest = module.partition(".")
    if stack in STACKS:
        number, _, inner = rest.partition(".")
        name, table = STACKS[stack]
        return [f"{name}.{number}.{part}" for part in table.get(inner, "").split()] if number.isdigit() else []
    return [MODULES[module]] if module in MODULES else []


def diffusers_names(module: str) -> list[str]:
    """parts_of, or a ValueError."""
    names = parts_of(module)
    if not names:
        raise ValueError(
            f"The weight '{module}' belongs to no FLUX or SD3 layer that diffusers knows: this model cannot run "
            "through diffusers."
        )
    return names


def networks_of(module: str) -> set[str]:
    """The networks, of "flux" and "sd3", that have this module of ComfyUI's."""
    if not parts_of(module):
        return set()
    if module.startswith("final_layer."):
        return {"flux", "sd3"}
    return (
        {"flux"}
        if module.startswith(("double_blocks.", "single_blocks.")) or module.split(".")[0].endswith("_in")
        else {"sd3"}
    )


def comfy_name(name: str, network: str) -> tuple[str, int] | None:
    """ComfyUI's module for one of diffusers' in "flux" or "sd3", and which of the parts that share its rows it is;

    None for no layer of that network.
    """
    block = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)
    if block is None or block[1] not in ("transformer_blocks", "single_transformer_blocks"):
        return next(
            ((module, 0) for module, part in MODULES.items() if part == name and network in networks_of(module)), None
        )
    for stack, (outer, table) in STACKS.items():
        if outer == block[1] and (stack == "joint_blocks") == (network == "sd3"):
            for inner, parts in table.items():
                if block[3] in parts.split():
                    return f"{stack}.{block[2]}.{inner}", parts.split().index(block[3])
    return None


def from_underscores(flat: str) -> str | None:
    """ComfyUI's module from its name in kohya's files: double_blocks_0_img_attn_qkv -> double_blocks.0.img_attn.qkv;
    None for no layer of FLUX or SD3.
    """
    for module in MODULES:
        if module.replace(".", "_") == flat:
            return module
    block = re.fullmatch(r"(double_blocks|single_blocks|joint_blocks)_(\d+)_(.+)", flat)
    inners = STACKS[block[1]][1] if block else ()
    return next((f"{block[1]}.{block[2]}.{inner}" for inner in inners if inner.replace(".", "_") == block[3]), None)


def diffusers_from_underscores(flat: str) -> str | None:
    """diffusers' module from its name in OneTrainer's files: transformer_blocks_0_attn_to_q ->
    transformer_blocks.0.attn.to_q; None for no layer of FLUX or SD3.
    """
    block = re.fullmatch(r"(transformer_blocks|single_transformer_blocks)_(\d+)_(.+)", flat)
    if block is None:
        return next((name for name in MODULES.values() if name.replace(".", "_") == flat), None)
    tables = [table for outer, table in STACKS.values() if outer == block[1]]
    inners = [inner for table in tables for names in table.values() for inner in names.split()]
    return next((f"{block[1]}.{block[2]}.{inner}" for inner in inners if inner.replace(".", "_") == block[3]), None)


def xlabs_parts(module: str) -> list[str]:
    """diffusers' module(s) for one of XLabs' FLUX LoRAs, double_blocks.0.processor.qkv_lora1; [] for none of them."""
    block = re.fullmatch(r"(\w+)\.(\d+)\.processor\.(\w+)", module)
    inners = XLABS.get((block[1], block[3]), "").split() if block else []
    return [f"{STACKS[block[1]][0]}.{block[2]}.{inner}" for inner in inners]


def swapped(module: str, tensor: Tensor, width: int) -> Tensor:
    """Rows (shift, scale) <-> (scale, shift) of the modulations that diffusers keeps in the other order: those with two
    parts.
    """
    if module.endswith("adaLN_modulation.1") and len(tensor) == 2 * width:
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor


def rename(state_dict: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """ComfyUI's weights under diffusers' names, fused layers split. width: the hidden size."""
    renamed = {}
    for key, tensor in state_dict.items():
        if key == "pos_embed":
            renamed["pos_embed.pos_embed"] = tensor
            continue
        module, _, leaf = key.rpartition(".")
        names = diffusers_names(module)
        sizes = [width] * (len(names) - 1)
        parts = swapped(module, tensor, width).split([*sizes, len(tensor) - sum(sizes)])
        renamed.update({f"{name}.{'weight' if leaf == 'scale' else leaf}": part for name, part in zip(names, parts)})
    return renamed
