"""core/method/ranks.py: any number of processes, on any split of prompts and trees, trains what one process trains;
real processes, gloo, tiny models.

Run by torch.distributed.run or accelerate this file is one of those processes: it trains every run.yaml it is given.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) if __name__ == "__main__" else None
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from graph import timeless

from core.method import ranks as parallel
from core.method.objective import Objective
from core.method.tree import TreeShape
from core.rewards.measure import Measure
from core.runs.config import (
    AdapterConfig,
    Config,
    ModelConfig,
    ProcessConfig,
    PromptConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    dump,
    load,
)
from core.runs.trainer import Settings
from standalone import launch, processes

PROMPTS, HELD_OUT = ["a circle", "a triangle", "a broken square"], ["a star", "a cross", "a moon"]
DEADLINE = 300  # seconds: only against waiting for ever
KILLED = "TREERPO_TEST_KILL"  # number of the process that is to end in its third iteration
HOW = "TREERPO_TEST_HOW"  # kill | raise | term
CALLS = "TREERPO_TEST_CALLS"  # iterations that earlier processes have done


class Odd(Measure):
    """Brightness; no score at all for a prompt that is broken, in the second iteration."""

    calls = int(os.environ.get(CALLS, 0))

    def score(self, images, prompts):
        self.calls += 1
        if os.environ.get(KILLED) == os.environ.get("RANK", "none") and self.calls == 3:
            how = os.environ.get(HOW, "kill")
            if how == "raise":
                raise ValueError("The judge fell asleep.")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[how])
        values = super().score(images, prompts)
        broken = torch.tensor(["broken" in prompt for prompt in prompts])
        return torch.where(broken & (self.calls == 2), torch.nan, values)


def odd(monkeypatch=None):
    (monkeypatch.setattr if monkeypatch else setattr)(
        launch.rewards, "load", lambda kind, path, device=None: Odd("brightness")
    )


def write(folder: Path, name: str, model: str = "flux", per_prompt: int = 1, iterations: int = 3, **changes) -> Path:
    """A run.yaml of the embedded model, with random numbers for text features."""
    draw = torch.Generator().manual_seed(0)
    features = {
        f"{i}.{what}": torch.randn(shape, generator=draw)
        for i in range(6)
        for what, shape in (("embeds", (5, 768)), ("pooled", (768,)))
    }
    save_file(features, folder / "conditioning.safetensors", {"treerpo.texts": json.dumps(PROMPTS + HELD_OUT)})
    settings = Settings(
        **{
            **dict(per_iteration=0, learning_rate=1e-3, seed=1, ema=0.5, only_good=False, on_alarm="warn"),
            **changes.pop("settings", {}),
        }
    )
    config = Config(
        ModelConfig(f"embedded/{model}", "", "conditioning.safetensors"),
        AdapterConfig(4, 8.0, "attention+mlp"),
        PromptConfig(PROMPTS, HELD_OUT),
        SamplingConfig(64, 64, 6),
        shape=TreeShape(2, 2, trees=2),
        settings=settings,
        rewards=[RewardConfig("measure", "brightness")],
        run=RunConfig(name, name, iterations),
        processes=ProcessConfig(per_prompt, DEADLINE),
        **changes,
    )
    path = folder / f"{name}.yaml"
    path.write_text(dump(config))
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(count: int, *files: Path, launcher=("torch.distributed.run",), **environment) -> subprocess.CompletedProcess:
    """This file in `count` processes."""
    options = {  # standalone: the launcher itself takes a port that stays its own
        "torch.distributed.run": ("--standalone", "--nproc-per-node", str(count)),
        "accelerate.commands.launch": ("--main_process_port", str(free_port())),
    }[launcher[0]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [sys.executable, "-m", *launcher, *options, __file__, *map(str, files)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def alone(path: Path, name: str, **changes) -> Path:
    """The same run in this process, in the folder `name`."""
    config = load(path)
    config.run = replace(config.run, folder=name, **changes)
    config.processes = ProcessConfig()
    launch.prepare(config, parallel.ALONE, torch.device("cpu")).train(config.run.iterations)
    return path.parent / name


def rows(folder: Path) -> list[dict]:
    return timeless(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def same(folder: Path, other: Path) -> None:
    """Adapters, average and metrics to 1e-5; of Adam only what is larger than rounding can be compared."""
    first, second = (torch.load(place / "state.pt", weights_only=True) for place in (folder, other))
    for key, tensor in first["adapters"].items():
        torch.testing.assert_close(second["adapters"][key], tensor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second["ema"]["shadow"], first["ema"]["shadow"], rtol=1e-5, atol=1e-5)
    assert len(rows(folder)) == len(rows(other)) > 0
    for row, expected in zip(rows(other), rows(folder)):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)


def ok(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("count, model", [(2, "flux"), (4, "sd3")])
def test_any_number_of_processes_trains_what_one_trains(count, model, tmp_path, monkeypatch):
    """Prompts split unevenly, trees split, a group that one process has to skip, evaluation and average."""
    settings = dict(settings=dict(evaluate_every=2))
    split = [write(tmp_path, f"teams of {team}", model, team, **settings) for team in ((1, 2) if count == 2 else (2,))]
    ok(start(count, *split))
    odd(monkeypatch)
    expected = alone(split[0], "one process")
    found = rows(expected)
    assert (
        [row["skipped_groups"] for row in found] == [0, 1, 0]
        and all(row["grad_norm"] > 0 for row in found)
        and "eval/reward" in found[1]
    )
    for path in split:
        same(expected, tmp_path / path.stem)


def test_a_sharded_base_model_trains_the_same(tmp_path, monkeypatch):
    """FSDP2 as accelerate's configuration asks for it: with KL, a skipped group, checkpointing and small micro-batches,
    where model calls come uneven.
    """
    path = write(
        tmp_path,
        "sharded",
        iterations=2,
        objective=Objective(kl=0.1),
        settings=dict(micro_batch=3, per_iteration=2, shuffle=False),
    )
    path.write_text(path.read_text().replace("checkpointing: false", "checkpointing: true"))
    asked = tmp_path / "fsdp.yaml"
    asked.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_machines: 1\nnum_processes: 2\nuse_cpu: "
        "true\nmixed_precision: 'no'\n"
        "fsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: true}\n"
    )
    ok(start(2, path, launcher=("accelerate.commands.launch", "--config_file", str(asked)), TREERPO_TEST_SHARDED="1"))
    odd(monkeypatch)
    same(alone(path, "one process"), tmp_path / "sharded")
    assert rows(tmp_path / "sharded")[1]["skipped_groups"] == 1


def test_a_killed_process_ends_the_job_and_another_number_of_processes_goes_on(tmp_path, monkeypatch):
    path = write(tmp_path, "killed", iterations=4)
    done = start(2, path, **{KILLED: "1"})
    assert done.returncode != 0 and len(rows(tmp_path / "killed")) == 2
    odd(monkeypatch)
    monkeypatch.setattr(Odd, "calls", 2)  # the iterations that are done
    resumed = alone(path, "killed")
    monkeypatch.setattr(Odd, "calls", 0)
    same(alone(path, "undisturbed"), resumed)


@pytest.mark.parametrize("how, reason", [("raise", "The judge fell asleep."), ("term", "Stopped by signal 15")])
def test_what_ends_one_process_ends_all_with_the_reason_and_more_processes_go_on(how, reason, tmp_path, monkeypatch):
    path = write(tmp_path, "ended", iterations=3)
    done = start(2, path, **{KILLED: "1", HOW: how})
    assert done.returncode != 0 and reason in done.stdout + done.stderr and len(rows(tmp_path / "ended")) == 2
    ok(start(3, path, **{CALLS: "2"}))
    odd(monkeypatch)
    same(alone(path, "undisturbed"), tmp_path / "ended")


def test_shares_are_complete_and_in_order():
    for size in (1, 2, 4, 6):
        for team in (t for t in range(1, size + 1) if size % t == 0):
            every = [parallel.Ranks(rank, size, team) for rank in range(size)]
            for prompts in (size // team, 7, 12):
                trees = 2 * team + 1
                found = [
                    (prompt, tree)
                    for ranks in every
                    for prompt in ranks.prompts(prompts)
                    for tree in ranks.trees(trees)
                ]
                assert sorted(found) == [(prompt, tree) for prompt in range(prompts) for tree in range(trees)]
            assert [turn for ranks in every for turn in ranks.turns(5)][:5] == list(range(5)) and len(
                {len(ranks.turns(5)) for ranks in every}
            ) == 1
    layer = torch.arange(3 * 4 * 2)  # 3 prompts, 4 trees, 2 edges
    assert parallel.Ranks(1, 2, 2).part(layer, [0, 2], 3, 4).tolist() == [4, 5, 6, 7, 20, 21, 22, 23]


@pytest.mark.parametrize(
    "ranks, prompts, trees, words",
    [
        (parallel.Ranks(0, 4), 3, 1, "3 prompts per iteration for 4 shares"),
        (parallel.Ranks(0, 4, 4), 1, 3, "3 trees per prompt for 4 shares"),
        (parallel.Ranks(0, 2, lockstep=True), 3, 1, "a multiple of 2, as FSDP"),
    ],
)
def test_a_split_that_leaves_processes_idle_is_refused(ranks, prompts, trees, words):
    with pytest.raises(ValueError, match=words):
        ranks.refuse(prompts, trees)


def test_teams_that_do_not_come_out_even_are_refused():
    with pytest.raises(ValueError, match="4 processes cannot be shared out in teams of 3"):
        parallel.Ranks(0, 4, 3)


if __name__ == "__main__":
    odd()
    stop = launch.Stop()
    first, device = processes.connect(timeout=DEADLINE)
    assert first.lockstep == ("TREERPO_TEST_SHARDED" in os.environ)
    for file in sys.argv[1:]:
        asked = load(file)
        trainer = launch.prepare(asked, replace(first, per_prompt=asked.processes.per_prompt), device, stop.check)
        trainer.train(asked.run.iterations)
    processes.disconnect()
