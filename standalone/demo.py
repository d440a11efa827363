"""The demo where there is no ComfyUI: the training run of the shipped graphs, on the embedded model, through diffusers.

    python -m standalone.demo --model flux|sd3 --iterations N --out DIR --seed S

Settings are read from workflows/api/trainer.json (training), the prompts from first_steps.json, and those before and
after from compare.json, by node title. Left out: resuming; each call begins a new run in DIR and replaces the one
before.
"""

import argparse
import importlib.util
import json
import logging
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from core.files import write_atomically, write_picture
from core.hosts.diffusers import simple_sigmas
from core.hosts.diffusers_models import DiffusersHost, embedded_vae, open_model
from core.hosts.peft import Attached, new_adapters
from core.method.noise import NoiseSchedule
from core.method.noise import roots as root_noise
from core.method.objective import Objective
from core.method.rollout import grow
from core.method.tree import TreeShape
from core.pictures import plot
from core.pictures.curve import reward_curve
from core.rewards import load
from core.runs.prompts import PromptList, lines
from core.runs.run import Run
from core.runs.trainer import Event, Settings, Trainer
from embedded.shapes import decodes_in
from standalone.figures import PICTURES, graph, in_turn, said, seen

log = logging.getLogger("treerpo")
PACKAGES = {"diffusers": "diffusers", "peft": "peft", "transformers": "transformers", "open_clip": "open_clip_torch"}


class Demo:
    """The embedded model with a LoRA, and the settings of the shipped graphs; their prompts, where none are given."""

    def __init__(self, model: str, seed: int, prompts: PromptList | None = None):
        self.settings, self.comparison = graph("trainer"), graph("compare")
        self.prompts = prompts or PromptList(
            lines(graph("first_steps")["Prompts"]["text"]), lines(self.comparison["Held-out prompts"]["text"])
        )
        size, wish, policy = self.settings["Size"], dict(self.settings["Reward"]), self.settings["Policy"]
        self.latent = (16, size["height"] // 8, size["width"] // 8)
        follow, each = wish.pop("follow_prompt"), wish.pop("each")
        self.reward = load("drawing", wish=wish, follow=follow, each=each)
        base, self.seed = open_model(f"embedded/{model}"), seed
        base.vae = embedded_vae(model, decodes_in(torch.device("cpu")))
        targets = policy["pattern"] if policy["targets"] == "pattern" else policy["targets"]
        self.adapters = new_adapters(
            base.transformer, policy["rank"], policy["alpha"], targets, seed=policy["init_seed"]
        )
        self.kind = model
        self.host = DiffusersHost(
            base,
            Attached(self.adapters, base.transformer),
            simple_sigmas(model, self.settings["Sigmas"]["steps"]),
            self.latent,
            [*self.prompts.train, *self.prompts.held_out],
        )

    def trainer(self, run: Run) -> Trainer:
        """The run's trainer, with the settings of the graph's nodes."""
        training, goal = self.settings["Trainer"], self.settings["Objective"]
        named = ("per_iteration", "learning_rate", "decay", "ema", "replay", "replay_from", "replay_pictures")
        settings = Settings(
            seed=self.seed,
            only_good=False,
            on_alarm="off",
            **{name: training[name] for name in named if name in training},
        )
        objective = Objective(
            loss="regression" if goal["method"] == "Tree Regression" else "grpo",
            **{field.name: goal[field.name] for field in fields(Objective) if field.name in goal},
        )
        return Trainer(
            run,
            self.host,
            self.prompts,
            tree_shape(self.settings["Shape"]),
            noise_schedule(self.settings["Noise"]),
            objective,
            self.reward,
            settings,
        )

    def draw(self, texts: list[str], seed: int, steps: int) -> Tensor:
        """Pictures [B, H, W, 3] of prompts, as a KSampler (euler, simple) with this seed draws them as one batch."""
        straight = TreeShape(branching=1, depth=1, window="fixed")
        with self.host.session(texts, None) as velocity:
            drawn = root_noise(self.latent, seed, 0, [0], len(texts))
            forest = grow(
                velocity,
                drawn,
                simple_sigmas(self.kind, steps),
                straight,
                NoiseSchedule("ode", 0.0),
                start=0,
                prompts=list(range(len(texts))),
            )
            return self.host.decode(velocity, forest.leaves)

    def compare(self, path: Path) -> tuple[float, Tensor]:
        """Draw the held-out prompts on fixed noise with the policy as it is, save the first of each: the mean reward of
        those, and all pictures [PICTURES, H, W, 3], the prompts in turn.
        """
        settings, texts = self.comparison["Sample after"], self.prompts.held_out
        images = self.draw(in_turn(texts, PICTURES), settings["seed"], settings["steps"])
        scores = self.reward.score(images[: len(texts)], texts)
        plot.score_sheet(images[: len(texts)], scores, texts, self.reward.name).save(path)
        return float(scores.mean()), images


def tree_shape(settings: dict) -> TreeShape:
    """The inputs of a Tree Shape node."""
    keys = ("branching", "depth", "trees", "window", "ratio", "stride", "interval", "tail")
    return TreeShape(
        **{key: settings[key] for key in keys}, fixed=settings["first_step"], siblings=settings["sibling_noise"]
    )


def noise_schedule(settings: dict) -> NoiseSchedule:
    """The inputs of a Depth Noise Schedule node."""
    return NoiseSchedule(
        settings["kind"],
        settings["level"],
        settings["shape"],
        settings["beta"],
        int(settings["count_layers_from"]),
        [float(value) for value in settings["list"].split(",") if value.strip()],
        settings["first_step_correlation"],
    )


def train(model: str, iterations: int, out: Path, seed: int) -> dict:
    """The whole demo: before, N iterations, after, LoRA; leaves all files in `out` and returns the summary."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    demo = Demo(model, seed)
    run = Run(out, demo.adapters, {"model": model, "seed": seed, "backend": "diffusers", **demo.settings})
    before, pictures = demo.compare(out / "before.png")
    log.info(
        "%s through diffusers, loaded in %.0f s; held-out prompts %.4f",
        model.upper(),
        time.perf_counter() - began,
        before,
    )

    def report(event: Event) -> None:
        row = event.row
        write_picture(out / "reward_curve.png", reward_curve(run.metrics))
        write_picture(
            out / "tree.png",
            plot.tree_picture(event.forest, event.credit.edges(event.forest), event.total, event.images, event.prompts),
        )
        log.info(
            "iteration %3d/%d   reward %.4f ± %.4f   %d forwards   %.1f s",
            run.iteration,
            iterations,
            row["reward"],
            row["reward_std"],
            row["forwards"],
            row["seconds"],
        )

    demo.trainer(run).train(iterations, report)
    with run.ema.applied() if run.ema is not None else nullcontext():
        after, trained = demo.compare(out / "after.png")
    found = seen(pictures, trained, demo.prompts.held_out, demo.reward.wish)
    name = f"treerpo-shapes-{model}.safetensors"
    write_atomically(out / name, save(run.lora(averaged=True), metadata=run.metadata()))
    first, last = ([row["reward"] for row in part] for part in (run.metrics[:4], run.metrics[-4:]))
    summary = {
        "backend": "diffusers",
        "model": model,
        "iterations": iterations,
        "seed": seed,
        "reward_first": sum(first) / len(first),
        "reward_last": sum(last) / len(last),
        "held_out": {"before": before, "after": after},
        **found,
        "seconds": time.perf_counter() - began,
    }
    write_atomically(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    log.info(
        "Mean reward, first %d -> last %d iterations: %.4f -> %.4f",
        len(first),
        len(last),
        summary["reward_first"],
        summary["reward_last"],
    )
    log.info("Held-out prompts, before -> after: %.4f -> %.4f", before, after)
    log.info(said(found))
    log.info("In %s: metrics.jsonl, reward_curve.png, tree.png, before.png, after.png, %s, summary.json", out, name)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description="TreeRPO's demo through diffusers, where there is no ComfyUI.")
    parser.add_argument("--model", choices=("flux", "sd3"), default="flux")
    parser.add_argument("--iterations", type=int, default=160)
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
