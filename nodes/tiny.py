"""The embedded models, loaded with ComfyUI's own loaders."""

import functools
from contextlib import contextmanager

import comfy.model_management
import comfy.sd
import torch
from torch.nn.functional import pad

from ..embedded.clip_l import SHORTEST, as_trained, random_clip_l
from ..embedded.shapes import FOLDER, decodes_in, skip_zero_blocks, vae_state_dict


@functools.cache
def _text_encoder():
    """A CLIP-L with fixed-seed random weights: enough to tell the shapes' captions apart. Made once per server.

    Its features end with the prompt, or after 16 tokens, not after 77: the models were trained on either, and most of
    an iteration's time would go into padding.
    """
    clip = comfy.sd.load_text_encoder_state_dicts([random_clip_l()], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    encoder, end = clip.cond_stage_model, clip.tokenizer.clip_l.end_token
    encode = encoder.encode_token_weights

    def encode_shorter(tokens):
        sections = tokens["l"]
        length = max(SHORTEST, [token for token, *_ in sections[0]].index(end) + 1) if len(sections) == 1 else None
        with only_first(encoder.clip_l.transformer.text_model.encoder, length):
            features, *more = encode(tokens)
        return features[:, :length], *more

    encoder.encode_token_weights = encode_shorter
    tokenize = clip.tokenizer.tokenize_with_weights
    clip.tokenizer.tokenize_with_weights = lambda text, *given, **named: tokenize(as_trained(text), *given, **named)
    return clip


@contextmanager
def only_first(layers, length: int | None):
    """CLIP's layers work on the first `length` tokens, which see no later ones; what the others would be is 0."""
    whole = layers.forward

    def forward(x, mask, *given, **named):
        outputs = whole(x[:, :length], mask[..., :length, :length], *given, **named)
        return tuple(one if one is None else pad(one, (0, 0, 0, x.shape[1] - one.shape[1])) for one in outputs)

    layers.forward = forward
    try:
        yield
    finally:
        del layers.forward


def load(model: str):
    """(MODEL, CLIP, VAE) of the embedded 'flux' or 'sd3'."""
    diffusion = comfy.sd.load_diffusion_model(str(FOLDER / f"{model}.safetensors"))
    form = diffusion.model.latent_format
    dtype = decodes_in(comfy.model_management.vae_device())
    vae = comfy.sd.VAE(sd=vae_state_dict(form.scale_factor, form.shift_factor), dtype=dtype)
    vae.first_stage_model.to(memory_format=torch.channels_last)
    skip_zero_blocks(vae.first_stage_model)
    return diffusion, _text_encoder(), vae
