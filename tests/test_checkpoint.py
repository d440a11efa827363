"""core/runs/run.py and core/lora/ema.py: a run survives kills, full disks, damaged files and rollbacks, on toy
adapters.
"""

import errno
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from core import files
from core.lora.adapters import Adapters
from core.lora.ema import Ema
from core.runs import run as run_module
from core.runs.checkpoint import FORMAT, DamagedCheckpoint, describe, list_checkpoints, read_state
from core.runs.run import Run
from core.runs.run_settings import changed_settings

CONFIG = {"rank": 2, "base_model": "Flux"}
END = 6


def new_adapters(hidden=5) -> Adapters:
    return Adapters.create(nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3)), 2, 3.0, "all linear")


def open_run(folder, resume_from=None, config=CONFIG) -> Run:
    """What a Trainer does first."""
    run = Run.open(folder, new_adapters(), config, resume_from)
    if run.iteration == 0:
        torch.manual_seed(0)
    run.ema = Ema(run.adapters, 0.7)
    return run


def learn(run) -> dict:
    """One update that depends on everything a resume must bring back: weights, moments, average, extra, random."""
    optimizer = run.adamw(0.05, weight_decay=0.01)
    for parameter, average in zip(run.adapters.parameters(), run.ema.shadow):
        parameter.grad = 0.1 * parameter.detach() + 0.1 * average + torch.randn(parameter.shape)
    optimizer.step()
    run.ema.update()
    reward = float(sum(p.detach().sum() for p in run.adapters.parameters()))
    run.extra = {"best": max(reward, run.extra.get("best", -1e9)), "seen": [*run.extra.get("seen", []), run.iteration]}
    return {"reward": reward, "reward_std": 0.5}


def train(run, until=END, every=1, last=2) -> Run:
    while run.iteration < until:
        run.record(learn(run))
        if run.iteration % every == 0 or run.iteration == until:
            run.keep(last, best=run.metrics[-1]["reward"] == run.extra["best"])
    return run


def bits(run) -> bytes:
    """Everything of a run that a resume must bring back, as bytes."""
    moments = run.adamw(0.05, weight_decay=0.01).state_dict()["state"]
    tensors = [
        *run.adapters.parameters(),
        *run.ema.shadow,
        *(moments[i][key] for i in moments for key in sorted(moments[i])),
        torch.get_rng_state(),
    ]
    return (
        b"".join(t.detach().numpy().tobytes() for t in tensors)
        + json.dumps([run.iteration, run.ema.steps, run.metrics, run.extra]).encode()
    )


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def hidden(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


@pytest.fixture(scope="module")
def through(tmp_path_factory) -> bytes:
    """A run that was never interrupted, and never saved before its end."""
    return bits(train(open_run(tmp_path_factory.mktemp("through") / "run"), every=END))


@pytest.fixture(scope="module", autouse=True)
def fast_disk():
    """Nothing here tests what a power failure does, so nothing waits for the disk.

    (tests/test_bad_input.py proves that fsync is called.)
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


# Resuming


@pytest.mark.parametrize("every", range(1, 6))
def test_resuming_is_the_same_as_never_having_stopped(every, through, tmp_path):
    for number, stops in enumerate(
        itertools.chain.from_iterable(itertools.combinations(range(1, END), n) for n in (1, 2))
    ):
        folder = tmp_path / str(number)
        for until in (*stops, END):
            run = open_run(folder)
            assert run.iteration <= until
            while run.iteration < until:  # stopped anywhere, also between two saves
                run.record(learn(run))
                if run.iteration % every == 0:
                    run.save()
        assert bits(run) == through
        assert rows(folder) == run.metrics and [row["iteration"] for row in rows(folder)] == list(range(END))


def test_the_files_of_a_run(folder):
    run = open_run(folder)
    run.commit(
        learn(run), lambda: {"curve.png": Image.new("RGB", (2, 2)), "samples/000001.png": Image.new("RGB", (2, 2))}
    )
    run.keep(1, best=True)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "state.pt",
        "adapter.safetensors",
        "config.json",
        "metrics.jsonl",
        "curve.png",
        "samples/000001.png",
        "best/state.pt",
        "best/adapter.safetensors",
        "checkpoints/000001/state.pt",
        "checkpoints/000001/adapter.safetensors",
    }
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    averaged, live = run.lora(averaged=True), run.lora()
    saved = load_file(folder / "adapter.safetensors")
    assert all(torch.equal(saved[key], averaged[key]) for key in saved) and any(
        not torch.equal(saved[key], live[key]) for key in saved
    )
    with safe_open(folder / "adapter.safetensors", "pt") as file:
        assert file.metadata()["treerpo.ema"] == "0.7" and file.metadata()["treerpo.iterations"] == "1"
    run.ema = None
    assert all(torch.equal(run.lora(averaged=True)[key], live[key]) for key in live)


def test_opening_a_run_writes_nothing_and_saving_it_again_loses_nothing(folder, through):
    train(open_run(folder), until=4)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run = Run.open(folder, new_adapters(), CONFIG)
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run.save()  # neither adamw() nor ema was asked for
    assert bits(train(open_run(folder))) == through


def test_rows_after_the_newest_state_are_not_kept_twice(folder):
    run = train(open_run(folder), until=2)
    run.record(learn(run))
    run.record(learn(run))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "rew')  # killed while writing
    run = open_run(folder)
    assert run.iteration == 2 and not run.unsaved
    run.record(learn(run))
    assert rows(folder) == run.metrics and len(run.metrics) == 3


def test_recording_appends_and_writes_no_state(folder, monkeypatch):
    run = train(open_run(folder), until=1)
    monkeypatch.setattr(run_module, "write_atomically", lambda *_: pytest.fail("only an append"))
    states = (folder / "state.pt").read_bytes()
    for _ in range(3):
        run.record({**learn(run), "tuple": (1, 2), "nan": float("nan")})
    assert (
        (folder / "state.pt").read_bytes() == states and len(rows(folder)) == 4 and run.metrics[-1]["tuple"] == [1, 2]
    )
    with pytest.raises(TypeError):
        run.record({"reward": torch.ones(1)})
    assert run.unsaved and run.iteration == len(run.metrics) == len(rows(folder)) == 4, (
        "what cannot be recorded is not counted"
    )


def test_numbers_of_numpy_are_saved_as_plain_ones(folder):
    numpy = pytest.importorskip("numpy")
    run = open_run(folder)
    run.extra["best"] = numpy.float64(0.5)
    run.commit({"reward": numpy.float64(0.25)})
    run = open_run(folder)
    assert (run.metrics[0]["reward"], run.extra) == (0.25, {"best": 0.5})


def test_metrics_jsonl_that_someone_removed_or_edited_is_written_anew(folder):
    run = train(open_run(folder), until=2)
    (folder / "metrics.jsonl").unlink()
    run.record(learn(run))
    assert rows(folder) == run.metrics
    (folder / "metrics.jsonl").write_text("{}\n")
    run.record(learn(run))
    assert rows(folder) == run.metrics
    assert not run.was_deleted()
    shutil.rmtree(folder)
    assert run.was_deleted()


# Kills and full disks, at every single file operation


class Disk:
    """Counts what core.runs.run does to files; from the `limit`-th operation on, `error` is raised instead. Writes are
    half done.
    """

    CHANGING = ("replace", "link", "unlink", "rmdir", "mkdir", "fsync", "truncate")

    def __init__(self, monkeypatch, error=None, needs_space=False, links=True):
        self.count, self.limit, self.error, self.patch = 0, None, error, monkeypatch
        for name in self.CHANGING:
            monkeypatch.setattr(
                os,
                name,
                self.wrap(
                    getattr(os, name),
                    needs_space and name in ("replace", "unlink", "rmdir", "truncate"),
                    links or name != "link",
                ),
            )
        monkeypatch.setattr(files, "open", self.open, raising=False)

    def step(self):
        self.count += 1
        if self.limit is not None and self.count > self.limit:
            raise self.error

    def wrap(self, function, free, allowed):
        def changed(*args, **kwargs):
            if not free:
                self.step()
            if not allowed:
                raise PermissionError(errno.EPERM, "no hard links here")
            return function(*args, **kwargs)

        return changed

    def open(self, path, mode="r"):
        if mode[0] == "r":
            return open(path, mode)
        self.step()
        file, disk = open(path, mode), self

        class File(io.BufferedIOBase):
            def write(self, data):
                try:
                    disk.step()
                except BaseException:
                    file.write(bytes(data)[: len(data) // 2])
                    raise
                return file.write(data)

            def flush(self):
                file.flush()

            def fileno(self):
                return file.fileno()

            def close(self):
                file.close()

        return File()


class Killed(BaseException):
    pass


def check_every_visible_file(folder):
    """Every state and checkpoint is whole, and each checkpoint of one iteration."""
    for path in [folder, folder / "best", *(folder / "checkpoints").glob("[0-9]*")]:
        if not (path / "state.pt").exists() and path in (folder, folder / "best"):
            continue
        state = read_state(path / "state.pt")
        if path != folder:  # there, the two files may be of two iterations after a kill
            with safe_open(path / "adapter.safetensors", "pt") as file:
                assert file.metadata()["treerpo.iterations"] == str(state["iteration"]) and len(file.keys()) == len(
                    state["adapters"]
                )
            assert path.name in ("best", f"{state['iteration']:06d}")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_a_kill_at_any_file_operation_changes_nothing(links, through, tmp_path, monkeypatch):
    """Killed at the n-th operation for all n; nothing after it happens either, no clean-up.

    Opened again, metrics.jsonl, the LoRA and best/ are the newest state's, nothing is left behind, and it goes on to
    the same end. With a rollback (copies) best/ may be of an iteration that the run has gone back from.
    """

    def session(folder):
        if links:
            return train(open_run(folder), until=4)
        run = train(open_run(folder), until=4, every=2)
        run.restore(2)
        return run

    with monkeypatch.context() as patch:
        disk = Disk(patch, links=links)
        session(tmp_path / "counted")
    total, had_best = disk.count, 0
    assert total > 60
    for limit in range(total):
        folder = tmp_path / str(limit)
        with monkeypatch.context() as patch:
            disk = Disk(patch, Killed(), links=links)
            disk.limit = limit
            with pytest.raises(Killed):
                session(folder)
        check_every_visible_file(folder)
        had_best += (folder / "best").exists()
        run = open_run(folder)
        assert run.iteration in (range(5) if links else (0, 2, 4))
        if run.iteration:
            assert rows(folder) == run.metrics and hidden(folder) == [], f"killed at operation {limit}"
            assert describe(folder).iteration == run.iteration
            if links:
                best = read_state(folder / "best/state.pt")
                assert best["extra"]["best"] == best["metrics"][-1]["reward"] == run.extra["best"]
                assert max(row["reward"] for row in run.metrics) == run.extra["best"]
        assert bits(train(run, every=3)) == through, f"killed at operation {limit}"
        assert rows(folder) == run.metrics and hidden(folder) == []
        shutil.rmtree(folder)
    assert had_best


def test_what_was_due_once_is_not_done_again(folder):
    """A rollback leaves a later best/ alone, and what comes after it is not taken for the best."""
    run = open_run(folder)
    for _ in range(3):
        run.record(learn(run))
        run.keep(3, best=True)
    run.restore(1)
    assert open_run(folder).iteration == 1 and describe(folder / "best").iteration == 3
    run = open_run(folder)
    run.record(learn(run))
    run.save()
    shutil.rmtree(folder / "checkpoints/000002")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert open_run(folder).iteration == 2 and describe(folder / "best").iteration == 3
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("to", ["somewhere", "nowhere"])
def test_a_best_that_is_a_link_is_replaced_and_what_it_leads_to_stays(folder, to):
    run = train(open_run(folder), until=1)
    run.keep(0, best=True)
    elsewhere = folder.parent / "somewhere"
    (folder / "best").rename(elsewhere)
    (folder / "best").symlink_to(folder.parent / to)
    run.record(learn(run))
    run.keep(0, best=True)
    assert not (folder / "best").is_symlink() and read_state(folder / "best/state.pt")["iteration"] == 2
    assert read_state(elsewhere / "state.pt")["iteration"] == 1 and hidden(folder) == []


@pytest.mark.parametrize("killed", ["before the new best is there", "while the old best is removed"])
def test_the_best_survives_a_kill_while_it_is_replaced(folder, killed, monkeypatch):
    run = train(open_run(folder), until=2)
    run.keep(2, best=True)
    run.record(learn(run))
    run.save()
    original, count = os.replace, []

    def replace(source, target):
        if str(target).endswith("best") and killed == "before the new best is there":
            raise Killed
        original(source, target)

    def rmtree(path):
        count.append(path)
        (path / "state.pt").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if killed == "while the old best is removed":
            patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            run.keep(2, best=True)
    run = open_run(folder)
    run.restore("best")
    assert run.iteration == 3 and hidden(folder) == []


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_a_disk_that_fills_up_at_any_moment(links, through, tmp_path, monkeypatch):
    """From the n-th operation on nothing can be written: one sentence each time, the run learns on in memory, and saves
    when there is space.
    """

    def session(run, errors):
        while run.iteration < END:
            row = learn(run)
            for action in (
                lambda: run.record(row),
                lambda: run.iteration % 2 or run.save(),
                lambda: run.iteration % 2 or run.keep(2, best=True),
            ):
                try:
                    action()
                except OSError as error:
                    errors.append(str(error))

    with monkeypatch.context() as patch:
        disk = Disk(patch, links=links)
        session(open_run(tmp_path / "counted"), [])
    for limit in range(0, disk.count, 5):
        folder, errors = tmp_path / str(limit), []
        run = open_run(folder)
        with monkeypatch.context() as patch:
            full = Disk(patch, OSError(errno.ENOSPC, "No space left on device"), needs_space=True, links=links)
            full.limit = limit
            session(run, errors)
            assert hidden(folder) == [] if folder.exists() else errors
        assert all(re.search(r"^Could not (write|add to|keep) .+ No space left on device\. ", text) for text in errors)
        if folder.exists():
            check_every_visible_file(folder)
        if (folder / "metrics.jsonl").exists():
            assert rows(folder) == run.metrics[: len(rows(folder))]
        assert run.iteration == len(run.metrics) == END and bits(run) == through
        if (folder / "state.pt").exists():
            assert read_state(folder / "state.pt")["iteration"] <= END
        run.save()
        assert rows(folder) == run.metrics and bits(open_run(folder)) == through
        shutil.rmtree(folder)


def test_a_failed_record_is_counted_once_and_leaves_no_half_line(folder, monkeypatch):
    run = train(open_run(folder), until=2)
    before = (folder / "metrics.jsonl").read_bytes()
    for truncating in (True, False):
        with monkeypatch.context() as patch:
            disk = Disk(patch, OSError(errno.ENOSPC, "No space left on device"), needs_space=truncating)
            disk.limit = 1  # the file opens, and half the line fits
            with pytest.raises(
                OSError,
                match="^Could not add to metrics.jsonl in .+ No space left on device. The run goes on in memory; its "
                "next save or iteration writes what is missing.$",
            ):
                run.record(learn(run))
        assert len(run.metrics) == run.iteration
        if truncating:
            assert (folder / "metrics.jsonl").read_bytes() == before
    run.record(learn(run))
    assert rows(folder) == run.metrics and len(run.metrics) == 5


def test_a_read_only_output_folder(folder, monkeypatch):
    run = train(open_run(folder), until=2)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        disk = Disk(patch, OSError(errno.EROFS, "Read-only file system"))  # root may write anywhere, so it is simulated
        disk.limit = 0
        for action in (lambda: run.record(learn(run)), run.save, lambda: run.keep(1), lambda: run.restore(1)):
            with pytest.raises(OSError, match="^Could not .+ Read-only file system. ") as caught:
                action()
            assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
        fresh = open_run(folder.parent / "new")
        with pytest.raises(OSError, match="^Could not write training.lock into .+ Read-only file system"):
            fresh.record(learn(fresh))
        assert fresh.iteration == 1 and not fresh.was_deleted()
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert run.iteration == 3
    run.save()
    assert read_state(folder / "state.pt")["iteration"] == 3


# Checkpoints and rollback


@given(st.integers(0, 4), st.lists(st.booleans(), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_pruning_keeps_the_newest(last, best_at):
    import tempfile

    with tempfile.TemporaryDirectory() as base:
        run = open_run(Path(base) / "run")
        for best in best_at:
            run.record(learn(run))
            run.keep(last, best)  # saves by itself
        made = range(1, len(best_at) + 1)
        assert [c.iteration for c in run.checkpoints()] == sorted(made, reverse=True)[:last]
        assert (
            sorted(os.listdir(run.folder / "checkpoints") if last else [])
            == [f"{i:06d}" for i in made][-last if last else len(made) :]
        )
        best = [i for i, chosen in zip(made, best_at) if chosen]
        assert (
            (read_state(run.folder / "best/state.pt")["iteration"] == best[-1])
            if best
            else not (run.folder / "best").exists()
        )


def test_pruning_removes_only_what_is_ours(folder):
    run = train(open_run(folder), until=3, last=9)
    other = train(open_run(folder.parent / "other", config={**CONFIG, "rank": 3}), until=1)
    places = folder / "checkpoints"
    shutil.copytree(other.folder / "checkpoints/000001", places / "000009")  # of a run with other settings
    (places / "000010").mkdir()
    (places / "000010/notes.txt").write_text("mine")
    shutil.copytree(places / "000001", places / "my favourite")
    (places / "000011").write_text("a file")
    (places / ".DS_Store").write_text("")
    run.keep(1)
    assert sorted(os.listdir(places)) == [".DS_Store", "000003", "000009", "000010", "000011", "my favourite"]
    assert [c.iteration for c in run.checkpoints()] == [3]


def test_checkpoints_are_listed_without_loading_them(folder, monkeypatch):
    run = train(open_run(folder), until=3, last=9)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("not cheap"))
    found = run.checkpoints()
    assert [(c.iteration, c.path.name) for c in found] == [
        (3, "000003"),
        (2, "000002"),
        (1, "000001"),
    ] and found == list_checkpoints(folder)
    assert found[0].summary == f"iteration 3, reward {run.metrics[-1]['reward']:.4f} ± 0.5000"
    (folder / "checkpoints/000002/adapter.safetensors").write_bytes(b"<html>")
    assert [c.iteration for c in run.checkpoints()] == [3, 1]
    assert list_checkpoints(folder.parent / "nowhere") == []


@pytest.mark.parametrize("where", [3, "3", "checkpoints/000003", "checkpoints/000003/state.pt", "best"])
@pytest.mark.parametrize("reopened", [False, True], ids=["in memory", "on opening"])
def test_rolling_back(folder, through, where, reopened):
    run = train(open_run(folder), until=3, last=9)
    run.keep(9, best=True)
    at_three = bits(run)
    for _ in range(2):
        run.record(learn(run))  # 4 is never saved
    run.save()
    if reopened:
        run = open_run(folder, resume_from=where)
    else:
        run.restore(where)
        assert run.ema.steps == 3
    assert run.iteration == 3 and bits(run) == at_three and rows(folder) == run.metrics
    assert read_state(folder / "checkpoints/000005/state.pt")["iteration"] == 5, "what was left is not lost"
    assert read_state(folder / "state.pt")["iteration"] == 3 and hidden(folder) == []
    assert (folder / "adapter.safetensors").read_bytes() == (
        folder / "checkpoints/000003/adapter.safetensors"
    ).read_bytes()
    assert bits(train(open_run(folder), last=9)) == through
    run = open_run(folder)
    run.restore(5)
    assert run.iteration == 5 and bits(train(run, last=9)) == through


def test_rolling_back_keeps_iterations_that_were_not_saved(folder):
    run = train(open_run(folder), until=2, last=9)
    run.record(learn(run))
    left = bits(run)
    run.restore(1)
    run.restore(3)
    assert bits(run) == left


def test_pruning_after_a_rollback_goes_by_when_a_checkpoint_was_made(folder):
    run = train(open_run(folder), until=5, last=9)
    shutil.copytree(folder / "checkpoints/000001", folder / "start")
    run.keep(3)
    run.restore("start")
    train(run, until=3, last=3)
    assert [c.iteration for c in run.checkpoints()] == [3, 2, 5], "4 is older than the new 2"


def test_a_rollback_to_before_there_was_an_average_begins_it_there(folder):
    run = Run.open(folder, new_adapters(), CONFIG)
    run.commit({})
    run.keep(2)
    run.ema = Ema(run.adapters, 0.9)
    learn(run)
    run.commit({})
    run.restore(1)
    assert run.ema.steps == 0 and all(torch.equal(s, p) for s, p in zip(run.ema.shadow, run.adapters.parameters()))
    assert run.adamw(0.1).state_dict()["state"] == {}, "the moments are gone as well"


def test_a_rollback_that_fails_changes_nothing(folder, monkeypatch):
    run = train(open_run(folder), until=3, last=9)
    before, files = bits(run), {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="^Run 'run' has no checkpoint '7': there is 3, 2, 1.$"):
        run.restore(7)
    for nonsense in ("../..", "x\0y", "-1", -1, 1.5, "latest"):
        with pytest.raises(ValueError, match="has no checkpoint"):
            run.restore(nonsense)
    with monkeypatch.context() as patch:
        disk = Disk(patch, OSError(errno.ENOSPC, "No space left on device"), needs_space=True, links=False)
        disk.limit = 6
        with pytest.raises(OSError, match="No space left on device. The previous version is untouched"):
            run.restore(1)
    assert bits(run) == before and files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_not_changed_by_what_the_run_does_later(folder):
    run = train(open_run(folder), until=2, last=9)
    assert (folder / "state.pt").samefile(folder / "checkpoints/000002/state.pt"), "no space is used twice"
    kept = (folder / "checkpoints/000002/state.pt").read_bytes()
    run.restore(1)
    train(run, until=3, last=9, every=9)
    run.restore(2)
    train(run, until=3, last=9)
    assert (folder / "checkpoints/000002/state.pt").read_bytes() == kept


# Files that are not what they should be


class Evil:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def corrupt(path, data: bytes):
    """As a broken download or disk leaves it: other files that share the content keep theirs."""
    path.unlink()
    path.write_bytes(data)


def test_damaged_states_are_refused_in_one_sentence_and_run_no_code(folder):
    run = train(open_run(folder), until=1, last=0)
    shutil.rmtree(folder / "best")
    whole, evil = (folder / "state.pt").read_bytes(), Evil(folder.parent / "evil happened")
    state = read_state(folder / "state.pt")
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("hello.txt", "hello")
    cases = {
        "empty": b"",
        "html": b"<html>not found</html>",
        "half": whole[: len(whole) // 2],
        "all but the last byte": whole[:-1],
        "zip": zipped.getvalue(),
        "lora": (folder / "adapter.safetensors").read_bytes(),
        "pickle": pickle.dumps(evil),
        "torch pickle": saved(evil),
        "hidden pickle": saved({**state, "extra": evil}),
        "legacy": saved_legacy(evil),
        "tensor": saved(torch.ones(3)),
        "list": saved([1]),
        "no keys": saved({"format": 2}),
        "wrong kinds": saved({**state, "iteration": "3"}),
        "text weights": saved({**state, "adapters": {"a": "b"}}),
        "optimizer list": saved({**state, "optimizer": [1]}),
        "text extra": saved({**state, "extra": "best"}),
        "rows of numbers": saved({**state, "metrics": "1\n2"}),
        "random state": saved({**state, "rng": 5}),
        "not finite": saved({**state, "adapters": {key: value / 0 for key, value in state["adapters"].items()}}),
    }
    for name, data in cases.items():
        corrupt(folder / "state.pt", data)
        with pytest.raises(
            DamagedCheckpoint,
            match=r"^The checkpoint \S+state.pt cannot be read \(\w+\): it is damaged or not one of TreeRPO's; "
            r"move it away "
            r"to begin again, or choose another run name\.$",
        ):
            open_run(folder)
        assert (folder / "state.pt").read_bytes() == data, name
    assert not evil.path.exists()
    pickle.loads(cases["pickle"]).close()
    assert evil.path.exists(), "it was a working attack"
    corrupt(folder / "state.pt", whole)
    assert open_run(folder).iteration == run.iteration


def saved_legacy(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def test_any_flipped_bit_is_noticed_or_harmless(folder):
    train(open_run(folder), until=1)
    whole, expected = (folder / "state.pt").read_bytes(), bits(open_run(folder))
    places = random.Random(0).sample(range(len(whole)), 100) + list(range(len(whole) - 150, len(whole), 3))
    noticed = 0
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        corrupt(folder / "state.pt", bytes(data))
        try:
            assert bits(open_run(folder)) == expected  # padding, a time stamp
        except DamagedCheckpoint:
            noticed += 1
    assert noticed > len(places) / 3
    middle = bytearray(whole)  # inside a tensor, where torch.load sees nothing wrong
    tensor = run_tensor_bytes(folder, whole)
    middle[whole.index(tensor) + 5] ^= 1
    torch.load(io.BytesIO(middle), weights_only=True)
    corrupt(folder / "state.pt", bytes(middle))
    with pytest.raises(DamagedCheckpoint):
        open_run(folder)


def run_tensor_bytes(folder, whole) -> bytes:
    state = torch.load(io.BytesIO(whole), weights_only=True)
    return max(state["adapters"].values(), key=torch.numel).numpy().tobytes()


def test_a_damaged_state_names_the_newest_checkpoint_that_is_whole(folder, through):
    run = train(open_run(folder), until=5, last=3)
    run.save()  # so that state.pt is a file of its own
    best = read_state(folder / "best/state.pt")["iteration"]
    damaged = (folder / "state.pt").read_bytes()[:-100]
    corrupt(folder / "state.pt", damaged)
    for newest in (5, 4, 3):
        with pytest.raises(
            DamagedCheckpoint,
            match=f"TreeRPO's; the checkpoint of iteration {newest} is whole: switch on recover to go back to it, or "
            f"choose .+ @ {newest}. under begin_from and a new run name.$",
        ):
            open_run(folder)
        corrupt(folder / f"checkpoints/{newest:06d}/state.pt", b"\0" * 1000)
    with pytest.raises(
        DamagedCheckpoint,
        match=f"the checkpoint of iteration {best} is whole: switch on recover to go back to it, or choose .+ @ best. "
        "under begin_from and a new run name.$",
    ):
        open_run(folder)
    with pytest.raises(
        DamagedCheckpoint,
        match="/checkpoints/000004/state.pt cannot be read .+ choose .+ @ best. under begin_from and a new run name.$",
    ):
        open_run(folder, resume_from=4)
    recovered = folder.parent / "recovered"
    shutil.copytree(folder, recovered)
    run = Run.open(recovered, new_adapters(), CONFIG, recover=True)
    assert run.iteration == best and (recovered / "state.damaged.pt").read_bytes() == damaged
    run = open_run(folder, resume_from="best")
    assert (folder / "state.damaged.pt").read_bytes() == damaged, "nothing is deleted"
    assert bits(train(open_run(folder))) == through and run.iteration <= 5


def test_a_newer_format_is_refused_and_todays_first_one_is_read(folder):
    run = train(open_run(folder), until=2, last=0)
    state = read_state(folder / "state.pt")
    corrupt(folder / "state.pt", saved({**state, "format": FORMAT + 1, "adapters": "something new"}))
    with pytest.raises(
        ValueError,
        match=r"was made by a newer TreeRPO \(format 3, this one reads up to 2\): update TreeRPO, or "
        r"choose another run name.$",
    ):
        open_run(folder)
    first = {key: state[key] for key in ("iteration", "adapters", "optimizer", "metrics", "config")}
    corrupt(folder / "state.pt", saved({"format": 1, **first}))
    old = open_run(folder)
    assert old.iteration == 2 and old.metrics == run.metrics and old.extra == {} and old.ema.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(old.adapters.parameters(), run.adapters.parameters()))
    train(old, until=3)
    assert read_state(folder / "state.pt")["format"] == FORMAT


def test_checkpoints_of_another_model_are_refused(folder):
    train(open_run(folder), until=2)
    with pytest.raises(
        ValueError,
        match=r"^Run 'run' was begun with other settings \(base_model 'Flux' -> 'SD3'\): set them back or "
        r"choose another run name.$",
    ):
        open_run(folder, config={**CONFIG, "base_model": "SD3"})
    with pytest.raises(
        ValueError, match="^The checkpoint of run 'run' belongs to another model: .+ 2 of another size .+$"
    ):
        Run.open(folder, new_adapters(hidden=6), CONFIG)
    one_layer = Adapters.create(nn.Sequential(nn.Linear(4, 5)), 2, 3.0, "all linear")
    with pytest.raises(ValueError, match="^The checkpoint of run 'run' belongs to another model: .+ unknown .+$"):
        Run.open(folder, one_layer, CONFIG)
    other = Run(folder.parent / "other", new_adapters(hidden=6), CONFIG)
    other.commit({})
    before = [p.clone() for p in other.adapters.parameters()]
    kept = {path: path.read_bytes() for path in other.folder.rglob("*")}
    with pytest.raises(ValueError, match="belongs to another model"):
        other.restore(folder / "checkpoints/000002")
    assert all(torch.equal(a, b) for a, b in zip(before, other.adapters.parameters())) and other.iteration == 1
    assert kept == {path: path.read_bytes() for path in kept}


# Settings


def test_trainer_settings_may_change_and_the_others_may_not(folder):
    run = open_run(folder)
    assert run.change_settings({"learning_rate": 3e-4, "betas": (0.9, 0.99)}) == []
    run.commit(learn(run))
    run = open_run(folder)
    assert run.change_settings({"learning_rate": 3e-4, "betas": (0.9, 0.99)}) == []
    assert run.change_settings({"learning_rate": 1e-4, "betas": (0.9, 0.99), "kl": 0.1}) == [
        "learning_rate 0.0003 -> 0.0001",
        "kl not set -> 0.1",
    ]
    run.commit(learn(run))
    assert json.loads((folder / "config.json").read_text())["trainer"]["learning_rate"] == 1e-4
    assert open_run(folder).config["trainer"]["kl"] == 0.1
    assert open_run(folder, config={**CONFIG, "trainer": {"learning_rate": 1}}).config["trainer"] == {
        "learning_rate": 1
    }
    with safe_open(folder / "adapter.safetensors", "pt") as file:
        assert "learning_rate" not in file.metadata()["treerpo.config"], "prompts may be among them"
    assert len(run.checkpoints()) == 0


def test_changed_settings():
    assert changed_settings({"a": 1, "b": None, "c": "x"}, {"a": 1, "b": None, "c": "x"}) == []
    assert changed_settings({"a": 1, "gone": 2}, {"a": True, "new": None}) == [
        "gone 2 -> not set",
        "new not set -> None",
    ]
    (text,) = changed_settings({"prompts": "a red circle\n" * 50}, {"prompts": "a blue circle\n" * 50})
    assert len(text) < 100 and "\n" not in text


# The moving average


def test_the_average_follows_flow_grpo():
    parameter = nn.Parameter(torch.zeros(3))
    ema, expected = Ema([parameter], decay=0.9), torch.zeros(3)
    for n in range(100):
        with torch.no_grad():
            parameter.copy_(torch.full((3,), float(n)))
        ema.update()
        expected += (1 - min((1 + n) / (10 + n), 0.9)) * (parameter.detach() - expected)
        torch.testing.assert_close(ema.shadow[0], expected)
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="decay from 0 to below 1"):
            Ema([parameter], decay)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, GeneratorExit])
def test_the_parameters_get_their_own_values_back(dtype, error):
    own = torch.tensor([1.1, -0.0, float("nan"), float("inf"), 1e-40]).to(dtype)
    parameter = nn.Parameter(own.clone())
    ema = Ema([parameter], 0.5)
    ema.shadow = [torch.arange(5.0)]
    with torch.inference_mode():  # as in ComfyUI's nodes
        try:
            with ema.applied():
                assert torch.equal(parameter, torch.arange(5.0).to(dtype)) and parameter.dtype == dtype
                with ema.applied():
                    with torch.inference_mode(False):
                        parameter.data = parameter.data.clone()  # what moving to another device does
                with pytest.raises(RuntimeError, match="cannot learn from itself"):
                    ema.update()
                if error is not None:
                    raise error
        except BaseException as caught:
            assert type(caught) is error
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(parameter.detach().view(integers), own.view(integers)) and not parameter.is_inference()
    ema.update()
    assert ema.shadow[0].dtype == torch.float32 and ema.steps == 1


def test_an_average_that_cannot_be_put_in_whole_is_not_left_half_in():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    ema = Ema(parameters, 0.5)
    ema.shadow = [torch.zeros(2), torch.zeros(4)]  # the second one does not fit
    with pytest.raises(RuntimeError):
        with ema.applied():
            pass
    assert all(torch.equal(p, torch.ones_like(p)) for p in parameters) and not ema.active


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_the_average_goes_where_the_parameters_go():
    adapters = new_adapters()
    ema = Ema(adapters, 0.5)
    adapters.to("cuda")
    ema.update()
    with ema.applied():
        adapters.to("cpu")
    assert all(p.device.type == "cpu" for p in adapters.parameters())
    ema.load_state_dict(ema.state_dict())
    ema.update()


def test_the_state_of_an_average(folder):
    adapters = new_adapters()
    ema, other = Ema(adapters, 0.5), Ema(adapters, 0.9)
    with torch.no_grad():
        [p.normal_() for p in adapters.parameters()]
    ema.update()
    other.load_state_dict(ema.state_dict())
    assert other.steps == 1 and other.decay == 0.9 and all(torch.equal(a, b) for a, b in zip(ema.shadow, other.shadow))
    small = Ema([nn.Parameter(torch.ones(2))], 0.5)
    with pytest.raises(ValueError, match="does not fit these adapters"):
        small.load_state_dict(ema.state_dict())
    assert small.steps == 0 and torch.equal(small.shadow[0], torch.ones(2))
    run = Run(folder, adapters, CONFIG)
    run.ema = ema
    with pytest.raises(RuntimeError, match="cannot be saved inside ema.applied"):
        with ema.applied():
            run.save()
    assert not folder.exists()
