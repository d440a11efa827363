"""How different pictures are: within a group, and from those of the base model."""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # pixels of the copies that are compared: enough for what is where, blind to fine texture


def diversity(images: Tensor, prompts: int) -> float:
    """How different the images of one prompt are: the mean distance of all pairs of its group, meant over the groups. 0
    = all alike.

    images: [prompts * K, H, W, 3] in 0..1, a prompt's images adjacent. The distance of two images is the RMS difference
    of their pixels after averaging to 32x32, 1 between black and white. Images that are not finite are left out; NaN
    where no pair is left.
    """
    if prompts < 1 or len(images) % prompts or not len(images):
        raise ValueError(
            f"{len(images)} images cannot be shared out among {prompts} prompts: give the same number of images to "
            "each prompt."
        )
    group = small(images).view(prompts, len(images) // prompts, -1)
    distance = torch.cdist(group, group, compute_mode="donot_use_mm_for_euclid_dist") / group.shape[-1] ** 0.5
    pairs = torch.ones_like(distance[0], dtype=torch.bool).triu(1)
    return float(distance[:, pairs].nanmean(1).nanmean())


def drift(images: Tensor, base_images: Tensor) -> float:
    """How far the tuned model's images are from those of the base model on the same prompts and seeds: the mean
    distance, as in `diversity`.

    images, base_images: [B, H, W, 3] in 0..1, in the same order. Pairs that are not finite are left out; NaN where none
    is left.
    """
    if images.shape != base_images.shape:
        raise ValueError(
            f"The tuned model's images are {list(images.shape)}, the base model's {list(base_images.shape)}: make both "
            "of the same prompts, seeds and size."
        )
    return float((small(images) - small(base_images)).square().mean(1).sqrt().nanmean())


def small(images: Tensor) -> Tensor:
    """[B, H, W, 3] -> [B, 3 * 32 * 32] averages over areas, fp32 on the CPU, one image at a time to save memory."""
    return torch.stack(
        [F.adaptive_avg_pool2d(image[..., :3].movedim(-1, 0).float(), SIDE).flatten().cpu() for image in images]
    )
