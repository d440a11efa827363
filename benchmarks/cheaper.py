"""Ideas that might make an iteration cheaper, measured before anything of them is built.

Parts: windows (every prompt of an iteration its own window start, stratified, against one start for all: gradient
signal-to-noise per cost), preview (a look at every leaf when the window ends: does it tell how the picture will be
rewarded, and what is a gradient worth that draws only the leaves that differ most to their end), size (prompts per
iteration that follow the gradient's noise scale, against a fixed number: reward at equal cost).

    python3 run.py bench cheaper --part windows|preview|size [--model flux|sd3] [--reward demo|size|taste|rare|follow]
"""

import argparse
import dataclasses
import math
import statistics
import sys
from pathlib import Path

import host
from common_runs import STEPS, WISHES, Lab, Method, methods
from iteration import network_passes
from learning import signal_to_noise, spearman

SEED, SCALE = 7, 0.02  # of the random policy whose gradients are compared
TREE = {"branching": 4, "depth": 2}
REGRESSION = {"loss": "regression", "anchor": 0.05, "step_weight": "layer"}
FEWEST, MOST, SHARE = 2, 8, 0.1  # adaptive: prompts per iteration, and their share of the noise scale


def prompts_of(lab: Lab, policy, count: int) -> list[int]:
    import torch

    drawn = lab.core.method.noise.generator(policy.seed, "prompts", policy.iteration)
    return torch.randperm(lab.training, generator=drawn)[:count].tolist()


def starts(lab: Lab, shape, iteration: int, prompts: int, stratified: bool) -> list[int]:
    """The window start of each prompt, every one with the distribution of `shape`: all the same, or stratified
    (systematic sampling: one of each 1/P of the distribution, in random order).
    """
    import torch

    if not stratified:
        return [shape.start(iteration, STEPS, SEED)] * prompts
    upto = lab.core.method.windows.probabilities(STEPS, shape.depth, shape.ratio).cumsum(0)
    draw = lab.core.method.noise.generator(SEED, "window", iteration)
    places = (torch.arange(prompts) + torch.rand(1, generator=draw, dtype=torch.float64)) / prompts
    found = torch.searchsorted(upto, places).clamp(max=len(upto) - 1)
    return found[torch.randperm(prompts, generator=draw)].tolist()


def take_gradient(policy):
    """The gradient of all parameters as one vector; none is left behind."""
    import torch

    found = [parameter.grad for parameter in policy.velocity.parameters() if parameter.grad is not None]
    for parameter in policy.velocity.parameters():
        parameter.grad = None
    return torch.cat([gradient.flatten() for gradient in found])


def mixed_gradient(lab: Lab, policy, method: Method, stratified: bool) -> tuple:
    """(gradient, cost, first prompt's start) of an iteration whose prompts have windows of their own."""
    import torch

    core, shape = lab.core, lab.core.method.tree.TreeShape(**method.shape)
    objective = core.method.objective.Objective(**{"clip_low": 1e-2, "clip_high": 1e-2, **method.objective})
    prompts, whole = prompts_of(lab, policy, method.prompts), 0.0
    placed = starts(lab, shape, policy.iteration, len(prompts), stratified)
    with network_passes(lab.graph.model.model.diffusion_model) as count:
        for start in sorted(set(placed)):
            own = [prompt for prompt, at in zip(prompts, placed) if at == start]
            forest = grown(lab, policy, method.shape, start, own)
            rewards = lab.score(policy.velocity, forest.leaves, torch.tensor(own).repeat_interleave(shape.leaves))
            leaf, _ = core.method.advantage.leaf_advantages({"reward": rewards}, len(own))
            layers = core.method.advantage.edge_advantages(
                method.estimator, [p.cpu() for p in forest.log_probs], leaf, forest.branching, len(own)
            )
            core.method.update.policy_gradient(policy.velocity, forest, layers, objective)
            whole = whole + take_gradient(policy) * len(own) / len(prompts)
    policy.iteration += 1
    return whole, count.forwards - count.backwards + count.backwards * lab.unit, placed[0]


def grown(lab: Lab, policy, shape: dict, start: int, prompts: list[int]):
    core = lab.core.method
    tree = core.tree.TreeShape(**shape)
    return core.rollout.grow(
        policy.velocity,
        core.noise.roots((16, 8, 8), policy.seed, policy.iteration + 1, prompts, tree.trees),
        lab.sigmas,
        tree,
        core.noise.NoiseSchedule(),
        start=start,
        prompts=prompts,
        seed=policy.seed,
        iteration=policy.iteration,
        retain=math.inf,
    )


def windows(lab: Lab, options) -> dict:
    base = Method(4, {**TREE, "tail": 0.4, "ratio": 0.5})
    kinds = {
        "early_b4w2_regression": base.but(shape={"tail": 0.3, "ratio": 0.3}, objective=REGRESSION),
        "b4w2_regression": base.but(objective=REGRESSION),
        "b4w2_grpo": base,
    }
    found = {}
    for name, method in kinds.items():
        for stratified in (False, True):
            with lab.open(SEED, scale=SCALE) as policy:
                rows = [mixed_gradient(lab, policy, method, stratified) for _ in range(options.iterations)]
            value, error = signal_to_noise(rows)
            place = f"{name}, {'stratified' if stratified else 'one window'}"
            found[place] = {"snr_per_cost": value, "standard_error": error}
            print(f"{options.model} {place}: {value:.3f} +- {error:.3f}", flush=True)
    return found


def previewed(lab: Lab, policy, shape: dict, start: int, prompts: list[int], tails: tuple[float, ...]) -> tuple:
    """(trees, x0 predicted where their window ends [P * K, C, H, W], {tail: leaves}, caption of each leaf)."""
    import torch

    forest = grown(lab, policy, {**shape, "tail": 0.05}, start, prompts)
    rows = torch.tensor(prompts).repeat_interleave(forest.leaves_per_prompt)
    rest, x = lab.sigmas[start + forest.depth :], forest.states[-1]
    first, leaves = policy.velocity(x, float(rest[0]), rows), {}
    for tail in tails:
        table, y, v = lab.core.method.rollout.shorten(rest, tail).tolist(), x, first
        for number, (s, n) in enumerate(zip(table, table[1:])):
            v = policy.velocity(y, s, rows) if number else v
            y = y + (n - s) * v
        leaves[tail] = y
    return forest, x - float(rest[0]) * first, leaves, rows


def preview(lab: Lab, options) -> dict:
    found = {"order": [], "gradient": {}}
    with lab.open(SEED, scale=SCALE) as policy:
        for start in (0, 1, 2, 4, 6):
            prompts = prompts_of(lab, policy, min(options.iterations, 12))
            forest, early, leaves, rows = previewed(lab, policy, TREE, start, prompts, (1.0, 0.3))
            drawn = {"preview": early, "tail .3": leaves[0.3], "whole tail": leaves[1.0]}
            scores = {
                name: lab.score(policy.velocity, part, rows).view(len(prompts), -1) for name, part in drawn.items()
            }
            row = {
                f"{a} ~ {b}": statistics.mean(spearman(x, y) for x, y in zip(scores[a], scores[b]))
                for a, b in (("preview", "whole tail"), ("preview", "tail .3"), ("tail .3", "whole tail"))
            }
            found["order"].append({"start": start, **row})
            print(
                f"{options.model} window at {start}: " + ", ".join(f"{k} {v:.2f}" for k, v in row.items()), flush=True
            )
            policy.iteration += 1
    rows = {}
    with lab.open(SEED, scale=SCALE) as policy:
        for _ in range(options.iterations):
            for name, row in contrasts(lab, policy).items():
                rows.setdefault(name, []).append(row)
    for name, taken in rows.items():
        pictures = taken[0][2]
        row = found["gradient"][name] = {"cost": taken[0][1], "pictures": pictures}
        for each in (0, 1, 5):
            value, error = signal_to_noise([(gradient, cost + each * pictures, 0) for gradient, cost, _ in taken])
            row[f"snr_at_{each}_forwards_per_picture"], row[f"error_at_{each}"] = value, error
        print(f"{options.model} window at 0, {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    return found


def contrasts(lab: Lab, policy, prompts: int = 4, tail: float = 0.3) -> dict[str, tuple]:
    """{which leaves: (gradient of tree regression, forwards it costs, pictures to decode and score)}, all of the same
    trees with their window at the start: all leaves to their end, the previews alone, those half of the leaves whose
    previews differ most, or any half.
    """
    import torch

    core, chosen = lab.core.method, prompts_of(lab, policy, prompts)
    forest, early, leaves, rows = previewed(lab, policy, TREE, 0, chosen, (tail,))
    looks = lab.score(policy.velocity, early, rows).view(prompts, -1)
    ends = lab.score(policy.velocity, leaves[tail], rows).view(prompts, -1)
    count, half = looks.shape[1], looks.shape[1] // 2
    order, draw = looks.argsort(1).argsort(1), core.noise.generator(policy.seed, "half", policy.iteration)
    every = torch.ones_like(order, dtype=torch.bool)
    extremes = (order < half // 2) | (order >= count - half // 2)
    random = torch.rand(looks.shape, generator=draw).argsort(1) < half
    nodes = core.cost.nodes(forest.depth, forest.branching)
    steps = core.cost.tail_steps(STEPS - forest.depth, tail)
    objective, found = core.objective.Objective(loss="regression", step_weight="layer"), {}
    for name, kept, looked, taken, scored in (
        ("all leaves", every, 0, steps, ends),
        ("previews alone", every, 0, 1, looks),
        ("half, by preview", extremes, count, steps, ends),
        ("half, at random", random, 0, steps, ends),
    ):
        mean = (scored * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        spread = ((scored - mean).square() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        leaf = ((scored - mean) * kept / (spread.sqrt() + 1e-8)).flatten()
        drawn = dataclasses.replace(forest, leaves=early if taken == 1 else leaves[tail], graphs={})
        layers = core.advantage.edge_advantages(
            "treegrpo", [p.cpu() for p in drawn.log_probs], leaf, drawn.branching, prompts
        )
        core.update.policy_gradient(policy.velocity, drawn, layers, objective)
        finished = int(kept.sum())
        forwards = prompts * nodes * lab.unit + finished * taken  # graphs are retained: a node's forward is in its unit
        forwards += (
            prompts * looked - finished if looked else 0
        )  # the first step of the leaves that are kept is their look
        found[name] = take_gradient(policy), forwards, finished + prompts * looked
    policy.iteration += 1
    return found


def noise_scale(rows: list[dict]) -> float | None:
    """Prompts of which one gradient's signal equals its noise, from the newest 20 iterations; None = not known yet."""
    rows = [row for row in rows[-20:] if "grad_signal" in row]
    if len(rows) < 5:
        return None
    signal = statistics.mean(row["grad_signal"] for row in rows)
    noise = statistics.mean(row["prompts"] * (row["grad_power"] - row["grad_signal"]) for row in rows)
    return noise / signal if signal > 0 else math.inf


def size(lab: Lab, options) -> dict:
    method, found = methods()["early_b4w2_regression"].but(learning_rate=1.2e-3), {}
    for seed in range(options.seeds):
        for name, adaptive in (("4 prompts", False), ("adaptive", True)):
            with lab.open(seed) as policy:
                rows, prompts = [], method.prompts
                while policy.cost < options.budget:
                    row = policy.learn(method.but(prompts=prompts))
                    rows.append({key: row[key] for key in row if key.startswith("grad_")} | {"prompts": prompts})
                    scale = noise_scale(rows)
                    if adaptive and scale is not None:
                        prompts = round(min(max(SHARE * scale, FEWEST), MOST))
                run = {**policy.evaluate(), "iterations": len(rows), "prompts": [row["prompts"] for row in rows]}
            found.setdefault(name, []).append({**run, "noise_scale": noise_scale(rows)})
            print(f"{options.model} seed {seed} {name}: {found[name][-1]}", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("windows", "preview", "size"), default="windows")
    parser.add_argument("--model", choices=("flux", "sd3"), default="sd3")
    parser.add_argument("--reward", choices=tuple(WISHES), default="demo")
    parser.add_argument("--iterations", type=int, default=40, help="windows, preview: independent gradients")
    parser.add_argument("--seeds", type=int, default=3, help="size: runs of each kind")
    parser.add_argument("--budget", type=float, default=4000, help="size: cost of a run, in forwards")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    pack = host.load_pack()
    sys.modules["comfy.utils"].PROGRESS_BAR_ENABLED = False
    lab = Lab(pack, options.model, options.reward)
    found = {"windows": windows, "preview": preview, "size": size}[options.part](lab, options)
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    host.save({**settings, "unit": lab.unit, "device": host.device(), "found": found}, options.json)


if __name__ == "__main__":
    main()
