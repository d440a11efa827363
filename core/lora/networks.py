"""What ComfyUI and diffusers call the layers of the networks that both have, one table for each. Strings only; neither
is imported.

`layers` are in the order in which ComfyUI's network has them: adapters draw their first values in this order.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Network:
    """One network in both worlds. "#" stands for the number of a block (or of an expert)."""

    title: str
    transformer: str  # its class in diffusers
    layers: dict[str, str]  # ComfyUI's module -> diffusers', several where they share the rows of a fused one
    swapped: tuple[str, ...] = ()  # of ComfyUI's: two halves (shift, scale) that are (scale, shift) in diffusers
    tensors: dict[str, str] = field(default_factory=dict)  # weights that belong to no layer
    published: dict[int, int] = field(default_factory=dict)  # hidden size of a published model -> blocks it has
    shapes: dict[str, float] = field(default_factory=dict)  # rows per column, where another network has the same name


def _block(stack: str, outer: str, inner: dict[str, str]) -> dict[str, str]:
    return {
        f"{stack}.#.{module}": " ".join(f"{outer}.#.{part}" for part in parts.split())
        for module, parts in inner.items()
    }


def _same(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


def _inside(block: str, names: str) -> str:
    return " ".join(f"{block}.{name}" for name in names.split())


_QKV, _ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_ATTENTION = {
    side: {
        f"{side}_attn.qkv": qkv,
        f"{side}_attn.norm.query_norm": f"attn.{norm}_q",
        f"{side}_attn.norm.key_norm": f"attn.{norm}_k",
        f"{side}_attn.proj": out,
    }
    for side, qkv, norm, out in (
        ("img", _QKV, "norm", "attn.to_out.0"),
        ("txt", _ADDED, "norm_added", "attn.to_add_out"),
    )
}
_FEED_FORWARD = {
    side: {f"{side}_mlp.0": f"{name}.net.0.proj", f"{side}_mlp.2": f"{name}.net.2"}
    for side, name in (("img", "ff"), ("txt", "ff_context"))
}
FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    **_ATTENTION["img"],
    **_FEED_FORWARD["img"],
    "txt_mod.lin": "norm1_context.linear",
    **_ATTENTION["txt"],
    **_FEED_FORWARD["txt"],
}
FLUX_SINGLE = {
    "linear1": f"{_QKV} proj_mlp",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "modulation.lin": "norm.linear",
}
_FLUX_SHAPES = {"single_blocks.#.linear1": 7, "single_blocks.#.linear2": 1 / 5} | {
    f"double_blocks.#.{side}_mlp.{place}": ratio for side in ("img", "txt") for place, ratio in ((0, 4), (2, 1 / 4))
}
FLUX = Network(
    "FLUX",
    "FluxTransformer2DModel",
    {
        "img_in": "x_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "txt_in": "context_embedder",
        **_block("double_blocks", "transformer_blocks", FLUX_DOUBLE),
        **_block("single_blocks", "single_transformer_blocks", FLUX_SINGLE),
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    swapped=("final_layer.adaLN_modulation.1",),
    published={3072: 19},
    shapes=_FLUX_SHAPES,
)

SD3_JOINT = {
    f"{side}_block.{module}": parts
    for side, modules in (
        (
            "context",
            {
                "attn.qkv": _ADDED,
                "attn.ln_q": "attn.norm_added_q",
                "attn.ln_k": "attn.norm_added_k",
                "attn.proj": "attn.to_add_out",
                "mlp.fc1": "ff_context.net.0.proj",
                "mlp.fc2": "ff_context.net.2",
                "adaLN_modulation.1": "norm1_context.linear",
            },
        ),
        (
            "x",
            {
                "attn.qkv": _QKV,
                "attn.ln_q": "attn.norm_q",
                "attn.ln_k": "attn.norm_k",
                "attn.proj": "attn.to_out.0",
                "attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
                "attn2.ln_q": "attn2.norm_q",
                "attn2.ln_k": "attn2.norm_k",
                "attn2.proj": "attn2.to_out.0",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
                "adaLN_modulation.1": "norm1.linear",
            },
        ),
    )
    for module, parts in modules.items()
}
SD3 = Network(
    "SD3",
    "SD3Transformer2DModel",
    {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "context_embedder": "context_embedder",
        **_block("joint_blocks", "transformer_blocks", SD3_JOINT),
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    # the last block's text side has a modulation of two parts
    swapped=("final_layer.adaLN_modulation.1", "joint_blocks.#.context_block.adaLN_modulation.1"),
    tensors={"pos_embed": "pos_embed.pos_embed"},
    published={1536: 24, 2432: 38},
)

_GATED = {
    side: {f"{side}_mlp.0": f"{name}.linear_in", f"{side}_mlp.2": f"{name}.linear_out"}
    for side, name in (("img", "ff"), ("txt", "ff_context"))
}
FLUX2 = Network(
    "FLUX.2",
    "Flux2Transformer2DModel",
    {
        "img_in": "x_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "txt_in": "context_embedder",
        **_block(
            "double_blocks",
            "transformer_blocks",
            {**_ATTENTION["img"], **_GATED["img"], **_ATTENTION["txt"], **_GATED["txt"]},
        ),
        **_block(
            "single_blocks",
            "single_transformer_blocks",
            {
                "linear1": "attn.to_qkv_mlp_proj",
                "linear2": "attn.to_out",
                "norm.query_norm": "attn.norm_q",
                "norm.key_norm": "attn.norm_k",
            },
        ),
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
    },
    swapped=("final_layer.adaLN_modulation.1",),
    published={6144: 8, 4096: 8, 3072: 5},  # dev, klein 9B, klein 4B
    shapes={"single_blocks.#.linear1": 9, "single_blocks.#.linear2": 1 / 4}
    | {f"double_blocks.#.{side}_mlp.{place}": r for side in ("img", "txt") for place, r in ((0, 6), (2, 1 / 3))},
)

CHROMA = Network(
    "Chroma",
    "ChromaTransformer2DModel",
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.layers.#.in_layer": "distilled_guidance_layer.layers.#.linear_1",
        "distilled_guidance_layer.layers.#.out_layer": "distilled_guidance_layer.layers.#.linear_2",
        "distilled_guidance_layer.norms.#": "distilled_guidance_layer.norms.#",
        "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
        **_block(
            "double_blocks",
            "transformer_blocks",
            {name: parts for name, parts in FLUX_DOUBLE.items() if not name.endswith("mod.lin")},
        ),
        **_block(
            "single_blocks",
            "single_transformer_blocks",
            {name: parts for name, parts in FLUX_SINGLE.items() if name != "modulation.lin"},
        ),
        "final_layer.linear": "proj_out",
    },
    published={3072: 19},
    shapes=_FLUX_SHAPES,
)

_NORMS = "attention_norm1 ffn_norm1 attention_norm2 ffn_norm2"
_Z_IMAGE_BLOCK = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    **_same(f"feed_forward.w1 feed_forward.w2 feed_forward.w3 {_NORMS} adaLN_modulation.0"),
}
Z_IMAGE = Network(
    "Z-Image",
    "ZImageTransformer2DModel",
    {
        "x_embedder": "all_x_embedder.2-1",
        **_block("noise_refiner", "noise_refiner", _Z_IMAGE_BLOCK),
        **_block("context_refiner", "context_refiner", _Z_IMAGE_BLOCK),
        **_same("t_embedder.mlp.0 t_embedder.mlp.2 cap_embedder.0 cap_embedder.1"),
        **_block("layers", "layers", _Z_IMAGE_BLOCK),
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
    tensors=_same("x_pad_token cap_pad_token"),
    published={3840: 30},
    shapes={f"{stack}.#.attention.qkv": 3 for stack in ("noise_refiner", "context_refiner", "layers")},
)

_LUMINA_BLOCK = {
    "attention.qkv": _QKV,
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    **{f"feed_forward.w{i}": f"feed_forward.linear_{i}" for i in (1, 2, 3)},
    **_same("ffn_norm1 ffn_norm2"),
    "attention_norm1": "norm1.norm",
    "attention_norm2": "norm2",
    "adaLN_modulation.1": "norm1.linear",
}
LUMINA2 = Network(
    "Lumina 2",
    "Lumina2Transformer2DModel",
    {
        "x_embedder": "x_embedder",
        **_block("noise_refiner", "noise_refiner", _LUMINA_BLOCK),
        **_block("context_refiner", "context_refiner", {**_LUMINA_BLOCK, "attention_norm1": "norm1"}),
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "cap_embedder.0": "time_caption_embed.caption_embedder.0",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        **_block("layers", "layers", _LUMINA_BLOCK),
        "final_layer.linear": "norm_out.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    },
    published={2304: 26},
    shapes={f"{stack}.#.attention.qkv": 5 / 3 for stack in ("noise_refiner", "context_refiner", "layers")},
)

QWEN_IMAGE = Network(
    "Qwen-Image",
    "QwenImageTransformer2DModel",
    {
        **_same("time_text_embed.timestep_embedder.linear_1 time_text_embed.timestep_embedder.linear_2"),
        **_same("txt_norm img_in txt_in"),
        **_same(
            _inside(
                "transformer_blocks.#",
                "img_mod.1 img_mlp.net.0.proj img_mlp.net.2 txt_mod.1 txt_mlp.net.0.proj txt_mlp.net.2 attn.norm_q "
                "attn.norm_k attn.norm_added_q attn.norm_added_k attn.to_q attn.to_k attn.to_v attn.add_q_proj "
                "attn.add_k_proj attn.add_v_proj attn.to_out.0 attn.to_add_out",
            )
        ),
        **_same("norm_out.linear proj_out"),
    },
    published={3072: 60},
)

_EXPERTS = " ".join(f"ff_i.{part}.{name}" for part in ("shared_experts", "experts.#") for name in ("w1", "w2", "w3"))
_STREAM = "adaLN_modulation.1 attn1.to_q attn1.to_k attn1.to_v attn1.to_out attn1.q_rms_norm attn1.k_rms_norm"
_TEXT = (
    "attn1.to_q_t attn1.to_k_t attn1.to_v_t attn1.to_out_t attn1.q_rms_norm_t attn1.k_rms_norm_t",
    "ff_t.w1 ff_t.w2 ff_t.w3",
)
HIDREAM = Network(
    "HiDream-I1",
    "HiDreamImageTransformer2DModel",
    {
        **_same("t_embedder.timestep_embedder.linear_1 t_embedder.timestep_embedder.linear_2"),
        **_same("p_embedder.pooled_embedder.linear_1 p_embedder.pooled_embedder.linear_2 x_embedder.proj"),
        **_same(_inside("double_stream_blocks.#.block", f"{_STREAM} {_TEXT[0]} {_EXPERTS} ff_i.gate {_TEXT[1]}")),
        **_same(_inside("single_stream_blocks.#.block", f"{_STREAM} {_EXPERTS} ff_i.gate")),
        **_same("final_layer.linear final_layer.adaLN_modulation.1 caption_projection.#.linear"),
    },
    published={2560: 16},
)

AURAFLOW = Network(
    "AuraFlow",
    "AuraFlowTransformer2DModel",
    {
        "t_embedder.mlp.0": "time_step_proj.linear_1",
        "t_embedder.mlp.2": "time_step_proj.linear_2",
        "cond_seq_linear": "context_embedder",
        "init_x_linear": "pos_embed.proj",
        **_block(
            "double_layers",
            "joint_transformer_blocks",
            {
                **{
                    f"mlp{side}.{module}": f"{name}.{part}"
                    for side, name in (("C", "ff_context"), ("X", "ff"))
                    for module, part in (
                        ("c_fc1", "linear_1"),
                        ("c_fc2", "linear_2"),
                        ("c_proj", "out_projection"),
                    )
                },
                "modC.1": "norm1_context.linear",
                "modX.1": "norm1.linear",
                **dict(zip((f"attn.w1{letter}" for letter in "qkvo"), f"{_ADDED} attn.to_add_out".split())),
                **dict(zip((f"attn.w2{letter}" for letter in "qkvo"), f"{_QKV} attn.to_out.0".split())),
            },
        ),
        **_block(
            "single_layers",
            "single_transformer_blocks",
            {
                "modCX.1": "norm1.linear",
                **dict(zip((f"attn.w1{letter}" for letter in "qkvo"), f"{_QKV} attn.to_out.0".split())),
                "mlp.c_fc1": "ff.linear_1",
                "mlp.c_fc2": "ff.linear_2",
                "mlp.c_proj": "ff.out_projection",
            },
        ),
        "final_linear": "proj_out",
        "modF.1": "norm_out.linear",
    },
    swapped=("modF.1",),
    tensors={"positional_encoding": "pos_embed.pos_embed", "register_tokens": "register_tokens"},
)

_KREA2_BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.gate": "attn.to_gate",
    "attn.wo": "attn.to_out.0",
    "attn.qknorm.qnorm": "attn.norm_q",
    "attn.qknorm.knorm": "attn.norm_k",
    "prenorm": "norm1",
    "postnorm": "norm2",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
KREA2 = Network(
    "Krea 2",
    "Krea2Transformer2DModel",
    {
        "first": "img_in",
        **_block("blocks", "transformer_blocks", _KREA2_BLOCK),
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        **_block("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks", _KREA2_BLOCK),
        "txtfusion.projector": "text_fusion.projector",
        **_block("txtfusion.refiner_blocks", "text_fusion.refiner_blocks", _KREA2_BLOCK),
        "txtmlp.0": "txt_in.norm",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "last.norm": "final_layer.norm",
        "last.linear": "final_layer.linear",
        "tproj.1": "time_mod_proj",
    },
    tensors={
        "blocks.#.mod.lin": "transformer_blocks.#.scale_shift_table",
        "last.modulation.lin": "final_layer.scale_shift_table",
    },
    published={6144: 28},
)

ERNIE_IMAGE = Network(
    "ERNIE-Image",
    "ErnieImageTransformer2DModel",
    {
        **_same("x_embedder.proj text_proj time_embedding.linear_1 time_embedding.linear_2 adaLN_modulation.1"),
        **_same(
            _inside(
                "layers.#",
                "adaLN_sa_ln self_attention.to_q self_attention.to_k self_attention.to_v self_attention.norm_q "
                "self_attention.norm_k self_attention.to_out.0 adaLN_mlp_ln mlp.gate_proj mlp.up_proj mlp.linear_fc2",
            )
        ),
        **_same("final_norm.linear final_linear"),
    },
)

NETWORKS = {
    "flux": FLUX,
    "sd3": SD3,
    "flux2": FLUX2,
    "chroma": CHROMA,
    "z-image": Z_IMAGE,
    "lumina2": LUMINA2,
    "qwen-image": QWEN_IMAGE,
    "hidream": HIDREAM,
    "auraflow": AURAFLOW,
    "krea2": KREA2,
    "ernie-image": ERNIE_IMAGE,
}
