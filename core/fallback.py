"""The demo where there is no ComfyUI: the training run of the shipped graphs, on the embedded model, through diffusers.

    python -m core.fallback --model flux|sd3 --iterations N --out DIR --seed S

Settings and prompts are read from workflows/api/first_steps.json (training) and compare.json (held-out prompts before
and after), by node title. Left out: resuming; each call begins a new run in DIR and replaces the one before.
"""
import argparse
import importlib.util
import json
import logging
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from . import noise, plot
from .advantage import edge_advantages, leaf_advantages
from .backends.diffusers import DiffusersVelocity, TinyVae, clip_l_features, comfy_lora, load_transformer, simple_sigmas
from .checkpoint import Run, write_atomically
from .lora import Adapters
from .noise import NoiseSchedule
from .objective import Objective
from .rewards.measure import Measure
from .rollout import grow
from .tree import TreeShape
from .update import update

log = logging.getLogger("treerpo")
PACKAGES = {"diffusers": "diffusers", "transformers": "transformers", "open_clip": "open_clip_torch"}
REPO = Path(__file__).resolve().parent.parent


def graph(name: str) -> dict[str, dict]:
    """Inputs of every node of a shipped graph, by the node's title."""
    nodes = json.loads((REPO / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
    return {node["_meta"]["title"]: node["inputs"] for node in nodes.values()}


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


class ComfyNames:
    """Adapters of diffusers' modules as a Run keeps them: trained as they are, saved under ComfyUI's names."""

    def __init__(self, adapters: Adapters, transformer: torch.nn.Module):
        self.adapters, self.transformer = adapters, transformer

    def parameters(self):
        return self.adapters.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return comfy_lora(self.adapters.state_dict(), self.transformer)


class Demo:
    """The embedded model with a LoRA, and the settings of the shipped graphs."""

    def __init__(self, model: str, seed: int):
        from embedded.clip_l import random_clip_l
        from embedded.shapes import vae_state_dict
        self.kind, self.seed = model, seed
        self.settings, self.comparison = graph("first_steps"), graph("compare")
        self.prompts, self.held_out = lines(self.settings["Prompts"]["text"]), lines(self.comparison["Held-out prompts"]["text"])
        size = self.settings["Size"]
        self.latent = (16, size["height"] // 8, size["width"] // 8)
        self.vae = TinyVae(vae_state_dict(model), model)
        measure = self.settings["Reward"]
        self.reward = Measure(measure["measure"], threshold=measure["threshold"], sign=1.0 if measure["direction"] == "more" else -1.0)
        self.transformer = load_transformer(load_file(str(REPO / "embedded" / f"{model}.safetensors")))
        policy = self.settings["Policy"]
        targets = policy["pattern"] if policy["targets"] == "pattern" else policy["targets"]
        self.adapters = Adapters.create(self.transformer, policy["rank"], policy["alpha"], targets, seed=policy["init_seed"])
        self.adapters.inject(self.transformer)
        features = clip_l_features(random_clip_l(), self.prompts + self.held_out)
        self.velocity = DiffusersVelocity(self.transformer, self.adapters, *features)

    def iterate(self, run: Run) -> None:
        """One iteration: rollout, rewards, advantages, update, files."""
        began, before = time.perf_counter(), self.velocity.forwards
        training = self.settings["Update"]
        shape, schedule = tree_shape(self.settings["Shape"]), noise_schedule(self.settings["Noise"])
        sigmas = simple_sigmas(self.kind, self.settings["Sigmas"]["steps"])
        count = min(self.settings["Prompts"]["per_iteration"] or len(self.prompts), len(self.prompts))
        chosen, numbers = [(run.iteration * count + j) % len(self.prompts) for j in range(count)], list(range(count))
        roots = noise.roots(self.latent, self.seed, run.iteration, numbers, shape.trees)
        forest = grow(self.velocity, roots, sigmas, shape, schedule, start=shape.start(run.iteration, len(sigmas) - 1, self.seed), prompts=chosen,
                      numbers=numbers, seed=self.seed, iteration=run.iteration)
        sampled = time.perf_counter()
        images = self.vae.decode(forest.leaves)
        texts = [self.prompts[i] for i in chosen for _ in range(shape.leaves)]
        scores = self.reward.score(images, texts)
        credit = self.settings["Advantages"]
        leaf, flat = leaf_advantages({self.reward.name: scores}, count, clip=credit["clip"])
        layers = edge_advantages(credit["estimator"], forest.log_probs, leaf, shape.branching, count, credit["weights"], forest.leaves[0].numel())
        scored = time.perf_counter()
        optimizer = run.adamw(training["learning_rate"], weight_decay=training["weight_decay"])
        objective = Objective(**{field.name: training[field.name] for field in fields(Objective) if field.name in training})
        metrics = update(self.velocity, forest, layers, optimizer, objective, max_grad_norm=training["max_grad_norm"],
                         inner_updates=training["inner_updates"])
        now = time.perf_counter()
        row = {"reward": float(scores.mean()), "reward_std": float(scores.view(count, -1).std(1, correction=0).mean()),
               "frac_reward_zero_std": float(flat.float().mean()), **metrics, "window_start": forest.start,
               "forwards": self.velocity.forwards - before, "seconds": now - began, "seconds/rollout": sampled - began,
               "seconds/reward": scored - sampled, "seconds/update": now - scored}
        run.commit(row, pictures={"reward_curve.png": plot.reward_curve([*run.metrics, row]),
                                  "tree.png": plot.tree_picture(forest, layers, scores, images, texts)})

    def draw(self, rows: list[int], seed: int, steps: int) -> Tensor:
        """Pictures [B, H, W, 3] of prompts by number, as a KSampler (euler, simple) with this seed draws them as one batch."""
        roots = noise.roots(self.latent, seed, 0, [0], len(rows))
        straight = TreeShape(branching=1, depth=1, window="fixed")
        forest = grow(self.velocity, roots, simple_sigmas(self.kind, steps), straight, NoiseSchedule("ode", 0.0), start=0, prompts=rows)
        return self.vae.decode(forest.leaves)

    def compare(self, path: Path) -> float:
        """Draw the held-out prompts on fixed noise with the policy as it is, save the pictures; their mean reward."""
        settings = self.comparison["Sample after"]
        images = self.draw([len(self.prompts) + i for i in range(len(self.held_out))], settings["seed"], settings["steps"])
        scores = self.reward.score(images, self.held_out)
        plot.score_sheet(images, scores, self.held_out, self.reward.name).save(path)
        return float(scores.mean())


def tree_shape(settings: dict) -> TreeShape:
    """The inputs of a Tree Shape node."""
    keys = ("branching", "depth", "trees", "window", "ratio", "stride", "interval", "tail")
    return TreeShape(**{key: settings[key] for key in keys}, fixed=settings["first_step"], siblings=settings["sibling_noise"])


def noise_schedule(settings: dict) -> NoiseSchedule:
    """The inputs of a Depth Noise Schedule node."""
    return NoiseSchedule(settings["kind"], settings["level"], settings["shape"], settings["beta"], int(settings["count_layers_from"]),
                         [float(value) for value in settings["list"].split(",") if value.strip()], settings["first_step_correlation"])


def train(model: str, iterations: int, out: Path, seed: int) -> dict:
    """The whole demo: before, N iterations, after, LoRA; leaves all files in `out` and returns the summary."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    demo = Demo(model, seed)
    run = Run(out, ComfyNames(demo.adapters, demo.transformer), {"model": model, "seed": seed, "backend": "diffusers", **demo.settings})
    before = demo.compare(out / "before.png")
    log.info("%s through diffusers, loaded in %.0f s; held-out prompts %.4f", model.upper(), time.perf_counter() - began, before)
    while run.iteration < iterations:
        demo.iterate(run)
        row = run.metrics[-1]
        log.info("iteration %3d/%d   reward %.4f ± %.4f   %d forwards   %.1f s", run.iteration, iterations, row["reward"], row["reward_std"],
                 row["forwards"], row["seconds"])
    after = demo.compare(out / "after.png")
    name = f"treerpo-shapes-{model}.safetensors"
    write_atomically(out / name, save(run.adapters.state_dict(), metadata=run.metadata()))
    first, last = ([row["reward"] for row in part] for part in (run.metrics[:4], run.metrics[-4:]))
    summary = {"backend": "diffusers", "model": model, "iterations": iterations, "seed": seed, "reward_first": sum(first) / len(first),
               "reward_last": sum(last) / len(last), "held_out": {"before": before, "after": after}, "seconds": time.perf_counter() - began}
    write_atomically(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    log.info("Mean reward, first %d -> last %d iterations: %.4f -> %.4f", len(first), len(last), summary["reward_first"], summary["reward_last"])
    log.info("Held-out prompts, before -> after: %.4f -> %.4f", before, after)
    log.info("In %s: metrics.jsonl, reward_curve.png, tree.png, before.png, after.png, %s, summary.json", out, name)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description="TreeRPO's demo through diffusers, where there is no ComfyUI.")
    parser.add_argument("--model", choices=("flux", "sd3"), default="flux")
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("treerpo-demo"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.iterations < 1:
        parser.error("--iterations must be at least 1")
    absent = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if absent:
        parser.exit(1, f"The demo without ComfyUI needs {len(absent)} more: pip install {' '.join(absent)}\n")
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    train(options.model, options.iterations, options.out, options.seed)


if __name__ == "__main__":
    main()
