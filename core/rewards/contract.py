"""What a reward is."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass
class Trial:
    """Known pictures, their prompts, and which must score above which."""

    images: Tensor  # [N, H, W, 3] in 0..1
    prompts: list[str]  # N
    pairs: list[tuple[int, int]]  # numbers of pictures: the first must score above the second


class Reward(Protocol):
    """Scores images for their prompts, higher is better.

    Every reward subclasses this; name and score are its own to give.
    """

    name: str  # in tables, curves and metrics
    group_wise: bool = False  # compares images: needs all neighbouring images of a prompt in one call
    whole: bool = False  # and those of all prompts of the iteration as well
    origin: tuple[str, object, dict] | None = (
        None  # (kind, path, options) of core.rewards.load, for run.yaml; None = no file to name
    )
    patcher: object = None  # ComfyUI's ModelPatcher of its weights; None = it has none
    tried: str | None = None  # what its self-test said, "" = all is well; None = not tried yet

    def refuse(self, prompts: list[str]) -> None:
        """ValueError in one sentence for a prompt it cannot score; asked before anything is sampled."""

    def trial(self) -> Trial | None:
        """Known pictures it must put in the right order (self_test.py); None = nothing can be known of it."""
        return None

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1, B prompts -> [B]; NaN = no score for this image, masked, never counted as 0.

        A prompt of an edit has the picture it is to change: core.references.reference_of(prompt).
        """


def refuse_unpaired(images: Tensor, prompts: list[str]) -> None:
    """ValueError in one sentence unless there are images [B, H, W, 3 or more] and B prompts."""
    if images.dim() != 4 or images.shape[-1] < 3 or len(prompts) != len(images):
        raise ValueError(
            f"There are {len(prompts)} prompts for images of the shape {list(images.shape)}: give one prompt per "
            "image, and images [batch, height, width, 3]."
        )
