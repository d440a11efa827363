"""The Trainer: a whole run in one node."""

import json

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..core.hosts.comfy_host import ComfyHost
from ..core.method.advantage import ESTIMATORS, WEIGHTS
from ..core.method.noise import NoiseSchedule
from ..core.method.objective import Objective
from ..core.method.tree import TreeShape
from ..core.pictures import plot
from ..core.pictures.theme import DARK
from ..core.runs.trainer import DECAYS, Settings, Trainer, refuse_unheld
from .advantages import SHAPING
from .export import export
from .live import Live
from .policy import LivePolicy
from .sample import RETAIN_SHARE
from .schema import (
    LoraSocket,
    NoiseSocket,
    ObjectiveSocket,
    PolicySocket,
    PromptsSocket,
    RewardSocket,
    ShapeSocket,
    expert,
    micro_batch_input,
    schema,
)
from .update import STEP, own_images

ALIASES = [  # what artists look for when they want to train
    "train lora",
    "lora training",
    "flux train",
    "sd3 train",
    "fine-tune",
    "teach",
    "learn",
    "taste",
    "style",
    "preference",
    "reinforcement learning",
    "rl",
    "online rl",
    "rlhf",
    "grpo",
    "dpo",
]


class TrainerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOTrainer",
            "TreeRPO Trainer",
            description="Trains the policy for many iterations, with a live picture: sample a tree, score it, learn, "
            "again. Stop it at any time and queue again to go on; the run lives in output/treerpo/<run name>/, also "
            "after a restart.",
            search_aliases=ALIASES,
            is_output_node=True,
            inputs=[
                PolicySocket.Input("policy", lazy=True),
                io.Clip.Input("clip", lazy=True),
                io.Vae.Input("vae", lazy=True),
                PromptsSocket.Input("prompts", tooltip="From Prompt List."),
                io.Sigmas.Input(
                    "sigmas",
                    lazy=True,
                    tooltip="From BasicScheduler with the base model, denoise 1. 10 steps are enough for training.",
                ),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent of the size to train at. Train at the size you sample at."
                ),
                RewardSocket.Input("reward_model", lazy=True),
                io.Int.Input(
                    "iterations",
                    default=100,
                    min=1,
                    max=1000000,
                    tooltip="Iterations of the run in all, those before this queue run included. Raise it to train on.",
                ),
                io.Int.Input(
                    "per_iteration",
                    default=1,
                    min=0,
                    max=1024,
                    tooltip="Prompts per iteration. Higher = steadier updates, slower iterations. 0 = all.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="Higher = learns faster, then falls apart. 1e-4 to 3e-4 for FLUX and SD3 LoRAs, 5e-4 to "
                    "1e-3 for the tiny models.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Same seed = same run.",
                ),
                ShapeSocket.Input(
                    "shape",
                    optional=True,
                    tooltip="From Tree Shape. Without it: branching 3, depth 3, random window, tail 0.4.",
                ),
                NoiseSocket.Input(
                    "noise", optional=True, tooltip="From Depth Noise Schedule. Without it: cps, 0.7 at every layer."
                ),
                ObjectiveSocket.Input("objective", optional=True, tooltip="From Training Objective. Without it: GRPO."),
                RewardSocket.Input(
                    "judge",
                    optional=True,
                    lazy=True,
                    tooltip="A second reward that is not trained on. If it falls while the trained reward rises, the "
                    "reward is being exploited; the run then pauses and says so.",
                ),
                io.Conditioning.Input("negative", optional=True, lazy=True, tooltip="Only used when cfg is not 1."),
                io.Latent.Input(
                    "images",
                    optional=True,
                    lazy=True,
                    tooltip="For an objective with target = images: encoded images of the training size, one for all "
                    "prompts.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip="Classifier-free guidance while training. 1 = off, half the cost and the safest; FLUX "
                    "uses its own guidance instead.",
                ),
                io.Int.Input(
                    "evaluate_every",
                    default=0,
                    min=0,
                    max=100000,
                    optional=True,
                    tooltip="Iterations between two looks at the held-out prompts, on fixed noise. Lower = notices "
                    "sooner when something goes wrong, costs more. 0 = never.",
                ),
                io.Combo.Input(
                    "on_alarm",
                    options=["pause", "warn", "off"],
                    default="pause",
                    optional=True,
                    tooltip="When the health watch finds something wrong: pause the run and say why, only say it, or "
                    "do not look.",
                ),
                io.Float.Input(
                    "ema",
                    default=0.0,
                    min=0.0,
                    max=0.9999,
                    step=0.01,
                    optional=True,
                    tooltip="Moving average of the LoRA, used for evaluation and for the LoRA that comes out. Higher "
                    "= steadier, slower; 0.9 is usual. 0 = off.",
                ),
            ]
            + [expert(field) for field in _advanced()],
            outputs=[
                PolicySocket.Output(display_name="policy"),
                LoraSocket.Output(display_name="lora"),
                io.Custom("LOSS_MAP").Output(display_name="loss"),
                io.String.Output(display_name="history", tooltip="metrics.jsonl: one line per iteration."),
                io.Image.Output(display_name="dashboard"),
                io.String.Output(display_name="status"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        return float("nan")  # a new NaN each time: the run moves on between queue runs

    @classmethod
    def check_lazy_status(cls, prompts, evaluate_every=0, **others):
        """What is wrong with the settings is said before any model is loaded: those inputs are lazy."""
        if evaluate_every:
            refuse_unheld(prompts)
        return [name for name, value in others.items() if value is None]

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return train(cls, **inputs)


def train(
    node,
    policy,
    clip,
    vae,
    prompts,
    sigmas,
    latent_image,
    reward_model,
    iterations,
    per_iteration,
    learning_rate,
    seed,
    shape=None,
    noise=None,
    objective=None,
    judge=None,
    negative=None,
    images=None,
    cfg=1.0,
    free_others=False,
    tensorboard=False,
    retain_graphs=False,
    minutes=0.0,
    go_on="Raise iterations to learn on.",
    **more,
) -> io.NodeOutput:
    """The run of `policy`, trained; node: the class that is running. minutes: 0 = until it has its iterations.

    iterations: a number, or a function that tells it anew after each. go_on: what to do when it has them.
    """
    run, foreseen = policy.run, iterations if callable(iterations) else lambda: iterations
    goal, only_good = objective or (Objective(), False)
    with torch.inference_mode(False), torch.no_grad():
        settings = Settings(
            per_iteration=per_iteration,
            seed=seed,
            learning_rate=learning_rate,
            only_good=only_good,
            retain_share=RETAIN_SHARE if retain_graphs else 0.0,
            **more,
        )
        host = ComfyHost(policy.policy, clip, vae, sigmas, latent_image, cfg, negative, free_others)
        trainer = Trainer(
            run,
            host,
            prompts,
            shape or TreeShape(tail=0.4),
            noise or NoiseSchedule("cps", 0.7),
            goal,
            reward_model,
            settings,
            judge=judge,
            images=(lambda velocity, forest: own_images(velocity, images, forest))
            if goal.target == "images" and goal.sft
            else None,
            check=comfy.model_management.throw_exception_if_processing_interrupted,
        )
        live = Live(node.hidden.unique_id, run, foreseen, tensorboard)
        trainer.progress = live.progress
        with live.to_its_end():
            live.begin()
            if run.iteration < foreseen():
                host.encode([*prompts.train, *(prompts.held_out if settings.evaluate_every else [])])
                export(run, host, prompts, trainer.shape, trainer.schedule, goal, settings, reward_model, judge,
                       foreseen())  # fmt: skip
            ended = trainer.train(foreseen, live.report, minutes)
        changed = [f"changed: {change}" for change in trainer.changes]
        status = live.end("; ".join(filter(None, [ended, *changed, trainer.doubts])), trainer.watch, go_on)
    picture = plot.to_tensor(live.picture(DARK))
    history = "".join(json.dumps(row) + "\n" for row in run.metrics)
    loss = {"loss": [row["loss"] for row in run.metrics if "loss" in row]}
    return io.NodeOutput(
        LivePolicy(policy.policy, run),
        run.lora(averaged=True),
        loss,
        history,
        picture,
        status,
        ui={**ui.PreviewImage(picture, cls=node).as_dict(), "text": (status,)},
    )


def _advanced() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "shuffle",
            default=True,
            optional=True,
            tooltip="Prompts in a new order each time through the list. Off = always in the list's order.",
        ),
        io.Combo.Input(
            "estimator",
            options=list(ESTIMATORS),
            default="treegrpo",
            optional=True,
            tooltip="How credit goes up the tree. treegrpo: average of the children, weighted by their probability. "
            "branchgrpo: compared within each layer. trajectory: as plain GRPO.",
        ),
        io.Combo.Input(
            "weights",
            options=list(WEIGHTS),
            default="mean-logprob",
            optional=True,
            tooltip="treegrpo only: how children are weighted.",
        ),
        io.Float.Input(
            "advantage_clip",
            default=5.0,
            min=0.1,
            max=100.0,
            step=0.1,
            optional=True,
            tooltip="Largest advantage of a single image. Lower = outliers count less.",
        ),
        *STEP,
        io.Combo.Input(
            "optimizer",
            options=["adamw", "adamw8bit"],
            default="adamw",
            optional=True,
            tooltip="adamw8bit needs the package bitsandbytes and an NVIDIA GPU; it saves three quarters of the "
            "optimizer's memory.",
        ),
        micro_batch_input(
            "Latents per model call. Lower = less memory. 0 = all at once; halves by itself when memory runs out.",
        ),
        io.Boolean.Input(
            "retain_graphs",
            default=False,
            optional=True,
            tooltip="Keep what the update needs while sampling: the same result, faster. Needs memory, least with "
            "checkpointing on in Tree Policy; where it does not fit, nothing is kept.",
        ),
        io.Boolean.Input(
            "free_others",
            default=False,
            optional=True,
            tooltip="Move text encoder, VAE and reward models off the GPU whenever the policy samples or learns. For "
            "small cards; costs time.",
        ),
        io.Boolean.Input(
            "new_noise",
            default=True,
            optional=True,
            tooltip="Each iteration draws new noise. Off = learns faster by heart, generalises worse.",
        ),
        io.Int.Input(
            "save_every",
            default=1,
            min=1,
            max=100000,
            optional=True,
            tooltip="Iterations between two saved states. Higher = less writing; after a crash so many iterations are "
            "done again.",
        ),
        io.Int.Input(
            "keep_every",
            default=20,
            min=1,
            max=100000,
            optional=True,
            tooltip="Iterations between two checkpoints that are kept to go back to.",
        ),
        io.Int.Input(
            "keep_last",
            default=3,
            min=0,
            max=1000,
            optional=True,
            tooltip="How many such checkpoints are kept. Higher = more disk space.",
        ),
        io.Int.Input(
            "most_skips",
            default=5,
            min=1,
            max=1000,
            optional=True,
            tooltip="Iterations in a row in which nothing could be learned (numbers that are not finite), before the "
            "run stops.",
        ),
        io.Boolean.Input(
            "tensorboard",
            default=False,
            optional=True,
            tooltip="Also write the metrics for TensorBoard, into the run's folder. Needs the package tensorboard.",
        ),
        *SHAPING,
        io.Combo.Input(
            "decay",
            options=list(DECAYS),
            default="none",
            optional=True,
            tooltip="cosine: the learning rate falls to 0 at the last of the iterations, so that what was learned "
            "settles. Raise iterations later and it is as high again as there. none: it stays.",
        ),
        io.Float.Input(
            "replay",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.05,
            round=False,
            optional=True,
            tooltip="How strongly a prompt's first good pictures are imitated each time it comes up, so that what the "
            "reward does not ask for stays varied. 0 = off; 0.5 is a start. Costs a pass for each picture.",
        ),
        io.Float.Input(
            "replay_from",
            default=0.0,
            min=-1000.0,
            max=1000.0,
            step=0.01,
            round=False,
            optional=True,
            tooltip="For replay: the reward from which on a picture is worth remembering. Take what only the "
            "best pictures of the first iterations reach.",
        ),
        io.Int.Input(
            "replay_pictures",
            default=4,
            min=1,
            max=64,
            optional=True,
            tooltip="For replay: pictures remembered per prompt. More = more variety; they are saved with the run.",
        ),
    ]
