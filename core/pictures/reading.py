"""Pictures from files, as they were meant: the one reader of them. What cannot be read for certain is refused."""

from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from .plot import to_tensor

PICTURES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
PICTURES += (".tga", ".jp2")
NOT_READ = (".heic", ".heif", ".jxl", ".psd", ".xcf", ".kra", ".svg", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw")
PHOTOMETRIC, MIN_IS_WHITE = 262, 0  # the TIFF tag that says whether 0 is white


def pictures_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder by name, and those of a kind that is not read. Hidden files are passed over."""
    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".") and file.is_file()]
    return tuple([file for file in files if file.suffix.lower() in kinds] for kinds in (PICTURES, NOT_READ))


def read_picture(path: Path) -> Tensor:
    """[1, H, W, 3] in 0..1: the first picture of the file, upright, on white where it is transparent.

    Grey of 16 bits is white at 65535, floating point at 1. Raises ValueError in one sentence for a picture that is
    damaged or cut short, or that does not say which number is white.
    """
    try:
        with _all_of_it(), Image.open(path) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except Exception as error:  # Pillow's readers raise whatever comes to them
        why = str(error).replace(str(path), path.name) or type(error).__name__
        raise ValueError(
            f"The picture {path.name} is damaged, cut short or of an unknown kind ({why}): replace it, or take it out "
            "of the folder."
        ) from error
    inverted = getattr(opened, "tag_v2", {}).get(PHOTOMETRIC) == MIN_IS_WHITE
    if upright.mode.startswith("I;16") or (upright.mode == "I" and opened.format == "PNG"):
        return _grey(upright.convert("I"), torch.int32, 65535, inverted)
    if upright.mode == "F":
        grey = _grey(upright, torch.float32, 1, inverted)
        if 0 <= grey.min() and grey.max() <= 1:  # False where one is NaN
            return grey
    if upright.mode in ("F", "I", "LAB", "HSV"):
        raise ValueError(
            f"The picture {path.name} has numbers of which none is known to be white (kind {upright.mode}): save it as "
            "PNG with 8 or 16 bits."
        )
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return to_tensor(upright)


def _grey(picture: Image.Image, kind: torch.dtype, white: int, inverted: bool) -> Tensor:
    """[1, H, W, 3] of a picture with one number per pixel; the number that stands for transparent becomes white."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=kind).view(1, picture.height, picture.width, 1)
    grey = values.float() / white
    grey = 1 - grey if inverted else grey
    clear = picture.info.get("transparency")
    return (grey if clear is None else grey.masked_fill(values == clear, 1.0)).expand(-1, -1, -1, 3).contiguous()


@contextmanager
def _all_of_it():
    """Pillow fills up what is missing of a picture where anything in this process asked it to; not here."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
