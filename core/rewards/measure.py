"""Weight-free rewards: what can be measured in the picture itself. For trying a graph, and for tests."""
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("foreground size", "brightness", "contrast", "colour")


@dataclass
class Measure:
    """A simple measurement as a reward.

    foreground size: share of pixels that differ from the background by more than `threshold`; the background is the
        median colour of the picture's border. brightness: mean luminance. contrast: standard deviation of luminance.
    colour: minus the distance of the mean colour to `target`, 0 at best. All in 0..1 (colour in -sqrt(3)..0).
    """
    kind: str = "foreground size"
    target: tuple[float, float, float] = (1.0, 0.0, 0.0)  # for colour: RGB in 0..1
    threshold: float = 0.25                               # for foreground size: distance in RGB space, 0..sqrt(3)
    sign: float = 1.0                                     # -1 = the less, the better

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Unknown measure '{self.kind}': choose one of {', '.join(KINDS)}.")
        self.name = self.kind if self.sign > 0 else f"less {self.kind}"

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1 -> [B]; the prompts do not matter."""
        images = images[..., :3].float()
        return self.sign * self._measure(images)

    def _measure(self, images: Tensor) -> Tensor:
        if self.kind == "foreground size":
            border = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], dim=1)
            background = border.median(dim=1).values[:, None, None]
            return ((images - background).norm(dim=-1) > self.threshold).float().mean((1, 2))
        if self.kind == "colour":
            return -(images.mean((1, 2)) - torch.tensor(self.target, device=images.device)).norm(dim=-1)
        luminance = images @ torch.tensor([0.2126, 0.7152, 0.0722], device=images.device)
        return luminance.mean((1, 2)) if self.kind == "brightness" else luminance.flatten(1).std(1, correction=0)
