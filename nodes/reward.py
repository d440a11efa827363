"""Reward models, and scoring images with them."""
from dataclasses import dataclass

import torch
from comfy_api.latest import io

from ..core import plot
from ..core.rewards.measure import KINDS, Measure
from .schema import RewardModel, Rewards, expert, schema


@dataclass
class Scores:
    """What flows along a REWARDS wire: per-image scores by reward name, and the images for the tree's picture."""
    values: dict[str, torch.Tensor]  # each [B]
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
            values = reward_model.score(images, per_image).float().cpu()
        if values.shape != (len(images),):
            raise ValueError(f"The reward '{reward_model.name}' gave {tuple(values.shape)} scores for {len(images)} images: it must give one per image.")
        text = table({reward_model.name: values}, per_image)
        sheet = plot.to_tensor(plot.score_sheet(images, values, per_image, reward_model.name))
        return io.NodeOutput(Scores({reward_model.name: values}, per_image, images), text, sheet, ui={"text": (text,)})


def table(values: dict[str, torch.Tensor], prompts: list[str]) -> str:
    """Scores per image, best first, and their mean and spread."""
    rows = []
    for name, scores in values.items():
        rows.append(f"{name}: mean {scores.mean():.4f}, std {scores.std(correction=0):.4f}, best {scores.max():.4f} (image {int(scores.argmax())})")
        for i in scores.argsort(descending=True).tolist():
            rows.append(f"{scores[i]:9.4f}  image {i:3d}  {prompts[i][:60]}")
    return "\n".join(rows)
