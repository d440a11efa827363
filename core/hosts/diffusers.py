"""FLUX and SD3 through diffusers: ComfyUI's weights, velocities, text features and sigmas where there is no ComfyUI.

Weights come as state dicts in ComfyUI's form and are renamed here. diffusers, transformers and open_clip are
imported when first used; nothing in this file touches ComfyUI.
"""

import math
import os
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..lora.layer_names import network_class, rename
from ..model import Velocity, by_kind

# ComfyUI hands (vae latent - shift) * scale to the diffusion model: (scale, shift).
LATENT_FORMATS = {"flux": (0.3611, 0.1159), "sd3": (1.5305, 0.0609)}


def load_transformer(state_dict: dict[str, Tensor], dtype=torch.float32) -> torch.nn.Module:
    """A FLUX or SD3/3.5 state dict as ComfyUI loads it -> the frozen diffusers transformer; every size is read from the
    weights.
    """
    sd = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in state_dict.items()}
    # the module is made of the state dict's own tensors: no second copy, and none in float32
    with torch.device("meta"):
        if "double_blocks.0.img_attn.qkv.weight" in sd and "vector_in.in_layer.weight" in sd:
            module, width = _empty_flux(sd)
        elif "joint_blocks.0.x_block.attn.qkv.weight" in sd and "y_embedder.mlp.0.weight" in sd:
            module, width = _empty_sd3(sd)
        else:
            raise ValueError("These weights are neither FLUX nor SD3: the diffusers backend runs no other model.")
    renamed = {name: tensor.to(dtype, copy=True) for name, tensor in rename(sd, network_class(module)).items()}
    if "pos_embed" not in sd and "joint_blocks.0.x_block.attn.qkv.weight" in sd:
        # in the place of a table that is not used
        renamed["pos_embed.pos_embed"] = torch.zeros(1, 1, width, dtype=dtype)
        module.pos_embed.cropped_pos_embed = partial(centred_positions, module.pos_embed)
    module.load_state_dict(renamed, assign=True)
    return module.eval().requires_grad_(False)


def _count(sd: dict[str, Tensor], stack: str) -> int:
    return len({key.split(".")[1] for key in sd if key.startswith(stack + ".")})


def _empty_flux(sd: dict[str, Tensor]) -> tuple[torch.nn.Module, int]:
    from diffusers import FluxTransformer2DModel

    width, channels = sd["img_in.weight"].shape
    if width % 128:
        raise ValueError(f"The hidden size of this FLUX is {width}; it must be a multiple of 128.")
    return FluxTransformer2DModel(
        in_channels=channels,
        out_channels=len(sd["final_layer.linear.weight"]),
        num_layers=_count(sd, "double_blocks"),
        num_single_layers=_count(sd, "single_blocks"),
        num_attention_heads=width // 128,
        joint_attention_dim=sd["txt_in.weight"].shape[1],
        pooled_projection_dim=sd["vector_in.in_layer.weight"].shape[1],
        guidance_embeds="guidance_in.in_layer.weight" in sd,
    ), width


def _empty_sd3(sd: dict[str, Tensor]) -> tuple[torch.nn.Module, int]:
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
    ), width


def centred_positions(embed: torch.nn.Module, height: int, width: int) -> Tensor:
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


class DiffusersVelocity(Velocity):
    """Velocity of a FLUX or SD3 transformer of diffusers for a fixed set of prompts: `velocity(x, sigma, rows) -> v`.

    transformer: from load_transformer or a diffusers pipeline. adapters: a trainable LoRA at work in it (peft.Attached,
    or Adapters that are injected), or None. shape: (C, H, W) of the latents, for who draws them. prompt_embeds: P
    tensors [L, D], of any lengths; pooled: P of [Pd]; negative: (1 or P embeds [L, D], as many pooled [Pd]), used where
    cfg is not 1. guidance: FLUX's embedded guidance. `forwards` counts latents through the network, twice with CFG.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        adapters,
        prompt_embeds: Sequence[Tensor],
        pooled: Sequence[Tensor],
        negative: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
        cfg: float = 1.0,
        guidance: float = 3.5,
        shape: tuple = (),
    ):
        if len(prompt_embeds) != len(pooled):
            raise ValueError(
                f"There are {len(prompt_embeds)} prompt embeddings and {len(pooled)} pooled ones: one of each per "
                "prompt."
            )
        if cfg != 1 and negative is None:
            raise ValueError(f"CFG {cfg} needs a negative prompt's embeddings; use CFG 1 to do without.")
        self.transformer, self.adapters = transformer, adapters
        self.flux = hasattr(transformer.config, "guidance_embeds")
        self.cfg, self.guidance, self.shape = cfg, guidance, tuple(shape)
        self.forwards = 0
        self._training = False
        self._sides = [self._conditioning(prompt_embeds, pooled)]  # positive, and negative where cfg is not 1
        if cfg != 1:
            other = self._conditioning(*negative)
            self._sides.append(other * (len(pooled) // len(other)))
        # Of each prompt: the lengths of its texts. Latents whose prompts' are equal share a call.
        self._lengths = [tuple(len(embeds) for embeds, _ in texts) for texts in zip(*self._sides, strict=True)]

    def _conditioning(self, embeds: Sequence[Tensor], pooled: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        weight = self.transformer.proj_out.weight
        width = self.transformer.config.pooled_projection_dim  # the first columns, as ComfyUI's FLUX does
        return [
            tuple(part.detach().to(weight.device, weight.dtype) for part in (text, whole[:width]))
            for text, whole in zip(embeds, pooled, strict=True)
        ]

    @property
    def device(self) -> torch.device:
        return self.transformer.proj_out.weight.device

    def parameters(self):
        return self.adapters.parameters() if self.adapters is not None else iter(())

    def weights(self) -> list[Tensor]:
        """Every tensor of the network and the adapters that outlives a forward."""
        return [*self.transformer.parameters(), *self.parameters()]

    @contextmanager
    def grad(self):
        """Gradients of the adapters are recorded inside."""
        before, self._training = self._training, True
        try:
            with torch.enable_grad():
                yield
        finally:
            self._training = before

    @contextmanager
    def reference(self):
        """The untuned model: adapters do nothing inside."""
        with self.adapters.disabled():
            yield

    def __call__(self, x: Tensor, sigma, rows) -> Tensor:
        """x: [B, C, H, W] in model space; sigma: number or [B] in 0..1; rows: conditioning row of each sample. -> [B,
        C, H, W], fp32.
        """
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"The latent is {x.shape[3]}x{x.shape[2]}: width and height must be even (pictures in multiples of 16)."
            )
        rows = torch.as_tensor(rows, dtype=torch.long).tolist()
        x = x.to(self.device)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).expand(len(x))
        with torch.set_grad_enabled(self._training):
            v = by_kind(
                [self._lengths[row] for row in rows],
                lambda own: self._guided(x[own], sigma[own], [rows[place] for place in own]),
            )
            return v + 0 * self._others(x, rows) if self._sharded else v

    def _guided(self, x: Tensor, sigma: Tensor, rows: list[int]) -> Tensor:
        """The velocity with prompts whose texts are equally long."""
        texts = [tuple(map(torch.stack, zip(*(side[row] for row in rows)))) for side in self._sides]
        if len(texts) == 1:
            return self._network(x, sigma, *texts[0])
        (embeds, pooled), (other, other_pooled) = texts
        if other.shape == embeds.shape:
            both = torch.cat([embeds, other]), torch.cat([pooled, other_pooled])
            positive, negative = self._network(torch.cat([x, x]), torch.cat([sigma, sigma]), *both).chunk(2)
        else:
            positive, negative = self._network(x, sigma, embeds, pooled), self._network(x, sigma, other, other_pooled)
        return negative + self.cfg * (positive - negative)

    @property
    def _sharded(self) -> bool:
        """FSDP2: every process must call the network as often as all others."""
        return hasattr(self.transformer, "unshard")

    def _others(self, x: Tensor, rows: list[int]) -> Tensor:
        """The network on nothing for every length that these prompts have not, and another process's may have; they
        are not counted. -> a number, for the graph.
        """
        counted, total = self.forwards, torch.zeros((), device=self.device)
        here = {self._lengths[row] for row in rows}
        for lengths in sorted(set(self._lengths) - here):
            blank = torch.zeros_like(x[:1])
            total = total + self._guided(blank, blank.new_full((1,), 0.5), [self._lengths.index(lengths)]).sum()
        self.forwards = counted
        return total

    def free_memory(self) -> float:
        """Bytes that may still be used on the device; 0 where that is not known."""
        if self.device.type == "cuda":
            return (
                torch.cuda.mem_get_info(self.device)[0]
                + torch.cuda.memory_reserved(self.device)
                - torch.cuda.memory_allocated(self.device)
            )
        names = getattr(os, "sysconf_names", ())
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) if "SC_AVPHYS_PAGES" in names else 0.0

    def _network(self, x: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        self.forwards += len(x)
        dtype = embeds.dtype
        common = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "return_dict": False}
        if not self.flux:
            return self.transformer(hidden_states=x.to(dtype), timestep=sigma * 1000, **common)[0].float()
        height, width = x.shape[2] // 2, x.shape[3] // 2
        ids = torch.zeros(height, width, 3, device=x.device)
        ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
        guidance = torch.full_like(sigma, self.guidance) if self.transformer.config.guidance_embeds else None
        packed = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2).to(dtype)
        v = self.transformer(
            hidden_states=packed,
            timestep=sigma,
            guidance=guidance,
            img_ids=ids.view(-1, 3),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device),
            **common,
        )[0]
        return F.pixel_shuffle(v.float().transpose(1, 2).unflatten(2, (height, width)), 2)


class TinyVae:
    """A TAESD in ComfyUI's file form (taesd_encoder.*, taesd_decoder.*, vae_scale, vae_shift) for latents of `kind`,
    "flux" or "sd3", computing in `dtype`.
    """

    def __init__(self, state_dict: dict[str, Tensor], kind: str, dtype: torch.dtype = torch.float32):
        from diffusers import AutoencoderTiny

        sd = {key: tensor.float() for key, tensor in state_dict.items()}
        self.scale, self.shift = sd.pop("vae_scale", torch.tensor(1.0)), sd.pop("vae_shift", torch.tensor(0.0))
        self.factor, self.offset = LATENT_FORMATS[kind]
        self.net = AutoencoderTiny(latent_channels=sd["taesd_decoder.1.weight"].shape[1])
        renamed = {}
        for key, tensor in sd.items():
            half, number, rest = key.split(".", 2)
            half = half.removeprefix("taesd_")
            # ComfyUI counts the decoder's clamp as layer 0.
            renamed[f"{half}.layers.{int(number) - (half == 'decoder')}.{rest}"] = tensor
        self.net.load_state_dict(renamed)
        self.net.eval().requires_grad_(False)
        # channels_last: a third faster on CPUs. torch's own `to`: diffusers' warns of what is meant here
        torch.nn.Module.to(self.net, dtype, memory_format=torch.channels_last)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] as the diffusion model sees them -> images [B, 8h, 8w, 3] in 0..1."""
        raw = (latents.float() / self.factor + self.offset - self.shift) * self.scale
        return ((self.net.decode(raw.to(self.net.dtype)).sample.float() + 1) / 2).clamp(0, 1).movedim(1, -1)


def clip_l_features(
    state_dict: dict[str, Tensor], prompts: list[str], shortest: int = 77
) -> list[tuple[Tensor, Tensor]]:
    """ComfyUI's conditioning of CLIPLoader(type="stable_diffusion"), of each prompt: last hidden state [L, 768] and
    pooled [768].

    state_dict: CLIP-L with all 197 keys. shortest: L is this, or the prompt's tokens where they are more. A prompt of
    more than 77 tokens is refused (ComfyUI splits it).
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
        hidden_act="quick_gelu",
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config)
    model.load_state_dict({key: tensor.float() for key, tensor in state_dict.items()}, assign=True, strict=False)
    model.eval()
    tokens = clip_l_tokens(prompts)
    with torch.no_grad():
        hidden = model(input_ids=tokens, position_ids=torch.arange(tokens.shape[1])[None]).last_hidden_state
    ends = (tokens == config.eos_token_id).int().argmax(1).tolist()  # causal: padding changes nothing before it
    return [
        (states[: max(shortest, end + 1)], states[end])  # ComfyUI leaves text_projection out here
        for states, end in zip(hidden, ends)
    ]


def clip_l_tokens(prompts: list[str], length: int = 77) -> Tensor:
    """CLIP's BPE tokens [P, length]: start, words, end, then padded with the end token."""
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ImportError("CLIP's tokenizer comes with open_clip: pip install open_clip_torch") from error
    tokenizer = SimpleTokenizer()
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    rows = []
    for prompt in prompts:
        words = tokenizer.encode(prompt)
        if len(words) > length - 2:
            raise ValueError(
                f"The prompt '{prompt[:40]}...' has {len(words)} tokens, at most {length - 2} fit: shorten it."
            )
        rows.append([start, *words, *[end] * (length - 1 - len(words))])
    return torch.tensor(rows)


def simple_sigmas(kind: str, steps: int) -> Tensor:
    """ComfyUI's "simple" scheduler [steps+1] for FLUX (shift 1.15, a table of 10,000 times) and SD3 (shift 3, 1,000
    times).
    """
    count = {"flux": 10000, "sd3": 1000}[kind]
    t = torch.tensor([count - int(i * count / steps) for i in range(steps)]) / count
    if kind == "flux":
        sigmas = math.exp(1.15) / (math.exp(1.15) + (1 / t - 1))
    else:
        sigmas = 3.0 * t / (1 + 2.0 * t)
    return torch.cat([sigmas, torch.zeros(1)])
