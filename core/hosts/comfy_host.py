"""ComfyUI's side of a run: text encoder, start latent and VAE (core.model.Host)."""

import weakref

import comfy.model_management
import comfy.sample
import torch

from ..method.noise import noised
from ..method.rollout import check_sigmas
from ..model import DECODED_AT_ONCE, Host
from .comfy import thaw

_ENCODED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
REMEMBERED = 4e9  # bytes of main memory per text encoder: about 500 prompts of T5-XXL


def encode(clip, text: str):
    """The CONDITIONING of a text, remembered as long as the text encoder lives."""
    known = _ENCODED.setdefault(clip.cond_stage_model, {})
    key = (text, clip.patcher.patches_uuid, clip.layer_idx)
    if key not in known or clip.use_clip_schedule:  # scheduled hooks may change from run to run
        made = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        if sum(map(size, known.values())) + size(made) > REMEMBERED:
            known.clear()
        known[key] = made
    return known[key]


def size(conditioning: list) -> int:
    """Bytes of a CONDITIONING's texts."""
    return sum(context.numel() * context.element_size() for context, _ in conditioning)


def batch(conditionings: list) -> list:
    """Single-prompt conditionings as one entry with a row per prompt; shorter texts are padded with zeros."""
    entries = [conditioning[0] for conditioning in conditionings]
    length = max(context.shape[1] for context, _ in entries)
    contexts = [torch.nn.functional.pad(context, (0, 0, 0, length - context.shape[1])) for context, _ in entries]
    options = dict(entries[0][1])
    if options.get("pooled_output") is not None:
        options["pooled_output"] = torch.cat([entry["pooled_output"] for _, entry in entries])
    return [[torch.cat(contexts), options]]


def start_latent(model, latent_image: dict) -> torch.Tensor:
    """The LATENT to start from, [1, C, H, W] in the model's channel count."""
    samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
    if samples.shape[0] != 1:
        raise ValueError(
            f"The latent has a batch of {samples.shape[0]}: set batch_size to 1, the number of images comes from Tree "
            "Shape."
        )
    return thaw(samples)


def roots(velocity, start: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """The roots: a LATENT's samples [1, C, H, W] with noise [B, C, H, W] at the first sigma, on the model's device."""
    return noised(velocity.process_in(start), noise, float(sigmas[0])).to(velocity.device)


class ComfyHost(Host):
    """The policy with its text encoder and VAE."""

    def __init__(
        self,
        policy,
        clip,
        vae,
        sigmas: torch.Tensor,
        latent_image: dict,
        cfg: float,
        negative: list | None,
        alone: bool,
    ):
        self.policy, self.clip, self.vae, self.cfg, self.negative, self.alone = policy, clip, vae, cfg, negative, alone
        self.sigmas = sigmas.detach().clone().float().cpu()
        check_sigmas(self.sigmas)
        self.start = start_latent(policy.model, latent_image)

    def encode(self, texts: list[str]) -> None:
        """All prompts in one go, remembered: afterwards the text encoder may leave the GPU for good."""
        for text in texts:
            comfy.model_management.throw_exception_if_processing_interrupted()
            encode(self.clip, text)

    def session(self, prompts: list[str], micro_batch):
        conditioning = batch([encode(self.clip, text) for text in prompts])
        return self.policy.session(
            conditioning,
            self.negative,
            self.cfg,
            shape=self.start.shape[1:],
            memory_batch=micro_batch.size or None,
            alone=self.alone,
        )

    def roots(self, velocity, noise: torch.Tensor) -> torch.Tensor:
        return roots(velocity, self.start, noise, self.sigmas)

    def decode(self, velocity, leaves: torch.Tensor) -> torch.Tensor:
        images = []
        for part in velocity.process_out(leaves).cpu().split(DECODED_AT_ONCE):
            comfy.model_management.throw_exception_if_processing_interrupted()
            images.append(self.vae.decode(part).float().cpu())
        return torch.cat(images)
