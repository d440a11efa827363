"""Pictures of a run: the reward curve, and a tree with its thumbnails, scores and advantages."""

import functools
import math

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, GREY, PALE, PAPER = (35, 35, 40), (130, 130, 138), (225, 225, 230), (255, 255, 255)
BETTER, WORSE = (24, 100, 200), (225, 110, 20)  # blue and orange: told apart by the colour-blind too
MAX_PROMPTS = 4  # panels in one tree picture
SHEET_MARGIN, SHEET_STRIP = 4, 20  # pixels around a picture of a numbered sheet, and for the number below it
STRIP, STRIP_SIDE = 8, 96  # pictures in a strip, and their height in pixels


@functools.cache
def font(size: int):
    return ImageFont.load_default(size)


def word(text: str, side: int) -> Image.Image:
    """A short text in dark letters on a plain square of so many pixels."""
    picture = Image.new("RGB", (side, side), PAPER)
    ImageDraw.Draw(picture).text((side // 10, side // 2), text, fill=INK, font=font(side // 6), anchor="lm")
    return picture


def to_tensor(picture: Image.Image) -> Tensor:
    """PIL picture -> [1, H, W, 3] in 0..1."""
    raw = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return raw.view(1, picture.height, picture.width, 3).float() / 255


def to_picture(image: Tensor) -> Image.Image:
    """[H, W, 3] in 0..1 -> PIL picture."""
    return Image.fromarray((image[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def reward_curve(metrics: list[dict], width: int = 900, height: int = 300) -> Image.Image:
    """Mean reward per iteration, with the spread within the groups as a band."""
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    metrics = [m for m in metrics if "reward" in m] or [{"reward": 0.0, "reward_std": 0.0}]
    means, spreads = [m["reward"] for m in metrics], [m.get("reward_std", 0.0) for m in metrics]
    low, high = min(m - s for m, s in zip(means, spreads)), max(m + s for m, s in zip(means, spreads))
    margin = 0.05 * (high - low) or max(abs(high), 1e-3) * 0.1
    low, high = low - margin, high + margin
    left, right, top, bottom = 70, width - 20, 30, height - 34

    def x(i):
        return left + (right - left) * (i / max(len(metrics) - 1, 1))

    def y(value):
        return bottom - (bottom - top) * (value - low) / (high - low)

    for j in range(5):
        value = low + (high - low) * j / 4
        draw.line([(left, y(value)), (right, y(value))], fill=PALE)
        draw.text((left - 8, y(value)), f"{value:.3g}", fill=GREY, font=font(12), anchor="rm")
    upper = [(x(i), y(m + s)) for i, (m, s) in enumerate(zip(means, spreads))]
    lower = [(x(i), y(m - s)) for i, (m, s) in enumerate(zip(means, spreads))]
    if len(metrics) > 1:
        draw.polygon(upper + lower[::-1], fill=(214, 228, 246))
        draw.line([(x(i), y(m)) for i, m in enumerate(means)], fill=BETTER, width=3, joint="curve")
    else:
        draw.line([upper[0], lower[0]], fill=(160, 190, 230), width=3)
    draw.ellipse([x(len(means) - 1) - 4, y(means[-1]) - 4, x(len(means) - 1) + 4, y(means[-1]) + 4], fill=BETTER)
    every = max(1, len(metrics) // 10)
    for i in range(0, len(metrics), every):
        draw.text((x(i), bottom + 6), str(metrics[i].get("iteration", i)), fill=GREY, font=font(12), anchor="mt")
    draw.text((left, 8), f"mean reward {means[-1]:.4f}   band: spread within a prompt's group", fill=INK, font=font(13))
    draw.text((right, height - 4), "iteration", fill=GREY, font=font(12), anchor="rb")
    return picture


def tree_picture(forest, layers: list[Tensor], scores: Tensor, images: Tensor, prompts: list[str]) -> Image.Image:
    """The trees of up to four prompts: edges coloured by advantage, leaves as thumbnails with their scores.

    layers: edge advantages per layer. scores: [P * K]. images: [P * K, H, W, 3] in 0..1. prompts: one text per image.
    """
    per_prompt = forest.leaves_per_prompt
    shown = min(len(forest.prompts), MAX_PROMPTS)
    thumb = max(24, min(96, 1400 // per_prompt - 6))
    panel_height = 70 + 46 * forest.depth + thumb + 30
    picture = Image.new("RGB", (max(per_prompt * (thumb + 6) + 20, 620), shown * panel_height + 26), PAPER)
    draw = ImageDraw.Draw(picture)
    peak = max(max(float(a.abs().max()) for a in layers), 1e-9)
    for panel in range(shown):
        first = panel * per_prompt
        _draw_group(picture, draw, forest, layers, scores, images, panel, panel * panel_height, thumb, peak)
        mean = score_text(float(scores[first : first + per_prompt].nanmean()))
        title = (
            f"{' '.join(prompts[first].split())}   mean {mean}   steps {forest.start + 1} to "
            f"{forest.start + forest.depth} branch"
        )
        draw.text((10, panel * panel_height + 8), title, fill=INK, font=font(14))
    more = f" ({len(forest.prompts) - shown} more prompts not shown)" if len(forest.prompts) > shown else ""
    draw.text(
        (10, picture.height - 20),
        f"blue: better than its group; orange: worse; thicker: more so{more}",
        fill=GREY,
        font=font(13),
    )
    return picture


def _draw_group(picture, draw, forest, layers, scores, images, panel: int, top: int, thumb: int, peak: float) -> None:
    per_prompt, b = forest.leaves_per_prompt, forest.branching
    row = [[10 + (thumb + 6) * (j + 0.5) for j in range(per_prompt)]]
    for _ in range(forest.depth):
        below = row[0]
        row.insert(0, [sum(below[j * b : (j + 1) * b]) / b for j in range(len(below) // b)])
    heights = [top + 42 + 46 * k for k in range(forest.depth + 1)]
    for k, advantage in enumerate(layers):
        edges = len(row[k + 1])
        values = advantage[panel * edges : (panel + 1) * edges].tolist()
        for j, value in enumerate(values):
            ends = [(row[k][j // b], heights[k]), (row[k + 1][j], heights[k + 1])]
            draw.line(ends, fill=_shade(value / peak), width=1 + round(4 * min(abs(value) / peak, 1)))
    for k in range(forest.depth):
        for position in row[k]:
            draw.ellipse([position - 5, heights[k] - 5, position + 5, heights[k] + 5], fill=INK)
    leaf = layers[-1][panel * per_prompt : (panel + 1) * per_prompt].tolist()
    for j, position in enumerate(row[-1]):
        image = to_picture(images[panel * per_prompt + j])
        image = image.resize(
            (thumb, thumb), Image.Resampling.LANCZOS if image.width > thumb else Image.Resampling.NEAREST
        )
        x, y = round(position - thumb / 2), heights[-1]
        draw.rectangle([x - 3, y - 3, x + thumb + 2, y + thumb + 2], fill=_shade(leaf[j] / peak))
        picture.paste(image, (x, y))
        draw.text(
            (position, y + thumb + 5),
            f"{scores[panel * per_prompt + j]:.3g}",
            fill=INK,
            font=font(11 if thumb >= 40 else 9),
            anchor="mt",
        )


def _shade(value: float) -> tuple[int, int, int]:
    """-1..1 -> orange .. light grey .. blue."""
    end, share = (BETTER if value > 0 else WORSE), min(abs(value), 1) ** 0.7
    return tuple(round(a + (z - a) * share) for a, z in zip((200, 200, 205), end))


def score_text(score: float) -> str:
    return "no score" if math.isnan(score) else f"{score:.4f}"


def score_sheet(
    images, scores: Tensor, prompts: list[str], name: str, columns: int = 4, labels: list[str] | None = None
) -> Image.Image:
    """Images in their order as a contact sheet, each with its score and prompt; the best and the worst are marked.

    images: [B, H, W, 3] in 0..1, or a list of [H, W, 3] of any sizes. scores: [B], NaN = no score. labels: instead of
    prompts.
    """
    longest = max(max(image.shape[:2]) for image in images)
    scales = [192 / (longest if longest < 192 else max(image.shape[:2])) for image in images]
    sizes = [
        (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        for image, scale in zip(images, scales)
    ]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    wide, high = max(size[0] for size in sizes), max(size[1] for size in sizes)
    cell = wide + 12, high + 44
    picture = Image.new("RGB", (columns * cell[0] + 12, rows * cell[1] + 34), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((12, 8), f"{name}: mean {score_text(float(scores.nanmean()))}", fill=INK, font=font(15))
    best, worst = int(scores.nan_to_num(-math.inf).argmax()), int(scores.nan_to_num(math.inf).argmin())
    for i, (image, scale, size) in enumerate(zip(images, scales, sizes)):
        x, y = 12 + i % columns * cell[0], 34 + i // columns * cell[1]
        left, top = x + (wide - size[0]) // 2, y + high - size[1]
        if best != worst and i in (best, worst):
            draw.rectangle(
                [left - 4, top - 4, left + size[0] + 3, top + size[1] + 3], fill=BETTER if i == best else WORSE
            )
        resampling = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        picture.paste(to_picture(image).resize(size, resampling), (left, top))
        draw.text((x, y + high + 5), score_text(float(scores[i])), fill=INK, font=font(13))
        draw.text((x, y + high + 22), shortened(draw, (labels or prompts)[i], 11, wide), fill=GREY, font=font(11))
    return picture


def numbered_sheet(images, levels=(), title: str = "", side: int = 384, enlarge: bool = False):
    """Images with their numbers, counted from 1, as a PIL picture, and its layout for those who cut it up again.

    levels: image numbers counted from 0, best level first: the first level is framed blue, the last one orange. side:
    of the largest image, in pixels.
    """
    longest = max(max(image.shape[:2]) for image in images)
    scale = side / longest if enlarge else min(1.0, side / longest)
    sizes = [(max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))) for image in images]
    wide, high = max(size[0] for size in sizes), max(size[1] for size in sizes)
    columns, top = math.ceil(math.sqrt(len(images))), 24 if title else 0
    step = wide + 2 * SHEET_MARGIN, high + 2 * SHEET_MARGIN + SHEET_STRIP
    picture = Image.new("RGB", (columns * step[0], -(-len(images) // columns) * step[1] + top), PAPER)
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((SHEET_MARGIN, 5), shortened(draw, title, 13, picture.width - 20), fill=INK, font=font(13))
    for i, (image, size) in enumerate(zip(images, sizes)):
        x, y = SHEET_MARGIN + i % columns * step[0], SHEET_MARGIN + top + i // columns * step[1]
        best, worst = len(levels) > 1 and i in levels[0], len(levels) > 1 and i in levels[-1]
        if best or (worst and (len(levels) > 2 or len(levels[-1]) == 1)):
            draw.rectangle([x - 4, y - 4, x + size[0] + 3, y + size[1] + 3], fill=BETTER if best else WORSE)
        picture.paste(
            to_picture(image.float()).resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS),
            (x, y),
        )
        draw.text(
            (x, y + size[1] + SHEET_MARGIN),
            f"{i + 1}{'  best' if best else ''}",
            fill=BETTER if best else INK,
            font=font(15),
        )
    return picture, {"columns": columns, "image": list(sizes[0]), "step": list(step), "margin": SHEET_MARGIN}


def shortened(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    """As much of the text as fits into `width` pixels."""
    short = text = " ".join(text.split())
    while short and draw.textlength(short, font(size)) > width:
        short = short[:-2]
    return short if len(short) == len(text) else f"{short}.."


def strip(images: Tensor) -> Image.Image:
    """Pictures [B, H, W, 3] side by side, STRIP_SIDE high: with those of other iterations, how a run goes."""
    pictures = [to_picture(image) for image in images]
    shrunk = STRIP_SIDE / pictures[0].height
    size = (max(1, round(pictures[0].width * shrunk)), STRIP_SIDE)
    resampling = Image.Resampling.LANCZOS if shrunk < 1 else Image.Resampling.NEAREST
    row = Image.new("RGB", (len(pictures) * (size[0] + 6) - 6, STRIP_SIDE), PAPER)
    for i, picture in enumerate(pictures):
        row.paste(picture.resize(size, resampling), (i * (size[0] + 6), 0))
    return row


def with_strips(picture: Image.Image, rows: list[tuple[str, Image.Image]]) -> Image.Image:
    """A picture with strips below it, each with its label, all as wide as fits."""
    if not rows:
        return picture
    label, gap = 90, 8
    fits = [row.resize((w := min(row.width, picture.width - label - 2 * gap), round(row.height * w / row.width)),
                       Image.Resampling.LANCZOS) if row.width > picture.width - label - 2 * gap else row
            for _, row in rows]  # fmt: skip
    whole = Image.new("RGB", (picture.width, picture.height + sum(row.height + gap for row in fits) + gap), PAPER)
    whole.paste(picture, (0, 0))
    draw, top = ImageDraw.Draw(whole), picture.height + gap
    for (text, _), row in zip(rows, fits):
        draw.text((gap, top + row.height / 2), text, fill=INK, font=font(16), anchor="lm")
        whole.paste(row, (label, top))
        top += row.height + gap
    return whole


def noise_picture(levels: list[float], kind: str, width: int = 420, height: int = 200) -> Image.Image:
    """The noise level of each tree layer as bars, root side left."""
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((10, 8), f"{kind}: noise level per tree layer", fill=INK, font=font(14))
    top, bottom, slot = 48, height - 28, (width - 20) / len(levels)
    for k, level in enumerate(levels):
        x = 10 + slot * k
        y = bottom - (bottom - top) * level / max(*levels, 1e-9, 1.0)
        draw.rectangle([x + slot * 0.15, y, x + slot * 0.85, bottom], fill=BETTER)
        draw.text((x + slot / 2, y - 4), f"{level:.3g}", fill=INK, font=font(12), anchor="mb")
        draw.text((x + slot / 2, bottom + 6), f"layer {k + 1}", fill=GREY, font=font(12), anchor="mt")
    return picture
