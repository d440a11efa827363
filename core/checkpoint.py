"""A training run on disk: resumed after a restart, a crash or a kill, and never half written.

    metrics.jsonl         one JSON object per iteration
    adapter.safetensors   the LoRA as ComfyUI loads it, with metadata
    state.pt              all that resuming needs: adapters, optimizer, iteration, metrics (weights_only)
    config.json           the settings the run was begun with
"""
import io
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes

FORMAT = 1


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name beside the target, flush it to the disk, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"Could not write {path.name} into {path.parent}: {error.strerror or error}. The previous version is untouched.") from error


class Run:
    """Adapters, optimizer, iteration and metrics of one training run, mirrored into `folder` by commit().

    `state.pt` alone is read on resume, so a kill between two files cannot mix iterations.
    """

    def __init__(self, folder: Path, adapters, config: dict):
        self.folder = Path(folder)
        self.adapters = adapters
        self.config = config
        self.iteration = 0
        self.metrics: list[dict] = []
        self.optimizer: torch.optim.AdamW | None = None
        self._saved_optimizer: dict | None = None

    @classmethod
    def open(cls, folder, adapters, config: dict) -> "Run":
        """Begin a run in `folder`, or continue the one that is there. Other settings than the run's own are refused."""
        run = cls(folder, adapters, config)
        if (run.folder / "state.pt").exists():
            run._resume()
        return run

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved, iteration, metrics, adapters, optimizer = (state[key] for key in ("config", "iteration", "metrics", "adapters", "optimizer"))
        except Exception as error:  # torch raises many kinds here: truncated zip, refused pickle, missing key
            raise ValueError(f"The checkpoint {path} cannot be read ({type(error).__name__}): it is damaged or not one of TreeRPO's. Move it "
                             "away to begin again, or choose another run name.") from error
        refuse_other_settings(self.folder.name, saved, self.config)
        self.adapters.load_state_dict(adapters)
        self.iteration, self.metrics, self._saved_optimizer = iteration, metrics, optimizer

    def adamw(self, learning_rate: float, betas=(0.9, 0.999), weight_decay: float = 0.0) -> torch.optim.AdamW:
        """The run's optimizer; its moments survive changes of the learning rate and restarts."""
        parameters = list(self.adapters.parameters())
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)
            if self._saved_optimizer is not None:
                self.optimizer.load_state_dict(self._saved_optimizer)
                self._saved_optimizer = None
        for group in self.optimizer.param_groups:
            group.update(lr=learning_rate, betas=tuple(betas), weight_decay=weight_decay)
        return self.optimizer

    def commit(self, row: dict, pictures: dict | None = None) -> None:
        """Count one iteration: append its metrics and write the run to the disk, with PIL pictures by file name.

        On failure the run in memory keeps its update, and the files of the iteration before stay whole.
        """
        self.metrics.append({"iteration": self.iteration, **row})
        self.iteration += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        optimizer = self.optimizer.state_dict() if self.optimizer is not None else None
        adapters = self.adapters.state_dict()
        state = {"format": FORMAT, "iteration": self.iteration, "adapters": adapters, "optimizer": optimizer,
                 "metrics": self.metrics, "config": self.config}
        write_atomically(self.folder / "state.pt", torch_bytes(state))
        write_atomically(self.folder / "adapter.safetensors", safetensors_bytes(adapters, metadata=self.metadata()))
        write_atomically(self.folder / "config.json", json.dumps(self.config, indent=1).encode())
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in self.metrics).encode())
        for name, picture in (pictures or {}).items():
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            write_atomically(self.folder / name, buffer.getvalue())

    def metadata(self) -> dict[str, str]:
        """Metadata of a saved LoRA: settings and how far it was trained, as strings (a safetensors rule)."""
        last = self.metrics[-1] if self.metrics else {}
        return {"format": "pt", "treerpo.iterations": str(self.iteration), "treerpo.run": self.folder.name,
                "treerpo.config": json.dumps(self.config), "treerpo.last": json.dumps(last)}


def refuse_other_settings(name: str, saved: dict, wanted: dict) -> None:
    """A run goes on only with the settings it was begun with; one sentence names those that differ."""
    differing = [key for key in wanted if saved.get(key) != wanted[key]]
    if differing:
        changes = ", ".join(f"{key} {saved.get(key)!r} -> {wanted[key]!r}" for key in differing)
        raise ValueError(f"Run '{name}' was begun with other settings ({changes}): set them back or choose another run name.")


def torch_bytes(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
