"""Flow models through diffusers: velocities, text features and VAEs where there is no ComfyUI.

The networks are in diffusers_networks.py. diffusers, transformers and open_clip are imported when first used; nothing
in this file touches ComfyUI.
"""

import math
import os
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..lora.layer_names import network_class
from ..model import Velocity, by_kind
from .diffusers_networks import KINDS, kind_of, load_transformer, simple_sigmas

__all__ = ["KINDS", "load_transformer", "simple_sigmas"]  # part of this side, as the rest of the file is
# ComfyUI hands (vae latent - shift) * scale to the diffusion model: (scale, shift). Z-Image's latents are FLUX's.
LATENT_FORMATS = {"flux": (0.3611, 0.1159), "sd3": (1.5305, 0.0609), "z-image": (0.3611, 0.1159)}


class DiffusersVelocity(Velocity):
    """Velocity of a transformer of diffusers for a fixed set of prompts: `velocity(x, sigma, rows) -> v`.

    transformer: from load_transformer or a diffusers pipeline. adapters: a trainable LoRA at work in it (peft.Attached,
    or Adapters that are injected), or None. shape: (C, H, W) of the latents, or (C, 1, H, W), for who draws
    them. prompt_embeds: P tensors [L, D], of any lengths; pooled: P of [Pd], None where the network takes none;
    negative: (1 or P embeds [L, D], as many pooled [Pd] or None), used where cfg is not 1. guidance: FLUX's and
    FLUX.2's embedded guidance. `forwards` counts latents through the network, twice with CFG.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        adapters,
        prompt_embeds: Sequence[Tensor],
        pooled: Sequence[Tensor] | None = None,
        negative: tuple[Sequence[Tensor], Sequence[Tensor] | None] | None = None,
        cfg: float = 1.0,
        guidance: float = 3.5,
        shape: tuple = (),
    ):
        self.kind, self.network = kind_of(transformer), network_class(transformer)
        pooled_ones = len(pooled) if pooled is not None else 0
        if pooled_ones != len(prompt_embeds) and (pooled is not None or self.kind.pooled):
            raise ValueError(
                f"There are {len(prompt_embeds)} prompt embeddings and {pooled_ones} pooled ones: one of each per "
                "prompt."
            )
        if cfg != 1 and negative is None:
            raise ValueError(f"CFG {cfg} needs a negative prompt's embeddings; use CFG 1 to do without.")
        self.transformer, self.adapters = transformer, adapters
        self.cfg, self.guidance, self.shape = cfg, guidance, tuple(shape)
        self.forwards = 0
        self._training = False
        self._sides = [self._conditioning(prompt_embeds, pooled)]  # positive, and negative where cfg is not 1
        if cfg != 1:
            other = self._conditioning(*negative)
            self._sides.append(other * (len(prompt_embeds) // len(other)))
        # Of each prompt: the lengths of its texts. Latents whose prompts' are equal share a call.
        self._lengths = [tuple(len(embeds) for embeds, _ in texts) for texts in zip(*self._sides, strict=True)]

    @property
    def _weight(self) -> Tensor:
        return self.transformer.get_submodule(self.kind.output).weight

    def _conditioning(self, embeds: Sequence[Tensor], pooled: Sequence[Tensor] | None) -> list[tuple[Tensor, Tensor]]:
        weight = self._weight
        pooled = pooled if self.kind.pooled else [text.new_zeros(0) for text in embeds]
        # the first columns, as ComfyUI's FLUX does
        width = self.transformer.config.pooled_projection_dim if self.kind.pooled else 0
        return [
            tuple(part.detach().to(weight.device, weight.dtype) for part in (text, whole[:width]))
            for text, whole in zip(embeds, pooled, strict=True)
        ]

    @property
    def device(self) -> torch.device:
        return self._weight.device

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
        """x: [B, *shape] in model space; sigma: number or [B] in 0..1; rows: conditioning row of each sample. -> [B,
        *shape], fp32.
        """
        if x.shape[-1] % self.kind.patch or x.shape[-2] % self.kind.patch:
            raise ValueError(
                f"The latent is {x.shape[-1]}x{x.shape[-2]}: width and height must be even (pictures in multiples of "
                "16)."
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

    def graph_bytes(self) -> float | None:
        """Nobody knows what a checkpointed network keeps; too much, then: no graphs are kept."""
        return math.inf if getattr(self.transformer, "is_gradient_checkpointing", False) else None

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
        return self.kind.ask(self.transformer, x, sigma, embeds, pooled, self.guidance)


class TinyVae:
    """A TAESD in ComfyUI's file form (taesd_encoder.*, taesd_decoder.*, vae_scale, vae_shift) for latents of `kind`,
    a key of LATENT_FORMATS, computing in `dtype`.
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
