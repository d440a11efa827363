"""How much faster several processes train: measured on this machine, and calculated for FLUX.1 on many GPUs.

Measured: the same run of an embedded model on 1, 2, ... processes in turn, one thread each, prompts shared out;
efficiency is the time of one process over n times the time of n. The times are the run's own (seconds of its metrics),
the first iteration left out, so starting up does not count.
Calculated: forwards from core/method/cost.py, bytes of the messages from the adapters' sizes, the rest from the
assumptions that are printed with it.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import host

sys.path.insert(0, str(host.ROOT))
# FLUX.1: hidden size, double and single blocks, parameters; and what is assumed of an H100 and of the network between
# machines.
HIDDEN, DOUBLE, SINGLE, WEIGHTS = 3072, 19, 38, 12e9
# FLOP/s reached in bf16; bytes/s per GPU inside a machine, and between machines of 8
FLOPS, LINK, NODE_LINK, RANK = (400e12, 150e9, 20e9, 32)
# of a forward: recomputing (checkpointing) and gradients with respect to the inputs; the frozen weights need none
BACKWARD = 2.0
DECODE_AND_SCORE = 0.25  # seconds per image


def write_run(folder: Path, model: str, prompts: int, size: int, iterations: int) -> Path:
    """A run.yaml with random text features, which cost what real ones cost."""
    import torch
    from safetensors.torch import save_file

    from core.method.tree import TreeShape
    from core.runs.config import (
        AdapterConfig,
        Config,
        ModelConfig,
        PromptConfig,
        RewardConfig,
        RunConfig,
        SamplingConfig,
        dump,
    )
    from core.runs.trainer import Settings

    texts = [f"prompt {number}" for number in range(prompts)]
    tensors = {
        f"{i}.{what}": torch.randn(shape)
        for i in range(prompts)
        for what, shape in (("embeds", (16, 768)), ("pooled", (768,)))
    }
    save_file(tensors, folder / "conditioning.safetensors", {"treerpo.texts": json.dumps(texts)})
    config = Config(
        ModelConfig(f"embedded/{model}", "", "conditioning.safetensors"),
        AdapterConfig(8, 16.0, "attention+mlp"),
        PromptConfig(texts),
        SamplingConfig(size, size, 10),
        shape=TreeShape(3, 2, window="fixed", tail=0.4),
        rewards=[RewardConfig("measure", "brightness")],
        settings=Settings(per_iteration=0, on_alarm="off", save_every=1000),
        run=RunConfig("scaling", "run", iterations),
    )
    path = folder / "run.yaml"
    path.write_text(dump(config))
    return path


def once(path: Path, count: int, name: str) -> list[dict]:
    """Metrics of one whole run on `count` processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(count),
        "--master-port",
        str(port),
        "-m",
        "standalone.launch",
        "train",
        "--config",
        str(path),
        "--folder",
        str(path.parent / name),
    ]
    subprocess.run(
        command, cwd=host.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL
    )
    return [json.loads(line) for line in (path.parent / name / "metrics.jsonl").read_text().splitlines()]


def measure(model: str, prompts: int, size: int, iterations: int, most: int, repeats: int) -> dict:
    counts = [2**power for power in range(10) if 2**power <= most]
    seconds, phases = {count: [] for count in counts}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = write_run(Path(folder), model, prompts, size, iterations)
        for repeat in range(repeats):
            for count in counts:
                rows = once(path, count, f"{count} {repeat}")[1:]
                seconds[count].append(statistics.median(row["seconds"] for row in rows))
                phases[count] = {
                    key.removeprefix("seconds/"): statistics.median(row[key] for row in rows)
                    for key in rows[0]
                    if key.startswith("seconds/")
                }
    efficiency = {
        count: statistics.median(one / (count * many) for one, many in zip(seconds[1], seconds[count]))
        for count in counts
    }
    return {
        "forwards": rows[-1]["forwards"],
        "seconds": {count: statistics.median(values) for count, values in seconds.items()},
        "phases": phases,
        "efficiency": efficiency,
    }


def lora_values(rank: int = RANK) -> int:
    """Values of a LoRA of this rank on FLUX.1's attention layers."""
    double = 2 * (HIDDEN + 3 * HIDDEN + 2 * HIDDEN)
    single = HIDDEN + 7 * HIDDEN + 5 * HIDDEN + HIDDEN
    return rank * (DOUBLE * double + SINGLE * single)


def calculate(gpus: int, prompts: int, trees: int, per_prompt: int, sharded: bool = False, size: int = 1024) -> dict:
    """Seconds of one iteration on `gpus` GPUs for FLUX.1, by phase, and the bytes each GPU sends."""
    from core.method.cost import expected_forwards
    from core.method.tree import TreeShape

    shape = TreeShape(tail=0.4, trees=trees)
    rollout, update = expected_forwards(shape, 10)
    tokens = (size // 16) ** 2 + 512
    forward = (2 * WEIGHTS * tokens + 4 * tokens**2 * HIDDEN * (DOUBLE + SINGLE)) / FLOPS
    teams = gpus // per_prompt
    share = -(-prompts // teams) / per_prompt  # of the fullest team, in prompts
    gradient = 4 * lora_values()
    link = LINK if gpus <= 8 else NODE_LINK
    # gathered inside a machine, once per call of 8 latents
    weights = 2 * WEIGHTS * 7 / 8 * (rollout + 2 * update) * share / 8 if sharded else 0.0
    seconds = {
        "rollout": rollout * share * forward,
        "decode and score": shape.leaves * share * DECODE_AND_SCORE,
        "update": update * share * forward * (1 + BACKWARD),
        "gradients": 2 * gradient * (gpus - 1) / gpus / link,
        "weights": weights / LINK,
    }
    return {
        "gpus": gpus,
        "prompts": prompts,
        "trees": trees,
        "per_prompt": per_prompt,
        "sharded": sharded,
        "seconds": seconds,
        "total": sum(seconds.values()),
        "images": shape.leaves * prompts,
        "gradient_bytes": gradient,
        "weight_bytes": weights,
    }


def main():
    options = host.arguments(
        __doc__,
        model=("flux", "flux or sd3"),
        prompts=(4, "prompts per iteration"),
        size=(256, "image size in pixels"),
        iterations=(6, "iterations of each run"),
        most=(2, "processes at most"),
        repeats=(3, "runs of each number of processes"),
    )
    result = measure(options.model, options.prompts, options.size, options.iterations, options.most, options.repeats)
    for count, seconds in result["seconds"].items():
        print(
            f"{count} process(es): {seconds:.2f} s per iteration of {result['forwards']} forwards, efficiency "
            f"{result['efficiency'][count]:.2f}; "
            + ", ".join(f"{name} {value:.2f}" for name, value in result["phases"][count].items())
        )
    print(
        f"\ncalculated for FLUX.1 at 1024 px, LoRA rank {RANK} on attention ({lora_values() / 1e6:.0f} million "
        f"values), {FLOPS / 1e12:.0f} TFLOP/s per GPU, {NODE_LINK / 1e9:.0f} GB/s per GPU between machines:"
    )
    cases = [
        calculate(8, 8, 1, 1),
        calculate(8, 8, 1, 1, sharded=True),
        calculate(64, 64, 1, 1),
        calculate(64, 16, 4, 4),
        calculate(512, 512, 1, 1),
        calculate(512, 64, 8, 8),
        calculate(512, 64, 8, 8, sharded=True),
    ]
    for case in cases:
        print(
            f"{case['gpus']:4} GPUs, {case['prompts']:3} prompts x {case['trees']} "
            f"trees{', sharded' if case['sharded'] else ''}: {case['total']:7.1f} s, {case['images']:6} "
            "images; " + ", ".join(f"{name} {value:.2f}" for name, value in case["seconds"].items())
        )
    words = {name: value for name, value in vars(options).items() if name != "json"}
    host.save(
        {
            "device": host.device(),
            "command": "python run.py bench scaling " + " ".join(f"--{name} {value}" for name, value in words.items()),
            "cores": os.cpu_count(),
            "measured": result,
            "calculated": cases,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
