"""Families that both ComfyUI and diffusers have, with the same random weights in both."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import families
import pytest
import torch
from families import CHROMA, CONTEXT, FLUX2, LUMINA, QWEN, Z_IMAGE
from test_families import Subject
from torch.nn import functional as F

from core.lora.layer_names import rename
from core.lora.networks import NETWORKS

FLUX2_BOTH = {**FLUX2, "mlp_ratio": 3.0, "depth": 2, "depth_single_blocks": 2}
_FLUX2 = dict(
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=64,
    num_attention_heads=2,
    joint_attention_dim=CONTEXT,
    axes_dims_rope=(16, 16, 16, 16),
)
# ComfyUI's family -> (key of NETWORKS, what its network has otherwise than in families.py, diffusers' configuration)
FAMILIES = {
    "FLUX.2": ("flux2", FLUX2_BOTH, dict(_FLUX2, guidance_embeds=True)),
    "FLUX.2 klein": ("flux2", {**FLUX2_BOTH, "guidance_embed": False}, dict(_FLUX2, guidance_embeds=False)),
    "Qwen-Image": (
        "qwen-image",
        {**QWEN, "attention_head_dim": 128, "num_attention_heads": 1, "axes_dims_rope": (16, 56, 56)},
        dict(num_layers=2, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=CONTEXT),
    ),
    "Z-Image": (
        "z-image",
        {**Z_IMAGE, "ffn_dim_multiplier": 8 / 3, "multiple_of": 1},
        dict(
            dim=256,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=CONTEXT,
            axes_dims=[16, 24, 24],
        ),
    ),
    "Chroma": (
        "chroma",
        # as many blocks as the published one: ComfyUI's network computes the modulations of so many
        {**CHROMA, "mlp_ratio": 4.0, "depth": 19, "depth_single_blocks": 38},
        dict(
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=CONTEXT,
            axes_dims_rope=(16, 24, 24),
            approximator_hidden_dim=64,
            approximator_layers=1,
        ),
    ),
    "Lumina 2": (
        "lumina2",
        {**LUMINA, "ffn_dim_multiplier": 4.0},
        dict(
            hidden_size=128,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=32,
            axes_dim_rope=(16, 24, 24),
            cap_feat_dim=CONTEXT,
        ),
    ),
    "HiDream-I1": (
        "hidream",
        {},
        dict(
            patch_size=2,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            caption_channels=[CONTEXT, CONTEXT],
            text_emb_dim=48,
            num_routed_experts=2,
            num_activated_experts=1,
            llama_layers=[0, 1],
            axes_dims_rope=(32, 16, 16),
            force_inference_output=True,
        ),
    ),
    "AuraFlow": (
        "auraflow",
        {},
        dict(
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=CONTEXT,
            caption_projection_dim=128,
            pos_embed_max_size=256,
        ),
    ),
    "Krea 2": (
        "krea2",
        {},
        dict(
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=256,
            text_hidden_dim=32,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=128,
            axes_dims_rope=(16, 24, 24),
        ),
    ),
    "ERNIE-Image": (
        "ernie-image",
        {},
        dict(
            hidden_size=128,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=256,
            text_in_dim=CONTEXT,
            rope_axes_dim=(16, 24, 24),
        ),
    ),
}

ONLY_COMFYUI = (  # diffusers 0.42 has no network for them
    "Chroma Radiance",
    "Z-Image, pixels",
    "PixelDiT",
    "OmniGen 2",
    "Boogu",
    "MageFlow",
    "Lens",
)


def family(name: str) -> families.Family:
    """As in families.py, with the sizes that diffusers' class has fixed."""
    found = families.named(name)
    return dataclasses.replace(found, unet={**found.unet, **FAMILIES[name][1]}, references=())


def transformer(name: str, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """diffusers' own class with these weights of ComfyUI's network."""
    import diffusers

    network, _, config = FAMILIES[name]
    kind = getattr(diffusers, NETWORKS[network].transformer, None)
    if kind is None:
        pytest.skip(f"this diffusers has no {NETWORKS[network].transformer}")
    model = kind(**config)
    if network == "z-image":  # its time embedder is 1,024 wide whatever the rest
        model.t_embedder = type(model.t_embedder)(256, mid_size=len(weights["t_embedder.mlp.0.weight"]))
    wanted, renamed = model.state_dict(), rename(weights, network)
    assert renamed.keys() == wanted.keys()
    model.load_state_dict({key: tensor.view(wanted[key].shape).clone() for key, tensor in renamed.items()})
    return model.eval().requires_grad_(False)


@dataclass
class Both:
    """One network in ComfyUI and in diffusers, and the same question to both: two latents with a prompt each."""

    name: str
    sigma: ClassVar[float] = 0.7

    def __post_init__(self):
        self.network = FAMILIES[self.name][0]
        self.subject = Subject(family(self.name))
        weights = self.subject.model.model.diffusion_model.state_dict()
        self.transformer = transformer(self.name, {key: tensor.clone() for key, tensor in weights.items()})
        self.x, self.prompts = self.subject.latents(2), [self.subject.prompt(number, 7) for number in range(2)]

    def comfy(self, policy) -> torch.Tensor:
        from test_backend_comfy import velocity_of

        return velocity_of(policy, self.x, self.sigma, [0, 1], self.subject.prompts((7, 7)))

    @torch.no_grad()
    def diffusers(self) -> torch.Tensor:
        embeds = torch.cat([prompt[0][0] for prompt in self.prompts]).clone()
        options = {
            key: torch.cat([prompt[0][1][key] for prompt in self.prompts]).clone() for key in self.prompts[0][0][1]
        }
        return ASKED[self.network](self.transformer, self.x, torch.full((2,), self.sigma), embeds, options)


def packed(x: torch.Tensor) -> torch.Tensor:
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpacked(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.pixel_shuffle(v.transpose(1, 2).unflatten(2, (x.shape[-2] // 2, x.shape[-1] // 2)), 2)


def grid(height: int, width: int, axes: int = 3) -> torch.Tensor:
    ids = torch.zeros(height, width, axes)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    return ids.view(-1, axes)


def flux2(net, x, sigma, embeds, options):
    embeds = F.pad(embeds, (0, 0, 512 - embeds.shape[1], 0))  # as ComfyUI does
    text = torch.zeros(512, 4)
    text[:, 3] = torch.arange(512)
    guidance = torch.full((len(x),), 3.5) if net.config.guidance_embeds else None
    ids = grid(*x.shape[-2:], axes=4)
    v = net(x.flatten(2).transpose(1, 2), embeds, sigma, ids, text, guidance, return_dict=False)[0]
    return v.transpose(1, 2).view(x.shape)


def qwen_image(net, x, sigma, embeds, options):
    shapes = [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x)
    v = net(packed(x[:, :, 0]), embeds, timestep=sigma, img_shapes=shapes, return_dict=False)[0]
    return unpacked(v, x)[:, :, None]


def z_image(net, x, sigma, embeds, options):
    return -torch.stack(net(list(x[:, :, None]), 1 - sigma, list(embeds), return_dict=False)[0])[:, :, 0]


def chroma(net, x, sigma, embeds, options):
    ids = grid(x.shape[-2] // 2, x.shape[-1] // 2)
    text = torch.zeros(embeds.shape[1], 3)
    return unpacked(net(packed(x), embeds, sigma, ids, text, return_dict=False)[0], x)


def lumina2(net, x, sigma, embeds, options):
    return -net(x, 1 - sigma, embeds, options["attention_mask"].bool(), return_dict=False)[0]


def hidream(net, x, sigma, embeds, options):
    llama = options["conditioning_llama3"].movedim(1, 0)
    asked = dict(encoder_hidden_states_t5=embeds, encoder_hidden_states_llama3=llama)
    return -net(x, sigma * 1000, pooled_embeds=options["pooled_output"], **asked, return_dict=False)[0]


def auraflow(net, x, sigma, embeds, options):
    return net(x, embeds, sigma, return_dict=False)[0]


def krea2(net, x, sigma, embeds, options):
    image = grid(x.shape[-2] // 2, x.shape[-1] // 2)
    text = embeds.unflatten(2, (net.config.num_text_layers, -1))
    ids = torch.cat([torch.zeros(embeds.shape[1], 3), image])
    return unpacked(net(packed(x[:, :, 0]), text, sigma, ids, return_dict=False)[0], x)[:, :, None]


def ernie_image(net, x, sigma, embeds, options):
    return net(x, sigma * 1000, embeds, torch.full((len(x),), embeds.shape[1]), return_dict=False)[0]


ASKED = {
    "flux2": flux2,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "chroma": chroma,
    "lumina2": lumina2,
    "hidream": hidream,
    "auraflow": auraflow,
    "krea2": krea2,
    "ernie-image": ernie_image,
}
