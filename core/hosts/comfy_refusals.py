"""What of a user's graph cannot be trained in ComfyUI, refused in one sentence before anything is loaded."""

import math

import comfy.model_sampling
from torch import Tensor

from .architectures import architecture_of

WHOLE_RUN = ("outer_sample", "prepare_sampling", "sampler_sample")  # wrappers that need a KSampler's whole run
ROWS = "treerpo_rows"  # option of an entry of Tree Prompts' CONDITIONING: the numbers of its prompts


def refuse_other_than_flow(model) -> None:
    """ValueError for a MODEL that cannot be trained, whatever the settings."""
    architecture = architecture_of(model)
    if architecture.untrainable:
        raise ValueError(f"{architecture.name} cannot be trained here: {architecture.untrainable}.")
    sampling = model.get_model_object("model_sampling")
    other = getattr(comfy.model_sampling, "IMG_TO_IMG_FLOW", ())  # begins from an image, and predicts another
    if not isinstance(sampling, comfy.model_sampling.CONST) or isinstance(sampling, other):
        raise ValueError(
            f"This MODEL ({type(model.model).__name__}) is not a flow-matching model: connect FLUX, SD3, SD3.5 or "
            "another flow model; SD1.5 and SDXL cannot be trained here."
        )
    scale = getattr(sampling, "noise_scale", 1.0)
    if scale != 1:
        raise ValueError(
            f"This MODEL is drawn from noise of scale {scale:g}, and only such of scale 1 can be trained: take out "
            "Model Noise Scale; HiDream-O1 cannot be trained here."
        )


def refuse_wrappers(wrappers: dict) -> None:
    """ValueError for what wraps a KSampler's whole run: there is none here."""
    for kind in WHOLE_RUN:
        for key, found in wrappers.get(kind, {}).items():
            for wrapper in found:
                name = key or getattr(wrapper, "__qualname__", type(wrapper).__name__)
                raise ValueError(
                    f"This MODEL carries '{name}' ({kind}), which works on a whole KSampler run and cannot be honoured "
                    "in a tree: connect the MODEL as it is before the node that adds it."
                )


def refuse_wrong_latent(model, shape) -> None:
    """ValueError unless latents of this shape, without the batch, are images of this MODEL."""
    form = model.model.latent_format
    wanted = [*["channels", 1][: form.latent_dimensions - 1], "height", "width"]
    if form.latent_dimensions < 2:
        raise ValueError(
            f"This MODEL ({type(model.model).__name__}) draws no images, and only images can be trained on."
        )
    if len(shape) == len(wanted) == 4 and shape[1] > 1:
        raise ValueError(
            f"The latent is a video of {shape[1]} latent frames, and only images can be trained on: set the length of "
            "the empty latent to 1."
        )
    if len(shape) != len(wanted):
        raise ValueError(
            f"The latent has the shape {['batch', *shape]}, but only images, {['batch', *wanted]}, can be trained on."
        )
    if shape[0] != form.latent_channels:
        raise ValueError(
            f"The latent has {shape[0]} channels, but this model needs {form.latent_channels}: connect an empty "
            "latent, or encode your picture with the VAE that belongs to the model."
        )


def refuse_wrong_conditioning(policy, texts: dict, cfg: float) -> dict[str, list[tuple[int, int]]]:
    """For each side, of each prompt, its entry and its row there; or a ValueError that says what is wrong."""
    if not math.isclose(cfg, 1.0) and "negative" not in texts:
        raise ValueError(f"cfg is {cfg}, which needs a negative prompt: connect negative, or set cfg to 1.")
    found = {}
    for side, entries in texts.items():
        found[side] = places_of(side, entries)
        for context, options in entries:
            start, end = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
            if any(options.get(key) is not None for key in ("area", "mask")) or start > 0 or end < 1:
                raise ValueError(
                    f"The {side} conditioning is limited to an area, a mask or a range of steps: connect the plain "
                    "prompt."
                )
            _refuse_wrong_widths(policy, side, context, options, context.shape[0])
    prompts, count = (len(found.get(side, found["positive"])) for side in ("positive", "negative"))
    if count not in (1, prompts):
        raise ValueError(
            f"The negative conditioning has {count} prompts for {prompts} positive ones: use one for all, or as many."
        )
    return {side: places * (prompts // len(places)) for side, places in found.items()}


def places_of(side: str, entries: list) -> list[tuple[int, int]]:
    """Of each prompt: the number of its entry, and its row there."""
    if len(entries) == 1 and ROWS not in entries[0][1]:
        return [(0, row) for row in range(entries[0][0].shape[0])]
    numbers = [options.get(ROWS, ()) for _, options in entries]
    places = {prompt: (entry, row) for entry, prompts in enumerate(numbers) for row, prompt in enumerate(prompts)}
    rows = [context.shape[0] for context, _ in entries]
    if not entries or rows != list(map(len, numbers)) or sorted(places) != list(range(sum(rows))):
        raise ValueError(
            f"The {side} conditioning has {len(entries)} entries, and ComfyUI would average them: connect a single "
            "prompt, or all of several from Tree Prompts."
        )
    return [places[prompt] for prompt in range(sum(rows))]


def _refuse_wrong_widths(policy, side: str, context: Tensor, options: dict, count: int) -> None:
    layers, architecture = dict(policy.model.model.diffusion_model.named_modules()), policy.architecture
    advice = f"encode the prompt with the text encoder that belongs to this {architecture.name} model"

    def width(name: str) -> int | None:
        """Input width of this layer, if the network has it."""
        return getattr(layers.get(name), "in_features", None)

    wanted = width(architecture.text)
    if wanted is not None and context.shape[-1] != wanted:
        raise ValueError(
            f"The {side} conditioning is {context.shape[-1]} wide, but the model needs {wanted}: {advice}."
        )
    pooled, wanted = options.get("pooled_output"), width(architecture.pooled)
    if pooled is None:
        if architecture.needs_pooled:
            raise ValueError(
                f"The {side} conditioning has no 'pooled_output', which this {architecture.name} model needs: {advice}."
            )
        return
    if pooled.shape[0] not in (1, count):
        raise ValueError(
            f"The {side} conditioning has {count} prompts but {pooled.shape[0]} rows of 'pooled_output': {advice}."
        )
    given = pooled.shape[-1]
    if wanted is not None and (given < wanted if architecture.pooled_first else given != wanted):
        raise ValueError(
            f"'pooled_output' of the {side} conditioning is {given} wide, but the model needs {wanted}: {advice}."
        )
