"""Several reward models as one. They stay apart until the advantages: z-scored per group first, then weighted."""

import reprlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method.advantage import Scores
from .contract import Reward


@dataclass
class Combined:
    """Reward models with weights.

    Scores are kept by name; core.method.advantage.leaf_advantages weights them (TreeGRPO).
    """

    parts: list[tuple[Reward, float]]
    raw: bool = False  # sum the raw scores instead of z-scoring each first

    @property
    def name(self) -> str:
        return " + ".join(f"{weight:g} {model.name}" for model, weight in self.parts)


def parts(reward: Reward | Combined) -> list[tuple[Reward, float]]:
    """The single models of a reward and their weights; one of weight 1 when it is not a combination."""
    return list(reward.parts) if isinstance(reward, Combined) else [(reward, 1.0)]


def combine(rewards: list, weights: list[float], raw: bool = False) -> Combined:
    """Rewards, each of which may be a combination itself: weights multiply."""
    return Combined(
        [(model, weight * outer) for reward, outer in zip(rewards, weights) for model, weight in parts(reward)], raw
    )


def scores(reward: Reward | Combined, images: Tensor | list[Tensor], prompts: list[str], chunk: int = 64) -> Scores:
    """Every image scored by every part of the reward, `chunk` at a time. Equal names are numbered.

    images: [B, H, W, 3], or a list of [H, W, 3] whose sizes may differ. A reward with `group_wise = True` gets all
    neighbouring images of one prompt in a single call, since it compares them with each other; those need one size.
    """
    found = Scores({}, {}, isinstance(reward, Combined) and reward.raw)
    for model, weight in parts(reward):
        name, number = model.name, 2
        while name in found.values:
            name, number = f"{model.name} {number}", number + 1
        slices = [slice(0, len(images))] if model.whole else _slices(images, prompts, chunk, model.group_wise)
        values = [_checked(model, images, prompts, part) for part in slices]
        found.values[name], found.weights[name] = torch.cat(values), weight
    return found


def neighbours(prompts: list[str]) -> list[slice]:
    """The runs of equal prompts, in their order."""
    edges = [i for i in range(len(prompts)) if i == 0 or prompts[i] != prompts[i - 1]] + [len(prompts)]
    return [slice(first, last) for first, last in zip(edges, edges[1:])]


def _slices(images, prompts: list[str], chunk: int, grouped: bool) -> list[slice]:
    """Neighbouring images of one size, at most `chunk` of them; grouped: those of one prompt, however many."""
    cuts, first = [], 0
    for i in range(1, len(images) + 1):
        here = (
            i < len(images)
            and images[i].shape == images[first].shape
            and (prompts[i] == prompts[first] if grouped else i - first < chunk)
        )
        if not here:
            cuts.append(slice(first, i))
            first = i
    return cuts


def _checked(model, images, prompts: list[str], part: slice) -> Tensor:
    batch = images[part] if torch.is_tensor(images) else torch.stack(images[part])
    values = model.score(batch, prompts[part])
    try:
        values = torch.as_tensor(values).float().cpu()  # also a list of numbers
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"The reward '{model.name}' gave {reprlib.repr(values)} for {len(batch)} images: its score() must return a "
            "tensor or a list with one number per image."
        ) from None
    if values.shape != (len(batch),):
        raise ValueError(
            f"The reward '{model.name}' gave {tuple(values.shape)} scores for {len(batch)} images: it must give one "
            "per image."
        )
    return values
