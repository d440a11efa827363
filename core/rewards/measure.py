"""Weight-free rewards: what can be measured in the picture itself, or against reference pictures with an encoder from
outside.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..references import reference_of
from .contract import Reward, Trial
from .self_test import scrambled

KINDS = ("foreground size", "brightness", "contrast", "colour", "sharpness", "jpeg size", "saturation")
OF = ("mean", "best", "source")
LUMINANCE = (0.2126, 0.7152, 0.0722)  # Rec. 709


@dataclass
class Measure(Reward):
    """A simple measurement as a reward.

    foreground size: share of pixels that differ from the background by more than `threshold`; the background is the
        median colour of the picture's border. brightness: mean luminance. contrast: standard deviation of luminance.
    colour: minus the distance of the mean colour to `target`, 0 at best. All in 0..1 (colour in -sqrt(3)..0).
    sharpness: variance of the Laplacian of luminance (see `sharpness`); depends on the resolution, and noise counts as
    sharp. jpeg size: kilobytes (1000 bytes) of the picture as JPEG; grows with the resolution. As flow_grpo's
    jpeg_incompressibility,
        and with sign -1 its jpeg_compressibility times 500. saturation: mean over the pixels of max(RGB) - min(RGB),
        0..1.
    A picture that holds NaN has no score: NaN.
    """

    kind: str = "foreground size"
    target: tuple[float, float, float] = (1.0, 0.0, 0.0)  # for colour: RGB in 0..1
    threshold: float = 0.25  # for foreground size: distance in RGB space, 0..sqrt(3)
    sign: float = 1.0  # -1 = the less, the better
    quality: int = 95  # for jpeg size: 1..100; 95 is flow_grpo's

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Unknown measure '{self.kind}': choose one of {', '.join(KINDS)}.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"The JPEG quality {self.quality} does not exist: choose 1 to 100.")
        self.name = self.kind if self.sign > 0 else f"less {self.kind}"

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1 -> [B]; the prompts do not matter."""
        images = images[..., :3].float()
        if not len(images):
            return torch.zeros(0)
        known = torch.isfinite(images).flatten(1).all(1)
        return torch.where(known, self.sign * self._measure(images), torch.nan)

    def _measure(self, images: Tensor) -> Tensor:
        if self.kind == "foreground size":
            border = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], dim=1)
            background = border.median(dim=1).values[:, None, None]
            return ((images - background).norm(dim=-1) > self.threshold).float().mean((1, 2))
        if self.kind == "colour":
            return -(images.mean((1, 2)) - torch.tensor(self.target, device=images.device)).norm(dim=-1)
        if self.kind == "saturation":
            return (images.amax(-1) - images.amin(-1)).mean((1, 2))
        if self.kind == "jpeg size":
            sizes = [len(encoded(image, "JPEG", self.quality)) / 1000 for image in images]
            return torch.tensor(sizes, device=images.device)
        luminance = images @ torch.tensor(LUMINANCE, device=images.device)
        if self.kind == "sharpness":
            return sharpness(luminance)
        return luminance.mean((1, 2)) if self.kind == "brightness" else luminance.flatten(1).std(1, correction=0)


def sharpness(luminance: Tensor) -> Tensor:
    """Variance over the inner pixels of L(y, x) = Y(y-1, x) + Y(y+1, x) + Y(y, x-1) + Y(y, x+1) - 4 Y(y, x): [B, H, W]
    -> [B].

    In squares of the 0..1 scale, 0..16; times 255^2 it is OpenCV's usual number. It sees the finest detail only: the
    same picture enlarged is less sharp, so compare pictures of one size.
    """
    if min(luminance.shape[1:]) < 3:
        raise ValueError(
            f"Sharpness needs pictures of at least 3 x 3 pixels; these have {luminance.shape[2]} x "
            f"{luminance.shape[1]}."
        )
    inner = luminance[:, 1:-1, 1:-1]
    around = luminance[:, :-2, 1:-1] + luminance[:, 2:, 1:-1] + luminance[:, 1:-1, :-2] + luminance[:, 1:-1, 2:]
    return (around - 4 * inner).flatten(1).var(1, correction=0)


def encoded(image: Tensor, format: str, quality: int = 95) -> bytes:
    """[H, W, 3] in 0..1 -> the bytes of a "JPEG" or "PNG" file; quality is JPEG's."""
    from ..pictures.plot import to_picture  # Pillow

    buffer = io.BytesIO()
    to_picture(image.detach().float().nan_to_num(0.0)).save(
        buffer, format, **({"quality": quality} if format == "JPEG" else {})
    )
    return buffer.getvalue()


@dataclass
class Similarity(Reward):
    """How much a picture resembles reference pictures: the cosine of their embeddings, -1..1."""

    reference: Tensor  # [R, H, W, 3] in 0..1
    encode: Callable[[Tensor], Tensor]  # [B, H, W, 3] in 0..1 -> embeddings [B, D], such as CLIP Vision's
    # over several references: "mean" of all cosines, or the "best" one; "source": that of the prompt's own reference
    # image instead, the picture that it changes
    of: str = "mean"
    batch: int = 16  # pictures per pass
    name: str = "similarity"
    # the references' directions [R, D], on the CPU
    _known: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.of not in OF:
            raise ValueError(f"Unknown '{self.of}' of similarities: choose one of {', '.join(OF)}.")
        if self.reference.dim() != 4 or not len(self.reference) or self.reference.shape[-1] < 3:
            raise ValueError(
                f"The reference has the shape {list(self.reference.shape)}: it must be one or more images [count, "
                "height, width, 3]."
            )

    def refuse(self, prompts: list[str]) -> None:
        """ValueError where there is nothing to compare with."""
        if self.of == "source" and any(reference_of(prompt) is None for prompt in prompts):
            raise ValueError(
                "Image Similarity compares with the picture that a prompt changes, but a prompt has none: connect "
                "references to the node with the prompts, or set of to mean or best."
            )

    def trial(self) -> Trial:
        """A reference resembles the references more than it does with its parts in another order."""
        own = self.reference[:1, ..., :3].float().cpu()
        return Trial(torch.cat([own, scrambled(own)]), ["", ""], [(0, 1)])

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1 -> [B] on the CPU; the prompts do not matter but for their own reference images. The
        references are encoded once.
        """
        self.refuse(prompts)
        with torch.inference_mode(False), torch.no_grad():
            if self.of == "source":
                return self._to_their_own(images, prompts)
            if self._known is None:
                self._known = self._directions(self.reference)
            if not len(images):
                return torch.zeros(0)
            cosines = self._directions(images) @ self._known.T
        return cosines.mean(1) if self.of == "mean" else cosines.amax(1)

    def _to_their_own(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3], B prompts with reference images -> [B]; each is encoded once."""
        sources = {prompt.digest: prompt.reference for prompt in prompts}
        known = {digest: self._directions(source[None]) for digest, source in sources.items()}
        if not prompts:
            return torch.zeros(0)
        return (self._directions(images) * torch.cat([known[prompt.digest] for prompt in prompts])).sum(1)

    def _directions(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] -> embeddings of length 1 [B, D]."""
        found = torch.cat([self.encode(part).float().cpu() for part in images[..., :3].split(self.batch)])
        if found.dim() != 2 or len(found) != len(images):
            raise ValueError(
                f"The image encoder gave {list(found.shape)} for {len(images)} images: it must give [batch, size]."
            )
        return F.normalize(found, dim=-1)
