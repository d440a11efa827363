"""Reference images in ComfyUI: what a prompt of an edit gives the model, as ComfyUI's own nodes and templates do it."""

import math
import re
import weakref

import comfy.utils
from torch import Tensor

from ..references import EditPrompt, reference_of
from .architectures import ARCHITECTURES, architecture_of, model_file

_ENCODED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
REMEMBERED = 1e9  # bytes of main memory per VAE: about 2,000 pictures of 1024 x 1024
PLUS = re.compile(r"2509|2511|plus", re.IGNORECASE)  # in the name of a Qwen-Image-Edit's file: the later ones
ZERO = re.compile(r"2511")  # those that are told that a reference is at time 0


def refuse_references(model, prompts: list[str]) -> None:
    """ValueError where a prompt has a reference image and the MODEL takes none."""
    architecture = architecture_of(model)
    if not architecture.reference and any(reference_of(prompt) is not None for prompt in prompts):
        others = ", ".join(row.name for row in ARCHITECTURES if row.reference)
        raise ValueError(
            f"This {architecture.name} model takes no reference images: connect one that edits ({others}), or take "
            "the reference images out of the prompts."
        )


def text_node(model):
    """ComfyUI's node that encodes a prompt together with its reference image, and the name of its input for it; None
    where the text encoder sees no picture.
    """
    if architecture_of(model).reference != "latent and text":
        return None
    from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit, TextEncodeQwenImageEditPlus

    plus = PLUS.search(_file(model))
    return (TextEncodeQwenImageEditPlus, "image1") if plus else (TextEncodeQwenImageEdit, "image")


def with_reference(model, vae, conditioning: list, prompt: str, pixels: int, multiple: int) -> list:
    """The CONDITIONING with the prompt's reference image as one more reference latent, as ReferenceLatent gives it.

    pixels, multiple: as in `fitted`.
    """
    options = {"reference_latents": [latent_of(vae, prompt, pixels, multiple)]}
    if architecture_of(model).reference == "latent and text" and ZERO.search(_file(model)):
        options["reference_latents_method"] = "index_timestep_zero"
    return [[context, {**own, **options}] for context, own in conditioning]


def latent_of(vae, prompt: EditPrompt, pixels: int, multiple: int) -> Tensor:
    """The prompt's reference image as the VAE encodes it, in about so many pixels; remembered as long as the VAE
    lives.
    """
    picture = prompt.reference[None]
    height, width = fitted(*picture.shape[1:3], pixels, multiple)
    known, key = _ENCODED.setdefault(vae.first_stage_model, {}), (prompt.digest, height, width)
    if key not in known:
        if (height, width) != tuple(picture.shape[1:3]):
            way = "area" if height * width < picture[0, ..., 0].numel() else "bicubic"
            scaled = comfy.utils.common_upscale(picture.movedim(-1, 1), width, height, way, "disabled")
            picture = scaled.movedim(1, -1).clamp(0, 1)
        made = vae.encode(picture)
        if sum(map(size, known.values())) + size(made) > REMEMBERED:
            known.clear()
        known[key] = made
    return known[key]


def fitted(height: int, width: int, pixels: int, multiple: int) -> tuple[int, int]:
    """Height and width of the same proportions with about so many pixels, each a multiple of `multiple`, at least
    one.
    """
    scale = math.sqrt(pixels / (height * width))
    return tuple(max(1, round(side * scale / multiple)) * multiple for side in (height, width))


def size(tensor: Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()


def _file(model) -> str:
    file = model_file(model)
    return file.stem if file is not None else ""
