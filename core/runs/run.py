"""A training run on disk: resumed after a restart, a crash or a kill, rolled back, and never half written.

- state.pt: the newest state, all that resuming needs: adapters, optimizer, average, iteration, metrics, random state
- adapter.safetensors: the newest LoRA as ComfyUI loads it, with metadata; its moving average where the run has one
- metrics.jsonl: one JSON object per iteration
- config.json: what the run was begun with, and under `trainer` the newest of the settings that may change
- checkpoints/<iteration>/, best/: state.pt and adapter.safetensors as they were then
"""

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..files import append, link_or_copy, replacing, temporary_name, write_atomically, write_picture
from ..lora.ema import Ema
from .checkpoint import (
    FILES,
    FORMAT,
    Checkpoint,
    DamagedCheckpoint,
    clean_up,
    describe,
    list_checkpoints,
    read_state,
    run_id,
    set_aside,
    signature,
    torch_bytes,
)
from .lock import Lock, Taken
from .run_settings import changed_settings, refuse_other_settings, without_trainer

log = logging.getLogger("treerpo")


class Run:
    """Adapters, optimizer, average, iteration and metrics of one training run, mirrored into `folder`.

    `record` counts an iteration, `save` writes the state, `keep` sets the newest state aside, `restore` goes back to
    one. `state.pt` alone is read on resume, so a kill between two files cannot mix iterations. Nothing is written
    before the first record, save or restore. Whatever cannot be written raises OSError: the run in memory keeps all it
    has learned and counted, the files that were there stay whole, no temporary file is left, and the next record or
    save writes what is missing.
    """

    def __init__(self, folder: Path, adapters, config: dict):
        self.folder = Path(folder)
        self.id = secrets.token_hex(8)  # of the run whatever its folder is called; the saved one where there is one
        self.adapters = adapters
        self.config = dict(config)
        self.writes = True  # False: another process of the same job writes the files
        self.iteration = 0
        self.metrics: list[dict] = []
        self._lines: list[str] = []  # of the metrics as JSON, as far as they were needed
        self.extra: dict = {}  # whatever else a trainer has to know after a resume, in JSON's types
        self.remembered: dict[str, Tensor] = {}  # good pictures by prompt (core.method.replay)
        self.optimizer: torch.optim.AdamW | None = None
        self._saved_optimizer: dict | None = None  # until adamw() is asked for
        self._ema: Ema | None = None
        self._saved_ema: dict | None = None  # until `ema` is set
        self._saved: int | None = None  # the iteration of state.pt
        self._written: int | None = None  # the iteration of both files, where this object has written them
        self._logged = (0, None)  # rows in metrics.jsonl and its size in bytes; None = not known
        self._seen: tuple | None = None  # what tells that state.pt is the one this object has written or read last
        self._lock, self._training = Lock(self.folder), 0

    @classmethod
    def open(
        cls, folder, adapters, config: dict, resume_from: int | str | Path | None = None, recover: bool = False
    ) -> "Run":
        """Begin a run in `folder`, or continue the one that is there. Other settings than the run's own are refused.

        resume_from: a checkpoint to go back to, as `restore` takes it. recover: go back to the newest whole checkpoint
        if the newest state is damaged. A damaged state is then kept as state.damaged.pt.
        """
        run = cls(folder, adapters, config)
        newest = run.folder / "state.pt"
        if newest.exists():
            try:
                run._seen = signature(newest)
                state = run._read(run.folder)
                run._take(state)
                run._mend(state.get("due") or {})
            except DamagedCheckpoint:
                whole = run._whole(run.folder) if recover and resume_from is None else None
                resume_from = whole.path if whole is not None else resume_from
                if resume_from is None:
                    raise
                with replacing(run.folder / "state.damaged.pt") as temporary:
                    link_or_copy(newest, temporary)
        if resume_from is not None:
            run.restore(resume_from)
        return run

    def adamw(self, learning_rate: float, weight_decay: float = 0.0, kind=torch.optim.AdamW) -> torch.optim.Optimizer:
        """The run's optimizer; its moments survive changes of the learning rate and restarts. kind: a class with
        AdamW's arguments; the moments of another kind cannot be taken over and begin anew.
        """
        if self.optimizer is not None and type(self.optimizer) is not kind:
            self._saved_optimizer, self.optimizer = self._optimizer_state(), None
        if self.optimizer is None:
            self.optimizer = kind(list(self.adapters.parameters()), lr=learning_rate, weight_decay=weight_decay)
            saved, self._saved_optimizer = self._saved_optimizer, None
            if saved is not None and saved.get("kind", "AdamW") == kind.__name__:
                self.optimizer.load_state_dict({key: value for key, value in saved.items() if key != "kind"})
            elif saved is not None:
                log.warning(
                    "The optimizer is %s now and was %s: its moments begin anew.",
                    kind.__name__,
                    saved.get("kind", "AdamW"),
                )
        for group in self.optimizer.param_groups:
            group.update(lr=learning_rate, weight_decay=weight_decay)
        return self.optimizer

    def _optimizer_state(self) -> dict | None:
        return (
            {**self.optimizer.state_dict(), "kind": type(self.optimizer).__name__}
            if self.optimizer is not None
            else self._saved_optimizer
        )

    @property
    def ema(self) -> Ema | None:
        """The moving average that is saved with the run.

        Setting one takes over what the run had of it; setting None forgets that.
        """
        return self._ema

    @ema.setter
    def ema(self, ema: Ema | None) -> None:
        live = self._ema.state_dict() if self._ema is not None and self._ema is not ema else None
        before = self._saved_ema or live
        if ema is not None and before is not None:
            ema.load_state_dict(before)
        self._ema, self._saved_ema = ema, None

    def average(self) -> Ema | None:
        """The run's moving average, also where only the disk has one yet: whoever trains the run moves it on."""
        if self._ema is None and self._saved_ema is not None:
            self.ema = Ema(self.adapters, self.config.get("trainer", {}).get("ema") or 0.9)
        return self._ema

    def lora(self, averaged: bool = False) -> dict[str, Tensor]:
        """The LoRA's tensors under ComfyUI's names: as trained, or the moving average where it is asked for and the run
        has one.
        """
        ema = self._ema
        if ema is None and self._saved_ema is not None and averaged:
            ema = Ema(self.adapters)
            ema.load_state_dict(self._saved_ema)
        if not averaged or ema is None:
            return self.adapters.state_dict()
        with ema.applied():
            return self.adapters.state_dict()

    def change_settings(self, wanted: dict) -> list[str]:
        """Train with these trainer settings from now on; texts of what differs from before."""
        wanted, before = json.loads(json.dumps(wanted)), self.config.get("trainer")
        self.config["trainer"] = wanted
        return [] if before is None else changed_settings(before, wanted)

    def record(self, row: dict) -> None:
        """Count one iteration and add its metrics to metrics.jsonl; the state is not written.

        On OSError the iteration is counted in memory all the same, metrics.jsonl has no half line, and the next record
        adds both rows.
        """
        self._count(row)
        with self.training():
            self._log()

    def amend(self, values: dict) -> None:
        """Add values to the newest row, which the next record or save writes."""
        self.metrics[-1] |= json.loads(json.dumps(values))
        del self._lines[len(self.metrics) - 1 :]
        self._logged, self._written, self._saved = (0, None), None, -1

    def commit(self, row: dict, pictures: Callable[[], dict] = dict) -> None:
        """Count one iteration and save the run.

        On OSError it is counted in memory all the same: nothing learned is lost.
        """
        self._count(row)
        self.save(pictures)

    def _count(self, row: dict) -> None:
        # or weights_only could not read them
        plain = json.loads(json.dumps({"iteration": self.iteration, **finite(row)}))
        self.metrics.append(plain)
        self.iteration += 1

    def save(self, pictures: Callable[[], dict] = dict) -> None:
        """Write the run to the disk. Each file is the old one or the new one, also after a kill.

        pictures: called when all the rest is safe; gives PIL pictures by file name.
        """
        if self._ema is not None and self._ema.active:
            raise RuntimeError(
                "The run cannot be saved inside ema.applied(): the average would be taken for the policy."
            )
        if not self.writes:
            self._saved = self.iteration
            return
        with self.training():
            self._save(pictures)

    def _save(self, pictures: Callable[[], dict] = dict, due: dict | None = None) -> None:
        """due: how this state is to be set aside, as `keep` takes it; in state.pt too, as a kill may come between."""
        clean_up(self.folder)
        write_atomically(self.folder / "state.pt", torch_bytes({**self._state(), "due": due}))
        self._saved, self._seen = self.iteration, signature(self.folder / "state.pt")
        metadata = self.metadata() if self._ema is None else {**self.metadata(), "treerpo.ema": str(self._ema.decay)}
        write_atomically(
            self.folder / "adapter.safetensors", safetensors_bytes(self.lora(averaged=True), metadata=metadata)
        )
        self._written = self.iteration
        write_atomically(self.folder / "config.json", json.dumps(self.config, indent=1).encode())
        self._log()
        for name, picture in pictures().items():
            write_picture(self.folder / name, picture)

    def _state(self) -> dict:
        """All that state.pt holds."""
        optimizer = self._optimizer_state()
        average = self._ema.state_dict() if self._ema is not None else self._saved_ema
        return {
            "format": FORMAT,
            "id": self.id,
            "iteration": self.iteration,
            "adapters": self.adapters.state_dict(),
            "optimizer": optimizer,
            "ema": average,
            "metrics": "\n".join(self._json_lines()),
            "extra": json.loads(json.dumps(self.extra)),
            "remembered": self.remembered,
            "config": self.config,
            "rng": torch.get_rng_state(),
        }

    def share(self, ranks) -> None:
        """Every process of the job (core.method.ranks.Ranks) holds what the first one holds, which alone reads and
        writes the files.
        """
        state = ranks.broadcast({**self._state(), "metrics": self.metrics} if ranks.rank == 0 else None)
        if ranks.rank > 0:
            self.writes = False
            self._take(state)

    def keep(self, last: int, best: bool = False) -> None:
        """Set the newest state aside as checkpoints/<iteration> (if last > 0) and as best/, and keep the newest `last`
        checkpoints.

        Saves the run first. Only whole checkpoints of this run are ever removed. On a file
        system with hard links a checkpoint costs no time, and no space until the newest state has moved on.
        """
        if not self.writes:
            return
        with self.training():
            self._save(due={"last": last, "best": best})
            self._keep(last, best)

    def _keep(self, last: int, best: bool) -> None:
        if last > 0:
            set_aside(self.folder, self._folder_of(self.iteration))
        if best:
            set_aside(self.folder, self.folder / "best")
        others = [checkpoint for checkpoint in self.checkpoints() if checkpoint.path != self._folder_of(self.iteration)]
        for checkpoint in others[max(last - 1, 0) :]:
            try:
                os.replace(checkpoint.path, temporary_name(checkpoint.path))
                shutil.rmtree(temporary_name(checkpoint.path))
            except OSError as error:  # on Windows: in use
                log.warning("Could not remove the old checkpoint %s: %s.", checkpoint.path, error.strerror or error)

    def checkpoints(self) -> list[Checkpoint]:
        """This run's checkpoints, the one saved last first; those of a run with other settings are left out."""
        own = json.loads(json.dumps(without_trainer(self.config)))
        return [
            checkpoint
            for checkpoint in list_checkpoints(self.folder)
            if checkpoint.settings.items() <= own.items() and (self._saved is None or checkpoint.run in (None, self.id))
        ]

    def restore(self, where: int | str | Path) -> None:
        """Go back to a checkpoint: an iteration, 'best', or a path. The state that is left is kept in checkpoints/
        first.

        Adapters, optimizer, average, iteration, metrics, extra and random state become the checkpoint's; settings stay.
        Ask `adamw` for the optimizer anew. ValueError (no such checkpoint, damaged, another model) and OSError (no
        space) leave the run as it was, in memory and on disk; only where metrics.jsonl alone could not be written, the
        run has gone back and its next save writes that.
        """
        with self.training():
            self._restore(self._find(where))

    def _restore(self, source: Path) -> None:
        clean_up(self.folder)
        state = self._read(source)
        if self.folder not in (source, *source.parents):  # another run's: a new beginning under this run's own id
            self._take({**state, "id": self.id})
            self._save()
            return
        if self.iteration and not self._folder_of(self.iteration).exists():
            if self._written != self.iteration:
                self.save()
            set_aside(self.folder, self._folder_of(self.iteration))
        with replacing(self.folder / "adapter.safetensors") as adapter, replacing(self.folder / "state.pt") as newest:
            link_or_copy(source / "adapter.safetensors", adapter)
            link_or_copy(source / "state.pt", newest)
            self._take(state)
        self._written, self._logged, self._seen = self.iteration, (0, None), signature(self.folder / "state.pt")
        self._log()

    @contextmanager
    def training(self):
        """Inside, this object alone trains and writes the run; may be nested.

        Raises ValueError, in a sentence, where another process trains it, or has trained it further than this object
        knows.
        """
        if self.writes and not self._training:
            self._lock.take()
        self._training += 1
        try:
            if self._training == 1 and self.writes:
                self._compare(reload=False)
            yield
        finally:
            self._training -= 1
            if not self._training:
                self._lock.give_back()

    def refresh(self) -> None:
        """Read the state anew if somebody else trained the run further. ValueError where the two have gone apart."""
        self._compare(reload=True)

    def _compare(self, reload: bool) -> None:
        """Memory against disk: what is newer there is taken over (reload) or refused, never overwritten."""
        found = signature(self.folder / "state.pt")
        if found is None or found == self._seen:
            return
        try:
            state = self._read(self.folder)
        except DamagedCheckpoint:
            return  # what is in memory is better
        ours, theirs = ([_lineage(row) for row in rows] for rows in (self.metrics, state["metrics"]))
        common = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        if (not ours or run_id(state) == self.id) and common == len(ours):  # theirs is ours, and maybe more
            if common == len(theirs):
                self._seen = found
            elif reload:
                log.info(
                    "Run '%s' was trained on elsewhere: going on from iteration %d.", self.folder.name, len(theirs)
                )
                self._take(state)
                self._seen, self._written, self._logged = found, None, (0, None)
            else:
                raise ValueError(
                    f"Run '{self.folder.name}' was trained on elsewhere, to iteration {len(theirs)}, while this one "
                    f"was at {len(ours)}: queue again to go on from there."
                )
        elif run_id(state) != self.id or common < len(theirs):
            raise ValueError(self._apart(len(theirs), common))

    def _apart(self, theirs: int, common: int) -> str:
        """Keep what only memory has under a name of its own; the sentence that says so."""
        name = f"{self.folder.name} (kept at {self.iteration})"
        kept = Run(self.folder.with_name(name), self.adapters, self.config)
        kept.id = hashlib.blake2b(f"{self.id} {name}".encode(), digest_size=8).hexdigest()
        kept.metrics, kept.iteration, kept.extra = list(self.metrics), self.iteration, dict(self.extra)
        kept.optimizer, kept._saved_optimizer = self.optimizer, self._saved_optimizer
        kept._ema, kept._saved_ema = self._ema, self._saved_ema
        kept.save()
        return (
            f"Run '{self.folder.name}' has gone two ways after iteration {common}: this one is at iteration "
            f"{self.iteration}, its folder at {theirs}, trained elsewhere. This one is kept as run '{name}'; queue "
            "again to go on with the folder's."
        )

    def _mend(self, due: dict) -> None:
        """Finish what a killed process had begun after its newest state was safe. due: of that state."""
        best = describe(self.folder / "best")  # a later one stays: the run has gone back
        wanted = due.get("best", False) and (best is None or best.iteration < self.iteration)
        last = due.get("last", 0) if describe(self._folder_of(self.iteration)) is None else 0
        newest, path = describe(self.folder), self.folder / "metrics.jsonl"
        log_data = "".join(line + "\n" for line in self._json_lines()).encode()
        hidden = [*self.folder.glob(".*"), *(self.folder / "checkpoints").glob(".*")]
        whole = newest is not None and newest.iteration == self.iteration
        if whole and not (wanted or last) and not hidden and path.is_file() and path.read_bytes() == log_data:
            return
        with suppress(Taken, OSError), self.training():  # whoever trains it now mends it
            if not whole:
                self._save(due=due)
            clean_up(self.folder)
            self._log()
            self._written = self.iteration
            if wanted or last:
                self._keep(last, wanted)

    @property
    def unsaved(self) -> bool:
        """True if iterations were counted, in this session or since the last save, that state.pt does not have."""
        return self.iteration != (self._saved or 0)

    def was_deleted(self) -> bool:
        """True if what this run has written was removed from the disk by someone else."""
        logged = self._logged[1] is not None
        return (self._saved is not None and not (self.folder / "state.pt").exists()) or (
            logged and not self.folder.exists()
        )

    def metadata(self) -> dict[str, str]:
        """Metadata of a saved LoRA: settings and how far it was trained, as strings (a safetensors rule)."""
        last = self.metrics[-1] if self.metrics else {}
        return {
            "format": "pt",
            "treerpo.iterations": str(self.iteration),
            "treerpo.run": self.folder.name,
            "treerpo.id": self.id,
            "treerpo.last": json.dumps(last),
            "treerpo.config": json.dumps(without_trainer(self.config)),
            "treerpo.saved": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        }

    def _read(self, folder: Path) -> dict:
        """The state saved in a folder.

        Raises ValueError in one sentence; it names a checkpoint that is whole if this one is not.
        """
        try:
            state = read_state(folder / "state.pt")
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{error}; {self._way_out(folder)}.") from error.__cause__
        refuse_other_settings(self.folder.name, state["config"], self.config)
        return state

    def _way_out(self, damaged: Path) -> str:
        """What to do about a damaged state."""
        other = self._whole(damaged)
        if other is not None:
            name = f"{self.folder.name} @ {'best' if other.path.name == 'best' else other.iteration}"
            recover = "switch on recover to go back to it, or " if damaged == self.folder else ""
            return (
                f"the checkpoint of iteration {other.iteration} is whole: {recover}choose '{name}' under begin_from "
                "and a new run name"
            )
        return (
            "move it away to begin again, or choose another run name"
            if damaged == self.folder
            else "choose another one"
        )

    def _whole(self, damaged: Path) -> Checkpoint | None:
        """The newest checkpoint that can be read; best/ where there is no other."""
        for other in [*self.checkpoints(), describe(self.folder / "best")]:
            with suppress(ValueError):
                if other is not None and other.path != damaged and read_state(other.path / "state.pt"):
                    return other
        return None

    def _take(self, state: dict) -> None:
        """Become what was saved. Raises ValueError, and changes nothing, if it is of another model."""
        try:
            self.adapters.load_state_dict(state["adapters"])
        except ValueError as error:
            raise ValueError(f"The checkpoint of run '{self.folder.name}' belongs to another model: {error}") from None
        self.iteration, self.metrics, self.extra, self._lines = (
            state["iteration"],
            state["metrics"],
            state.get("extra", {}),
            [],
        )
        self.remembered = dict(state.get("remembered", {}))
        self.optimizer, self._saved_optimizer, self._saved_ema = None, state["optimizer"], state.get("ema")
        self.id = run_id(state)
        if self._ema is not None:
            self._ema.reset()  # for a checkpoint from before there was an average
            self.ema = self._ema
        if "trainer" in state["config"]:
            self.config.setdefault("trainer", state["config"]["trainer"])
        if state.get("rng") is not None:
            torch.set_rng_state(state["rng"])
        self._saved = self.iteration

    def _json_lines(self) -> list[str]:
        """The metrics as JSON.

        Each line is made once: in a long run, making them all anew would slow down every save.
        """
        self._lines += [json.dumps(row) for row in self.metrics[len(self._lines) :]]
        return self._lines

    def _log(self) -> None:
        """Bring metrics.jsonl up to date: add the new rows, or write it anew where it is not what this object left
        there.
        """
        if not self.writes:
            return
        path, (rows, size) = self.folder / "metrics.jsonl", self._logged
        if size is None or not path.exists() or path.stat().st_size != size:
            rows, size = 0, 0
        data = "".join(line + "\n" for line in self._json_lines()[rows:]).encode()
        if size == 0:
            write_atomically(path, data)
        elif data:
            append(path, data, size)
        self._logged = (len(self.metrics), size + len(data))

    def _folder_of(self, iteration: int) -> Path:
        return self.folder / "checkpoints" / f"{iteration:06d}"

    def _find(self, where: int | str | Path) -> Path:
        """The folder of a checkpoint. Raises ValueError if there is none."""
        folder = self._folder_of(int(where)) if str(where).isdecimal() else self.folder / str(where)
        folder = folder.parent if folder.name == "state.pt" else folder
        if not all((folder / name).is_file() for name in FILES):
            known = ", ".join(str(checkpoint.iteration) for checkpoint in self.checkpoints()) or "none"
            raise ValueError(f"Run '{self.folder.name}' has no checkpoint '{where}': there is {known}.")
        return folder


def _lineage(row: dict) -> dict:
    """What of a row says which training it comes from: evaluations may come later."""
    return {key: value for key, value in row.items() if not key.startswith("eval/")}


def finite(row: dict) -> dict:
    """The row without what JSON does not know: NaN and infinity."""
    return {key: value for key, value in row.items() if not (isinstance(value, float) and not math.isfinite(value))}
