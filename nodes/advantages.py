"""From scores to advantages: which branches of the tree were worth taking."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from comfy_api.latest import io, ui

from ..core.method.advantage import ESTIMATORS, SHAPINGS, WEIGHTS, check_rewards, total_reward
from ..core.method.iteration import Credit, credit, score
from ..core.pictures import plot
from ..core.pictures.theme import DARK
from .schema import AdvantagesSocket, ScoresSocket, TreeSocket, expert, schema


@dataclass
class TreeCredit:
    """What flows along an ADVANTAGES wire: who earned what, and the picture of it."""

    credit: Credit
    layers: list[torch.Tensor]  # advantages of all edges of the tree, as Credit.edges gives them
    picture: Callable  # draws the tree as a PIL image


ESTIMATOR = expert(
    io.Combo.Input(
        "estimator",
        options=list(ESTIMATORS),
        default="treegrpo",
        optional=True,
        tooltip="treegrpo: average of the children, weighted by their probability. branchgrpo: compared within each "
        "layer. trajectory: as plain GRPO.",
    )
)

SHAPING = [  # also the Trainer's
    expert(
        io.Combo.Input(
            "shaping",
            options=list(SHAPINGS),
            default="z-score",
            optional=True,
            tooltip="How rewards become advantages. z-score: every prompt counts alike. slas: what stands out counts "
            "more, and so do prompts whose images differ more (SLAS, arXiv 2605.10937, our reading of its summary).",
        )
    ),
    expert(
        io.Float.Input(
            "gamma",
            default=0.5,
            min=0.0,
            max=5.0,
            step=0.1,
            optional=True,
            tooltip="slas only. Higher = the images that stand out count more. 0 = linear.",
        )
    ),
]


class AdvantagesNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOAdvantages",
            "Tree Advantages",
            description="Compares the images of each prompt with each other and hands the credit back up the tree: "
            "which branches were worth taking. The picture shows the tree with scores and advantages.",
            search_aliases=["grpo advantage", "credit assignment"],
            is_output_node=True,
            inputs=[
                TreeSocket.Input("tree"),
                ScoresSocket.Input("rewards"),
                ESTIMATOR,
                expert(
                    io.Combo.Input(
                        "weights",
                        options=list(WEIGHTS),
                        default="mean-logprob",
                        optional=True,
                        tooltip="treegrpo only: how children are weighted. mean-logprob is almost uniform, "
                        "sum-logprob picks one child.",
                    )
                ),
                expert(
                    io.Float.Input(
                        "clip",
                        default=5.0,
                        min=0.1,
                        max=100.0,
                        step=0.1,
                        optional=True,
                        tooltip="Largest advantage of a single image. Lower = outliers count less.",
                    )
                ),
                *SHAPING,
            ],
            outputs=[AdvantagesSocket.Output(display_name="advantages"), io.Image.Output(display_name="picture")],
        )

    @classmethod
    def execute(cls, tree, rewards, estimator="treegrpo", weights="mean-logprob", clip=5.0, **shaping) -> io.NodeOutput:
        forest = tree.forest
        with torch.inference_mode(False), torch.no_grad():
            for name, values in rewards.values.items():
                if len(values) != len(forest.leaves):
                    raise ValueError(
                        f"Reward '{name}' scored {len(values)} images, but the tree has {len(forest.leaves)} leaves: "
                        "decode and score all leaves of this tree, and nothing else."
                    )
            check_prompts(rewards.prompts, len(forest.prompts))
            # a person is looking: a reward that says nothing at all is an error here
            check_rewards(rewards.values, len(forest.prompts))
            found = score(rewards, forest)
            earned = credit(tree.sampled, found, estimator=estimator, weights=weights, clip=clip, **shaping)
            total = total_reward(found.values, found.weights)
            layers = earned.edges(forest)
            picture = partial(plot.tree_picture, forest, layers, total, rewards.images, rewards.prompts)
            image = plot.to_tensor(picture(theme=DARK))
        return io.NodeOutput(TreeCredit(earned, layers, picture), image, ui=ui.PreviewImage(image, cls=cls))


def check_prompts(texts: list[str], trees: int) -> None:
    """The images of one prompt's trees were scored for one prompt, and no list of prompts was taken for a prompt."""
    size = len(texts) // trees
    own = [set(texts[first * size : (first + 1) * size]) for first in range(trees)]
    together = trees > 1 and len(set(texts)) == 1 and "\n" in texts[0]
    if together or any(len(prompts) > 1 for prompts in own):
        raise ValueError(
            f"The images were scored for other prompts than those of the tree, which has {trees}: connect the output "
            "prompts of Tree Prompts straight to the node that scores them."
        )
