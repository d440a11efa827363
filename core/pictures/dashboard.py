"""How a run is doing, in one picture and in one line: made to be read at a glance, also as small as a node shows it."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from .curve import (
    Box,
    Curve,
    brief,
    draw_curve,
    draw_iterations,
    known,
    no_zero,
    number,
    reward_names,
    ring,
    series,
    value_text,
    wrapped,
)
from .plot import to_picture
from .theme import LIGHT, Theme, font

WAIT = "The curve begins after the first iteration. Stop whenever you like: Run goes on."
MAX_ROWS = 5  # curves above each other; more would be too flat to read
WIDTH, HEIGHT = 900, 520  # the size that all lengths below are for; a node shows it about 400 wide
TEXT, LARGE = 24, 34  # heights of texts
LABEL, SMALL_LABEL, NUMBERS, SIDE = 164, 118, 66, 220  # widths: of labels, of ticks' numbers, of the column of images
FOOT = 112  # height of the two small curves


@dataclass
class Sample:
    """One image of the newest tree."""

    image: Tensor  # [H, W, 3] in 0..1
    score: float  # NaN = none
    prompt: str


@dataclass
class _Row:
    """A curve and the label left of it."""

    name: str
    curve: Curve


def dashboard(
    metrics: list[dict],
    best: Sample | None = None,
    worst: Sample | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
    judge: str = "judge",
    theme: Theme = LIGHT,
) -> Image.Image:
    """A run so far: the reward, or each reward on its own scale; what it does on held-out prompts; how much of the
    learning was held back, and how far the policy is from the base model; two images.

    metrics: one dict per iteration, as in metrics.jsonl; `eval/reward` and `eval/judge` in some of them. Any key may be
    missing and any number NaN. Where nothing is clipped the gradient's signal-to-noise ratio takes its place, and where
    no KL is measured the spread within the groups. best, worst: where both have the same score neither is drawn, as
    none is better. judge: what `eval/judge` is called. Everything grows with the picture.
    """
    picture = Image.new("RGB", (width, height), theme.paper)
    scale = min(width / WIDTH, height / HEIGHT)
    gap, right = _px(16, scale), width
    if best is not None or worst is not None:
        right = width - _px(SIDE, scale)
        _draw_samples(picture, best, worst, (right + gap // 2, gap, width - gap, height), scale, theme)
    foot = height - _px(FOOT, scale)
    rows, more = _reward_rows(metrics, judge)
    step = (foot - _px(TEXT + 12, scale) - gap // 2) / len(rows)
    for i, row in enumerate(rows):
        box = (gap, round(gap // 2 + i * step), right - gap, round(gap // 2 + (i + 1) * step))
        _draw_row(picture, row, box, scale, theme)
    axis = foot - _px(TEXT + 8, scale)
    if more:
        note = (gap, axis), f"+{more} more"
        ImageDraw.Draw(picture).text(*note, fill=theme.grey, font=font(_px(TEXT, scale)))
    draw_iterations(picture, metrics, (gap + _px(LABEL + NUMBERS, scale), axis, right - gap), _px(TEXT, scale), theme)
    if not metrics:
        size, room = _px(TEXT, scale), (gap + _px(LABEL + NUMBERS, scale), right - 2 * gap)
        for i, line in enumerate(wrapped(WAIT, size, room[1] - room[0], 4) if room[0] < room[1] else []):
            place = (room[0], foot // 3 + i * _px(TEXT + 8, scale))
            ImageDraw.Draw(picture).text(place, line, fill=theme.ink, font=font(size))
    middle, kl = (gap + right) // 2, series(metrics, "kl")
    clipped, signal = series(metrics, "clip_frac"), series(metrics, "gradient_snr")
    first = ("held back", Curve(clipped, small=True, percent=True))
    if known(signal) and not any(known(clipped)):
        first = ("signal", Curve(signal, small=True))
    second = ("change", kl) if any(known(kl)) else ("spread", series(metrics, "reward_std"))
    for row, left, end in (
        (_Row(*first), gap, middle - gap),
        (_Row(second[0], Curve(second[1], small=True)), middle, right - gap),
    ):
        _draw_row(picture, row, (left, height - _px(FOOT - 14, scale), end, height - _px(6, scale)), scale, theme)
    return picture


def _reward_rows(metrics: list[dict], judge: str) -> tuple[list[_Row], int]:
    """What the large curves show: one reward with its spread, or several without; then evaluations. And how many
    rewards find no room.
    """
    names = reward_names(metrics)
    held_out, judged = series(metrics, "eval/reward"), series(metrics, "eval/judge")
    extra = [_Row(judge, Curve(judged, held_out=True))] if known(judged) else []
    if len(names) < 2:
        curve = Curve(series(metrics, "reward"), series(metrics, "reward_std"), held_out)
        return [_Row(names[0] if names else "reward", curve), *extra], 0
    extra = [_Row("held-out", Curve(held_out, held_out=True)), *extra] if known(held_out) else extra
    shown = names[: MAX_ROWS - len(extra)]
    rows = [_Row(name, Curve(series(metrics, f"rewards/{name}/mean"))) for name in shown]
    return [*rows, *extra], len(names) - len(shown)


def _draw_row(picture: Image.Image, row: _Row, box: Box, scale: float, theme: Theme) -> None:
    """A label with the newest value, and the curve right of it."""
    left, top, right, bottom = box
    draw, curve, size = ImageDraw.Draw(picture), row.curve, _px(TEXT, scale)
    now, marks, room = known(curve.values), known(curve.marks or []), bottom - top
    small, large = font(size), font(_px(TEXT + 4 if curve.small else LARGE, scale))
    label = _px(SMALL_LABEL if curve.small else LABEL, scale)
    lines = [(value_text(now[-1] if now else math.nan, curve.percent), large, theme.ink)]
    if marks:
        lines += [("held-out", small, theme.grey), (value_text(marks[-1]), large, theme.ink)]
    if not curve.small and len(now) > 1 and room >= _px(LARGE + 3 * TEXT + 60 * bool(marks), scale):
        lines.insert(1, (f"from {value_text(now[0])}", small, theme.grey))
    names = 2 if room >= sum(_line(used, small, scale) for _, used, _ in lines) + 2 * _line(small, small, scale) else 1
    name = wrapped(row.name, size, label - _px(10, scale), names)
    lines = [(text, small, theme.grey) for text in name] + lines
    y = (top + bottom - sum(_line(used, small, scale) for _, used, _ in lines)) / 2
    for i, (text, used, colour) in enumerate(lines):
        y += (high := _line(used, small, scale))
        draw.text((left, y - high / 2), text, fill=colour, font=used, anchor="lm")
        if marks and i == len(lines) - 2:  # what the rings are
            at = left + draw.textlength(text, small) + _px(14, scale), y - high / 2
            ring(draw, *at, _px(5, scale), _px(2, scale), theme)
    inner = (left + label + _px(NUMBERS, scale), top + _px(4, scale), right, bottom - _px(4, scale))
    if inner[2] - inner[0] > 8 and inner[3] - inner[1] > 8 and size > 2:
        draw_curve(picture, curve, inner, size, theme)


def _line(used, small, scale: float) -> int:
    """Height of a line of a label."""
    return _px(TEXT + 3 if used is small else LARGE + 2, scale)


def _draw_samples(picture: Image.Image, best, worst, box: Box, scale: float, theme: Theme) -> None:
    """The best and the worst image below each other; a word where none is better."""
    left, top, right, bottom = box
    if best is not None and worst is not None and best.score == worst.score:
        draw, size = ImageDraw.Draw(picture), _px(TEXT, scale)
        draw.text((left, top), "all even", fill=theme.ink, font=font(size))
        for i, line in enumerate(wrapped("no image is liked better than another yet", size, right - left, 4)):
            draw.text((left, top + (i + 1.3) * 1.15 * size), line, fill=theme.grey, font=font(size))
        return
    middle = (top + bottom) // 2
    for sample, title, colour, ends in (
        (best, "best", theme.better, (top, middle)),
        (worst, "worst", theme.worse, (middle, bottom)),
    ):
        if sample is not None:
            _thumbnail(picture, sample, title, colour, (left, ends[0], right, ends[1]), scale, theme)


def _thumbnail(picture: Image.Image, sample: Sample, title: str, colour, box: Box, scale: float, theme: Theme) -> None:
    """Title and score, the image in a coloured frame, and up to two lines of its prompt."""
    left, top, right, bottom = box
    draw, border, size, line = ImageDraw.Draw(picture), _px(4, scale), _px(TEXT, scale), _px(TEXT + 3, scale)
    title = f"{title} {value_text(number(sample.score))}"
    draw.text((left, top + line / 2), title, fill=colour, font=font(size), anchor="lm")
    room = (right - left - 2 * border, bottom - top - 3 * line - _px(12, scale) - 2 * border)
    if min(room) < 8:
        return
    image = _reduced(sample.image, room)
    at = (left + border, top + line + _px(2, scale) + border)
    frame = [at[0] - border, at[1] - border, at[0] + image.width + border - 1, at[1] + image.height + border - 1]
    draw.rectangle(frame, fill=colour)
    picture.paste(image, at)
    below = at[1] + image.height + border + _px(2, scale)
    for i, text in enumerate(wrapped(sample.prompt, size, right - left)):
        draw.text((left, below + i * line), text, fill=theme.grey, font=font(size))


def _reduced(image: Tensor, room: tuple[int, int]) -> Image.Image:
    """[H, W, 3] as a picture as large as fits into room. Of a large image a part of the pixels is enough for that."""
    skip = max(1, min(image.shape[0] // (2 * room[1]), image.shape[1] // (2 * room[0])))
    small = to_picture(image.detach()[::skip, ::skip].float().nan_to_num(0.0))
    factor = min(room[0] / small.width, room[1] / small.height)
    size = (max(1, round(small.width * factor)), max(1, round(small.height * factor)))
    return small.resize(size, Image.Resampling.HAMMING if factor < 1 else Image.Resampling.NEAREST)


def _px(size: float, scale: float) -> int:
    return max(1, round(size * scale))


def status_line(row: dict, done: int, total: int, seconds_per_iteration: float, memory_bytes: int | None = None) -> str:
    """'iteration 12/100 · reward .412 ± .031 · change 1.2e-4 · 11.3 GB · 4 min left'; what is not known is left out.

    row: the newest metrics; change is its KL. done, total: iterations; total 0 = no end. memory_bytes: in use or at its
    peak, as the caller counts it.
    """
    parts = [f"iteration {done}/{total}" if total else f"iteration {done}"]
    reward, spread, kl = (number(row.get(key)) for key in ("reward", "reward_std", "kl"))
    if math.isnan(reward):
        parts += ["reward is no number"] if "reward" in row else []
    elif number(row.get("frac_reward_zero_std")) == 1:
        parts.append(f"reward {brief(reward)}, all even")
    else:
        parts.append(f"reward {brief(reward)}{_give_or_take(brief(reward), spread)}")
    if kl > 0:
        parts.append(f"change {brief(kl)}")
    if memory_bytes:
        parts.append(f"{memory_bytes / 1e9:.1f} GB")
    if total and math.isfinite(seconds_per_iteration):
        parts.append(_time_left((total - done) * seconds_per_iteration))
    return " · ".join(parts)


def _give_or_take(reward: str, spread: float) -> str:
    """' ± .031', with as many digits as the reward has."""
    if math.isnan(spread):
        return ""
    digits = len(reward.partition(".")[2])
    return f" ± {brief(spread) if 'e' in reward else no_zero(f'{spread:.{digits}f}')}"


def _time_left(seconds: float) -> str:
    """Two units at most, the smaller one only where it matters."""
    if seconds <= 0:
        return "done"
    if seconds < 90:
        return f"{math.ceil(seconds)} s left"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min left"
    hours = round(seconds / 3600)
    if minutes < 600:
        return f"{minutes // 60} h {minutes % 60} min left"
    return f"{hours} h left" if hours < 48 else f"{hours // 24} days {hours % 24} h left"
