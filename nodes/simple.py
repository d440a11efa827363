"""Simple Trainer: from a model, prompts and a reward to a LoRA, with everything between chosen."""

import dataclasses
from pathlib import Path

import comfy.samplers
import comfy.sd
import torch
from comfy_api.latest import io

from ..core.hosts.architectures import architecture_of, model_file
from ..core.hosts.comfy_host import empty_latent
from ..core.method.noise import NoiseSchedule
from ..core.method.objective import Objective
from ..core.method.tree import TreeShape
from ..core.runs.prompts import collect, split
from .policy import PolicyNode, begin_from_input
from .runs import NOTHING
from .save import SaveTreeLoraNode, merging
from .schema import RewardSocket, expert, schema
from .trainer import ALIASES, train

TINY = 50e6  # parameters; what has fewer is one of the embedded models
STEPS = 10
PER_ITERATION = 4  # prompts
CHECKED = 16  # held-out pictures at least
MOST_HELD_OUT = 8  # of every five prompts one, and no more than this
PRESETS = {  # how much faster than usual, and how strongly it is held to the base model; docs/benchmarks_teaching.md
    "gentle": (0.5, 0.1),
    "normal": (1.0, 0.05),
    "strong": (1.5, 0.03),
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """What suits a base model."""

    size: int  # pixels, square
    learning_rate: float  # of the normal preset
    cfg: float
    rank: int
    targets: str
    checkpointing: bool
    steps: int = STEPS
    tail: float = 0.3  # of few steps none can be spared
    tiny: bool = False  # one of the embedded models


def fit(model, cfg: float = 0.0) -> Fit:
    """cfg: the user's own; 0 = what the model is usually drawn with."""
    network = model.model.diffusion_model
    if sum(weight.numel() for weight in network.parameters()) < TINY:
        return Fit(64, 1.2e-3, cfg or 1.0, 8, "all linear", False, tiny=True)
    usual, steps = architecture_of(model).habit(model_file(model))
    few = steps < STEPS
    return Fit(512, 2e-4, cfg or usual, 32, "attention", True, min(steps, STEPS), 1.0 if few else 0.3)


CLIP_AND_VAE = [
    io.Clip.Input("clip", lazy=True, tooltip="The text encoder that belongs to the model."),
    io.Vae.Input("vae", lazy=True, tooltip="The VAE that belongs to the model."),
]
TUNED = io.Model.Output(display_name="tuned_model", tooltip="The model with the LoRA on it, for a KSampler.")


class TrainsSimply(io.ComfyNode):
    """What the nodes have in common that choose everything by themselves: a `lora_name`, and prompts as a text."""

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        return float("nan")  # a new NaN each time: the run moves on between queue runs

    @classmethod
    def validate_inputs(cls, lora_name):
        return SaveTreeLoraNode.validate_inputs([lora_name])

    @classmethod
    def check_lazy_status(cls, prompts, **others):
        """Missing prompts are told before any model is loaded."""
        collect([prompts])
        return [name for name, value in others.items() if value is None]


class SimpleTrainerNode(TrainsSimply):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOSimple",
            "Simple Trainer",
            description="Trains a LoRA that draws what the reward likes: model, prompts and a reward in, a LoRA out. "
            "It chooses steps, tree, noise and learning rate by itself; TreeRPO Trainer has every setting. Stop it at "
            "any time: the LoRA is saved, and the next Run goes on.",
            search_aliases=ALIASES,
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", lazy=True, tooltip="The base model: FLUX, SD3, Qwen-Image ... It is never changed."
                ),
                *CLIP_AND_VAE,
                RewardSocket.Input("reward_model", lazy=True, tooltip="What is good: any reward of TreeRPO."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    placeholder="One prompt per line. Ten or more work best.",
                    tooltip="What to train on, one prompt per line. A fifth of them are kept aside to check on.",
                ),
                io.String.Input(
                    "lora_name",
                    default="my style",
                    tooltip="The LoRA in models/loras, and the run in output/treerpo. A new name begins anew.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="normal",
                    tooltip="gentle = keeps close to the base model, slower. strong = keeps least to it: for a reward "
                    "that hardly moves; pictures become less varied.",
                ),
                io.Int.Input(
                    "iterations",
                    default=100,
                    min=1,
                    max=100000,
                    tooltip="Of this Run; the next Run learns on.",
                ),
                io.Float.Input(
                    "minutes",
                    default=0.0,
                    min=0.0,
                    max=10000.0,
                    step=1.0,
                    tooltip="Stop after so many minutes, whatever comes first; the next Run goes on. 0 = no limit.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=16,
                    tooltip="Width and height to train at, in pixels. Smaller = faster; the size you draw at = best. "
                    "0 = 512, or 64 for the tiny models.",
                ),
                RewardSocket.Input(
                    "judge",
                    optional=True,
                    lazy=True,
                    tooltip="A second reward that is not trained on. If it falls while the trained one rises, the run "
                    "pauses and says so.",
                ),
                expert(
                    io.Float.Input(
                        "cfg",
                        default=0.0,
                        min=0.0,
                        max=30.0,
                        step=0.1,
                        optional=True,
                        tooltip="Classifier-free guidance to draw with. 0 = what suits the model. Set it to 1 for a "
                        "distilled model (Turbo, Lightning) whose file name does not say so: its weights look like "
                        "its base model's. Other than 1 = twice the cost.",
                    )
                ),
                begin_from_input("lora_name"),
            ],
            outputs=[
                TUNED,
                io.String.Output(display_name="path", tooltip="Where the LoRA is."),
                io.Image.Output(display_name="dashboard"),
                io.String.Output(display_name="status"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora_name, begin_from=NOTHING):
        return super().validate_inputs(lora_name)  # a checkpoint that is gone is explained when the node runs

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        reward_model,
        prompts,
        lora_name,
        preset,
        iterations,
        minutes=0.0,
        size=0,
        judge=None,
        cfg=0.0,
        begin_from=NOTHING,
    ) -> io.NodeOutput:
        return train_simply(
            cls,
            model,
            clip,
            vae,
            prompts,
            lora_name,
            preset,
            lambda policy, fitting: (reward_model, policy.run.iteration + iterations),
            minutes=minutes,
            size=size,
            judge=judge,
            cfg=cfg,
            begin_from=begin_from,
        )


def train_simply(
    node,
    model,
    clip,
    vae,
    prompts,
    lora_name,
    preset,
    wanted,
    *,
    size=0,
    cfg=0.0,
    begin_from=NOTHING,
    go_on="Run learns on.",
    **more,
):
    """What a node that chooses everything by itself does: the policy, the training, the LoRA; saved also on Stop.

    wanted(policy, fitting) -> (reward, iterations), both as `train` takes them. Returns the outputs model, path,
    picture and status.
    """
    fitting, (speed, anchor) = fit(model, cfg), PRESETS[preset]
    listed = collect([prompts])
    listed = split(listed, min(MOST_HELD_OUT, len(listed) // 5), 0)
    if listed.held_out:  # each several times, each time from other noise: four pictures would tell nothing for sure
        listed = dataclasses.replace(listed, held_out=listed.held_out * -(-CHECKED // len(listed.held_out)))
    policy = PolicyNode.execute(
        model,
        lora_name,
        fitting.rank,
        2.0 * fitting.rank,
        fitting.targets,
        checkpointing=fitting.checkpointing,
        begin_from=begin_from,
    ).args[0]
    with torch.inference_mode(False), torch.no_grad():
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", fitting.steps)
        latent_image = empty_latent(model, size or fitting.size)
        negative = clip.encode_from_tokens_scheduled(clip.tokenize("")) if fitting.cfg != 1 else None
    reward, iterations = wanted(policy, fitting)
    settings = {
        "per_iteration": min(PER_ITERATION, len(listed.train)),
        "learning_rate": fitting.learning_rate * speed,
        "seed": 1,
        "shape": TreeShape(branching=4, depth=2, ratio=0.3, tail=fitting.tail),
        "noise": NoiseSchedule("cps", 0.7),
        "objective": (Objective(loss="regression", anchor=anchor, step_weight="layer"), False),
        "negative": negative,
        "cfg": fitting.cfg,
        "evaluate_every": 10 if listed.held_out else 0,
        "ema": 0.97,
        "go_on": go_on,
        **more,
    }
    try:
        trained = train(node, policy, clip, vae, listed, sigmas, latent_image, reward, iterations, **settings)
    finally:  # also when it is stopped
        if policy.run.iteration:
            path = SaveTreeLoraNode.execute([policy], [lora_name], listed.train).args[0]
    *_, picture, status = trained.args
    ended, _, following = status.partition("\n")
    said = " ".join(filter(None, (ended, f"Saved as {Path(path).name}.", merging(model)))) + f"\n{following}"
    return io.NodeOutput(tuned(policy), path, picture, said, ui={**trained.ui, "text": (said,)})


def tuned(policy):
    """A MODEL with the policy's LoRA on it: exactly what was trained where this ComfyUI can, and else merged."""
    load = getattr(comfy.sd, "load_bypass_lora_for_models", comfy.sd.load_lora_for_models)
    return load(policy.policy.model, None, policy.run.lora(averaged=True), 1.0, 0.0)[0]
