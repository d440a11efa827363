"""What the Trainer makes more likely."""

from dataclasses import replace

from comfy_api.latest import io

from ..core.method.objective import (
    LEAF_WEIGHTS,
    MATCHING,
    RATIOS,
    STATES,
    STEP_WEIGHTS,
    TARGETS,
    WEIGHTINGS,
    Objective,
)
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
TRUST = expert(
    io.Float.Input(
        "trust",
        default=0.0,
        min=0.0,
        max=10.0,
        step=1e-6,
        round=False,
        optional=True,
        tooltip="How far one update may go, higher = further. Softmax-TB and AWM: clip range of the ratio (published "
        "0.2 and 1). Flow-DPPO: KL per latent element from which on a branch no longer pulls (published 1e-5). 0 = as "
        "published.",
    )
)
BETA = expert(
    io.Float.Input(
        "beta",
        default=0.0,
        min=0.0,
        max=1000.0,
        step=0.1,
        optional=True,
        tooltip="Softmax-TB: how sharply the better images are preferred, higher = only the best count (published 15). "
        "DiffusionNFT: higher = closer to the old policy, lower = further from it (published 1, or 0.1). 0 = as "
        "published.",
    )
)
REFERENCE = expert(
    io.Float.Input(
        "reference",
        default=0.1,
        min=0.0,
        max=1000.0,
        step=0.01,
        optional=True,
        tooltip="Softmax-TB: holds an update to the policy that drew the tree, as TMPO's public code does. Higher = "
        "stays closer. Only matters with several inner updates.",
    )
)
MATCHED = [  # how DiffusionNFT, AWM and tree regression learn
    expert(
        io.Combo.Input(
            "states",
            options=list(STATES),
            default="auto",
            optional=True,
            tooltip="DiffusionNFT, AWM, Tree Regression, RAM: what they learn from. window = the tree's branching "
            "points; renoised = finished images with fresh noise, as DiffusionNFT and AWM are published; both. auto = "
            "renoised for these two, window for the others.",
        )
    ),
    expert(
        io.Int.Input(
            "per_image",
            default=1,
            min=1,
            max=64,
            optional=True,
            tooltip="States renoised: how often each image is learned from, at a random step each time. Higher = "
            "steadier, and costs a forward and backward more per image. Published: 9 of 10 steps (DiffusionNFT), 6 of "
            "14 (AWM).",
        )
    ),
    expert(
        io.Combo.Input(
            "weighting",
            options=list(WEIGHTINGS),
            default="ghuber",
            optional=True,
            tooltip="AWM: how errors count. ghuber = as in its published runs, large ones less; uniform = squared; t = "
            "squared, more for noisier states.",
        )
    ),
]
METHODS = {  # the method's name -> its loss
    "GRPO": "grpo",
    "LayerTuning-RL": "grpo",
    "Tree Regression": "regression",
    "RAM": "regression",
    "DiffusionNFT": "nft",
    "AWM": "awm",
    "Softmax-TB": "softmax_tb",
    "Flow-DPPO": "dppo",
}


class ObjectiveNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOObjective",
            "Training Objective",
            description="What the Trainer makes more likely, and how carefully. Without this node it is GRPO with the "
            "usual settings.",
            search_aliases=[
                "grpo",
                "layertuning-rl",
                "tree regression",
                "ram",
                "tmpo",
                "softmax-tb",
                "flow-dppo",
                "loss",
            ],
            inputs=[
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="GRPO",
                    tooltip="LayerTuning-RL adds Dynamic-TreeRPO's supervised term towards each prompt's best image "
                    "(its weights' formula is our reading). Tree Regression (ours) learns where the better images are "
                    "instead of which branch led there: faster on the tiny models. RAM is the same from the base "
                    "model's velocity, anchor 1 (arXiv 2605.10759, inferred from its summary). DiffusionNFT (arXiv "
                    "2509.16117) and AWM (2509.25050) learn from the finished images with fresh noise. Softmax-TB is "
                    "TMPO's, split over the branches. Flow-DPPO is GRPO with a KL limit in place of the clip.",
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
                TRUST,
                BETA,
                REFERENCE,
                *MATCHED,
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
        trust=0.0,
        beta=0.0,
        reference=0.1,
        states="auto",
        per_image=1,
        weighting="ghuber",
        **named,
    ) -> io.NodeOutput:
        sft = named.get("lambda", 0.001) if method == "LayerTuning-RL" else 0.0
        loss, own = METHODS[method], {}
        if loss == "grpo":
            own = {"clip_low": clip_low, "clip_high": clip_high, "sensitivity": sensitivity}
        elif loss == "regression":
            own = regression(1.0 if method == "RAM" else anchor, eta, leaf_weights)
        else:
            own = {"trust": trust, "beta": beta, "reference": reference}
        if loss in MATCHING:
            own |= {"states": states, "per_image": per_image, "weighting": weighting}
        goal = Objective(**{"loss": loss, "ratio": ratio, "step_weight": step_weight, "kl": kl, **own})
        if sft:
            goal = replace(goal, sft=sft, target=target)
        return io.NodeOutput((goal, only_good and sft > 0))


def regression(anchor: float, eta: float, leaf_weights: str) -> dict:
    """Fields of Objective for tree regression."""
    return {"loss": "regression", "anchor": anchor, "eta": eta, "leaf_weights": leaf_weights}
