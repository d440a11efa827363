"""Combining rewards, scoring images with them, and the images of a folder to score."""

from dataclasses import dataclass, field
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..core.files import read_text
from ..core.method.advantage import group_z, total_reward
from ..core.pictures import plot
from ..core.pictures.reading import pictures_in, read_picture
from ..core.pictures.theme import DARK
from ..core.rewards.combine import Scores, combine, scores
from ..core.rewards.self_test import doubts
from ..core.runs.prompts import PromptText, note_on, share
from .schema import RewardSocket, ScoresSocket, expert, growing, grown, schema

MOST_REWARDS = 16


@dataclass
class Scored(Scores):
    """What flows along a REWARDS wire: the scores, and the images for the tree's picture."""

    prompts: list[str] = field(default_factory=list)  # one per image
    images: torch.Tensor | list = ()  # [B, H, W, 3] in 0..1, or a list of [H, W, 3] of several sizes


class CombineRewardsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOCombine",
            "Combine Rewards",
            description="Several rewards as one. While learning, each is first compared within its prompt's group on "
            "its own scale (z-score), then weighted, so that the one with the larger numbers does not win. TreeGRPO "
            "uses 0.8 HPSv2.1 + 0.2 CLIPScore.",
            search_aliases=["multi reward", "weighted reward", "ensemble"],
            inputs=[
                growing(RewardSocket, "rewards", "reward", MOST_REWARDS),
                io.String.Input(
                    "weights",
                    default="1, 1",
                    tooltip="One number per reward, in their order, such as 0.8, 0.2. Higher = counts more; below 0 = "
                    "the less, the better. Empty = all count the same.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["z-score each, then weight", "raw weighted sum"],
                    default="z-score each, then weight",
                    tooltip="z-score: rewards of any scale count by their weights. raw: scores are added as they are, "
                    "so that the reward with the larger numbers counts more.",
                ),
            ],
            outputs=[RewardSocket.Output(display_name="reward_model")],
        )

    @classmethod
    def execute(cls, weights, mode, rewards=None, **inputs) -> io.NodeOutput:
        models = grown(rewards, inputs, "rewards", "reward", MOST_REWARDS)
        if not models:
            raise ValueError("Combine Rewards has no reward connected: connect at least one reward model.")
        return io.NodeOutput(combine(models, numbers(weights, len(models)), raw=mode == "raw weighted sum"))


def numbers(text: str, count: int) -> list[float]:
    """The weights a user wrote; all 1 when there are none."""
    words = text.replace(",", " ").replace(";", " ").split()
    try:
        found = [float(word) for word in words] or [1.0] * count
    except ValueError:
        raise ValueError(
            f"The weights '{text}' are not numbers: write one number per reward, such as 0.8, 0.2."
        ) from None
    if len(found) != count:
        raise ValueError(f"There are {len(found)} weights for {count} rewards: write one number per reward, or none.")
    return found


class ImageFolderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOFolder",
            "Image Folder",
            description="All pictures of a folder, one by one, in the order of their names: to score and rank them, "
            "no training involved.",
            search_aliases=["load images", "batch folder", "rank images"],
            inputs=[
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="A folder inside ComfyUI's input folder; output/... for one inside the output folder. "
                    "Empty = the input folder itself. Links to other folders work.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="For pictures without a text of their own. A file with the picture's name and the ending "
                    ".txt is that picture's prompt.",
                ),
                io.Int.Input(
                    "limit", default=256, min=1, max=100000, tooltip="At most so many pictures. Higher = more memory."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True),
                io.String.Output(display_name="names", is_output_list=True),
                io.String.Output(display_name="prompts", is_output_list=True),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, prompt, limit):
        try:
            return sorted((file.name, file.stat().st_mtime) for file in picture_folder(folder).iterdir())
        except (ValueError, OSError):
            return float("nan")

    @classmethod
    def execute(cls, folder, prompt, limit) -> io.NodeOutput:
        found, not_read = pictures_in(picture_folder(folder))
        if not found:
            raise ValueError(f"There is no picture in '{folder or 'the input folder'}'.")
        files = found[:limit]
        summary = f"{len(files)} pictures" + (
            f", {len(found) - limit} more left out: raise limit" if len(found) > limit else ""
        )
        if not_read:
            names = ", ".join(file.name for file in not_read[:3]) + (" ..." if len(not_read) > 3 else "")
            summary += f"\n{len(not_read)} pictures of a kind that is not read left out: {names}"
        captions = [caption(file, prompt) for file in files]
        images = [read_picture(file) for file in files]
        return io.NodeOutput(images, [file.name for file in files], captions, ui={"text": (summary,)})


def caption(picture: Path, otherwise: str) -> PromptText:
    """The prompt of a picture: the whole text of the file beside it, or the node's, line breaks and all."""
    file = picture.with_suffix(".txt")
    text = (read_text(file, "text of a picture") if file.is_file() else otherwise).strip()
    return PromptText(text, [text])


def picture_folder(text: str) -> Path:
    """A folder inside ComfyUI's input or output folder; nothing else on the disk is shown."""
    parts = Path(text.strip().replace("\\", "/")).parts
    base = folder_paths.get_output_directory() if parts[:1] == ("output",) else folder_paths.get_input_directory()
    inside = parts[1:] if parts[:1] in (("output",), ("input",)) else parts
    if any(part in ("..", "/") or ":" in part for part in inside):
        raise ValueError(
            f"'{text}' is not inside ComfyUI's input folder: move or link the folder there, or write output/... for "
            "one in the output folder."
        )
    folder = Path(base).joinpath(*inside)
    if not folder.is_dir():
        raise ValueError(f"There is no folder '{'/'.join(inside)}' in ComfyUI's {Path(base).name} folder.")
    return folder


class ScoreImagesNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOScore",
            "Score Images",
            description="Scores every image with a reward model, and ranks them. Works on any images, no training "
            "needed; for training, connect the decoded leaves of Tree Sampler.",
            search_aliases=[
                "reward",
                "aesthetic score",
                "rank",
                "rank images",
                "best of n",
                "clip score",
                "hps",
                "pickscore",
            ],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                RewardSocket.Input("reward_model"),
                io.Image.Input("images"),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt, line breaks and all. From Tree Prompts: several prompts, and the images are "
                    "taken in equal parts, in order. From Image Folder: one per image.",
                ),
                io.Int.Input(
                    "best_n",
                    default=1,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="How many of the best images of each prompt go to the output 'best'.",
                ),
                expert(
                    io.String.Input(
                        "names",
                        default="",
                        optional=True,
                        force_input=True,
                        tooltip="Names to show instead of image numbers.",
                    )
                ),
            ],
            outputs=[
                ScoresSocket.Output(display_name="rewards"),
                io.String.Output(display_name="table"),
                io.Image.Output(
                    display_name="sheet", tooltip="The images with their scores as one picture, best first."
                ),
                io.Image.Output(
                    display_name="best", is_output_list=True, tooltip="The best images of each prompt, best first."
                ),
                io.Int.Output(
                    display_name="order",
                    is_output_list=True,
                    tooltip="Numbers of all images, counted from 0: the best of its prompt first.",
                ),
            ],
        )

    @classmethod
    def execute(cls, reward_model, images, prompts, best_n=(1,), names=()) -> io.NodeOutput:
        reward = reward_model[0]
        with torch.inference_mode(False), torch.no_grad():
            every = [image.clone() for batch in images for image in batch]
            stacked = torch.stack(every) if len({image.shape for image in every}) == 1 else every
            per_image = share(prompts, [len(batch) for batch in images])
            warning = doubts(reward)
            found = scores(reward, stacked, per_image)
        total = total_reward(found.values, found.weights)
        order = ranking(found, total, per_image)
        labels = list(names) if len(names) == len(every) else None
        text = table(found.values, per_image, labels)
        sheet = plot.score_sheet(every, total, per_image, reward.name, labels=labels, ranked=order, theme=DARK)
        sheet = plot.to_tensor(sheet)
        best = [every[i][None] for group in order for i in group[: best_n[0]]]
        shown = "\n".join(filter(None, [note_on(prompts), warning, text]))
        return io.NodeOutput(
            Scored(found.values, found.weights, found.raw, per_image, stacked),
            text,
            sheet,
            best,
            [i for group in order for i in group],
            ui={**ui.PreviewImage(sheet, cls=cls).as_dict(), "text": (shown,)},
        )


def ranking(found: Scores, total: torch.Tensor, prompts: list[str]) -> list[list[int]]:
    """Image numbers of each prompt, best first, those without a score last. Several rewards are compared as while
    learning: z-scored within the prompt's images, then weighted.
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    ranked = []
    for members in groups.values():
        value = total[members]
        if len(found.values) > 1 and not found.raw and len(members) > 1:
            together = sum(
                found.weights[name] * group_z(scores[members][None])[0][0] for name, scores in found.values.items()
            )
            value = torch.where(value.isnan(), value, together)
        ranked.append(
            [members[j] for j in value.nan_to_num(float("-inf")).argsort(descending=True, stable=True).tolist()]
        )
    return ranked


def one_line(prompt: str) -> str:
    """The beginning of a prompt, for a line of a table."""
    text = " ".join(prompt.split())
    return text if len(text) <= 60 else f"{text[:60].rsplit(' ', 1)[0]}…"


def table(values: dict[str, torch.Tensor], prompts: list[str], names: list[str] | None = None) -> str:
    """Scores per image, best first, and their mean and spread."""
    rows = []
    for name, found in values.items():
        known = found[found.isfinite()]
        if not len(known):
            rows.append(f"{name}: no score for any of the {len(found)} images")
            continue
        order = found.nan_to_num(float("-inf")).argsort(descending=True, stable=True).tolist()
        missing = f", {len(found) - len(known)} without a score" if len(known) < len(found) else ""
        rows.append(
            f"{name}: mean {known.mean():.4f}, std {known.std(correction=0):.4f}, best {known.max():.4f} (image "
            f"{order[0]}){missing}"
        )
        rows += [
            f"{plot.score_text(float(found[i])):>9}  {names[i] if names else f'image {i:3d}'}  {one_line(prompts[i])}"
            for i in order
        ]
    return "\n".join(rows)
