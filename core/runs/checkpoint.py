"""What a run has saved, its newest state or a checkpoint: read whole, described without loading it, set aside."""

import hashlib
import io
import json
import os
import re
import shutil
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..files import link_or_copy, temporary_name, tidy
from .run_settings import without_trainer

FORMAT = 2  # 1 had no ema, extra and rng
FILES = ("state.pt", "adapter.safetensors")  # of a checkpoint
KINDS = {"iteration": int, "adapters": dict, "metrics": list, "config": dict}  # what every state.pt has
MAYBE = {"optimizer": dict, "ema": dict, "extra": dict, "due": dict, "id": str, "rng": Tensor}  # or None, or not at all


class DamagedCheckpoint(ValueError):
    """A state.pt that is not whole, or not one of ours."""


@dataclass
class Checkpoint:
    """What is known of a checkpoint without loading its tensors."""

    iteration: int
    path: Path  # its folder
    summary: str  # for a list to choose from: 'iteration 80, reward 0.3124 ± 0.0210'
    saved: str  # when, ISO 8601 in UTC
    settings: dict  # of the run it belongs to, without the trainer's
    run: str | None  # that run's id; None = saved before there were ids


def read_state(path: Path) -> dict:
    """The content of a state.pt, verified. Raises DamagedCheckpoint, half a sentence, or ValueError if it is of a newer
    TreeRPO.

    The checksums in the file are verified first: torch.load does not (0.12 s for 300 MB, as much again as loading
    them).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("wrong checksum")
        with torch.inference_mode(False):
            state = torch.load(path, map_location="cpu", weights_only=True)
        version = dict(state)["format"]
        if isinstance(state.get("metrics"), str):  # since format 2
            state["metrics"] = [json.loads(line) for line in state["metrics"].splitlines()]
        if version <= FORMAT and not (
            all(isinstance(state[key], kind) for key, kind in KINDS.items())
            and "optimizer" in state
            and all(isinstance(state.get(key), (kind, type(None))) for key, kind in MAYBE.items())
            and all(isinstance(row, dict) for row in state["metrics"])
            and all(isinstance(tensor, Tensor) for tensor in state["adapters"].values())
        ):
            raise TypeError("not the state of a run")
        if version <= FORMAT and not all(tensor.isfinite().all() for tensor in state["adapters"].values()):
            raise ValueError("its LoRA has numbers that are not finite")
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # torch and zipfile raise many kinds here: truncated, refused pickle, missing key
        raise DamagedCheckpoint(
            f"The checkpoint {path} cannot be read ({type(error).__name__}): it is damaged or not one of TreeRPO's"
        ) from error
    if version > FORMAT:
        raise ValueError(
            f"The checkpoint {path} was made by a newer TreeRPO (format {version}, this one reads up to {FORMAT}): "
            "update TreeRPO, or choose another run name."
        )
    return state


def torch_bytes(state: dict) -> memoryview:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def signature(path: Path) -> tuple | None:
    """Changes whenever a file is replaced; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def run_id(state: dict) -> str:
    """The id of the run that a state belongs to; for states from before there were ids, one made of its beginning."""
    beginning = json.dumps([without_trainer(state["config"]), state["metrics"][:1]], sort_keys=True)
    return state.get("id") or hashlib.blake2b(beginning.encode(), digest_size=8).hexdigest()


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints in a run's folder, the one saved last first. Reads no tensors."""
    folders = [path for path in (Path(folder) / "checkpoints").glob("*") if re.fullmatch(r"\d{6,}", path.name)]
    return sorted(
        filter(None, map(describe, folders)),
        key=lambda checkpoint: (checkpoint.saved, checkpoint.iteration),
        reverse=True,
    )


def describe(folder: Path) -> Checkpoint | None:
    """What the metadata of a checkpoint's adapter says; None where there is no checkpoint of ours."""
    if not (folder / "state.pt").is_file():
        return None
    try:
        with safe_open(folder / "adapter.safetensors", "pt") as file:
            metadata = file.metadata()
        row, iteration = json.loads(metadata["treerpo.last"]), int(metadata["treerpo.iterations"])
        reward = f", reward {row['reward']:.4f}" if "reward" in row else ""
        spread = f" ± {row['reward_std']:.4f}" if reward and "reward_std" in row else ""
        return Checkpoint(
            iteration,
            folder,
            f"iteration {iteration}{reward}{spread}",
            metadata["treerpo.saved"],
            json.loads(metadata["treerpo.config"]),
            metadata.get("treerpo.id"),
        )
    except Exception:  # whatever it is, it is not ours
        return None


def set_aside(folder: Path, target: Path) -> None:
    """Copy the newest files of a run's folder to the folder `target`, whole or not at all; the folder of that
    name is replaced."""
    new, old = temporary_name(target), target.with_name(f".{target.name}.old")
    try:
        new.mkdir(parents=True)
        for name in FILES:
            link_or_copy(folder / name, new / name)
        if target.exists() or target.is_symlink():
            # a folder cannot be replaced in one step; clean_up puts it back after a kill right here
            os.replace(target, old)
        os.replace(new, target)
        if old.is_symlink():
            old.unlink()
        elif old.exists():
            shutil.rmtree(old)
    except OSError as error:
        clean_up(folder)
        raise OSError(
            f"Could not keep the checkpoint {target.name} in {target.parent}: {error.strerror or error}. The run "
            "itself is saved, and the older checkpoints are untouched."
        ) from error


def clean_up(folder: Path) -> None:
    """Remove what a killed process has left half done in a run's folder, and undo what it was replacing."""
    for place in (folder, folder / "checkpoints", folder / "samples"):
        for leftover in filter(Path.is_dir, place.glob(".*.old")):
            replaced = leftover.with_name(leftover.name[1 : -len(".old")])
            with suppress(OSError):
                shutil.rmtree(leftover) if replaced.exists() else os.replace(leftover, replaced)
        tidy(place)
