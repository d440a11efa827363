"""Exact gradients through ComfyUI's networks: in-place updates, checkpointing, and kernels without a backward pass."""

from contextlib import ExitStack, contextmanager

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    import comfy_kitchen
    from comfy_kitchen.backends.eager import rope as comfy_kitchen_plain
except ImportError:  # older ComfyUI
    comfy_kitchen = None


FUSED = tuple(
    f"{op}{half}{one}" for op in ("apply_rope", "rms_rope") for half in ("", "_split_half") for one in ("", "1")
)


def adapted_norms(network: nn.Module) -> list:
    """Hooks that give every LayerNorm a copy of its own."""
    return [
        layer.register_forward_pre_hook(own_input) for layer in network.modules() if isinstance(layer, nn.LayerNorm)
    ]


def own_input(layer, args):
    """FLUX adds to the very tensor a LayerNorm has just saved for its backward: give the norm a copy of its own."""
    return (args[0].clone(), *args[1:]) if torch.is_grad_enabled() else None


def blocks_of(network: nn.Module) -> list[nn.Module]:
    return [block for stack in network.children() if isinstance(stack, nn.ModuleList) for block in stack]


@contextmanager
def checkpointed(network: nn.Module):
    """Every block of the network recomputes its activations in the backward pass."""
    with ExitStack() as stack:
        for block in blocks_of(network):
            stack.callback(_restore, block, vars(block).get("forward"))
            block.forward = _recomputing(block.forward)
        yield


def _restore(block: nn.Module, forward) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward


def _recomputing(forward):
    def own(value):
        # [B, tokens, width] is what blocks update in place; the checkpoint's saved inputs must not change.
        return value.clone() if torch.is_tensor(value) and value.dim() == 3 else value

    def run(args, kwargs):
        return forward(*map(own, args), **{key: own(value) for key, value in kwargs.items()})

    def wrapped(*args, **kwargs):
        if isinstance(kwargs.get("transformer_options"), dict):
            kwargs["transformer_options"] = dict(kwargs["transformer_options"])  # block_index in there moves on
        return checkpoint(run, args, kwargs, use_reentrant=False, preserve_rng_state=False)

    return wrapped


@contextmanager
def training_kernels():
    """ComfyUI's differentiable kernels, for rollouts too, so that the first ratio is exactly 1.

    Versions before 0.14 have only those. Not every network asks whether it is in training (Anima, ERNIE-Image and
    JoyImage call fused kernels all the same): those are replaced by comfy_kitchen's own plain versions.
    """
    with ExitStack() as stack:
        if hasattr(comfy.model_management, "in_training"):
            stack.enter_context(_set(comfy.model_management, "in_training", True))
        for name in FUSED if comfy_kitchen is not None else ():
            plain = getattr(comfy_kitchen_plain, name, None)
            if plain is not None and hasattr(comfy_kitchen, name):
                stack.enter_context(_set(comfy_kitchen, name, plain))
        yield


@contextmanager
def _set(owner, name: str, value):
    """owner.name is value inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def use_differentiable_attention(transformer_options: dict) -> None:
    """PyTorch's attention where ComfyUI runs with one that has no backward pass (sage, flash, int8)."""
    attention = comfy.ldm.modules.attention
    fine = [
        getattr(attention, f"attention_{name}", None) for name in ("pytorch", "basic", "split", "sub_quad", "xformers")
    ]
    if attention.optimized_attention not in fine:
        transformer_options.setdefault(
            "optimized_attention_override", lambda _, *args, **kwargs: attention.attention_pytorch(*args, **kwargs)
        )
