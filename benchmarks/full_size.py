"""One training iteration at full size: FLUX.1-dev's, SD3.5-medium's and -large's real architecture with random weights,
on a GPU.

    python3 run.py bench full_size [--model flux] [--dtype fp8] [--vae] [--reward pickscore] [--memory 24]
    python3 run.py bench full_size --part overhead [--engine diffusers]
    python3 run.py bench full_size --scale 24 --size 64 --dtype fp32      (the same code, small, without a GPU)

Shapes are what costs, so nothing is downloaded: weights, text features, VAE and reward model are random numbers of the
official sizes. The rows are those of the benchmark `iteration`; they run in turn in one process, so that only their
ratios count. Every phase of a row is timed with the GPU's queue, its highest memory stands beside what ComfyPolicy
estimated, and passes are counted at the network itself. Targets are printed beside what was measured. `--part overhead`
compares one straight line through our sampler with ComfyUI's KSampler and with diffusers' own pipeline. Engines:
ComfyUI (COMFYUI_PATH), or diffusers and peft alone.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
from pathlib import Path

import host
from engines import GB, MODELS, Comfy, Diffusers, latent_shape, random_reward
from iteration import LEAVES, network_passes, predicted, rows

RETAIN_SHARE = 0.6  # as Tree Sampler's
FITS = {("flux", "fp8"): 24, ("sd35_medium", "bf16"): 12}  # GB in all
# than this row; True: decoding and scoring included
FASTER = {("window", False): 3.5, ("independent", False): 5.0, ("window", True): 2.4}


def phase(work):
    """(what work() gives, {seconds, highest memory allocated and reserved}); without a GPU the resident set."""
    import torch

    results = []
    with host.Peak() as peak:
        seconds = host.timed(lambda: results.append(work()))
    reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
    return results[0], {"seconds": seconds, "allocated": peak.highest, "reserved": reserved}


class Bench:
    """One open session; `iteration(name)` does the phases of an iteration as that row does them."""

    def __init__(self, engine, velocity, options, reward):
        import torch

        from core.method.memory import MicroBatch
        from core.method.noise import NoiseSchedule

        self.engine, self.velocity, self.options, self.reward = engine, velocity, options, reward
        self.batch, self.noise, self.rows = MicroBatch(options.micro_batch), NoiseSchedule(), rows(options.steps)
        self.optimizer = torch.optim.AdamW(engine.optimized, lr=1e-6)

    def iteration(self, name: str) -> dict:
        import torch

        from core.method.advantage import edge_advantages, leaf_advantages
        from core.method.objective import Objective
        from core.method.update import update

        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the row before had reserved is not this row's
        forest, found = phase(lambda: self.rollout(name))
        found = {"rollout": found}
        if not bool(forest.leaves.isfinite().all()):
            raise RuntimeError("the leaves are not finite")
        if self.engine.vae is not None:
            images, found["decode"] = phase(lambda: self.engine.decode(self.velocity, forest.leaves))
            if self.reward is not None:
                _, found["reward"] = phase(lambda: self.reward.score(images, ["a photo of a cat"] * LEAVES))
        # Random numbers, so that every edge has something to learn whatever a random reward model says.
        draws = {"random": torch.rand(LEAVES, generator=torch.Generator().manual_seed(0))}
        layers = edge_advantages(
            "treegrpo", [p.cpu() for p in forest.log_probs], leaf_advantages(draws, 1)[0], forest.branching, 1
        )
        shared = self.rows[name][1].get("shared", True)
        metrics, found["update"] = phase(
            lambda: update(
                self.velocity,
                forest,
                layers,
                self.optimizer,
                Objective(1e-2, 1e-2),
                micro_batch=self.batch,
                shared=shared,
            )
        )
        return found | {"ratio": metrics["ratio_first"], "skipped": metrics["skipped"]}

    def rollout(self, name: str):
        from core.method import noise
        from core.method.rollout import grow
        from core.method.tree import TreeShape

        settings, extra = self.rows[name]
        first = 0 if name == "independent" else self.options.start
        shape = TreeShape(**settings, window="fixed", fixed=first)
        roots = noise.roots(latent_shape(self.options), 0, 1, [0], shape.trees).to(self.velocity.device)
        return grow(
            self.velocity,
            roots,
            self.engine.sigmas,
            shape,
            self.noise,
            start=first,
            prompts=[0],
            micro_batch=self.batch,
            retain=self.budget() if extra.get("retain") else 0,
        )

    def budget(self) -> float | bool:
        """For the graphs that the rollout keeps.

        Like the nodes, none with checkpointing, whose needs cannot be measured beforehand.
        """
        if self.options.retain == "all":
            return True
        import torch

        free = self.velocity.free_memory()
        if self.options.memory:
            free = min(free, max(0, self.options.memory * GB - torch.cuda.memory_allocated()))
        return 0 if self.options.checkpointing == "on" else RETAIN_SHARE * free

    def unit(self) -> dict[str, float]:
        """Seconds per latent of a forward and of a forward with backward, at the micro-batch; also the warm-up."""
        import torch

        seconds, x, count = {}, None, 0

        def forward(first, last):
            self.velocity(x[first:last], 0.9, [0] * (last - first))

        def both(first, last):
            with self.velocity.grad():
                loss = self.velocity(x[first:last], 0.9, [0] * (last - first)).square().sum()
                torch.autograd.grad(loss, list(self.velocity.parameters()), allow_unused=True)

        for name, work in (("forward", forward), ("unit", both)):
            for _ in range(2):  # the first loads and warms; it also halves the micro-batch where it does not fit
                count = self.batch.size or LEAVES
                x = torch.ones(count, *latent_shape(self.options), device=self.velocity.device)
                seconds[name] = host.timed(lambda: self.batch.run(count, work)) / count
        return seconds


def measure(engine, options) -> tuple[dict, dict]:
    """({row: its runs' medians}, unit)."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reward = random_reward(options.reward, options.scale > 1, device) if options.reward != "none" else None
    wanted = list(rows(options.steps)) if options.rows == "all" else options.rows.split(",")
    result: dict[str, dict] = {}
    with torch.inference_mode(False), torch.no_grad(), engine.session(options.micro_batch) as velocity:
        bench = Bench(engine, velocity, options, reward)
        unit = bench.unit()
        for repeat in range(options.repeats):
            for name in wanted:
                if name == "independent" and repeat or "error" in result.get(name, {}):
                    continue  # the dearest row once
                try:
                    with network_passes(engine.network) as count:
                        run = bench.iteration(name)
                except RuntimeError as error:
                    result[name] = {"error": str(error)}
                else:
                    row = result.setdefault(
                        name, {"forwards": count.forwards, "backwards": count.backwards, "runs": []}
                    )
                    row |= {"micro_batch": bench.batch.size, "ratio": run.pop("ratio"), "skipped": run.pop("skipped")}
                    row["runs"].append(run)
                host.save({"rows": result, "unit": unit, **about(engine, options)}, options.json)
    return result, unit


def about(engine, options) -> dict:
    import torch

    settings = {key: value for key, value in vars(options).items() if key != "json"}
    return {
        "device": host.device(),
        "torch": torch.__version__,
        "engine": engine.name,
        "options": settings,
        "sizes": engine.size,
        "parameters": sum(parameter.numel() for parameter in engine.network.parameters()),
    }


def seconds(row: dict, *phases: str) -> float:
    """Median over the runs of the sum of these phases."""
    return statistics.median(sum(run[name]["seconds"] for name in phases if name in run) for run in row["runs"])


def highest(row: dict, phase: str, what: str) -> float:
    return max(run[phase][what] or math.nan for run in row["runs"])


def table(engine, result: dict, unit: dict, options) -> None:
    print(
        f"\na forward {1e3 * unit['forward']:.2f} ms per latent, forward and backward "
        f"{unit['unit'] / unit['forward']:.2f} forwards"
    )
    print(
        f"{'':16}{'passes':>12}{'rollout':>9}{'decode':>8}{'reward':>8}{'update':>8}{'s in all':>9} | memory in GB per "
        "phase: allocated / reserved (estimated)"
    )
    for name, row in result.items():
        if "error" in row:
            print(f"{name:16}{row['error']}")
            continue
        phases = [phase for phase in ("rollout", "decode", "reward", "update") if phase in row["runs"][0]]
        times = "".join(
            f"{seconds(row, phase):8.2f}" if phase in phases else " " * 8
            for phase in ("rollout", "decode", "reward", "update")
        )
        guesses = {phase: estimated(engine, phase, name, row) for phase in phases}
        memory = ", ".join(
            f"{phase} {highest(row, phase, 'allocated') / GB:.2f} / {highest(row, phase, 'reserved') / GB:.2f}"
            + (f" ({guesses[phase] / GB:.2f})" if guesses[phase] else "")
            for phase in phases
        )
        print(
            f"{name:16}{row['forwards']:6}+{row['backwards']:<5} {times}{seconds(row, *phases):9.2f} | {memory}"
            + (f"; micro-batch {row['micro_batch']}" if row["micro_batch"] else "")
            + (f"; ratio {row['ratio']:.6f}" if abs(row["ratio"] - 1) > 1e-6 else "")
        )


def estimated(engine, phase: str, name: str, row: dict) -> float | None:
    """What ComfyPolicy estimated for this phase of this row, bytes with the weights."""
    settings, extra = rows(engine.options.steps)[name]
    learning = (
        LEAVES if not extra.get("shared", True) or settings["branching"] == 1 else LEAVES // settings["branching"]
    )
    widest = {"rollout": LEAVES, "update": learning}.get(phase)
    found = engine.estimate(min(row["micro_batch"] or widest, widest)) if widest else None
    return found and found["weights"] + found["adapters"] + found[{"rollout": "sampling", "update": "learning"}[phase]]


def verdict(result: dict, unit: dict, options) -> dict[str, float]:
    """The targets beside what was measured; returns what was measured."""
    import torch

    found, best = {}, result.get("tree_short_tail", {})
    real = options.scale == 1 and torch.cuda.is_available()

    def judged(met: bool) -> str:
        return ("met" if met else "not met") + ("" if real else " (which says nothing of the full size on a GPU)")

    print()
    for (name, whole), target in FASTER.items():
        other, label = result.get(name, {}), f"{name}{', VAE and reward included' if whole else ''}"
        if "runs" not in best or whole and not {"decode", "reward"} <= set(best["runs"][0]):
            print(f"at least {target}x faster than {label}: not measured")
        elif "runs" in other:
            phases = ("rollout", "update", "decode", "reward") if whole else ("rollout", "update")
            ratio = found[label] = seconds(other, *phases) / seconds(best, *phases)
            by_passes = "" if whole else f" (by passes {predicted(other, unit) / predicted(best, unit):.2f}x)"
            print(f"at least {target}x faster than {label}: {ratio:.2f}x{by_passes}, {judged(ratio >= target)}")
        else:
            print(f"at least {target}x faster than {label}: that row was not measured")
    limit = FITS.get((options.model, options.dtype))
    used = [
        run[phase]["reserved"] or run[phase]["allocated"]
        for name, row in result.items()
        if name not in ("independent", "window")
        for run in row.get("runs", [])
        for phase in ("rollout", "decode", "reward", "update")
        if phase in run
    ]
    if limit and used:
        found["highest_gb"] = max(used) / GB
        print(f"tree rows within {limit} GB: {max(used) / GB:.2f} GB at most, {judged(max(used) <= limit * GB)}")
    return found


def overhead(engine, others: list, options) -> dict:
    """One straight line through our sampler against the hosts' own, in turn in one process."""
    import torch

    from core.method import noise
    from core.method.noise import NoiseSchedule
    from core.method.rollout import grow
    from core.method.tree import TreeShape

    def ours(adapters_on: bool):
        with engine.session(1) as velocity, contextlib.nullcontext() if adapters_on else velocity.reference():
            roots = noise.roots(latent_shape(options), 0, 0, [0], 1).to(velocity.device)
            return grow(
                velocity,
                roots,
                engine.sigmas,
                TreeShape(1, 1, window="fixed"),
                NoiseSchedule(level=0.0),
                start=0,
                prompts=[0],
            ).leaves

    runs = {"ours, LoRA off": lambda: ours(False), "ours, live LoRA": lambda: ours(True)} | dict(
        other.baseline() for other in [engine, *others]
    )
    found: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode(False), torch.no_grad():
        for work in runs.values():
            work()  # warm
        for _ in range(options.repeats):
            for name, work in runs.items():
                found[name].append(host.timed(work))
    reference = next(iter(runs))
    for name in runs:
        ratio = statistics.median(a / b for a, b in zip(found[reference], found[name]))
        print(
            f"{name}: {statistics.median(found[name]):.3f} s"
            + ("" if name.startswith("ours") else f"; ours takes {ratio:.3f} times as long (target: at most 1.05)")
        )
    return found


def choose_engines(wanted: str) -> list:
    """Engine classes that run here, the one to measure first. Exits with one sentence where none does."""
    import torch

    problems, found = {}, []
    folder = os.environ.get("COMFYUI_PATH")
    sys.path[:] = [
        *([folder] if folder else []),
        *[p for p in sys.path if Path(p or ".").resolve() != host.ROOT],
        str(host.ROOT),
    ]
    for name, engine in (("comfy", Comfy), ("diffusers", Diffusers)):
        try:
            if name == "comfy":
                from comfy.cli_args import args

                args.cpu = args.cpu or not torch.cuda.is_available()
                import comfy.sd  # noqa: F401
            else:
                import diffusers  # noqa: F401
                import peft  # noqa: F401
        except ImportError as error:
            problems[name] = str(error)
        else:
            found.insert(0 if name == wanted else len(found), engine)
    if found and wanted == "auto" and folder and "comfy" in problems:
        print(f"ComfyUI in {folder} cannot be used here ({problems['comfy']}); going on with diffusers.")
    if not found or wanted in problems:
        reasons = "; ".join(f"{name}: {problems[name]}" for name in problems if wanted in ("auto", name))
        sys.exit(
            "Full-size models run through ComfyUI (set COMFYUI_PATH) or through diffusers and peft (pip install "
            f"diffusers peft), and that is missing here ({reasons})."
        )
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, choices in (
        ("part", "iteration", ("iteration", "overhead")),
        ("engine", "auto", ("auto", "comfy", "diffusers")),
        ("model", "flux", tuple(MODELS)),
        ("dtype", "bf16", ("bf16", "fp8", "fp32")),
        ("checkpointing", "on", ("on", "off")),
        ("reward", "none", ("none", "pickscore", "clipscore")),
        ("retain", "auto", ("auto", "all")),
    ):
        parser.add_argument(f"--{name}", default=default, choices=choices, help=f"default {default}")
    for name, default, text in (
        ("size", 512, "pixels"),
        ("steps", 10, "sampling steps"),
        ("start", 0, "first step of the window"),
        ("rank", 32, "LoRA rank"),
        ("micro-batch", 0, "latents per model call, 0 = all; halves by itself"),
        ("repeats", 2, "runs of each row but `independent`"),
        ("scale", 1, "divides depth and width, to try it on a small machine"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--memory", type=float, default=0.0, help="GB that the GPU may pretend to have, 0 = all it has")
    parser.add_argument("--rows", default="all", help=f"all, or some of {','.join(rows(10))}")
    parser.add_argument("--vae", action="store_true", help="decode the leaves with a VAE of FLUX's size")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    unknown = [name for name in options.rows.split(",") if name != "all" and name not in rows(options.steps)]
    if unknown or options.size % 16 or min(options.size, options.steps - 4, options.repeats, options.scale) < 1:
        parser.error(
            f"no such row: {', '.join(unknown)}"
            if unknown
            else "the size must be a multiple of 16, steps at least 5, repeats and scale at least 1"
        )
    if options.reward != "none" and not options.vae:
        parser.error("a reward needs images: add --vae")
    return options


def main():
    import torch

    options = arguments()
    engine_class, *others = choose_engines(options.engine)
    if options.memory:
        if not torch.cuda.is_available():
            sys.exit("--memory pretends that a GPU is smaller, and there is none here: leave it out.")
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, options.memory * GB / torch.cuda.get_device_properties(0).total_memory)
        )
    engine = engine_class(options)
    print(
        f"{options.model} through {engine.name} on {host.device()}, torch {torch.__version__}: "
        f"{about(engine, options)['parameters'] / 1e9:.3f} billion parameters, {options.dtype}, {options.size} px, "
        f"{options.steps} steps, LoRA rank {options.rank}, checkpointing {options.checkpointing}"
    )
    if options.part == "overhead":
        result = overhead(
            engine, [other(options) for other in others if other is not Comfy and options.dtype != "fp8"], options
        )
        return host.save({"seconds": result, **about(engine, options)}, options.json)
    print(engine.preflight())
    result, unit = measure(engine, options)
    table(engine, result, unit, options)
    found = verdict(result, unit, options)
    host.save({"rows": result, "unit": unit, "verdict": found, **about(engine, options)}, options.json)


if __name__ == "__main__":
    main()
