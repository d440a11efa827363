"""Reward models, and scoring images with them."""
from dataclasses import dataclass

import torch
from comfy_api.latest import io

from ..core import plot
from ..core.rewards.combine import combine, scores
from ..core.rewards.measure import KINDS, Measure
from .schema import RewardModel, Rewards, expert, schema


@dataclass
class Scores:
    """What flows along a REWARDS wire: per-image scores by reward name, and the images for the tree's picture."""
    values: dict[str, torch.Tensor]  # each [B]
    weights: dict[str, float]        # by reward name
    prompts: list[str]               # one per image
    images: torch.Tensor             # [B, H, W, 3] in 0..1


class ImageMeasure(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOMeasure", "Image Measure",
            description="A reward that is measured in the picture itself, without any model: for trying a graph. Foreground size is the share of "
                        "pixels that differ from the border's median colour.",
            search_aliases=["reward", "brightness", "colour reward"],
            inputs=[
                io.Combo.Input("measure", options=list(KINDS), default="foreground size", tooltip="What to measure."),
                io.Combo.Input("direction", options=["more", "less"], default="more", tooltip="Whether more or less of it is better."),
                expert(io.String.Input("colour", default="#ff0000", optional=True,
                                       tooltip="For measure = colour: the colour the picture's mean should come close to, as #rrggbb.")),
                expert(io.Float.Input("threshold", default=0.25, min=0.01, max=1.7, step=0.01, optional=True,
                                      tooltip="For foreground size: how far a pixel must be from the background to count. Higher = only strong differences.")),
            ],
            outputs=[RewardModel.Output(display_name="reward_model")])

    @classmethod
    def execute(cls, measure, direction, colour="#ff0000", threshold=0.25) -> io.NodeOutput:
        return io.NodeOutput(Measure(measure, rgb(colour), threshold, 1.0 if direction == "more" else -1.0))


def rgb(text: str) -> tuple[float, float, float]:
    digits = text.strip().lstrip("#")
    try:
        if len(digits) != 6:
            raise ValueError
        return tuple(int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4))
    except ValueError:
        raise ValueError(f"'{text}' is not a colour: write it as #rrggbb, such as #ff8800.") from None


class CombineRewards(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        def weight(name):
            return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.05,
                                  tooltip="Higher = counts more. Only the proportion matters while learning; below 0 = the less, the better.")
        return schema(
            "TreeRPOCombine", "Combine Rewards",
            description="Two rewards as one; chain it for more. While learning, each is first compared within its prompt's group on its own scale "
                        "(z-score), then weighted, so that the one with the larger numbers does not win. TreeGRPO uses 0.8 HPSv2.1 + 0.2 CLIPScore.",
            search_aliases=["multi reward", "weighted reward"],
            inputs=[RewardModel.Input("reward_a"), weight("weight_a"), RewardModel.Input("reward_b"), weight("weight_b")],
            outputs=[RewardModel.Output(display_name="reward_model")])

    @classmethod
    def execute(cls, reward_a, weight_a, reward_b, weight_b) -> io.NodeOutput:
        return io.NodeOutput(combine(reward_a, weight_a, reward_b, weight_b))


class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOScore", "Score Images",
            description="Scores every image with a reward model. Works on any images; for training, connect the decoded leaves of Tree Sampler.",
            search_aliases=["reward", "aesthetic score", "rank images"],
            is_output_node=True,
            inputs=[
                RewardModel.Input("reward_model"),
                io.Image.Input("images"),
                io.String.Input("prompts", multiline=True, default="", tooltip="One prompt per line. With several, the images are taken in equal "
                                                                                "parts: the first part belongs to the first prompt, and so on."),
            ],
            outputs=[Rewards.Output(display_name="rewards"), io.String.Output(display_name="table"),
                     io.Image.Output(display_name="sheet", tooltip="The images with their scores, as one picture.")])

    @classmethod
    def execute(cls, reward_model, images, prompts) -> io.NodeOutput:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()] or [""]
        if len(images) % len(lines):
            raise ValueError(f"{len(images)} images cannot be shared out evenly over {len(lines)} prompts: give one prompt per line, each with as many images.")
        per_image = [line for line in lines for _ in range(len(images) // len(lines))]
        with torch.inference_mode(False), torch.no_grad():
            images = images.clone()
            values, weights = scores(reward_model, images, per_image)
        text = table(values, per_image)
        total = sum(weights[name] * values[name] for name in values)
        sheet = plot.to_tensor(plot.score_sheet(images, total, per_image, reward_model.name))
        return io.NodeOutput(Scores(values, weights, per_image, images), text, sheet, ui={"text": (text,)})


def table(values: dict[str, torch.Tensor], prompts: list[str]) -> str:
    """Scores per image, best first, and their mean and spread."""
    rows = []
    for name, found in values.items():
        rows.append(f"{name}: mean {found.mean():.4f}, std {found.std(correction=0):.4f}, best {found.max():.4f} (image {int(found.argmax())})")
        for i in found.argsort(descending=True).tolist():
            rows.append(f"{found[i]:9.4f}  image {i:3d}  {prompts[i][:60]}")
    return "\n".join(rows)
