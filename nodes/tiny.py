"""The embedded models, loaded with ComfyUI's own loaders."""

import functools

import comfy.sd

from ..embedded.clip_l import random_clip_l
from ..embedded.shapes import FOLDER, vae_state_dict


@functools.cache
def _text_encoder():
    """A CLIP-L with fixed-seed random weights: enough to tell the shapes' captions apart. Made once per server."""
    return comfy.sd.load_text_encoder_state_dicts([random_clip_l()], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


def load(model: str):
    """(MODEL, CLIP, VAE) of the embedded 'flux' or 'sd3'."""
    diffusion = comfy.sd.load_diffusion_model(str(FOLDER / f"{model}.safetensors"))
    form = diffusion.model.latent_format
    return diffusion, _text_encoder(), comfy.sd.VAE(sd=vae_state_dict(form.scale_factor, form.shift_factor))
