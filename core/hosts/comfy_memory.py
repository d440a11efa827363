"""What a call needs beside the weights, from the shapes of a network; numbers counted on networks of true size."""

import re

from torch import nn

from .comfy_gradients import blocks_of

# Activations in units of tokens times a block's width; counted with a LoRA of rank 32 on the attention, see activations
SAMPLING, KEPT, BACKWARD = 31.0, 20.5, 20.0  # of a forward; of what one block keeps; of a block's backward beside that
TEXT = 256  # tokens of a prompt where it is not known yet: FLUX's T5 gives as many at least
MODULATION = re.compile(r"(^|[._])(mod|modulation|adaln)", re.IGNORECASE)


def patch(model) -> int:
    """Latents per token, in each direction: sides that are no multiple of it the network pads, and draws less well."""
    network = model.model.diffusion_model
    sizes = (getattr(network, name, None) for name in ("patch_size", "patch", "patch_spatial"))
    size = next((size for size in sizes if size is not None), 1)
    return int(size if isinstance(size, int) else size[-1])


def activations(
    network: nn.Module, tokens: float, item: int, checkpointing: bool, cast: bool, timed: bool = False
) -> dict[str, float]:
    """Bytes beside the weights: of a forward ("sampling"), of what its graph keeps ("graph"), and of a forward with its
    backward ("learning").

    tokens: of images and texts, of all latents of the call. item: bytes of an activation. cast: whether weights are
    cast to compute with (fp8 ones, above all): autograd holds on to the cast copies. timed: a gradient also goes
    through layers that work on the time alone. In units of tokens times the blocks' width; the numbers were counted on
    networks of true size (benchmarks/allocations.py).
    """
    blocks = blocks_of(network)
    widths = [_width(block) for block in blocks] or [1]
    unit = tokens * item
    layers = [_cast_weights(block, timed) if cast else [] for block in blocks]
    copies = [item * sum(layer) for layer in layers] or [0]
    within = KEPT * max(widths) * unit + max(copies)  # of one block
    if checkpointing:
        every = (sum(widths) + max(widths)) * unit
    else:
        whole = item * sum(_cast_weights(network, timed)) if cast and timed else sum(copies)
        every = KEPT * sum(widths) * unit + whole
    return {
        "sampling": SAMPLING * max(widths) * unit + item * max(map(max, filter(None, layers)), default=0),
        "graph": every,
        "learning": every + BACKWARD * max(widths) * unit + (within if checkpointing else 0),
    }


def _width(block: nn.Module) -> int:
    """Features per token: what most of a block's Linear layers take."""
    sizes = [layer.in_features for layer in block.modules() if isinstance(getattr(layer, "in_features", None), int)]
    return max(set(sizes), key=lambda size: (sizes.count(size), -size)) if sizes else 0


def _cast_weights(module: nn.Module, timed: bool) -> list[int]:
    """Numbers in each Linear layer in there; those that work on the time alone only where timed."""
    return [
        layer.in_features * layer.out_features
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "in_features", None), int)
        and isinstance(getattr(layer, "out_features", None), int)
        and (timed or not MODULATION.search(name))
    ]
