"""The training runs that nodes work on: opened once, found again on the disk, listed to choose from."""

from pathlib import Path

import folder_paths
import torch

from ..core.hosts.architectures import model_file
from ..core.hosts.comfy import ComfyPolicy
from ..core.hosts.comfy_refusals import refuse_other_than_flow
from ..core.hosts.comfy_weights import patched
from ..core.runs.checkpoint import describe, list_checkpoints
from ..core.runs.run import Run
from ..core.runs.run_settings import adapter_settings, refuse_other_settings
from .schema import plain_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BY_NAME, NOTHING = "(run_name)", "(nothing)"

# Training state by run folder. It lives here and on disk, never in ComfyUI's output cache alone, which may drop any
# object between two queue runs.
_RUNS: dict[Path, Run] = {}


def open_run(
    name: str,
    model,
    *,
    rank: int,
    alpha: float,
    targets: str,
    dtype: str,
    seed: int,
    begin_from: Path | None = None,
    recover: bool = False,
) -> Run:
    """The run of this name: from memory, else from disk, else new. Other settings than the run's own are refused.

    begin_from: a checkpoint's folder, of this run or another, that a new run takes over as its own beginning.
    recover: go back to the newest whole checkpoint where the newest state is damaged.
    """
    refuse_other_than_flow(model)
    folder = run_folder(name)
    layers = ComfyPolicy.layers(model, targets)
    config = adapter_settings(rank, alpha, targets, dtype, seed, base_model(model), layers, patched(model))
    run = _RUNS.get(folder)
    if run is not None and run.iteration > 0 and not run.was_deleted():
        refuse_other_settings(name, run.config, config)
        try:
            run.refresh()
        except ValueError:
            del _RUNS[folder]  # what is in memory is kept under another name; the next queue run opens the folder
            raise
        return run
    run = _RUNS[folder] = Run.open(
        folder, ComfyPolicy.new_adapters(model, rank, alpha, targets, DTYPES[dtype], seed), config, recover=recover
    )
    if begin_from is not None and run.iteration == 0:
        run.restore(begin_from)
    return run


def runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "treerpo"


def known_runs() -> list[str]:
    """Names of the runs on the disk, the newest first."""
    folder = runs_folder()
    states = sorted(folder.glob("*/state.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent.name for path in states if _is_plain(path.parent.name)]


def _is_plain(name: str) -> bool:
    try:
        return plain_name(name, "run") == name
    except ValueError:  # made by hand, or by an older version
        return False


def known_checkpoints() -> list[str]:
    """What a new run can begin from: 'run @ 80', 'run @ best', 'run @ newest'."""
    found = []
    for name in known_runs():
        folder = run_folder(name)
        best = [f"{name} @ best"] if describe(folder / "best") else []
        found += [
            f"{name} @ newest",
            *best,
            *(f"{name} @ {checkpoint.iteration}" for checkpoint in list_checkpoints(folder)),
        ]
    return found


def way_back(folder: Path, iteration: int) -> tuple[int, str] | None:
    """(iteration, its name behind the @ of begin_from) of the newest that a run's folder keeps up to an iteration; None
    where nothing is kept. A checkpoint's number rather than `best`, which moves on when the run does.
    """
    best = describe(folder / "best")
    kept = [(checkpoint.iteration, str(checkpoint.iteration)) for checkpoint in list_checkpoints(folder)]
    kept += [(best.iteration, "best")] if best else []
    return max((one for one in kept if one[0] <= iteration), key=lambda one: one[0], default=None)


def checkpoint_folder(choice: str) -> Path | None:
    """The folder of a choice of `known_checkpoints`."""
    if choice == NOTHING:
        return None
    name, _, which = choice.rpartition(" @ ")
    folder = run_folder(name)
    place = {"newest": folder, "best": folder / "best"}.get(
        which
    ) or folder / "checkpoints" / f"{int(which) if which.isdecimal() else -1:06d}"
    if not (place / "state.pt").is_file():
        raise ValueError(f"There is no checkpoint '{choice}': choose another one under begin_from.")
    return place


def run_folder(name: str) -> Path:
    return Path(folder_paths.get_output_directory()) / "treerpo" / plain_name(name, "run")


def base_model(model) -> str:
    """The base model's architecture, and its file name where ComfyUI remembers it."""
    file = model_file(model)
    return " ".join([type(model.model).__name__, *([file.name] if file else [])])
