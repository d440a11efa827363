"""The embedded models, loaded with ComfyUI's own loaders."""

import functools

import comfy.model_management
import comfy.sd
import torch

from ..embedded.clip_l import random_clip_l
from ..embedded.shapes import FOLDER, decodes_in, vae_state_dict


@functools.cache
def _text_encoder():
    """A CLIP-L with fixed-seed random weights: enough to tell the shapes' captions apart. Made once per server."""
    return comfy.sd.load_text_encoder_state_dicts([random_clip_l()], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


def load(model: str):
    """(MODEL, CLIP, VAE) of the embedded 'flux' or 'sd3'."""
    diffusion = comfy.sd.load_diffusion_model(str(FOLDER / f"{model}.safetensors"))
    form = diffusion.model.latent_format
    dtype = decodes_in(comfy.model_management.vae_device())
    vae = comfy.sd.VAE(sd=vae_state_dict(form.scale_factor, form.shift_factor), dtype=dtype)
    vae.first_stage_model.to(memory_format=torch.channels_last)
    return diffusion, _text_encoder(), vae
