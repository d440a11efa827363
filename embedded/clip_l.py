"""A CLIP-L text encoder with random weights from a fixed seed: 247 MB that need not be shipped.

The embedded models were trained on its features: a random transformer tells 96 captions apart just as well.
Weights are uniform, not normal, because uniform numbers from a CPU generator are the same bits on every machine.
"""

import math
import re

import torch
from torch import Tensor

WIDTH, LAYERS, VOCABULARY, POSITIONS = 768, 12, 49408, 77
SHORTEST = 16  # text tokens that the embedded models see at least; captions have 9
# Standard deviations: of the embeddings, and as gains over 1/sqrt(fan in). Attention mixes every word
# into the end-of-text token, whose feature is the pooled output; sharp attention keeps captions apart (cosine .5-.7).
TOKEN, POSITION, QUERY_KEY, VALUE_OUT, MLP = 1.0, 0.5, 3.0, 1.0, 0.2


def shapes_and_scales() -> dict[str, tuple[tuple[int, ...], float]]:
    """Every weight that is not a bias or a norm: name -> shape, standard deviation."""
    unit, wide = 1 / math.sqrt(WIDTH), 4 * WIDTH
    table = {
        "text_model.embeddings.token_embedding.weight": ((VOCABULARY, WIDTH), TOKEN),
        "text_model.embeddings.position_embedding.weight": ((POSITIONS, WIDTH), POSITION),
    }
    for i in range(LAYERS):
        layer = f"text_model.encoder.layers.{i}"
        for name, gain in (
            ("q_proj", QUERY_KEY),
            ("k_proj", QUERY_KEY),
            ("v_proj", VALUE_OUT),
            ("out_proj", VALUE_OUT),
        ):
            table[f"{layer}.self_attn.{name}.weight"] = ((WIDTH, WIDTH), gain * unit)
        table[f"{layer}.mlp.fc1.weight"] = ((wide, WIDTH), MLP * unit)
        table[f"{layer}.mlp.fc2.weight"] = ((WIDTH, wide), MLP * unit / 2)
    table["text_projection.weight"] = ((WIDTH, WIDTH), unit)
    return table


def random_clip_l(seed: int = 0) -> dict[str, Tensor]:
    """The fp16 state dict, all 197 keys, in the form ComfyUI's text encoder loader takes as CLIP-L."""
    sd = {}
    for number, (name, (shape, scale)) in enumerate(shapes_and_scales().items()):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        values = torch.rand(shape, generator=generator)
        sd[name] = values.sub_(0.5).mul_(scale * math.sqrt(12)).half()
        if name.startswith("text_model.encoder"):
            sd[name.replace(".weight", ".bias")] = torch.zeros(shape[0], dtype=torch.float16)
    norms = [f"text_model.encoder.layers.{i}.layer_norm{j}" for i in range(LAYERS) for j in (1, 2)]
    for name in [*norms, "text_model.final_layer_norm"]:
        sd[f"{name}.weight"] = torch.ones(WIDTH, dtype=torch.float16)
        sd[f"{name}.bias"] = torch.zeros(WIDTH, dtype=torch.float16)
    return sd


def as_trained(prompt: str) -> str:
    """A prompt as the embedded models' captions put it: they say "a orange circle"."""
    return re.sub(r"\b(a)n\b", r"\1", prompt, flags=re.IGNORECASE)
