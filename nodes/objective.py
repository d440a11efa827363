"""What the Trainer makes more likely."""

from comfy_api.latest import io

from ..core.method.objective import LEAF_WEIGHTS, RATIOS, STEP_WEIGHTS, TARGETS, Objective
from .schema import ObjectiveSocket, expert, schema

CLIPPING = [  # of both GRPO updates and Training Objective
    expert(
        io.Float.Input(
            "clip_low",
            default=1e-4,
            min=1e-7,
            max=1.0,
            step=1e-6,
            round=False,
            optional=True,
            tooltip="How far one update may make a worse branch less likely, per latent element. Lower = more "
            "careful. Only matters with several inner updates. The usual 1e-4 is for 512x512; smaller latents need "
            "more (1e-2 for the tiny models).",
        )
    ),
    expert(
        io.Float.Input(
            "clip_high",
            default=1e-4,
            min=1e-7,
            max=1.0,
            step=1e-6,
            round=False,
            optional=True,
            tooltip="How far one update may make a better branch more likely, per latent element. Lower = more "
            "careful.",
        )
    ),
    expert(
        io.Float.Input(
            "sensitivity",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            optional=True,
            tooltip="Dynamic clip: widens the clip range of a branch with its reward. Higher = the best branches may "
            "change more. 0 = off. Dynamic-TreeRPO has it; the exact formula is not published, this one is our "
            "reading.",
        )
    ),
    expert(
        io.Combo.Input(
            "ratio",
            options=list(RATIOS),
            default="plain",
            optional=True,
            tooltip="guard = GRPO-Guard's normalised ratio: the same meaning of the clip range at every step. Needs a "
            "larger clip range.",
        )
    ),
]
STEP_WEIGHT = expert(  # of every update and Training Objective
    io.Combo.Input(
        "step_weight",
        options=list(STEP_WEIGHTS),
        default="none",
        optional=True,
        tooltip="How much each step of the window counts. none = every branch alike, so that late steps, which have "
        "more of them, count more; layer = every step alike; tau = more for noisier steps (TempFlow-GRPO); guard = "
        "more for small steps (GRPO-Guard); flash = Flash-GRPO's.",
    )
)
ETA = expert(
    io.Float.Input(
        "eta",
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.1,
        optional=True,
        tooltip="Tree regression: how far an update aims beyond what the policy did. Higher = pulls more against the "
        "anchor, and further with several inner updates.",
    )
)
ANCHOR = io.Float.Input(
    "anchor",
    default=0.05,
    min=0.0,
    max=1.0,
    step=0.01,
    optional=True,
    tooltip="Tree regression: how much every update pulls back towards the base model. Higher = prettier and more "
    "varied, but learns less. Above 0 costs one more forward per node.",
)
LEAF_WEIGHT = expert(
    io.Combo.Input(
        "leaf_weights",
        options=list(LEAF_WEIGHTS),
        default="group",
        optional=True,
        tooltip="Tree regression: an image counts by its advantage in its prompt's group, or only against the images "
        "of the same branch (node).",
    )
)
METHODS = ("GRPO", "LayerTuning-RL", "Tree Regression")


class ObjectiveNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOObjective",
            "Training Objective",
            description="What the Trainer makes more likely, and how carefully. Without this node it is GRPO with the "
            "usual settings.",
            search_aliases=["grpo", "layertuning-rl", "tree regression", "diffusionnft", "clip range", "kl", "loss"],
            inputs=[
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="GRPO",
                    tooltip="LayerTuning-RL adds Dynamic-TreeRPO's supervised term towards each prompt's best image "
                    "(its weights' formula is our reading). Tree Regression (ours) learns where the better images are "
                    "instead of which branch led there: faster on the tiny models.",
                ),
                io.Float.Input(
                    "kl",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.001,
                    tooltip="Pulls the policy back towards the base model. Higher = stays closer. Above 0 costs one "
                    "more forward per node.",
                ),
                io.Float.Input(
                    "lambda",
                    default=0.001,
                    min=0.0,
                    max=100.0,
                    step=0.0001,
                    round=False,
                    optional=True,
                    tooltip="LayerTuning-RL: weight of the supervised term. Higher = imitates the best image more, "
                    "explores less.",
                ),
                io.Combo.Input(
                    "target",
                    options=list(TARGETS),
                    default="best-path",
                    optional=True,
                    tooltip="LayerTuning-RL: best-path (published), best-leaf (ours), or images: your own, connected "
                    "to the Trainer.",
                ),
                expert(
                    io.Boolean.Input(
                        "only_good",
                        default=True,
                        optional=True,
                        tooltip="LayerTuning-RL: imitate a prompt's best image only if it is as good as the best "
                        "images were on average so far.",
                    )
                ),
                *CLIPPING,
                STEP_WEIGHT,
                ANCHOR,
                ETA,
                LEAF_WEIGHT,
            ],
            outputs=[ObjectiveSocket.Output(display_name="objective")],
        )

    @classmethod
    def execute(
        cls,
        method,
        kl,
        target="best-path",
        only_good=True,
        clip_low=1e-4,
        clip_high=1e-4,
        sensitivity=0.0,
        ratio="plain",
        step_weight="none",
        anchor=0.05,
        eta=1.0,
        leaf_weights="group",
        **named,
    ) -> io.NodeOutput:
        sft = named.get("lambda", 0.001) if method == "LayerTuning-RL" else 0.0
        goal = Objective(clip_low, clip_high, sensitivity, ratio, step_weight, kl, sft, target)
        if method == "Tree Regression":
            goal = Objective(step_weight=step_weight, kl=kl, **regression(anchor, eta, leaf_weights))
        return io.NodeOutput((goal, only_good and sft > 0))


def regression(anchor: float, eta: float, leaf_weights: str) -> dict:
    """Fields of Objective for tree regression."""
    return {"loss": "regression", "anchor": anchor, "eta": eta, "leaf_weights": leaf_weights}
