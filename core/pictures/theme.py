"""Two palettes for the same drawings: light for files on the disk, dark for what a node shows in ComfyUI's page."""

import functools
from dataclasses import dataclass

from PIL import ImageFont

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """Colours of a picture. Texts are ink, grey, better or worse, each at a contrast of 4.5 : 1 on the paper at least
    (WCAG 2 AA).
    """

    paper: Colour  # behind everything
    ink: Colour  # what is read first
    grey: Colour  # what explains it
    pale: Colour  # lines of the grid
    better: Colour  # blue and orange: told apart by the colour-blind too
    worse: Colour
    band: Colour  # the spread around a curve
    faint: Colour  # the points that a curve smooths
    even: Colour  # between better and worse


LIGHT = Theme(
    paper=(255, 255, 255),
    ink=(35, 35, 40),
    grey=(102, 102, 110),
    pale=(225, 225, 230),
    better=(24, 100, 200),
    worse=(184, 84, 0),
    band=(222, 234, 249),
    faint=(150, 184, 228),
    even=(200, 200, 205),
)
DARK = Theme(
    paper=(32, 32, 34),
    ink=(232, 232, 236),
    grey=(172, 172, 180),
    pale=(62, 62, 68),
    better=(104, 172, 255),
    worse=(255, 158, 74),
    band=(40, 54, 76),
    faint=(70, 106, 156),
    even=(92, 92, 98),
)


@functools.cache
def font(size: int):
    return ImageFont.load_default(size)
