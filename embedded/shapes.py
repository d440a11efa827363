"""Synthetic shapes: the data that the embedded models draw, and how drawings of it are scored.

An image shows one of 4 shapes in one of 8 colours on one of 3 plain backgrounds. Everything here needs
torch alone (Pillow only to save a grid), runs on any device, and is deterministic given a torch.Generator.
Images are float tensors [B, 3, H, W] with values in 0..1; `score` also takes ComfyUI's [B, H, W, 3].
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 64
JITTER = 4  # pixels the centre may be off the middle, each way
RADIUS = (0.21, 0.31)  # of SIZE
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.86, 0.08, 0.10),
    "green": (0.05, 0.60, 0.15),
    "blue": (0.10, 0.20, 0.88),
    "yellow": (0.96, 0.88, 0.08),
    "orange": (0.98, 0.50, 0.05),
    "purple": (0.45, 0.08, 0.60),
    "cyan": (0.05, 0.80, 0.88),
    "pink": (0.98, 0.50, 0.75),
}
BACKGROUNDS = {"white": (0.97, 0.97, 0.97), "gray": (0.50, 0.50, 0.50), "black": (0.04, 0.04, 0.04)}
FOLDER = Path(__file__).resolve().parent

# ComfyUI turns a VAE's latent x into (x - shift) * scale before the diffusion model sees it. The file is in FLUX's
# units.
SCALE, SHIFT = 0.3611, 0.1159


def captions() -> list[str]:
    """All 96 captions; index = (shape * 8 + colour) * 3 + background."""
    return [
        f"a {colour} {shape} on a {background} background"
        for shape in SHAPES
        for colour in COLOURS
        for background in BACKGROUNDS
    ]


def labels(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Caption indices -> shape, colour and background numbers."""
    per_shape = len(COLOURS) * len(BACKGROUNDS)
    return index // per_shape, index // len(BACKGROUNDS) % len(COLOURS), index % len(BACKGROUNDS)


def caption_index(text: str) -> int | None:
    """The number of the caption that names the same shape, colour and background; None if some is missing."""
    words = text.lower().replace("grey", "gray").replace(",", " ").split()
    for i, caption in enumerate(captions()):
        _, colour, shape, _, _, background, _ = caption.split()
        if colour in words and shape in words and background in words:
            return i
    return None


def distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance (negative inside) to each sample's shape; areas are alike at the same radius."""
    circle = torch.hypot(x, y) - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.886 * radius
    r = 1.35 * radius
    yc = y - r / 4  # middle of the triangle's height, not its centroid, goes to the centre
    triangle = torch.maximum(yc - r / 2, 0.866025 * x.abs() - yc / 2 - r / 2)
    arm, half = 1.1 * radius, 0.4 * radius
    bars = [torch.maximum(a.abs() - arm, b.abs() - half) for a, b in ((x, y), (y, x))]
    cross = torch.minimum(*bars)
    return torch.stack([circle, square, triangle, cross]).gather(0, shape.expand_as(x)[None])[0]


def draw(
    index: Tensor,
    generator: torch.Generator | None = None,
    size: int = SIZE,
    radius: tuple[float, float] = RADIUS,
    jitter: float = JITTER,
) -> Tensor:
    """Draw one image for each caption index: [B, 3, size, size] in 0..1, edges anti-aliased."""
    n = len(index)
    shape, colour, background = labels(index)
    offset = (torch.rand(n, 2, generator=generator) * 2 - 1) * jitter * size / SIZE
    low, high = radius
    r = (low + (high - low) * torch.rand(n, generator=generator)) * size
    grid = torch.arange(size) + 0.5 - size / 2
    x = (grid[None, None, :] - offset[:, :1, None]).expand(n, size, size)
    y = (grid[None, :, None] - offset[:, 1:, None]).expand(n, size, size)
    alpha = (0.5 - distance(shape[:, None, None], x, y, r[:, None, None])).clamp(0, 1)[:, None]
    front = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None]
    back = torch.tensor(list(BACKGROUNDS.values()))[background][:, :, None, None]
    return back + alpha * (front - back)


def foreground(images: Tensor, threshold: float = 0.2) -> Tensor:
    """Mask [B, H, W]: where some channel differs from the background, the mean of the four 3 px corners."""
    c = 3
    corners = torch.cat(
        [images[..., a, b].flatten(2) for a in (slice(c), slice(-c, None)) for b in (slice(c), slice(-c, None))], 2
    )
    back = corners.median(2).values[:, :, None, None]
    return (images - back).abs().amax(1) > threshold


def size_of(images: Tensor) -> Tensor:
    """Foreground size: the share of pixels that differ from the background, [B]."""
    return foreground(images).float().mean((1, 2))


def colour_of(images: Tensor) -> Tensor:
    """Number of the palette colour nearest to the median foreground colour, [B]; -1 where there is no foreground."""
    masks = foreground(images)
    palette = torch.tensor(list(COLOURS.values()), device=images.device)
    found = []
    for image, mask in zip(images.float(), masks):
        pixels = image[:, mask]
        near = (palette - pixels.median(1).values).norm(dim=1).argmin() if pixels.shape[1] else torch.tensor(-1)
        found.append(int(near))
    return torch.tensor(found, device=images.device)


def background_of(images: Tensor) -> Tensor:
    """Number of the background nearest to the colour of the corners, [B]."""
    palette = torch.tensor(list(BACKGROUNDS.values()), device=images.device)
    corner = torch.stack([images[:, :, y, x] for y in (1, -2) for x in (1, -2)]).median(0).values
    return torch.cdist(corner.float(), palette).argmin(1)


class ShapeClassifier(nn.Module):
    """Tiny CNN: images [B, 3, H, W] in 0..1 -> logits over SHAPES; it looks at 64 px whatever the size."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, 2), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(2 * width, 3 * width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(3 * width, 3 * width, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(3 * width * 16, len(SHAPES)),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if x.shape[-2:] != (SIZE, SIZE):
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        return self.net(x - 0.5)


def load_classifier(path: Path | str = FOLDER / "classifier.safetensors") -> ShapeClassifier:
    """The pre-trained shape classifier, in fp32, frozen."""
    from safetensors.torch import load_file

    model = ShapeClassifier()
    model.load_state_dict({k: v.float() for k, v in load_file(str(path)).items()})
    return model.eval().requires_grad_(False)


def score(images: Tensor, index: Tensor, classifier: ShapeClassifier) -> dict[str, Tensor]:
    """Per image: is the shape, colour, background right, how sure the classifier is of the asked shape, the size."""
    if images.shape[-1] == 3 and images.shape[1] != 3:
        images = images.movedim(-1, 1)
    shape, colour, background = labels(index.to(images.device))
    with torch.no_grad():
        chance = classifier(images).softmax(1)
    return {
        "shape": (chance.argmax(1) == shape).float(),
        "shape_probability": chance.gather(1, shape[:, None])[:, 0],
        "colour": (colour_of(images) == colour).float(),
        "background": (background_of(images) == background).float(),
        "size": size_of(images),
    }


def vae_state_dict(
    scale_to: float = SCALE, shift_to: float = SHIFT, path: Path | str = FOLDER / "vae.safetensors"
) -> dict[str, Tensor]:
    """The embedded VAE for a model whose latent format has this scale and shift.

    FLUX and SD3 scale latents differently (factor 4.2): the two numbers `vae_scale` and `vae_shift` are replaced, so
    that every diffusion model sees latents of unit variance.
    """
    from safetensors.torch import load_file

    sd = load_file(str(path))
    scale, shift = sd["vae_scale"].double(), sd["vae_shift"].double()
    # x = z / scale + shift, and (x - shift_to) * scale_to has to be the same number for every model
    sd["vae_scale"] = (scale * scale_to / SCALE).float()
    sd["vae_shift"] = ((shift - SHIFT) * SCALE / scale_to + shift_to).float()
    return sd
