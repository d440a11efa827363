"""Two processes that train one run, with kills and copies of its folder between: nothing that was saved is ever lost.

And two never train at once.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core.lora.adapters import Adapters
from core.runs.checkpoint import read_state
from core.runs.lock import FILE, Lock, Taken
from core.runs.run import Run

CONFIG = {"rank": 1, "base_model": "Flux"}
REPO = Path(__file__).resolve().parent.parent


def open_run(folder) -> Run:
    return Run.open(folder, Adapters.create(nn.Sequential(nn.Linear(2, 2)), 1, 1.0, "all linear"), CONFIG)


def train(run, draw) -> None:
    """An iteration unlike any other."""
    with run.training():
        with torch.no_grad():
            [p.fill_(draw.random()) for p in run.adapters.parameters()]
        run.commit({"reward": draw.random()})


def lineage(metrics) -> list[float]:
    return [row["reward"] for row in metrics]


def saved(folder) -> list[list[float]]:
    """What every run beside this one has gone through."""
    return [lineage(read_state(path)["metrics"]) for path in folder.parent.glob("run*/state.pt")]


def is_kept(history, everywhere) -> bool:
    return any(other[: len(history)] == history for other in everywhere)


ACTIONS = st.lists(
    st.sampled_from(["A trains", "B trains", "A restarts", "B restarts", "copy away", "copy back", "A is killed"]),
    min_size=4,
    max_size=24,
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(ACTIONS)
def test_nothing_newer_is_ever_lost(tmp_path_factory, actions):
    """As nodes.runs.open_run uses a run: refreshed before each use, dropped where it has gone another way.

    Only a person can lose something, by copying an old folder over a newer one; whoever still has that in its memory
    saves it when it is used again.
    """
    base = tmp_path_factory.mktemp("runs")
    folder, copy, draw = base / "run", base / "a copy", random.Random(len(actions))
    held, safe = {}, []  # what each process has in its memory; every history that must stay on the disk
    for action in actions:
        who = action[0]
        if action.endswith("trains"):
            run = held.get(who) or open_run(folder)
            held[who] = run
            try:
                run.refresh()
                train(run, draw)
                safe.append(lineage(run.metrics))
            except ValueError as error:
                assert "has gone two ways" in str(error) and is_kept(lineage(run.metrics), saved(folder))
                del held[who]
        elif action.endswith("restarts"):
            held.pop(who, None)
        elif action == "A is killed" and folder.exists():
            run = held.pop("A", None) or open_run(folder)
            with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt, ValueError)):
                run.refresh()
                patch.setattr(run, "_log", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
                train(run, draw)
            history = lineage(read_state(folder / "state.pt")["metrics"])
            if history == lineage(run.metrics):
                safe.append(history)
        elif action == "copy away" and folder.exists():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
        elif action == "copy back" and copy.exists():
            shutil.rmtree(folder)
            shutil.copytree(copy, folder)
            safe = [history for history in safe if is_kept(history, saved(folder))]
        assert all(is_kept(history, saved(folder)) for history in safe), action
        if folder.exists():
            metrics = [
                json.loads(line) for line in (open_run(folder).folder / "metrics.jsonl").read_text().splitlines()
            ]
            assert metrics == read_state(folder / "state.pt")["metrics"]


HOLD = """import sys
from pathlib import Path
from core.runs.lock import Lock
lock = Lock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_in_training_is_not_trained_by_another_process_until_that_one_is_gone(tmp_path, caplog):
    folder = tmp_path / "run"
    run = open_run(folder)
    train(run, random.Random(0))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        for use in (lambda: train(run, random.Random(1)), run.save, lambda: run.keep(1), lambda: run.restore(1)):
            with pytest.raises(
                Taken, match=rf"^Run 'run' is being trained by process {other.pid} on \S+ since \S+: stop"
            ):
                use()
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != FILE}
        assert after == before and run.iteration == 1
        assert open_run(folder).iteration == 1  # looking is allowed
    finally:
        other.kill()
        other.wait()
    train(run, random.Random(1))
    assert run.iteration == 2 and not (folder / FILE).exists()
    assert f"left by process {other.pid}, which is gone" in caplog.text


def test_a_lock_copied_from_another_machine_is_told(tmp_path):
    lock = Lock(tmp_path)
    lock.path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "2026-01-01T00:00:00+00:00"}))
    with pytest.raises(Taken, match="process 1 on elsewhere since .+ delete training.lock in the run's folder.$"):
        lock.take()
    lock.path.write_text('{"host": "elsewh')  # its writer was killed
    lock.take()
    lock.give_back()
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_writes_now_stays(tmp_path):
    """Only what processes of this machine have left that are gone is tidied away."""
    run = open_run(tmp_path / "run")
    train(run, random.Random(0))
    from core.files import HERE

    alive = tmp_path / f"run/.picture.png.{HERE}-1.tmp"
    others = tmp_path / "run/.picture.png.000000-99.tmp"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = tmp_path / f"run/.picture.png.{HERE}-{gone.pid}.tmp"
    for path in (alive, others, dead):
        path.write_bytes(b"half")
    run.save()
    assert alive.exists() and others.exists() and not dead.exists()
