"""From IMAGE tensors to what each vision tower was trained on: resized, cropped, normalised."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# of CLIP's and BLIP's training images
MEAN, STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def normalise(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in 0..1 -> the same, centred and scaled."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def quantise(images: Tensor) -> Tensor:
    """[...] in 0..1 -> whole numbers in 0..255 as float, as saving to a file does.

    The gradient passes straight through.
    """
    scaled = images.float().clamp(0, 1) * 255
    if scaled.requires_grad:
        return scaled + (scaled.round() - scaled).detach()
    return scaled.round_()  # the same numbers in a third of the time


def crop_offset(length: int, size: int, rounded: bool) -> int:
    """rounded: torchvision's CenterCrop; else as transformers' image processors.

    They differ by a pixel now and then.
    """
    return round((length - size) / 2) if rounded else (length - size) // 2


def short_side(images: Tensor, size: int, rounded_crop: bool, differentiable: bool = False) -> Tensor:
    """Short side to `size` (bicubic), centre crop: [B, H, W, 3] in 0..1 -> [B, 3, size, size] normalised."""
    height, width = images.shape[1:3]
    new = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    resized = _resized(images, *new, differentiable)
    top, left = (crop_offset(length, size, rounded_crop) for length in new)
    return normalise(resized[..., top : top + size, left : left + size] / 255)


def exactly(images: Tensor, height: int, width: int, differentiable: bool = False) -> Tensor:
    """To this size (bicubic), whatever the proportions: [B, H, W, 3] in 0..1 -> [B, 3, height, width] normalised."""
    return normalise(_resized(images, height, width, differentiable) / 255)


def _resized(images: Tensor, height: int, width: int, differentiable: bool) -> Tensor:
    """[B, H, W, 3] in 0..1 -> [B, 3, height, width] in 0..255: Pillow's values, and if need be torch's gradient."""
    whole = quantise(images[..., :3])
    resized = resize_with_pillow(whole, height, width)
    if not differentiable:
        return resized
    near = resize_with_gradient(whole, height, width)
    return near + (resized.to(near) - near).detach()


def long_side(images: Tensor, size: int) -> Tensor:
    """Long side to `size` on the float image (bicubic, antialiased), black around: [B, H, W, 3] in 0..1 -> [B, 3, size,
    size] normalised. HPSv2's own transform.
    """
    height, width = images.shape[1:3]
    scale = size / max(height, width)
    new = tuple(round(length * scale) for length in (height, width))
    pixels = quantise(images[..., :3]).movedim(-1, 1) / 255
    if scale != 1:
        pixels = F.interpolate(pixels, new, mode="bicubic", antialias=True, align_corners=False)
    down, right = (size - length for length in new)
    return normalise(F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2)))


def resize_with_pillow(images: Tensor, height: int, width: int) -> Tensor:
    """[B, H, W, 3] in 0..255 -> [B, 3, height, width]."""
    whole = images.detach().to("cpu", torch.uint8).numpy()
    resized = np.stack(
        [np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in whole]
    )
    return torch.from_numpy(resized).to(images.device).movedim(-1, 1).float()


def resize_with_gradient(images: Tensor, height: int, width: int) -> Tensor:
    """The same with a gradient, within a step of Pillow, which also filters width, then height, and rounds after each.
    Here nothing is rounded.
    """
    pixels = images.movedim(-1, 1)
    for size in ((pixels.shape[2], width), (height, width)):
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return pixels
