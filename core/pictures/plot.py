"""Pictures of a run: a tree with its thumbnails, scores and advantages; sheets of scored or numbered images; strips."""

import math

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .curve import shortened, value_text, wrapped
from .theme import LIGHT, Theme, font

READABLE = 27  # height of a text, in thousandths of the width of a picture that a node shows about 400 wide
SHEET_TEXT = 22  # height of the texts of a sheet of scored images
MAX_PROMPTS = 4  # panels in one tree picture
SHEET_MARGIN = 4  # pixels around a picture of a numbered sheet
STRIP, STRIP_SIDE = 8, 96  # pictures in a strip, and their height in pixels


def word(text: str, side: int) -> Image.Image:
    """A short text in dark letters on a plain square of so many pixels."""
    picture = Image.new("RGB", (side, side), LIGHT.paper)
    ImageDraw.Draw(picture).text((side // 10, side // 2), text, fill=LIGHT.ink, font=font(side // 6), anchor="lm")
    return picture


def to_tensor(picture: Image.Image) -> Tensor:
    """PIL picture -> [1, H, W, 3] in 0..1."""
    raw = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return raw.view(1, picture.height, picture.width, 3).float() / 255


def to_picture(image: Tensor) -> Image.Image:
    """[H, W, 3] in 0..1 -> PIL picture."""
    return Image.fromarray((image[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def tree_picture(
    forest, layers: list[Tensor], scores: Tensor, images: Tensor, prompts: list[str], theme: Theme = LIGHT
) -> Image.Image:
    """The trees of up to four prompts: edges coloured by advantage, leaves as thumbnails with their scores.

    layers: edge advantages per layer. scores: [P * K]. images: [P * K, H, W, 3] in 0..1. prompts: one text per image.
    """
    per_prompt = forest.leaves_per_prompt
    shown = min(len(forest.prompts), MAX_PROMPTS)
    thumb = max(24, min(96, 1400 // per_prompt - 6))
    width = max(per_prompt * (thumb + 6) + 20, 620)
    size = width * READABLE // 1000
    panel_height = 48 + 2 * size + 46 * forest.depth + thumb + 30
    picture = Image.new("RGB", (width, shown * panel_height + 2 * size), theme.paper)
    draw = ImageDraw.Draw(picture)
    peak = max(max(float(a.abs().max()) for a in layers), 1e-9)
    for panel in range(shown):
        first, top = panel * per_prompt, panel * panel_height
        mean = score_text(float(scores[first : first + per_prompt].nanmean()))
        said = f"   mean {mean}   steps {forest.start + 1} to {forest.start + forest.depth} branch"
        room = width - 20 - draw.textlength(said, font(size))
        title = f"{shortened(prompts[first], size, room)}{said}"
        draw.text((10, top + 8), title, fill=theme.ink, font=font(size))
        below = top + 2 * size
        _draw_group(picture, draw, forest, layers, scores, images, panel, below, thumb, peak, theme)
    more = f" ({len(forest.prompts) - shown} more prompts not shown)" if len(forest.prompts) > shown else ""
    said = f"blue: better than its group; orange: worse; thicker: more so{more}"
    said = shortened(said, size, width - 20)
    draw.text((10, picture.height - round(1.5 * size)), said, fill=theme.grey, font=font(size))
    return picture


def _draw_group(
    picture, draw, forest, layers, scores, images, panel: int, top: int, thumb: int, peak: float, theme: Theme
) -> None:
    """One prompt's trees below `top`."""
    per_prompt, b = forest.leaves_per_prompt, forest.branching
    row = [[10 + (thumb + 6) * (j + 0.5) for j in range(per_prompt)]]
    for _ in range(forest.depth):
        below = row[0]
        row.insert(0, [sum(below[j * b : (j + 1) * b]) / b for j in range(len(below) // b)])
    heights = [top + 16 + 46 * k for k in range(forest.depth + 1)]
    for k, advantage in enumerate(layers):
        edges = len(row[k + 1])
        values = advantage[panel * edges : (panel + 1) * edges].tolist()
        for j, value in enumerate(values):
            ends = [(row[k][j // b], heights[k]), (row[k + 1][j], heights[k + 1])]
            draw.line(ends, fill=_shade(value / peak, theme), width=1 + round(4 * min(abs(value) / peak, 1)))
    for k in range(forest.depth):
        for position in row[k]:
            draw.ellipse([position - 5, heights[k] - 5, position + 5, heights[k] + 5], fill=theme.ink)
    leaf = layers[-1][panel * per_prompt : (panel + 1) * per_prompt].tolist()
    used = font(max(9, min(26, (thumb + 4) * 10 // 24)))  # five characters below a thumbnail
    for j, position in enumerate(row[-1]):
        image = to_picture(images[panel * per_prompt + j])
        image = image.resize(
            (thumb, thumb), Image.Resampling.LANCZOS if image.width > thumb else Image.Resampling.NEAREST
        )
        x, y = round(position - thumb / 2), heights[-1]
        draw.rectangle([x - 3, y - 3, x + thumb + 2, y + thumb + 2], fill=_shade(leaf[j] / peak, theme))
        picture.paste(image, (x, y))
        text = value_text(float(scores[panel * per_prompt + j]))
        draw.text((position, y + thumb + 5), text, fill=theme.ink, font=used, anchor="mt")


def _shade(value: float, theme: Theme) -> tuple[int, int, int]:
    """-1..1 -> orange .. grey .. blue."""
    end, share = (theme.better if value > 0 else theme.worse), min(abs(value), 1) ** 0.7
    return tuple(round(a + (z - a) * share) for a, z in zip(theme.even, end))


def score_text(score: float) -> str:
    return "no score" if math.isnan(score) else f"{score:.4f}"


def score_sheet(
    images,
    scores: Tensor,
    prompts: list[str],
    name: str,
    columns: int = 4,
    labels: list[str] | None = None,
    ranked: list[list[int]] | None = None,
    theme: Theme = LIGHT,
) -> Image.Image:
    """A contact sheet of images with their scores and prompts; a prompt that all share stands once above them.

    images: [B, H, W, 3] in 0..1, or a list of [H, W, 3] of any sizes. scores: [B], NaN = no score. labels: instead of
    prompts, which take up to three lines. ranked: image numbers of each prompt, best first: the order to show them in,
    each with its number and, where a prompt has several, its place; without it they come as they are. The best and the
    worst are framed, of each prompt where they are ranked.
    """
    longest = max(max(image.shape[:2]) for image in images)
    scales = [192 / (longest if longest < 192 else max(image.shape[:2])) for image in images]
    sizes = [tuple(max(1, round(image.shape[i] * scale)) for i in (1, 0)) for image, scale in zip(images, scales)]
    columns = min(columns, len(images))
    wide, high = max(128, *(size[0] for size in sizes)), max(size[1] for size in sizes)
    captions = labels or (prompts if len(set(prompts)) > 1 else [""] * len(images))
    text, line = SHEET_TEXT, SHEET_TEXT + 4
    below = [wrapped(caption, text, wide, 3) for caption in captions]
    cell = wide + 12, high + 18 + line * (1 + max(map(len, below)))
    above = [f"{name}: mean {score_text(float(scores.nanmean()))}"] + ([] if any(captions) else prompts[:1])
    width = max(columns, 2) * cell[0] + 12
    above = [part for said in above for part in wrapped(said, text, width - 24)]
    top = 16 + len(above) * line
    picture = Image.new("RGB", (width, top + -(-len(images) // columns) * cell[1]), theme.paper)
    draw = ImageDraw.Draw(picture)
    for i, said in enumerate(above):
        draw.text((12, 8 + i * line), said, fill=theme.grey if i else theme.ink, font=font(text))
    framed = _framed(scores, ranked or [list(range(len(images)))], theme)
    contest = any(len(group) > 1 for group in ranked or [])
    places = {i: place for group in ranked or [] for place, i in enumerate(group, 1)}
    for at, i in enumerate(places or range(len(images))):
        x, y = 12 + at % columns * cell[0], top + 4 + at // columns * cell[1]
        left, upper = x + (wide - sizes[i][0]) // 2, y + high - sizes[i][1]
        if i in framed:
            draw.rectangle([left - 4, upper - 4, left + sizes[i][0] + 3, upper + sizes[i][1] + 3], fill=framed[i])
        resampling = Image.Resampling.LANCZOS if scales[i] < 1 else Image.Resampling.NEAREST
        picture.paste(to_picture(images[i]).resize(sizes[i], resampling), (left, upper))
        score = value_text(float(scores[i])) if not scores[i].isnan() else "no score"
        said = f"{places[i]}.  {score}" if contest else score
        draw.text((x, y + high + 5), said, fill=framed.get(i, theme.ink), font=font(text))
        if places and not labels:
            draw.text((x + wide, y + high + 5), f"#{i}", fill=theme.grey, font=font(text), anchor="ra")
        for row, caption in enumerate(below[i], 1):
            draw.text((x, y + high + 5 + row * line), caption, fill=theme.grey, font=font(text))
    return picture


def _framed(scores: Tensor, groups: list[list[int]], theme: Theme) -> dict[int, tuple[int, int, int]]:
    """The colour of the best and of the worst image of each group; none where all are even or without a score."""
    framed = {}
    for group in groups:
        known = [i for i in group if not scores[i].isnan()]
        values = [float(scores[i]) for i in known]
        if known and min(values) < max(values):
            framed |= {known[values.index(min(values))]: theme.worse, known[values.index(max(values))]: theme.better}
    return framed


def numbered_sheet(images, levels=(), title: str = "", side: int = 384, enlarge: bool = False, theme: Theme = LIGHT):
    """Images with their numbers, counted from 1, as a PIL picture, and its layout for those who cut it up again.

    levels: image numbers counted from 0, best level first: the first level is framed blue, the last one orange. side:
    of the largest image, in pixels.
    """
    longest = max(max(image.shape[:2]) for image in images)
    scale = side / longest if enlarge else min(1.0, side / longest)
    sizes = [(max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))) for image in images]
    wide, high = max(size[0] for size in sizes), max(size[1] for size in sizes)
    columns, text = math.ceil(math.sqrt(len(images))), max(15, min(26, wide // 8))
    top = round(1.6 * text) if title else 0
    step = wide + 2 * SHEET_MARGIN, high + 2 * SHEET_MARGIN + text + 5
    picture = Image.new("RGB", (columns * step[0], -(-len(images) // columns) * step[1] + top), theme.paper)
    draw = ImageDraw.Draw(picture)
    if title:
        title = shortened(title, text, picture.width - 2 * SHEET_MARGIN)
        draw.text((SHEET_MARGIN, 5), title, fill=theme.ink, font=font(text))
    for i, (image, size) in enumerate(zip(images, sizes)):
        x, y = SHEET_MARGIN + i % columns * step[0], SHEET_MARGIN + top + i // columns * step[1]
        best, worst = len(levels) > 1 and i in levels[0], len(levels) > 1 and i in levels[-1]
        if best or (worst and (len(levels) > 2 or len(levels[-1]) == 1)):
            draw.rectangle([x - 4, y - 4, x + size[0] + 3, y + size[1] + 3], fill=theme.better if best else theme.worse)
        picture.paste(
            to_picture(image.float()).resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS),
            (x, y),
        )
        draw.text(
            (x, y + size[1] + SHEET_MARGIN),
            f"{i + 1}{'  best' if best else ''}",
            fill=theme.better if best else theme.ink,
            font=font(text),
        )
    return picture, {"columns": columns, "image": list(sizes[0]), "step": list(step), "margin": SHEET_MARGIN}


def strip(images: Tensor) -> Image.Image:
    """Pictures [B, H, W, 3] side by side, STRIP_SIDE high, with nothing between them: with those of other iterations,
    how a run goes.
    """
    pictures = [to_picture(image) for image in images]
    shrunk = STRIP_SIDE / pictures[0].height
    size = (max(1, round(pictures[0].width * shrunk)), STRIP_SIDE)
    resampling = Image.Resampling.LANCZOS if shrunk < 1 else Image.Resampling.NEAREST
    row = Image.new("RGBA", (len(pictures) * (size[0] + 6) - 6, STRIP_SIDE))
    for i, picture in enumerate(pictures):
        row.paste(picture.resize(size, resampling), (i * (size[0] + 6), 0))
    return row


def with_strips(
    picture: Image.Image, rows: list[tuple[str, Image.Image]], theme: Theme = LIGHT, said: str = ""
) -> Image.Image:
    """A picture with strips below it, a heading above them, and each one's label left of it, all as wide as fits."""
    if not rows:
        return picture
    gap, size = 8, picture.width * READABLE // 1000
    label = max(round(font(size).getlength(text)) for text, _ in rows) + 3 * gap
    room = picture.width - label - 2 * gap
    shrunk = min(1.0, *(room / row.width for _, row in rows))
    fits = [row.resize((round(row.width * shrunk), round(row.height * shrunk)), Image.Resampling.LANCZOS)
            if shrunk < 1 else row for _, row in rows]  # fmt: skip
    head = size + 2 * gap if said else gap
    high = picture.height + head + sum(row.height + gap for row in fits) + gap
    whole = Image.new("RGB", (picture.width, high), theme.paper)
    whole.paste(picture, (0, 0))
    draw, top = ImageDraw.Draw(whole), picture.height + head
    draw.line([(2 * gap, picture.height), (picture.width - 2 * gap, picture.height)], fill=theme.pale, width=2)
    said = shortened(said, size, picture.width - 4 * gap)
    draw.text((2 * gap, picture.height + gap), said, fill=theme.grey, font=font(size))
    for (text, _), row in zip(rows, fits):
        draw.text((label - gap, top + row.height / 2), text, fill=theme.ink, font=font(size), anchor="rm")
        whole.paste(row, (label, top), row if row.mode == "RGBA" else None)
        top += row.height + gap
    return whole


def noise_picture(
    levels: list[float], kind: str, width: int = 420, height: int = 200, theme: Theme = LIGHT
) -> Image.Image:
    """The noise level of each tree layer as bars, root side left."""
    picture = Image.new("RGB", (width, height), theme.paper)
    draw = ImageDraw.Draw(picture)
    draw.text((10, 8), f"{kind}: noise level per tree layer", fill=theme.ink, font=font(14))
    top, bottom, slot = 48, height - 28, (width - 20) / len(levels)
    for k, level in enumerate(levels):
        x = 10 + slot * k
        y = bottom - (bottom - top) * level / max(*levels, 1e-9, 1.0)
        draw.rectangle([x + slot * 0.15, y, x + slot * 0.85, bottom], fill=theme.better)
        draw.text((x + slot / 2, y - 4), f"{level:.3g}", fill=theme.ink, font=font(12), anchor="mb")
        draw.text((x + slot / 2, bottom + 6), f"layer {k + 1}", fill=theme.grey, font=font(12), anchor="mt")
    return picture
