"""Whether a long run survives, and stays as it is: killed at random moments, and 500 iterations in one go.

    python3 run.py bench endurance [--part kills|long|all] [--kills 20] [--between 20] [--iterations 500]
        [--model flux|sd3]

kills: the Trainer runs in a process of its own, which is killed (SIGKILL) at random moments of its work, sampling,
decoding, learning and writing alike, and started again until the run is done. The LoRA must then equal that of a run
that was never killed, bit for bit.
long: the Trainer runs on; resident memory, hooks on the model and seconds per iteration are noted after every
iteration.
"""

import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from host import ROOT, arguments, device, load_pack, save

SETTINGS = dict(evaluate_every=4, held_out=2, ema=0.9, keep_every=3, keep_last=2, per_iteration=1, shuffle=True)
TEXT = "\n".join(
    f"a {colour} {shape} on a white background"
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square", "cross")
)


def session(model: str, folder: Path):
    pack = load_pack()  # puts tests/ on the path as well
    from graph import Graph

    built = Graph(pack, folder, model)
    built.forget()
    return built


def work(model: str, folder: Path, iterations: int) -> None:
    """What is killed: goes on with the run in `folder` until it is done."""
    graph = session(model, folder)
    policy = graph.policy("run")
    print(f"READY {policy.run.iteration}", flush=True)
    graph.train(policy, iterations, text=TEXT, **SETTINGS)
    print("DONE", flush=True)


def kills(model: str, count: int, between: int, seed: int = 0) -> dict:
    """Kill the run `count` times, within some `between` iterations each, then let it end; whether it equals one that
    was never killed.
    """
    chance = random.Random(seed)
    iterations = between * count
    folders = [Path(tempfile.mkdtemp(prefix="treerpo-endurance-")) for _ in range(2)]
    started, resumed = time.perf_counter(), []
    for number in range(count):
        child = start(model, folders[0], iterations)
        at = int(child.stdout.readline().split()[1])
        time.sleep(chance.uniform(0.1, 0.2 * between))
        child.send_signal(signal.SIGKILL)
        child.wait()
        if child.returncode == 0:
            break  # it was faster, and is done
        if child.returncode != -signal.SIGKILL:
            sys.exit(f"The run failed before kill {number + 1}:\n{child.stderr.read()[-2000:]}")
        resumed.append(at)
        print(f"kill {number + 1}: resumed at iteration {at}", flush=True)
    for folder in folders:
        child = start(model, folder, iterations)
        out, error = child.communicate()
        if "DONE" not in out:
            sys.exit(f"The run could not be ended: {error[-2000:]}")
    from safetensors.torch import load_file

    runs = [folder / "output" / "treerpo" / "run" for folder in folders]
    first, second = (load_file(run / "adapter.safetensors") for run in runs)
    rows = [
        [
            {key: value for key, value in json.loads(line).items() if "seconds" not in key}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in runs
    ]
    import torch

    return {
        "kills": len(resumed),
        "resumed_at": resumed,
        "iterations": iterations,
        "same_lora": all(torch.equal(first[key], second[key]) for key in second),
        "same_metrics": rows[0] == rows[1],
        "seconds": time.perf_counter() - started,
    }


def start(model: str, folder: Path, iterations: int) -> subprocess.Popen:
    command = [sys.executable, __file__, "--model", model, "--worker", str(folder), "--iterations", str(iterations)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return child


def long(model: str, iterations: int) -> dict:
    """Memory, hooks and time of every iteration of one run."""
    import psutil

    graph = session(model, Path(tempfile.mkdtemp(prefix="treerpo-endurance-")))
    process, network = psutil.Process(), graph.model.model.diffusion_model
    policy = graph.policy("run")
    rows, trainer = [], graph.pack.nodes.live.Live
    report = trainer.report
    last = time.perf_counter()

    def noted(self, event):
        nonlocal last
        began = time.perf_counter()
        report(self, event)
        now = time.perf_counter()
        rows.append((process.memory_info().rss, now - last, event.row["forwards"], now - began))
        last = now

    trainer.report = noted
    graph.train(policy, iterations, text=TEXT, keep_every=100, per_iteration=1, shuffle=True)
    trainer.report = report
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())
    warm = rows[len(rows) // 5 :]
    x = list(range(len(warm)))
    slope = statistics.linear_regression(x, [row[0] for row in warm]).slope
    speed = [statistics.median(row[1] / row[2] for row in part) for part in (rows[5:55], rows[-50:])]
    return {
        "iterations": iterations,
        "hooks_left": hooks,
        "injections_left": len(graph.model.injections),
        "megabytes_at_20_percent": warm[0][0] / 1e6,
        "megabytes_at_end": warm[-1][0] / 1e6,
        "bytes_per_iteration": slope,
        "last_50_against_first_50": speed[1] / speed[0],
        "live_picture_share": sum(row[3] for row in rows) / sum(row[1] for row in rows),
        "seconds_per_iteration": statistics.median(row[1] for row in rows),
    }


def main() -> None:
    options = arguments(
        __doc__,
        part=("all", "kills, long or all"),
        kills=(20, "how often to kill"),
        between=(20, "iterations per kill"),
        iterations=(500, "of the long run"),
        model=("flux", "flux or sd3"),
        worker=("", "internal"),
    )
    if options.worker:
        return work(options.model, Path(options.worker), options.iterations)
    results = {"model": options.model, "device": device()}
    if options.part in ("kills", "all"):
        results["kills"] = kills(options.model, options.kills, options.between)
        print(json.dumps(results["kills"]))
    if options.part in ("long", "all"):
        results["long"] = long(options.model, options.iterations)
        print(json.dumps(results["long"]))
    save(results, options.json)


if __name__ == "__main__":
    main()
