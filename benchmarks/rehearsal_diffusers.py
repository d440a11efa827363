"""Whether diffusers' own networks of true size, made on "meta", have the layers that a LoRA file names: for the
benchmark rehearsal.
"""

import json
from pathlib import Path


def network(model: str):
    import diffusers
    import torch

    with torch.device("meta"):
        if model == "flux":
            return diffusers.FluxTransformer2DModel(guidance_embeds=True)  # its defaults are FLUX.1-dev's
        return diffusers.SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )


def check(file: Path, model: str) -> None:
    """Prints {"diffusers_layers", "diffusers_unmatched"} as JSON."""
    from safetensors import safe_open

    modules, unmatched, layers = dict(network(model).named_modules()), 0, 0
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():
            name = key.removeprefix("transformer.")
            module, is_down = modules.get(name.rpartition(".lora_")[0]), name.endswith(".lora_A.weight")
            width = getattr(module, "in_features" if is_down else "out_features", None)
            unmatched += width != tensors.get_slice(key).get_shape()[1 if is_down else 0]
            layers += is_down
    print(json.dumps({"diffusers_layers": layers, "diffusers_unmatched": unmatched}))
