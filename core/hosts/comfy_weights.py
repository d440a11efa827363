"""ComfyUI's tensors and weights for autograd, which cannot save what was made in inference mode."""

import hashlib

import torch
from torch import Tensor, nn


def thaw(tree):
    """Copies of all tensors of nested dicts, lists and tuples that autograd may use; anything else as it is."""
    with torch.inference_mode(False):
        return map_tensors(tree, lambda tensor: tensor.detach().clone())


def map_tensors(tree, change):
    if torch.is_tensor(tree):
        return change(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([map_tensors(value, change) for value in tree])
    return tree


def thaw_weights(model: nn.Module) -> None:
    """Replace weights made in inference mode by normal, frozen ones.

    The memory stays the same, so pinned weights stay pinned.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not _autograd_can_save(parameter):
                module._parameters[name] = nn.Parameter(_normal(parameter), requires_grad=False)
            elif parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
        for name, buffer in module._buffers.items():
            if buffer is not None and not _autograd_can_save(buffer):
                module._buffers[name] = _normal(buffer)
        # ComfyUI's bypass loaders keep a LoRA's tensors in an object behind the layer's swapped forward
        adapter = getattr(getattr(vars(module).get("forward"), "__self__", None), "adapter", None)
        if isinstance(getattr(adapter, "weights", None), (tuple, list)):
            adapter.weights = type(adapter.weights)(
                _normal(part) if torch.is_tensor(part) and not _autograd_can_save(part) else part
                for part in adapter.weights
            )


def _autograd_can_save(tensor: Tensor) -> bool:
    """False for an inference tensor, and for one that was: moved by `.to` outside inference mode it no longer says
    is_inference(), and still has no version counter."""
    if tensor.is_inference():
        return False
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def _normal(tensor: Tensor) -> Tensor:
    # packed weights know how to copy themselves, but ComfyUI-GGUF's do not
    if type(tensor) not in (Tensor, nn.Parameter):
        copied = tensor.detach().clone()
        if _autograd_can_save(copied):
            return copied
        copied = _normal(tensor.as_subclass(Tensor)).as_subclass(type(tensor))
        vars(copied).update(vars(tensor))
        return copied
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def patched(model) -> str:
    """What a MODEL's weights are patched with, such as LoRAs: 'none', or how many weights and a digest of the patches.

    The digest is of names, strengths and the tensors' sizes and sums, so it is the same after a restart.
    """
    parts = [f"{key} {_described(model.patches[key])}" for key in sorted(model.patches, key=str)]
    parts += sorted(str(name) for name in getattr(model, "injections", {}))  # bypass loaders
    digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=4).hexdigest()
    return f"{len(parts)} weights, {digest}" if parts else "none"


def _described(value) -> str:
    """Everything that is fixed of a patch, as text."""
    if torch.is_tensor(value):
        return f"{tuple(value.shape)} {float(value.double().sum()):.6e}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    if hasattr(value, "weights"):  # comfy.weight_adapter
        return f"{type(value).__name__} {_described(value.weights)}"
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__
