"""A judge by rules: what a drawing shows and how well it is drawn, found by matching it with ideal drawings.

It shares nothing with any reward: no network, no training, only the drawings of `shapes.render`. Where a reward is
gamed (blobs that a classifier calls circles), the judge's `quality` falls.
"""

import functools
import math

import torch
from torch import Tensor

from . import shapes

SIZE = shapes.SIZE
PLACES = torch.arange(-4.0, 5.0, 2.0)  # pixels from the middle at which a template is tried
RADII = torch.tensor((0.20, 0.24, 0.265, 0.29, 0.315, 0.34, 0.38)) * SIZE
COLOURED = 0.15  # difference between the largest and smallest channel from which a pixel is not gray
ALIKE, VISIBLE = 0.6, 0.1  # correlation with an ideal face from which on it is one; its least contrast in lightness


@functools.cache
def templates() -> tuple[Tensor, Tensor, Tensor]:
    """Coloured part of every ideal drawing [N, 64 * 64], its (shape, outline, face) and its (x, y, radius) [N, 3]."""
    shown = torch.cartesian_prod(torch.arange(len(shapes.SHAPES)), torch.arange(2), torch.arange(2))
    where = torch.cartesian_prod(PLACES, PLACES, RADII)
    shown, where = shown.repeat_interleave(len(where), 0), where.repeat(len(shown), 1)
    return torch.cat([masks(*part) for part in zip(shown.split(256), where.split(256))]), shown, where


def masks(shown: Tensor, where: Tensor) -> Tensor:
    """[N, 64 * 64]: how much of each pixel has the shape's colour; the same numbers as `colour_share` of a drawing."""
    grid = torch.arange(SIZE) + 0.5 - SIZE / 2
    x, y, r = (column[:, None, None] for column in where.T)
    shape, outline, face = (column[:, None, None] for column in shown.T)
    u, v = (grid[None, None, :] - x).expand(-1, SIZE, -1), (grid[None, :, None] - y).expand(-1, -1, SIZE)
    far = shapes.distance(shape, u, v, r)
    part = shapes.inked(far, outline, r)
    hole = torch.where(face > 0, shapes.smile(shape, u, v, r), torch.inf)
    return ((0.5 - part).clamp(0, 1) * (1 - (0.5 - hole).clamp(0, 1))).flatten(1)


def colour_share(images: Tensor) -> Tensor:
    """[B, H, W] in 0..1: each pixel's share of the picture's own colour, so that a soft edge counts as half."""
    chroma = (images.amax(1) - images.amin(1)).clamp(min=0)
    full = chroma.flatten(1).quantile(0.97, dim=1).clamp(min=COLOURED)
    return (chroma / full[:, None, None]).clamp(0, 1)


def dice(share: Tensor, mask: Tensor) -> Tensor:
    """Overlap [B] of soft masks [B, P], 1 where they are the same."""
    return 2 * (share * mask).sum(1) / (share.square() + mask.square()).sum(1).clamp(min=1e-6)


def judge(images: Tensor) -> dict[str, Tensor]:
    """What each picture shows, as numbers [B], and how well it is drawn.

    images: [B, 3, 64, 64] in 0..1 (or ComfyUI's [B, 64, 64, 3]).
    shape, colour, background: numbers in SHAPES, COLOURS, BACKGROUNDS; the names of STYLES: 0 or 1; radius: in pixels;
    `quality`: overlap of the coloured part with its best template (Dice, 1 = an ideal drawing) times 1 minus the
    distance (root mean square) to the ideal picture with all that was found.
    """
    if images.shape[-1] == 3 and images.shape[1] != 3:
        images = images.movedim(-1, 1)
    images = images.float().cpu()
    bank, shown, where = templates()
    share = colour_share(images).flatten(1)
    both = share @ bank.T
    best = (2 * both / (share.square().sum(1)[:, None] + bank.square().sum(1)[None])).argmax(1)
    shown, where = shown[best], where[best]
    for step in (1.0, 0.5):  # the same drawing a little to the side, larger or smaller
        moves = torch.cartesian_prod(*[torch.tensor((-step, 0.0, step))] * 3)
        near = [where + move for move in moves]
        found = torch.stack([dice(share, masks(shown, place)) for place in near])
        overlap, best = found.max(0)
        where = torch.stack(near)[best, torch.arange(len(where))]
    shape, outline, face = shown.T

    backgrounds, colours = torch.tensor(list(shapes.BACKGROUNDS.values())), torch.arange(len(shapes.COLOURS))
    corner = torch.stack([images[:, :, y, x] for y in (1, -2) for x in (1, -2)]).median(0).values
    background = torch.cdist(corner, backgrounds).argmin(1)
    inks = torch.cat([shapes.paint(colours, torch.full_like(colours, pastel)) for pastel in (0, 1)])
    full = share >= 0.8 * share.amax(1, keepdim=True)
    ink = torch.stack([image[:, part].median(1).values for image, part in zip(images.flatten(2), full)])
    nearest = torch.cdist(ink, inks).argmin(1)
    colour, palette = nearest % len(colours), nearest // len(colours)

    index = shapes.caption_numbers(shape, colour, background)
    styles = torch.stack([palette, outline, *[torch.zeros_like(face)] * 3], 1)
    for column in (2, 3):  # dots, a frame
        with_it = styles.clone()
        with_it[:, column] = 1
        without, drawn = (shapes.render(index, tried, where[:, :2], where[:, 2]) for tried in (styles, with_it))
        differ = (without - drawn).abs().amax(1, keepdim=True) > 0.05
        errors = [((images - picture).abs() * differ).flatten(1).sum(1) for picture in (without, drawn)]
        styles[:, column] = (errors[1] < errors[0]).long()  # nearer to the drawing that has it, where the two differ
    styles[:, 4] = smiles(images, shape, where)
    ideal = shapes.render(index, styles, where[:, :2], where[:, 2])
    off = (images - ideal).square().flatten(1).mean(1).sqrt()
    shown = dict(zip((*shapes.NAMED, *shapes.STYLES), (shape, colour, background, *styles.T)))
    return {**shown, "radius": where[:, 2], "quality": overlap * (1 - off)}


def smiles(images: Tensor, shape: Tensor, where: Tensor) -> Tensor:
    """1 where a face is in the middle of the shape, else 0 [B]: where lightness correlates with an ideal face, in any
    ink, a little to the side, larger or smaller. images: [B, 3, 64, 64]; where: x, y and radius of the shape [B, 3].
    """
    light = torch.einsum("bchw,c->bhw", images, shapes.LIGHT)
    shape, (x, y, radius) = shape[:, None, None], (column[:, None, None] for column in where.T)
    grid = torch.arange(SIZE) + 0.5 - SIZE / 2
    found = torch.zeros(len(images), dtype=torch.bool)
    for right, down, scale in torch.cartesian_prod(*[torch.arange(-3.0, 4.0, 1.5)] * 2, torch.tensor((0.9, 1.0, 1.1))):
        r = scale * radius
        u, v = grid[None, None] - x - right, grid[None, :, None] - y - down
        u, v = torch.broadcast_tensors(u, v)
        ideal = (0.5 - shapes.smile(shape, u, v, r)).clamp(0, 1)
        middle = v - 0.25 * r * (shape == 2) - 0.05 * r  # of the face
        near = ((u.abs() < 0.46 * r) & (middle.abs() < 0.42 * r)).float().flatten(1)
        a, b = (
            near * (part - (part * near).sum(1, keepdim=True) / near.sum(1, keepdim=True).clamp(min=1))
            for part in (ideal.flatten(1), light.flatten(1))
        )
        both, own = (a * b).sum(1), a.square().sum(1).clamp(min=1e-9)
        alike = both / (own * b.square().sum(1).clamp(min=1e-9)).sqrt()
        found |= (alike.abs() >= ALIKE) & ((both / own).abs() >= VISIBLE)
    return found.long()


def figures(images: Tensor, prompts: list[str], wish: dict[str, str]) -> dict[str, float]:
    """`figures_of` what the judge sees in pictures [B, 3, 64, 64] (or [B, 64, 64, 3])."""
    return figures_of(judge(images), prompts, wish)


def figures_of(found: dict[str, Tensor], prompts: list[str], wish: dict[str, str]) -> dict[str, float]:
    """What the judge has seen (`judge`) in pictures of these prompts [B], on average.

    taste: share with every wished style (0 where none is wished for); follows: share with the asked shape and colour;
    quality: how well they are drawn; diversity: mean entropy, in bits, of the styles that nobody wished for.
    """
    met = [found[name] == shapes.STYLES[name].index(value) for name, value in wish.items()]
    met = torch.stack(met or [torch.zeros(len(prompts), dtype=torch.bool)])
    asked = [shapes.asked(prompt) for prompt in prompts]
    follows = torch.stack(
        [found[what] == torch.tensor([one.get(what, -1) for one in asked]) for what in ("shape", "colour")]
    )
    free = [found[name].double().mean() for name in shapes.STYLES if name not in wish]
    shares = torch.stack(free or [torch.zeros((), dtype=torch.double)])
    entropy = -(torch.xlogy(shares, shares) + torch.xlogy(1 - shares, 1 - shares)) / math.log(2)
    return {
        "taste": float(met.all(0).double().mean()),
        "follows": float(follows.all(0).double().mean()),
        "quality": float(found["quality"].mean()),
        "diversity": float(entropy.mean()),
    }


def expected_quality(drawn: dict[str, Tensor], shown: dict[str, Tensor]) -> Tensor:
    """How well the untuned model, in whose pictures the judge has seen `drawn`, draws the styles of the pictures
    `shown` (faces worse than others) [B]: least squares over its own pictures.
    """
    rows = [
        torch.stack([*(found[name].float() for name in shapes.STYLES), torch.ones(len(found["quality"]))], 1)
        for found in (drawn, shown)
    ]
    return rows[1] @ torch.linalg.lstsq(rows[0], drawn["quality"][:, None]).solution[:, 0]
