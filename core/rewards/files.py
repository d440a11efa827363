"""Weight files that users have, opened without running anything in them, and refused with one sentence."""

import json
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def find(path: Path, *names: str) -> Path:
    """The weights' file: `path` itself, or in a folder the first of these names, else the only weights there."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"There is no file {path}.")
    for name in names:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in ENDINGS)
    if len(found) != 1:
        raise ValueError(
            f"The folder {path} holds {len(found)} weight files ({', '.join(f.name for f in found) or 'none'}): name "
            "the file itself."
        )
    return found[0]


def beside(path: Path, *names: str) -> Path | None:
    """The first of these files in the folder of the weights, or None."""
    return next((path.parent / name for name in names if (path.parent / name).is_file()), None)


def read_json(path: Path | None) -> dict:
    """A configuration file; {} where there is none."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable configuration file ({error}): download it again.") from error
    return found if isinstance(found, dict) else {}


def open_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or torch file, on the CPU. Pickled code is refused, never run."""
    with open(path, "rb") as file:
        head = file.read(512)
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path.name} is a web page, not weights: the download went wrong; download the file itself.")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path.name} is only a pointer to the weights (Git LFS): download the file itself.")
    try:
        if head[8:9] == b"{":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or head[:1] == b"\x80":
            raise ValueError(
                f"{path.name} holds something else than weights, possibly code, and was not opened: get the official "
                "file."
            ) from error
        raise ValueError(f"{path.name} is not a weights file: get the official file.") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path.name} is damaged or cut short ({path.stat().st_size:,} bytes): download it again."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict) or not weights or not all(torch.is_tensor(value) for value in weights.values()):
        raise ValueError(f"{path.name} holds no weights by name: get the official file.")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def fill(module: nn.Module, weights: dict[str, Tensor], file: str, what: str) -> nn.Module:
    """Put the weights into a module made on the meta device.

    Anything missing, unknown or of another shape is an error.
    """
    try:
        missing, unknown = module.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        wrong = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{file} does not fit {what}: {wrong}") from error
    # transformers below 4.31 saves what `_computed` works out
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing or unknown:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise ValueError(f"{file} is not {what}: of its weights {' and '.join(parts)}.")
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_meta:
                owner._buffers[name] = _computed(name, buffer)
    return module


def _computed(name: str, buffer: Tensor) -> Tensor:
    """What CLIP's modules work out and do not save: positions and the causal mask."""
    if name == "position_ids":
        return torch.arange(buffer.shape[-1]).expand(buffer.shape)
    if name == "attn_mask":
        return torch.full(buffer.shape, float("-inf")).triu_(1)
    raise RuntimeError(f"The buffer '{name}' is not in the weights.")


def layers(weights: dict[str, Tensor], prefix: str) -> int:
    """How many numbered blocks there are under `prefix`, such as 'visual.transformer.resblocks.'."""
    return 1 + max((int(key[len(prefix) :].split(".")[0]) for key in weights if key.startswith(prefix)), default=-1)
