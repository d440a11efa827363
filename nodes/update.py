"""From advantages to an updated policy."""

import math
import time
from dataclasses import asdict

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..core.hosts.comfy_host import refuse_dropped
from ..core.method.iteration import learn
from ..core.method.memory import MicroBatch
from ..core.method.objective import TARGETS, Objective
from ..core.pictures import plot
from ..core.pictures.curve import reward_curve
from ..core.pictures.theme import DARK
from ..core.runs.health import course
from .objective import ANCHOR, CLIPPING, ETA, LEAF_WEIGHT, STEP_WEIGHT, regression
from .policy import LivePolicy
from .schema import AdvantagesSocket, ObjectiveSocket, PolicySocket, TreeSocket, expert, micro_batch_input, schema

KEEP_EVERY = 5  # iterations between two looks at whether best/ is due

# Inputs that the update nodes share.
_WIRES = [PolicySocket.Input("policy"), TreeSocket.Input("tree"), AdvantagesSocket.Input("advantages")]
_RATE = io.Float.Input(
    "learning_rate",
    default=3e-4,
    min=0.0,
    max=1.0,
    step=1e-6,
    round=False,
    tooltip="Higher = learns faster, then falls apart. 1e-4 to 3e-4 for FLUX and SD3 LoRAs, 1e-3 for the tiny models.",
)
STEP = [  # also the Trainer's
    expert(
        io.Float.Input(
            "max_grad_norm",
            default=1.0,
            min=0.0,
            max=1000.0,
            step=0.1,
            optional=True,
            tooltip="Gradients longer than this are shortened to it. Lower = more careful. 0 = off.",
        )
    ),
    expert(
        io.Float.Input(
            "weight_decay",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            tooltip="Pulls the LoRA towards zero. Higher = stays closer to the base model. TreeGRPO uses 0.01.",
        )
    ),
    expert(
        io.Int.Input(
            "inner_updates",
            default=1,
            min=1,
            max=32,
            optional=True,
            tooltip="Optimizer steps on the same trees. More = learns more from each tree, but clips more and can "
            "over-fit it.",
        )
    ),
]
_MICRO_BATCH = expert(
    micro_batch_input(
        "Latents per forward and backward pass. Lower = less memory. 0 = as Tree Sampler.",
    )
)
_EXPERT = [
    *CLIPPING,
    STEP_WEIGHT,
    expert(
        io.Float.Input(
            "kl",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=0.001,
            optional=True,
            tooltip="Pulls the policy back towards the base model. Higher = stays closer. Above 0 costs one more "
            "forward per node.",
        )
    ),
    *STEP,
    _MICRO_BATCH,
]
_OUTPUTS = [
    PolicySocket.Output(display_name="policy"),
    io.String.Output(display_name="metrics"),
    io.Image.Output(display_name="curve"),
]
_SAVED = "After every update the run is saved in output/treerpo/<run name>/."


class UpdateNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOUpdate",
            "GRPO Update",
            description="One step of learning: makes the better branches of the tree more likely. Queue the graph "
            f"again for the next iteration; Run (Instant) trains on and on. {_SAVED}",
            search_aliases=["grpo", "rlhf", "train", "optimizer"],
            is_output_node=True,
            inputs=[
                *_WIRES,
                _RATE,
                *_EXPERT,
                ObjectiveSocket.Input(
                    "objective",
                    optional=True,
                    tooltip="From Training Objective: another loss than GRPO, in place of the clip ranges, ratio, "
                    "step_weight and kl of this node.",
                ),
            ],
            outputs=_OUTPUTS,
        )

    @classmethod
    def execute(cls, policy, tree, advantages, learning_rate, objective=None, **settings) -> io.NodeOutput:
        if objective is not None:
            goal, settings["only_good"] = objective
            if goal.sft and goal.target == "images":
                raise ValueError(
                    "An objective with the target 'images' needs your own images: use LayerTuning-RL Update, or "
                    "another target."
                )
            settings |= asdict(goal)
        return update_policy(cls, policy, tree, advantages, learning_rate, **settings)


class LayerTuningNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOLayerTuning",
            "LayerTuning-RL Update",
            description="GRPO Update with Dynamic-TreeRPO's supervised term: every node of the window also learns to "
            "go where the best image of its prompt came from, the more the worse it did. Published are the term "
            "itself, its coefficient lambda, the best-path target and that the weights are dynamic; the weights' "
            f"exact formula and the other targets are ours. {_SAVED}",
            search_aliases=["dynamic-treerpo", "sft", "progress reward", "grpo"],
            is_output_node=True,
            inputs=[
                *_WIRES,
                _RATE,
                io.Float.Input(
                    "lambda",
                    default=0.001,
                    min=0.0,
                    max=100.0,
                    step=0.0001,
                    round=False,
                    tooltip="Weight of the supervised term. Higher = imitates the best image more, explores less; 0.1 "
                    "already stops the tiny models from improving. 0 = plain GRPO Update.",
                ),
                io.Combo.Input(
                    "target",
                    options=list(TARGETS),
                    default="best-path",
                    tooltip="best-path (published): the velocity on the way to the best image. best-leaf (ours): the "
                    "velocity from each node's own state straight to the best image. images (ours): to your own "
                    "images.",
                ),
                io.Latent.Input(
                    "images",
                    optional=True,
                    tooltip="For target = images: encoded images of the same size, one per prompt or one for all.",
                ),
                expert(
                    io.Boolean.Input(
                        "only_good",
                        default=True,
                        optional=True,
                        tooltip="Imitate a prompt's best image only if it is at least as good as the best images were "
                        "on average so far. Off = always: a bad group then imitates the best of the worst.",
                    )
                ),
                *_EXPERT,
            ],
            outputs=_OUTPUTS,
        )

    @classmethod
    def execute(cls, policy, tree, advantages, learning_rate, only_good=True, **settings) -> io.NodeOutput:
        sft = settings.pop("lambda")
        return update_policy(cls, policy, tree, advantages, learning_rate, only_good=only_good, sft=sft, **settings)


class RegressionNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPORegression",
            "Tree Regression Update",
            description="One step of learning without trajectories (ours): from every branching point of the tree, the "
            "velocity moves towards its better images and away from its worse ones, by how good each is. Needs no clip "
            f"range, and learned faster than GRPO Update on the tiny models. {_SAVED}",
            search_aliases=["diffusionnft", "awm", "ram", "forward process", "train", "grpo"],
            is_output_node=True,
            inputs=[*_WIRES, _RATE, ANCHOR, ETA, LEAF_WEIGHT, STEP_WEIGHT, *STEP, _MICRO_BATCH],
            outputs=_OUTPUTS,
        )

    @classmethod
    def execute(
        cls, policy, tree, advantages, learning_rate, anchor=0.05, eta=1.0, leaf_weights="group", **settings
    ) -> io.NodeOutput:
        goal = regression(anchor, eta, leaf_weights)
        return update_policy(cls, policy, tree, advantages, learning_rate, **goal, **settings)


def update_policy(
    cls,
    policy,
    tree,
    advantages,
    learning_rate,
    *,
    images=None,
    only_good=False,
    max_grad_norm=1.0,
    weight_decay=0.0,
    inner_updates=1,
    micro_batch=0,
    **objective,
) -> io.NodeOutput:
    """What all update nodes do: one update of the policy, one row of metrics, the run on disk.

    objective: fields of Objective; those that a graph does not name have its defaults.
    """
    began, goal = time.perf_counter(), Objective(**objective)
    sampled, run = tree.sampled, policy.run
    batch = MicroBatch(micro_batch) if micro_batch else tree.micro_batch
    optimizer = run.adamw(learning_rate, weight_decay=weight_decay)
    shape = sampled.forest.leaves.shape[1:]
    session = policy.policy.session(
        tree.positive,
        tree.negative,
        tree.cfg,
        shape=shape,
        sigmas=sampled.forest.sigmas,
        memory_batch=batch.size or None,
    )
    with run.training(), session as velocity:
        row = learn(
            velocity,
            sampled,
            advantages.credit,
            optimizer,
            goal,
            only_good=only_good,
            history=run.metrics,
            images=own_images(velocity, images, sampled.forest),
            ema=run.average(),
            micro_batch=batch,
            max_grad_norm=max_grad_norm,
            inner_updates=inner_updates,
            check=comfy.model_management.throw_exception_if_processing_interrupted,
        )
        now = time.perf_counter()
        row |= {"seconds": now - tree.began, "seconds/rollout": tree.seconds, "seconds/update": now - began}
        run.commit(row, lambda: {"reward_curve.png": reward_curve(run.metrics), "tree.png": advantages.picture()})
        said = keep_best(run)
    row, image = run.metrics[-1], plot.to_tensor(reward_curve(run.metrics, theme=DARK))
    shown = ("reward", "reward_std", "ratio_mean", "clip_frac", "grad_norm", "forwards", "seconds")
    text = f"iteration {run.iteration}: " + ", ".join(f"{key} {row[key]:.4g}" for key in shown if key in row)
    text = f"{said} ({text})" if said else text
    return io.NodeOutput(
        LivePolicy(policy.policy, run), text, image, ui={**ui.PreviewImage(image, cls=cls).as_dict(), "text": (text,)}
    )


def keep_best(run) -> str | None:
    """Set the state aside as best/ while the reward still rises; a sentence when it no longer does.

    What a Trainer has judged on held-out prompts is not replaced by what the training prompts say.
    """
    newest, said = course([row.get("reward", math.nan) for row in run.metrics])
    if newest and run.iteration % KEEP_EVERY == 0 and "best" not in run.extra:
        run.keep(0, best=True)
    return said


def own_images(velocity, images: dict | None, forest) -> torch.Tensor | None:
    """The user's latents as the model sees them, one per prompt: [P, ...] of the leaves' shape."""
    if images is None:
        return None
    refuse_dropped(images, ignored=("batch_index",))
    samples, prompts = images["samples"], len(forest.prompts)
    if samples.dim() == 4 and forest.leaves.dim() == 5:
        samples = samples.unsqueeze(2)  # the time that Qwen-Image's latents have
    if samples.shape[1:] != forest.leaves.shape[1:] or len(samples) not in (1, prompts):
        raise ValueError(
            f"The images are {list(samples.shape)} as latents, but the leaves are {list(forest.leaves.shape[1:])} for "
            f"{prompts} prompts: encode images of the training size, one per prompt or one for all."
        )
    return velocity.process_in(samples).to(velocity.device).expand(prompts, *samples.shape[1:])
