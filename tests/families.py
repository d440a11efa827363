"""Random networks of every flow model for images that ComfyUI loads: its own classes with small sizes, which its loader
could not tell from a file (it knows the real sizes by heart), so they are made from the same configurations.
"""

import dataclasses
import re

import pytest
import torch
from tiny import CONTEXT, POOLED

FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": POOLED,
    "context_in_dim": CONTEXT,
    "hidden_size": 128,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 24, 24],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
SCHNELL = {**FLUX, "guidance_embed": False}
FLUX2 = {
    **FLUX,
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "patch_size": 1,
    "axes_dim": [16, 16, 16, 16],
    "theta": 2000,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
}
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 128,
    "cap_feat_dim": CONTEXT,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 1,
    "axes_dims": [16, 24, 24],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 32,
}
Z_IMAGE = {
    **LUMINA,
    "dim": 256,
    "n_heads": 4,
    "n_kv_heads": 4,
    "rope_theta": 256.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
CHROMA = {
    **{key: value for key, value in FLUX.items() if key != "guidance_embed"},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 128,
    "hidden_dim": 64,
    "n_layers": 1,
    "vec_in_dim": None,
}
SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": POOLED,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": CONTEXT, "out_features": 128},
    },
    "num_patches": 144,
    "pos_embed_max_size": 12,
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
}
COSMOS = {  # Anima
    "image_model": "anima",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 128,
    "concat_padding_mask": True,
    "crossattn_emb_channels": CONTEXT,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "num_blocks": 2,
    "num_heads": 2,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}
HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 64,
    "out_channels": 64,
    "patch_size": [1, 1],
    "vec_in_dim": None,
    "axes_dim": [32, 32],
    "meanflow": False,
    "context_in_dim": CONTEXT,
    "hidden_size": 128,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": CONTEXT,
    "axes_dims_rope": (16, 24, 24),
}
OMNIGEN = {
    "image_model": "omnigen2",
    "axes_dim_rope": [16, 24, 24],
    "axes_lens": [1024, 1664, 1664],
    "ffn_dim_multiplier": 1.0,
    "hidden_size": 128,
    "in_channels": 16,
    "multiple_of": 32,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "out_channels": None,
    "patch_size": 2,
    "text_feat_dim": CONTEXT,
    "timestep_scale": 1000.0,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One flow model of ComfyUI, small."""

    name: str  # as in core/hosts/architectures.py and in docs/base_models.md
    config: str  # class of comfy.supported_models
    unet: dict  # its network's configuration
    size: int = 8  # height and width of the latents
    context: int = CONTEXT  # width of the text features
    pooled: int | None = None  # width of the pooled text
    mask: bool = False  # the text encoder gives an attention mask
    options: dict = dataclasses.field(default_factory=dict)  # further conditioning: name -> shape of one prompt
    references: tuple = ()  # shapes of latents that each prompt refers to: another for each prompt
    row: str = ""  # its architecture's name, where that is another


FAMILIES = [
    Family("FLUX.1-dev", "Flux", FLUX, pooled=POOLED, row="FLUX.1"),
    Family("FLUX.1 Kontext", "Flux", FLUX, pooled=POOLED, row="FLUX.1", references=((16, 8, 8),)),
    Family("FLUX.1 Fill", "FluxInpaint", {**FLUX, "in_channels": 96}, pooled=POOLED),
    Family("FLUX.1-schnell", "FluxSchnell", SCHNELL, pooled=POOLED),
    Family(
        "Ovis-Image",
        "FluxSchnell",
        {**SCHNELL, "vec_in_dim": None, "yak_mlp": True, "txt_norm": True, "txt_ids_dims": [1, 2]},
    ),
    Family("FLUX.2", "Flux2", FLUX2, size=4, references=((128, 4, 4),)),
    Family("FLUX.2 klein", "Flux2", {**FLUX2, "guidance_embed": False}, size=4),
    Family("SD3", "SD3", SD3, pooled=POOLED),
    Family("SD3.5", "SD3", {**SD3, "qk_norm": "rms", "x_block_self_attn_layers": [0]}, pooled=POOLED, row="SD3"),
    Family("Z-Image", "ZImage", Z_IMAGE),
    Family("Lumina 2", "Lumina2", LUMINA, mask=True),
    Family("Qwen-Image", "QwenImage", QWEN),
    Family("Qwen-Image-Edit", "QwenImage", QWEN, row="Qwen-Image", references=((16, 1, 8, 8), (16, 1, 4, 6))),
    Family(
        "Krea 2",
        "Krea2",
        {
            "image_model": "krea2",
            "features": 128,
            "channels": 16,
            "patch": 2,
            "layers": 2,
            "heads": 2,
            "kvheads": 1,
            "multiplier": 2,
            "txtlayers": 2,
            "txtdim": 32,
            "txtheads": 2,
            "txtkvheads": 2,
        },
    ),
    Family("Anima", "Anima", COSMOS),
    Family("Chroma", "Chroma", CHROMA, pooled=POOLED),
    Family(
        "Chroma Radiance",
        "ChromaRadiance",
        {
            **CHROMA,
            "image_model": "chroma_radiance",
            "in_channels": 3,
            "out_channels": 3,
            "patch_size": 8,
            "nerf_hidden_size": 16,
            "nerf_mlp_ratio": 2,
            "nerf_depth": 1,
            "nerf_max_freqs": 4,
            "nerf_tile_size": 512,
            "nerf_final_head_type": "conv",
            "nerf_embedder_dtype": torch.float32,
            "use_x0": True,
            "use_sequential_txt_ids": False,
        },
        size=16,
        pooled=POOLED,
    ),
    Family(
        "Z-Image, pixels",
        "ZImagePixelSpace",
        {
            **Z_IMAGE,
            "image_model": "zimage_pixel",
            "patch_size": 8,
            "in_channels": 3,
            "decoder_in_channels": 192,
            "decoder_hidden_size": 64,
            "decoder_num_res_blocks": 1,
            "decoder_max_freqs": 4,
        },
        size=16,
    ),
    Family(
        "PixelDiT",
        "PixelDiTT2I",
        {
            "image_model": "pixeldit_t2i",
            "num_groups": 2,
            "hidden_size": 128,
            "pixel_hidden_size": 8,
            "pixel_attn_hidden_size": 64,
            "pixel_num_groups": 1,
            "patch_depth": 2,
            "pixel_depth": 1,
            "patch_size": 8,
            "txt_embed_dim": CONTEXT,
            "txt_max_length": 20,
        },
        size=16,
    ),
    Family(
        "AuraFlow",
        "AuraFlow",
        {
            "max_seq": 256,
            "cond_seq_dim": CONTEXT,
            "n_double_layers": 1,
            "n_layers": 2,
            "dim": 128,
            "n_heads": 2,
            "global_conddim": 128,
        },
    ),
    Family(
        "HiDream-I1",
        "HiDream",
        {
            "image_model": "hidream",
            "attention_head_dim": 64,
            "axes_dims_rope": [32, 16, 16],
            "caption_channels": [CONTEXT, CONTEXT],
            "max_resolution": [128, 128],
            "in_channels": 16,
            "llama_layers": [0, 1],
            "num_attention_heads": 2,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "num_layers": 1,
            "num_single_layers": 1,
            "out_channels": 16,
            "patch_size": 2,
            "text_emb_dim": POOLED,
        },
        pooled=POOLED,
        options={"conditioning_llama3": (2, 5, CONTEXT)},
    ),
    Family("Hunyuan Image 2.1", "HunyuanImage21", HUNYUAN, size=4),
    Family("OmniGen 2", "Omnigen2", OMNIGEN, mask=True),
    Family(
        "Boogu",
        "Boogu",
        {
            "image_model": "boogu",
            "hidden_size": 128,
            "num_layers": 1,
            "num_double_stream_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 32,
            "ffn_dim_multiplier": 1.0,
            "axes_dim_rope": (16, 24, 24),
            "instruction_feat_dim": CONTEXT,
        },
        mask=True,
    ),
    Family(
        "ERNIE-Image",
        "ErnieImage",
        {
            "image_model": "ernie",
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 256,
            "text_in_dim": CONTEXT,
            "rope_axes_dim": (16, 24, 24),
        },
        size=4,
    ),
    Family(
        "Ideogram 4",
        "Ideogram4",
        {
            "image_model": "ideogram4",
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "intermediate_size": 128,
            "adaln_dim": 64,
            "llm_features_dim": CONTEXT,
            "mrope_section": [12, 10, 10],
        },
        size=4,
    ),
    Family(
        "MageFlow",
        "MageFlow",
        {
            "image_model": "mage_flow",
            "in_channels": 128,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "joint_attention_dim": CONTEXT,
            "axes_dims_rope": (16, 24, 24),
        },
        size=4,
    ),
    Family(
        "JoyImage",
        "JoyImage",
        {
            "image_model": "joyimage",
            "in_channels": 16,
            "hidden_size": 128,
            "patch_size": [1, 2, 2],
            "num_layers": 2,
            "num_attention_heads": 1,
            "text_dim": CONTEXT,
            "mlp_width_ratio": 2.0,
        },
    ),
    Family(
        "LongCat-Image",
        "LongCatImage",
        {**SCHNELL, "vec_in_dim": None, "txt_ids_dims": [1, 2]},
    ),
    Family(
        "Lens",
        "Lens",
        {
            "image_model": "lens",
            "in_channels": 128,
            "out_channels": 32,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "enc_hidden_dim": 32,
            "axes_dims_rope": (16, 24, 24),
            "multi_layer_encoder_feature": True,
            "selected_layer_index": (5, 11),
        },
        size=4,
        context=64,
    ),
    Family(
        "Kandinsky 5 Image",
        "Kandinsky5Image",
        {
            "image_model": "kandinsky5",
            "model_dim": 128,
            "visual_embed_dim": 64,
            "in_text_dim": CONTEXT,
            "in_text_dim2": POOLED,
            "time_dim": 64,
            "ff_dim": 256,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (16, 24, 24),
        },
        pooled=POOLED,
    ),
    Family(
        "Wan, one frame",
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 128,
            "out_dim": 16,
            "num_heads": 2,
            "ffn_dim": 256,
            "num_layers": 2,
            "patch_size": (1, 2, 2),
            "freq_dim": 64,
            "text_dim": CONTEXT,
            "in_dim": 16,
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
        },
    ),
]


OTHERS = {  # classes of comfy.supported_models that are not tried, by the reason
    "They predict noise or v, or have no flow: refused.": "LotusD Stable_Zero123 SD15_instructpix2pix SD15 SD20 "
    "SD21UnclipL SD21UnclipH SDXL_instructpix2pix SDXLRefiner SDXL SSD1B KOALA_700M KOALA_1B Segmind_Vega "
    "SD_X4Upscaler Stable_Cascade_C Stable_Cascade_B SV3D_u SV3D_p SVD_img2vid PixArtAlpha PixArtSigma HunyuanDiT "
    "HunyuanDiT1 CogVideoX_Inpaint CogVideoX_I2V CogVideoX_T2V",
    "Their flow has sigmas beyond 1 (Cosmos, Cosmos-Predict2): refused.": "CosmosT2V CosmosI2V CosmosT2IPredict2 "
    "CosmosI2VPredict2",
    "Noise of scale 8 (HiDream-O1): refused.": "HiDreamO1",
    "They need a latent or an image to refine: not tried.": "PiD HunyuanImage21Refiner SeedVR2",
    "Video models: single images with these were not tried, only with Wan.": "GenmoMochi LTXV LTXAV MiniMaxH3 "
    "HunyuanVideo HunyuanVideoI2V HunyuanVideoSkyreelsI2V HunyuanVideo15 "
    "HunyuanVideo15_SR_Distilled Kandinsky5 WAN22_T2V WAN21_CausalAR_T2V WAN21_I2V WAN21_FunControl2V WAN21_Vace "
    "WAN21_Camera WAN22_Camera WAN22_S2V WAN21_HuMo WAN22_Animate WAN_Animate2 WAN21_FlowRVS WAN21_SCAIL "
    "WAN21_SCAIL2 WAN22_WanDancer",
    "No pictures: sound, shapes, depth, masks.": "StableAudio StableAudio3 ACEStep ACEStep15 MiniMaxMusic3 Hunyuan3Dv2 "
    "Hunyuan3Dv2mini Hunyuan3Dv2_1 TripoSplat Trellis2 RT_DETR_v4 SAM3 SAM31 DepthAnything3",
}


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def load(family: Family, dtype=torch.float32, seed: int = 0):
    """A MODEL with random weights, made in inference mode as in ComfyUI's executor; skips where ComfyUI has no such."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models

    if not hasattr(comfy.supported_models, family.config):
        pytest.skip(f"this ComfyUI has no {family.name}")
    with torch.inference_mode():
        config = getattr(comfy.supported_models, family.config)(family.unet)
        config.unet_config.update(family.unet)
        config.set_inference_dtype(dtype, None)
        model = network_of(config, family)
        if family.config == "Anima":
            shrink_adapter(model.diffusion_model, dtype)
        fill(model.diffusion_model, seed, scale=0.0 if family.config == "Krea2" else 1.0)
        return comfy.model_patcher.ModelPatcher(
            model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
        )


def network_of(config, family: Family):
    """ComfyUI's model of a configuration, without what older versions do not know."""
    while True:
        try:
            return config.get_model({}, "")
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in config.unet_config:
                raise
            if unknown[1] == "yak_mlp":
                pytest.skip(f"this ComfyUI has no {family.name}")
            del config.unet_config[unknown[1]]


def shrink_adapter(network: torch.nn.Module, dtype) -> None:
    """Anima's text adapter has fixed sizes, 130 million parameters."""
    import comfy.ops
    from comfy.ldm.anima.model import LLMAdapter

    network.llm_adapter = LLMAdapter(
        CONTEXT, CONTEXT, CONTEXT, num_layers=1, num_heads=1, dtype=dtype, operations=comfy.ops.disable_weight_init
    )


def fill(network: torch.nn.Module, seed: int, scale: float = 1.0) -> None:
    """N(0, 1/fan_in), modulations half of that, biases 0. scale: what a file has where a norm scales by 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.state_dict().items():  # positions are a buffer in SD3
        if weight.dim() > 1:
            gain = 0.5 if "mod" in name.lower() else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * gain / weight[0].numel() ** 0.5)
        else:
            weight.fill_(0.0 if name.endswith("bias") else scale)


def conditioning(family: Family, tokens: int = 7, seed: int = 1) -> list:
    """Random CONDITIONING of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        options = {} if family.pooled is None else {"pooled_output": torch.randn(1, family.pooled, generator=generator)}
        for name, shape in family.options.items():
            options[name] = torch.randn(1, *shape, generator=generator)
        if family.references:
            options["reference_latents"] = [torch.randn(1, *shape, generator=generator) for shape in family.references]
        if family.mask:
            options["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        if family.config == "Anima":
            options["t5xxl_ids"] = torch.randint(0, 100, (tokens,), generator=generator)
            options["t5xxl_weights"] = torch.ones(tokens)
        return [[torch.randn(1, tokens, family.context, generator=generator), options]]
