"""LAION's aesthetic predictor v2: a linear head on the normalised CLIP ViT-L/14 image embedding; no prompts."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import pixels as resize
from .clip import load_tower
from .files import ENDINGS, fill, find, open_weights
from .scorer import Scorer


def head(weights: dict[str, Tensor], prefix: str = "") -> nn.Sequential:
    """The linear layers `layers.0, 2, 4, 6, 7` of LAION's and ImageReward's heads, in the sizes of the weights; dropout
    sits between.
    """
    stack = nn.Sequential()
    for i in range(8):
        weight = weights.get(f"{prefix}layers.{i}.weight")
        stack.append(nn.Identity() if weight is None else nn.Linear(weight.shape[1], weight.shape[0]))
    return stack


class Aesthetic(Scorer):
    """Scores of about 1 to 10. The head is small: it stays in float32, and may sit on an encoder that others own."""

    reads_prompts = False

    def __init__(
        self,
        layers: nn.Module,
        embed: Callable[[Tensor], Tensor],
        image_size: int,
        tower: nn.Module | None = None,
        name: str = "aesthetic",
        device="cpu",
        dtype: torch.dtype | None = None,
        rounded_crop: bool = True,
    ):
        """embed: pixels [B, 3, image_size, image_size], normalised -> [B, D]. tower: the module behind it, if it is
        ours to move.
        """
        self.layers, self.embed, self.image_size, self.rounded_crop = layers.float(), embed, image_size, rounded_crop
        super().__init__(name, tower if tower is not None else layers, device, dtype)
        self.layers = self.layers.float()

    def pixels(self, images: Tensor, differentiable: bool) -> Tensor:
        return resize.short_side(images, self.image_size, self.rounded_crop, differentiable)

    def compare(self, pixels: Tensor) -> Tensor:
        features = F.normalize(self.embed(pixels).float(), dim=-1)
        return self.layers.to(features.device)(features).squeeze(-1)


def load(path: Path, device="cpu", dtype: torch.dtype | None = None, name: str = "aesthetic", clip=None) -> Aesthetic:
    """path: the head's file, or a folder with the head and a CLIP ViT-L/14. clip: the CLIP's file or folder, or an
    encoder with `embed(pixels)` and `image_size`; default: the CLIP beside the head.
    """
    file = find(path, "sac+logos+ava1-l14-linearMSE.pth")
    weights = {key.removeprefix("mlp."): value for key, value in open_weights(file).items()}
    if "layers.0.weight" not in weights:
        raise ValueError(f"{file.name} is not LAION's aesthetic head: it has no weight 'layers.0.weight'.")
    with torch.device("meta"):
        module = nn.Module()
        module.layers = head(weights)
    fill(module, weights, file.name, "LAION's aesthetic head")
    width = weights["layers.0.weight"].shape[1]
    if clip is not None and not isinstance(clip, (str, Path)):
        return Aesthetic(module.layers, clip.embed, clip.image_size, name=name, device=device, dtype=torch.float32)
    tower = load_tower(_clip_file(file, clip), "a CLIP ViT-L/14", quick_gelu=True)
    scorer = Aesthetic(
        module.layers, tower.image_features, tower.image_size, tower, name, device, dtype, tower.rounded_crop
    )
    made = (
        tower.model.visual.proj.shape[1]
        if hasattr(tower.model, "visual")
        else tower.model.visual_projection.weight.shape[0]
    )
    if made != width:
        raise ValueError(
            f"The aesthetic head {file.name} takes embeddings of {width} numbers, but this CLIP makes {made}: it needs "
            "CLIP ViT-L/14."
        )
    return scorer


def _clip_file(head_file: Path, clip) -> Path:
    if clip is not None:
        return find(Path(clip), "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
    others = sorted(file for file in head_file.parent.iterdir() if file.suffix in ENDINGS and file != head_file)
    if len(others) == 1:
        return others[0]
    raise ValueError(
        f"The aesthetic head {head_file.name} sits on CLIP ViT-L/14: say which file or folder holds it (clip=...), or "
        "connect a CLIP_VISION."
    )
