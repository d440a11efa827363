"""ComfyUI's side of a run: text encoder, start latent and VAE (core.model.Host)."""

import weakref

import comfy.model_management
import comfy.sample
import torch

from ..method.noise import noised
from ..method.rollout import check_sigmas
from ..model import DECODED_AT_ONCE, Host
from ..references import reference_of
from .comfy_memory import patch
from .comfy_references import refuse_references, text_node, with_reference
from .comfy_refusals import ROWS, refuse_wrong_latent
from .comfy_weights import thaw

_ENCODED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of an empty LATENT, as ComfyUI spells them
REMEMBERED = 4e9  # bytes of main memory per text encoder: about 500 prompts of T5-XXL


def encode(clip, text: str, seeing=None):
    """The CONDITIONING of a text, remembered as long as the text encoder lives. seeing: as comfy_references.text_node,
    for a prompt whose reference image the text encoder sees.
    """
    known = _ENCODED.setdefault(clip.cond_stage_model, {})
    options = sorted(getattr(clip, "tokenizer_options", {}).items())
    hooks = getattr(clip, "apply_hooks_to_conds", None), getattr(clip.patcher, "forced_hooks", None)
    node, name = seeing or (None, "")
    text = text if node else str(text)
    key = (text, node, clip.patcher.patches_uuid, clip.layer_idx, repr(options), *hooks)
    if key not in known or clip.use_clip_schedule:  # scheduled hooks may change from run to run
        if node:
            made = node.execute(clip, str(text), **{name: text.reference[None]}).args[0]
        else:
            made = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        if sum(map(size, known.values())) + size(made) > REMEMBERED:
            known.clear()
        known[key] = made
    return known[key]


def conditioned(model, clip, vae, prompt: str, start: torch.Tensor):
    """The CONDITIONING of a prompt, with its reference image where it has one, in about as many pixels as the latents
    `start` [1, C, ..., H, W] have. ValueError where the MODEL takes none.
    """
    if reference_of(prompt) is None:
        return encode(clip, prompt)
    refuse_references(model, [prompt])
    found = encode(clip, prompt, text_node(model))
    return with_reference(model, vae, found, prompt, *room(model, start))


def room(model, start: torch.Tensor) -> tuple[int, int]:
    """Pixels of latents, and what the sides of a picture are multiples of."""
    scale = downscale(model)
    return start.shape[-1] * start.shape[-2] * scale**2, scale * patch(model)


def size(conditioning: list) -> int:
    """Bytes of a CONDITIONING's texts."""
    return sum(context.numel() * context.element_size() for context, _ in conditioning)


def batch(conditionings: list) -> list:
    """Single-prompt conditionings as one CONDITIONING: an entry with a row per prompt for all prompts that may share a
    model call. Where that makes several entries, each has its prompts' numbers among its options.
    """
    groups: list[list[int]] = []
    for number, conditioning in enumerate(conditionings):
        if len(conditioning) != 1:
            raise ValueError(
                f"The text encoder gives {len(conditioning)} entries for one prompt (scheduled hooks), and only one "
                "can be trained on: use a CLIP without them."
            )
        group = next((group for group in groups if alike(conditionings[group[0]][0], conditioning[0])), None)
        if group is None:
            groups.append([number])
        else:
            group.append(number)
    entries = []
    for group in groups:
        contexts, options = zip(*(conditionings[number][0] for number in group))
        shared = dict(options[0])
        if shared.get("pooled_output") is not None:
            shared["pooled_output"] = torch.cat([own["pooled_output"] for own in options])
        if len(groups) > 1:
            shared[ROWS] = tuple(group)
        entries.append([torch.cat(contexts), shared])
    return entries


def alike(one: list, other: list) -> bool:
    """Whether two entries of a CONDITIONING may share a model call: equally long, and with the same options."""
    (context, options), (other_context, other_options) = one, other
    pooled, other_pooled = options.get("pooled_output"), other_options.get("pooled_output")
    return (
        context.shape == other_context.shape
        and getattr(pooled, "shape", None) == getattr(other_pooled, "shape", None)
        and _same({**options, "pooled_output": None}, {**other_options, "pooled_output": None})
    )


def _same(one, other) -> bool:
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and isinstance(one, (bool, int, float, str)) and one == other)


def refuse_dropped(latent: dict, ignored: tuple = ()) -> None:
    """ValueError for what a KSampler would heed in this LATENT, or another node might, and nothing here does."""
    for key, value in latent.items():
        nothing = (
            value is None
            or (key == "noise_mask" and bool((value == 1).all()))
            or (key == "batch_index" and list(value) == [0])
        )
        if key not in ("samples", *RATIOS, *ignored) and not nothing:
            raise ValueError(
                f"The latent has a '{key}', which cannot be honoured in a tree: connect a LATENT without it, such as "
                "an empty one or a plain VAE Encode."
            )


def start_latent(model, latent_image: dict) -> torch.Tensor:
    """The LATENT to start from, in the model's channel count: [1, C, H, W], or [1, C, 1, H, W] where the model's
    latents have a time, as those of Qwen-Image do.
    """
    refuse_dropped(latent_image)
    ratios = {key: latent_image[key] for key in RATIOS if latent_image.get(key) is not None}
    samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"], **ratios)
    if samples.shape[0] != 1:
        raise ValueError(
            f"The latent has a batch of {samples.shape[0]}: set batch_size to 1, the number of images comes from Tree "
            "Shape."
        )
    refuse_wrong_latent(model, samples.shape[1:])
    return thaw(samples)


def downscale(model) -> int:
    """Pixels per latent, in each direction."""
    return getattr(model.model.latent_format, "spacial_downscale_ratio", 8)  # not in 0.3.64, where it was always 8


def empty_latent(model, pixels: int) -> dict:
    """A LATENT of the model's own size and channels for a square of at most so many pixels, and at least one token."""
    form, tokens = model.model.latent_format, patch(model)
    side = max(1, pixels // downscale(model) // tokens) * tokens
    time = [1] * (form.latent_dimensions - 2)
    return {"samples": torch.zeros(1, form.latent_channels, *time, side, side)}


def pictures(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, H, W] or [B, C, 1, H, W] as the VAE takes them -> images [B, H, W, 3] in 0..1 on the CPU."""
    decoded = vae.decode(latents).float().cpu()
    return decoded.flatten(0, -4)  # a VAE for videos gives [B, frames, H, W, 3]


def roots(velocity, start: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """The roots: a LATENT's samples [1, ...] with noise [B, ...] at the first sigma, on the model's device."""
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
        refuse_references(self.policy.model, texts)
        for text in texts:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self._conditioned(text)
            if self.cfg != 1 and reference_of(text) is not None:
                self._negative_of(text)

    def session(self, prompts: list[str], micro_batch):
        edited = any(reference_of(prompt) is not None for prompt in prompts)
        negative = [self._negative_of(prompt) for prompt in prompts] if edited and self.cfg != 1 else None
        return self.policy.session(
            batch([self._conditioned(prompt) for prompt in prompts]),
            batch(negative) if negative else self.negative,
            self.cfg,
            shape=self.start.shape[1:],
            sigmas=self.sigmas,
            memory_batch=micro_batch.size or None,
            alone=self.alone,
        )

    def _conditioned(self, prompt: str) -> list:
        return conditioned(self.policy.model, self.clip, self.vae, prompt, self.start)

    def _negative_of(self, prompt: str) -> list:
        """The negative of a prompt, with its reference image too: ComfyUI's templates guide an edit so. Without a
        negative it is the empty text, which the text encoder reads beside the same picture.
        """
        edits = reference_of(prompt) is not None
        if self.negative is None:
            return self._conditioned(prompt.about("") if edits else "")
        if len(self.negative) != 1 or self.negative[0][0].shape[0] != 1:
            raise ValueError("Prompts with reference images need a negative of a single prompt, or none at all.")
        if not edits or self.negative[0][1].get("reference_latents") is not None:
            return self.negative
        return with_reference(self.policy.model, self.vae, self.negative, prompt, *room(self.policy.model, self.start))

    def roots(self, velocity, noise: torch.Tensor) -> torch.Tensor:
        return roots(velocity, self.start, noise, self.sigmas)

    def decode(self, velocity, leaves: torch.Tensor) -> torch.Tensor:
        images = []
        for part in velocity.process_out(leaves).cpu().split(DECODED_AT_ONCE):
            comfy.model_management.throw_exception_if_processing_interrupted()
            images.append(pictures(self.vae, part))
        return torch.cat(images)
