"""Reward health: known pairs that a reward model must put in the right order, tried once, before it is relied on.

A wrong file under the right names, a head on another tower or pixels that are not what a network was trained on: all
give numbers that look like scores, and a night of training on them. A clean picture must score above the same one
damaged, and under its own prompt above another's. This notices what is grossly wrong (random weights pass one time in
sixteen), not what is a little wrong, such as a crop that is a pixel off: for that there are the golden tests. It only
warns, for what a reward likes is its own affair.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from .combine import parts
from .contract import Trial

log = logging.getLogger("treerpo")
SIDE = 256  # pixels of the known pictures
PROMPTS = ("a photo of the sun setting over the sea", "a photo of a red ball on green grass under a blue sky")


def doubts(*rewards) -> str:
    """What the self-tests of these rewards and their parts say, "" when all is well; None among them is none.

    Every model is tried once. What goes wrong is logged with the model's name; the sentences that come back hold no
    name, since a browser may show them as HTML.
    """
    found = []
    for model in (model for reward in rewards if reward is not None for model, _ in parts(reward)):
        if model.tried is None:
            model.tried = _tried(model)
            if model.tried:
                log.warning("%s: %s", model.name, model.tried)
        found.append(model.tried)
    return " ".join(dict.fromkeys(filter(None, found)))


def _tried(model) -> str:
    with torch.inference_mode(False), torch.no_grad():
        trial = model.trial()
        if trial is None:
            return ""
        scores = torch.as_tensor(model.score(trial.images, trial.prompts)).float()
    before = "look at its scores with Score Images before you train on it."
    missing = int((~scores.isfinite()).sum())
    if missing:
        return f"A reward model has no score for {missing} of {len(scores)} known pictures: {before}"
    least = 1e-6 * scores.abs().max()  # what rounding makes is no order
    wrong = sum(bool(scores[better] - scores[worse] <= least) for better, worse in trial.pairs)
    if not wrong:
        return ""
    return (
        f"A reward model failed its self-test: it put {wrong} of {len(trial.pairs)} known pairs in the wrong order (a "
        f"clean picture and a damaged one, the right prompt and a wrong one). Check its file, and {before}"
    )


def scenes(reads_prompts: bool = True) -> Trial:
    """For rewards of any pictures: two drawn scenes, each damaged, and where prompts are read each under the other's;
    else each damaged twice.
    """
    clean = torch.stack([sunset(), ball()])
    second = clean if reads_prompts else noisy(clean)
    images = torch.cat([clean, scrambled(noisy(clean)), second])
    return Trial(images, [*PROMPTS, *PROMPTS, *PROMPTS[::-1]], [(0, 2), (1, 3), (0, 4), (1, 5)])


def noisy(images: Tensor, amount: float = 0.35) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + amount * noise).clamp(0, 1)


def scrambled(images: Tensor, block: int = 16) -> Tensor:
    """The blocks of each picture [B, H, W, 3] in another order; what is left at the right and below stays."""
    high, wide = images.shape[1] // block, images.shape[2] // block
    images, whole = images[:, : high * block, : wide * block], images.clone()
    blocks = images.unflatten(2, (wide, block)).unflatten(1, (high, block)).transpose(2, 3).flatten(1, 2)
    blocks = blocks[:, torch.randperm(high * wide, generator=torch.Generator().manual_seed(0))]
    whole[:, : high * block, : wide * block] = (
        blocks.unflatten(1, (high, wide)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    )
    return whole


def _grid(side: int) -> tuple[Tensor, Tensor]:
    """x and y of the pixels, 0..1 from left to right and from top to bottom."""
    line = (torch.arange(side) + 0.5) / side
    return line[None, :].expand(side, side), line[:, None].expand(side, side)


def _over(image: Tensor, colour, alpha: Tensor) -> Tensor:
    """A colour (three numbers, or a picture) laid over [H, W, 3]."""
    return image + alpha[..., None] * (torch.as_tensor(colour) - image)


def _between(first, last, share: Tensor) -> Tensor:
    """[H, W, 3]: colours from the first to the last."""
    return torch.lerp(torch.tensor(first), torch.tensor(last), share[..., None])


def _ripples(side: int, seed: int, cells: tuple[int, int]) -> Tensor:
    """Smooth noise about 0, [side, side]."""
    coarse = torch.randn(1, 1, *cells, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)[0, 0]


def sunset(side: int = SIDE) -> Tensor:
    """[side, side, 3] in 0..1: a low sun, its glow, and its path on the water."""
    x, y = _grid(side)
    horizon = 0.55
    image = _between((0.20, 0.16, 0.42), (0.99, 0.62, 0.28), (y / horizon).clamp(0, 1))
    far = torch.hypot(x - 0.5, y - 0.46)
    image = _over(image, (1.0, 0.80, 0.45), (-(far**2) / 0.03).exp() * 0.8)
    image = _over(image, (1.0, 0.95, 0.75), ((0.08 - far) * side / 2 + 0.5).clamp(0, 1))
    water = _between((0.75, 0.42, 0.30), (0.08, 0.10, 0.25), ((y - horizon) / (1 - horizon)).clamp(0, 1))
    waves = _ripples(side, 1, (96, 8)) * (y - horizon).clamp(min=0).sqrt()
    path = (-(((x - 0.5) / (0.05 + 0.35 * (y - horizon).clamp(min=0))) ** 2)).exp()
    water = water + 0.10 * waves[..., None] + (path * (0.35 + 0.35 * waves))[..., None] * torch.tensor((1.0, 0.7, 0.4))
    return _over(image, water, ((y - horizon) * side + 0.5).clamp(0, 1)).clamp(0, 1)


def ball(side: int = SIDE) -> Tensor:
    """[side, side, 3] in 0..1: a shaded ball on grass."""
    x, y = _grid(side)
    horizon, radius = 0.5, 0.2
    image = _between((0.25, 0.50, 0.90), (0.75, 0.88, 0.98), (y / horizon).clamp(0, 1))
    grass = _between((0.35, 0.62, 0.25), (0.12, 0.42, 0.10), ((y - horizon) / (1 - horizon)).clamp(0, 1))
    grass = grass * (1 + 0.18 * _ripples(side, 2, (64, 128)))[..., None]
    image = _over(image, grass, ((y - horizon) * side + 0.5).clamp(0, 1))
    shadow = torch.hypot((x - 0.56) / 0.26, (y - 0.80) / 0.06)
    image = _over(image, (0.04, 0.14, 0.04), ((1 - shadow) * 3).clamp(0, 0.75))
    u, v = (x - 0.5) / radius, (y - 0.62) / radius
    height = (1 - u**2 - v**2).clamp(min=0).sqrt()
    light = (-0.5 * u - 0.6 * v + 0.62 * height).clamp(0, 1)
    red = torch.tensor((0.85, 0.08, 0.08)) * (0.25 + 0.75 * light)[..., None] + (light**24)[..., None] * 0.8
    return _over(image, red, ((1 - torch.hypot(u, v)) * radius * side + 0.5).clamp(0, 1)).clamp(0, 1)
