"""The networks that the diffusers engine runs: diffusers' classes with the sizes of ComfyUI's weights, and how each is
asked for a velocity. diffusers is imported when first used.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..lora.layer_names import network_class, rename

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """One of them; its key in KINDS is that in core.lora.networks."""

    mark: tuple[str, ...]  # weights that only its files have, in ComfyUI's names
    empty: Callable[[Weights], nn.Module]  # diffusers' network of the sizes of these weights
    ask: Callable[..., Tensor]  # (network, x [B, *shape], sigma [B], texts [B, L, D], pooled [B, Pd], guidance) -> v
    sigmas: tuple[str, float]  # ComfyUI's sampling: "flux" (exponential) or "discrete", and its shift
    output: str = "proj_out"  # its last layer, whose weight has the dtype that it computes in
    channels: int = 16  # of its latents
    downscale: int = 8  # a picture's size in proportion to its latents'
    patch: int = 2  # latents' sides are multiples of it
    time: bool = False  # its latents are [C, 1, H, W]
    pooled: bool = False  # it takes a pooled text besides
    least_text: int = 0  # rows that ComfyUI fills up with zeros before a shorter text


def kind_of(transformer: nn.Module) -> Kind:
    return KINDS[network_class(transformer)]


def load_transformer(state_dict: Weights, dtype=torch.float32) -> nn.Module:
    """A state dict as ComfyUI loads it -> the frozen diffusers transformer; every size is read from the weights.

    ValueError, in a sentence, for a network that is none of KINDS.
    """
    sd = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in state_dict.items()}
    kind = next((kind for kind in KINDS.values() if all(mark in sd for mark in kind.mark)), None)
    if kind is None:
        raise ValueError(
            "These weights are of none of FLUX, SD3, FLUX.2, Z-Image and Qwen-Image: the diffusers backend runs no "
            "other model."
        )
    # the module is made of the state dict's own tensors: no second copy, and none in float32
    with torch.device("meta"):
        module = kind.empty(sd)
    renamed = {name: tensor.to(dtype, copy=True) for name, tensor in rename(sd, network_class(module)).items()}
    if "joint_blocks.0.x_block.attn.qkv.weight" in sd and "pos_embed" not in sd:
        # in the place of a table that is not used
        renamed["pos_embed.pos_embed"] = torch.zeros(1, 1, module.pos_embed.proj.out_channels, dtype=dtype)
        module.pos_embed.cropped_pos_embed = partial(centred_positions, module.pos_embed)
    module.load_state_dict(renamed, assign=True)
    positions = getattr(module, "pos_embed", None)
    if hasattr(positions, "pos_freqs"):  # Qwen-Image's table of angles: not on the meta device
        module.pos_embed = type(positions)(positions.theta, positions.axes_dim, positions.scale_rope)
    return module.eval().requires_grad_(False)


def _count(sd: Weights, stack: str) -> int:
    return len({key.split(".")[1] for key in sd if key.startswith(stack + ".")})


def _heads(width: int, head: int, name: str) -> int:
    if width % head:
        raise ValueError(f"The hidden size of this {name} is {width}; it must be a multiple of {head}.")
    return width // head


# FLUX


def _empty_flux(sd: Weights) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    width, channels = sd["img_in.weight"].shape
    return FluxTransformer2DModel(
        in_channels=channels,
        out_channels=len(sd["final_layer.linear.weight"]),
        num_layers=_count(sd, "double_blocks"),
        num_single_layers=_count(sd, "single_blocks"),
        num_attention_heads=_heads(width, 128, "FLUX"),
        joint_attention_dim=sd["txt_in.weight"].shape[1],
        pooled_projection_dim=sd["vector_in.in_layer.weight"].shape[1],
        guidance_embeds="guidance_in.in_layer.weight" in sd,
    )


def _packed(x: Tensor) -> Tensor:
    """Latents [B, C, H, W] as tokens of 2x2 [B, HW/4, 4C]."""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def _unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    return F.pixel_shuffle(tokens.float().transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def _grid(height: int, width: int, axes: int, device: torch.device) -> Tensor:
    """Positions [HW, axes] of a picture's tokens, with y and x on axes 1 and 2."""
    ids = torch.zeros(height, width, axes, device=device)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    return ids.view(-1, axes)


def _guidance(network: nn.Module, sigma: Tensor, guidance: float) -> Tensor | None:
    return torch.full_like(sigma, guidance) if network.config.guidance_embeds else None


def _ask_flux(network: nn.Module, x: Tensor, sigma: Tensor, texts: Tensor, pooled: Tensor, guidance: float) -> Tensor:
    height, width = x.shape[2:]
    v = network(
        hidden_states=_packed(x).to(texts.dtype),
        encoder_hidden_states=texts,
        pooled_projections=pooled,
        timestep=sigma,
        guidance=_guidance(network, sigma, guidance),
        img_ids=_grid(height // 2, width // 2, 3, x.device),
        txt_ids=torch.zeros(texts.shape[1], 3, device=x.device),
        return_dict=False,
    )[0]
    return _unpacked(v, height, width)


# SD3


def _empty_sd3(sd: Weights) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    width, channels, patch, _ = sd["x_embedder.proj.weight"].shape
    blocks = _count(sd, "joint_blocks")
    return SD3Transformer2DModel(
        patch_size=patch,
        in_channels=channels,
        out_channels=len(sd["final_layer.linear.weight"]) // patch**2,
        num_layers=blocks,
        num_attention_heads=width // 64,
        joint_attention_dim=sd["context_embedder.weight"].shape[1],
        caption_projection_dim=width,
        pooled_projection_dim=sd["y_embedder.mlp.0.weight"].shape[1],
        pos_embed_max_size=math.isqrt(sd["pos_embed"].shape[1]) if "pos_embed" in sd else 1,
        dual_attention_layers=tuple(i for i in range(blocks) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in sd),
        qk_norm="rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in sd else None,
    )


def centred_positions(embed: nn.Module, height: int, width: int) -> Tensor:
    """Sine-cosine positions [1, N, D] of a latent's patches, as ComfyUI computes them where SD3's file has no table.

    The shorter side spans 0..15 whatever its length, so any picture size works.
    """
    device, dim = embed.proj.weight.device, embed.proj.out_channels
    h, w = height // embed.patch_size, width // embed.patch_size
    omega = 1 / 10000 ** (torch.arange(dim // 4, device=device) / (dim / 4))
    halves = []
    for length, shape in ((w, (1, w)), (h, (h, 1))):
        reach = length / min(h, w) * 7.5
        position = torch.linspace(7.5 - reach, 7.5 + reach, length, device=device).view(shape).expand(h, w)
        angle = position.reshape(-1, 1) * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1)[None]


def _ask_sd3(network: nn.Module, x: Tensor, sigma: Tensor, texts: Tensor, pooled: Tensor, guidance: float) -> Tensor:
    asked = {"encoder_hidden_states": texts, "pooled_projections": pooled, "return_dict": False}
    return network(hidden_states=x.to(texts.dtype), timestep=sigma * 1000, **asked)[0].float()


# FLUX.2


def _empty_flux2(sd: Weights) -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    width, channels = sd["img_in.weight"].shape
    head = next(len(sd[key]) for key in sd if key.startswith("double_blocks.0.img_attn.norm.query_norm."))
    return Flux2Transformer2DModel(
        in_channels=channels,
        out_channels=len(sd["final_layer.linear.weight"]),
        num_layers=_count(sd, "double_blocks"),
        num_single_layers=_count(sd, "single_blocks"),
        attention_head_dim=head,
        num_attention_heads=_heads(width, head, "FLUX.2"),
        joint_attention_dim=sd["txt_in.weight"].shape[1],
        mlp_ratio=sd["double_blocks.0.img_mlp.2.weight"].shape[1] / width,
        axes_dims_rope=(head // 4,) * 4,
        guidance_embeds="guidance_in.in_layer.weight" in sd,
    )


def _ask_flux2(network: nn.Module, x: Tensor, sigma: Tensor, texts: Tensor, pooled: Tensor, guidance: float) -> Tensor:
    places = torch.zeros(texts.shape[1], 4, device=x.device)
    places[:, 3] = torch.arange(texts.shape[1])
    v = network(
        hidden_states=x.flatten(2).transpose(1, 2).to(texts.dtype),
        encoder_hidden_states=texts,
        timestep=sigma,
        guidance=_guidance(network, sigma, guidance),
        img_ids=_grid(*x.shape[2:], 4, x.device),
        txt_ids=places,
        return_dict=False,
    )[0]
    return v.float().transpose(1, 2).reshape(x.shape)


# Z-Image


def _empty_z_image(sd: Weights) -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    width, head = len(sd["x_embedder.weight"]), len(sd["layers.0.attention.q_norm.weight"])
    heads = _heads(width, head, "Z-Image")
    network = ZImageTransformer2DModel(
        in_channels=sd["x_embedder.weight"].shape[1] // 4,
        dim=width,
        n_layers=_count(sd, "layers"),
        n_refiner_layers=_count(sd, "noise_refiner"),
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=len(sd["cap_embedder.0.weight"]),
        axes_dims=[head // 4, head * 3 // 8, head * 3 // 8],
    )
    embedder, (inside, _) = network.t_embedder, sd["t_embedder.mlp.0.weight"].shape
    if inside != embedder.mlp[0].out_features:  # 1,024 in the published model
        network.t_embedder = type(embedder)(len(sd["t_embedder.mlp.2.weight"]), mid_size=inside)
    return network


def _ask_z_image(
    network: nn.Module, x: Tensor, sigma: Tensor, texts: Tensor, pooled: Tensor, guidance: float
) -> Tensor:
    asked = list(x[:, :, None].to(texts.dtype).unbind()), 1 - sigma, list(texts.unbind())
    return -torch.stack(network(*asked, return_dict=False)[0])[:, :, 0].float()


# Qwen-Image


def _empty_qwen_image(sd: Weights) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    (width, channels), head = sd["img_in.weight"].shape, len(sd["transformer_blocks.0.attn.norm_q.weight"])
    return QwenImageTransformer2DModel(
        in_channels=channels,
        out_channels=len(sd["proj_out.weight"]) // 4,
        num_layers=_count(sd, "transformer_blocks"),
        attention_head_dim=head,
        num_attention_heads=_heads(width, head, "Qwen-Image"),
        joint_attention_dim=len(sd["txt_norm.weight"]),
        axes_dims_rope=(head // 8, head * 7 // 16, head * 7 // 16),
    )


def _ask_qwen_image(
    network: nn.Module, x: Tensor, sigma: Tensor, texts: Tensor, pooled: Tensor, guidance: float
) -> Tensor:
    height, width = x.shape[3:]
    v = network(
        hidden_states=_packed(x[:, :, 0]).to(texts.dtype),
        encoder_hidden_states=texts,
        timestep=sigma,
        img_shapes=[[(1, height // 2, width // 2)]] * len(x),
        return_dict=False,
    )[0]
    return _unpacked(v, height, width)[:, :, None]


KINDS = {
    "flux": Kind(
        ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
        _empty_flux,
        _ask_flux,
        ("flux", 1.15),
        pooled=True,
    ),
    "sd3": Kind(
        ("joint_blocks.0.x_block.attn.qkv.weight", "y_embedder.mlp.0.weight"),
        _empty_sd3,
        _ask_sd3,
        ("discrete", 3.0),
        pooled=True,
    ),
    "flux2": Kind(
        ("double_stream_modulation_img.lin.weight",),
        _empty_flux2,
        _ask_flux2,
        ("flux", 2.02),
        channels=128,
        downscale=16,
        patch=1,
        least_text=512,
    ),
    "z-image": Kind(
        ("layers.0.adaLN_modulation.0.weight", "cap_pad_token"),
        _empty_z_image,
        _ask_z_image,
        ("discrete", 3.0),
        output="all_final_layer.2-1.linear",
    ),
    "qwen-image": Kind(
        ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
        _empty_qwen_image,
        _ask_qwen_image,
        ("flux", 1.15),
        time=True,
    ),
}


def simple_sigmas(network: str, steps: int) -> Tensor:
    """ComfyUI's "simple" scheduler [steps+1] of a network: a table of 10,000 times where the shift is exponential,
    else of 1,000.
    """
    sampling, shift = KINDS[network].sigmas
    count = {"flux": 10000, "discrete": 1000}[sampling]
    t = torch.tensor([count - int(i * count / steps) for i in range(steps)]) / count
    if sampling == "flux":
        sigmas = math.exp(shift) / (math.exp(shift) + (1 / t - 1))
    else:
        sigmas = shift * t / (1 + (shift - 1) * t)
    return torch.cat([sigmas, torch.zeros(1)])
