"""How a run is doing, in one picture and in one line: made to be read at a glance, also at half its size."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from .plot import BETTER, GREY, INK, PALE, PAPER, WORSE, font, shortened, to_picture

BAND = (214, 228, 246)
MAX_ROWS = 5  # curves above each other; more would be too flat to read
TEXT = 20  # size of the smaller texts, in pixels of a picture 900 wide
POINTS = 160  # of a curve: a longer run is averaged down to so many
FINE = 2  # curves are drawn this much larger and averaged, which smooths their edges
LARGEST = 1e30  # beyond it a number is taken for a missing one


@dataclass
class Sample:
    """One image of the newest tree."""

    image: Tensor  # [H, W, 3] in 0..1
    score: float  # NaN = none
    prompt: str


@dataclass
class _Row:
    """One curve and the label left of it. Values go over the iterations; NaN = missing."""

    name: str
    values: list[float]
    spread: list[float] | None = None  # half the width of a band around the values
    marks: list[float] | None = None  # points on the same scale: evaluations on held-out prompts
    held_out: bool = False  # values are evaluations, missing in most iterations
    small: bool = False  # one of the two below, in grey and with a scale from 0
    percent: bool = False

    @property
    def label(self) -> int:
        """Width of the label, in pixels of a picture 900 wide."""
        return 112 if self.small else 150


def dashboard(
    metrics: list[dict],
    best: Sample | None = None,
    worst: Sample | None = None,
    width: int = 900,
    height: int = 420,
    judge: str = "judge",
) -> Image.Image:
    """A run so far: the reward, or each reward on its own scale; what it does on held-out prompts; clip fraction and
    KL; two images.

    metrics: one dict per iteration, as in metrics.jsonl; `eval/reward` and `eval/judge` in some of them. Any key may be
    missing and any number NaN. Where no KL is measured the spread within the groups takes its place. judge: what
    `eval/judge` is called. Everything grows with the picture.
    """
    picture = Image.new("RGB", (width, height), PAPER)
    scale = min(width / 900, height / 420)
    gap, right = _px(16, scale), width
    if best is not None or worst is not None:
        right = width - _px(200, scale)
        for i, (sample, title, colour) in enumerate(((best, "best", BETTER), (worst, "worst", WORSE))):
            if sample is not None:
                top, bottom = (gap + half * (height - gap) // 2 for half in (i, i + 1))
                _thumbnail(picture, sample, title, colour, (right + gap // 2, top, width - gap, bottom), scale)
    foot = height - _px(92, scale)
    rows, more = _reward_rows(metrics, judge)
    step = (foot - _px(28, scale) - gap // 2) / len(rows)
    for i, row in enumerate(rows):
        _draw_row(picture, row, (gap, round(gap // 2 + i * step), right - gap, round(gap // 2 + (i + 1) * step)), scale)
    _draw_iterations(
        picture, metrics, (gap, foot - _px(26, scale), right - gap), scale, f"+{more} more" if more else ""
    )
    middle, kl = (gap + right) // 2, _series(metrics, "kl")
    second = (
        _Row("KL", kl, small=True) if any(_known(kl)) else _Row("spread", _series(metrics, "reward_std"), small=True)
    )
    for row, left, end in (
        (_Row("clipped", _series(metrics, "clip_frac"), small=True, percent=True), gap, middle - gap),
        (second, middle, right - gap),
    ):
        _draw_row(picture, row, (left, height - _px(80, scale), end, height - _px(10, scale)), scale)
    return picture


def _reward_rows(metrics: list[dict], judge: str) -> tuple[list[_Row], int]:
    """What the large curves show: one reward with its spread, or several without; then evaluations. And how many
    rewards find no room.
    """
    names = list(
        dict.fromkeys(
            key for row in metrics[-10:] for key in row if key.startswith("rewards/") and key.endswith("/mean")
        )
    )
    held_out, judged = _series(metrics, "eval/reward"), _series(metrics, "eval/judge")
    extra = [_Row(judge, judged, held_out=True)] if _known(judged) else []
    if len(names) < 2:
        return [_Row("reward", _series(metrics, "reward"), _series(metrics, "reward_std"), held_out), *extra], 0
    extra = [_Row("held-out", held_out, held_out=True), *extra] if _known(held_out) else extra
    shown = names[: MAX_ROWS - len(extra)]
    return [*(_Row(name[len("rewards/") : -len("/mean")], _series(metrics, name)) for name in shown), *extra], len(
        names
    ) - len(shown)


def _draw_row(picture: Image.Image, row: _Row, box: tuple[int, int, int, int], scale: float) -> None:
    """A label with the newest value, and the curve right of it. box: left, top, right, bottom."""
    left, top, right, bottom = box
    draw, known, marks = ImageDraw.Draw(picture), _known(row.values), _known(row.marks or [])
    small, large = font(_px(TEXT, scale)), font(_px(26 if row.small else 30, scale))
    lines = [
        (shortened(draw, _plain(row.name)[:48], _px(TEXT, scale), _px(row.label - 14, scale)), small, GREY),
        (_value(known[-1] if known else math.nan, row.percent), large, INK),
    ]
    if not row.small and bottom - top >= _px(84, scale) and len(known) > 1:
        lines.append((f"from {_value(known[0])}", small, GREY))
    if marks:
        lines += [("held-out", small, GREY), (_value(marks[-1]), large, INK)]
    heights = [_px(24 if used is small else 34, scale) for _, used, _ in lines]
    y = (top + bottom - sum(heights)) / 2
    for i, ((text, used, colour), high) in enumerate(zip(lines, heights)):
        draw.text((left, y + high / 2), text, fill=colour, font=used, anchor="lm")
        if marks and i == len(lines) - 2:  # what the rings are
            _ring(
                draw, left + draw.textlength(text, small) + _px(14, scale), y + high / 2, _px(5, scale), _px(2, scale)
            )
        y += high
    inner = (left + _px(row.label, scale), top + _px(8, scale), right, bottom - _px(8, scale))
    if inner[2] - inner[0] > 8 and inner[3] - inner[1] > 8:
        _draw_curve(picture, row, inner, scale)


def _draw_curve(picture: Image.Image, row: _Row, box: tuple[int, int, int, int], scale: float) -> None:
    """Axis lines, band, curve and rings into box, drawn larger and averaged down."""
    wide, high, edge = (box[2] - box[0]) * FINE, (box[3] - box[1]) * FINE, _px(8 * FINE, scale)
    part = Image.new("RGB", (wide, high), PAPER)
    draw, values, marks = ImageDraw.Draw(part), _averaged(row.values), row.marks or []
    spread = [0.0 if math.isnan(s) else abs(s) for s in _averaged(row.spread)] if row.spread else [0.0] * len(values)
    upper, lower = [v + s for v, s in zip(values, spread)], [v - s for v, s in zip(values, spread)]
    bottom, top = _range([*upper, *lower, *marks], row.small)
    if len(values) == 1 and not row.small:  # a lone point's band would fill the whole height
        bottom, top = 2 * bottom - top, 2 * top - bottom

    def at(i, value, of):
        return edge + (wide - 2 * edge) * (i / (of - 1) if of > 1 else 0.5), high - edge - (high - 2 * edge) * (
            value - bottom
        ) / (top - bottom)

    for line in (edge, high - edge):
        draw.line([(0, line), (wide, line)], fill=PALE, width=FINE)
    known, colour = (
        [i for i, v in enumerate(values) if not math.isnan(v)],
        GREY if row.small else INK if row.held_out else BETTER,
    )
    for run in [known] if row.held_out and known else _runs(values):
        ends = [at(i, upper[i], len(values)) for i in run], [at(i, lower[i], len(values)) for i in run[::-1]]
        points = [at(i, values[i], len(values)) for i in run]
        if row.spread and len(run) > 1:
            draw.polygon(ends[0] + ends[1], fill=BAND)
        elif row.spread:
            draw.line([ends[0][0], ends[1][0]], fill=BAND, width=2 * edge)
        if len(points) > 1:
            draw.line(
                points, fill=colour, width=_px((2 if row.small or row.held_out else 3) * FINE, scale), joint="curve"
            )
        _dot(draw, *points[-1], _px((3.5 if row.small else 5) * FINE, scale), colour)
    rings = [(i, v, len(marks)) for i, v in enumerate(marks) if not math.isnan(v)] or [
        (i, values[i], len(values)) for i in known if row.held_out
    ]
    for ring in rings[:: -(-(-len(rings) // 30) or 1)]:
        _ring(draw, *at(*ring), _px(5 * FINE, scale), _px(2 * FINE, scale))
    picture.paste(part.reduce(FINE), box[:2])


def _draw_iterations(
    picture: Image.Image, metrics: list[dict], place: tuple[int, int, int], scale: float, note: str
) -> None:
    """First and last iteration's number below the curves, and a note below the labels. place: left, top, right."""
    draw, used, (left, top, right) = ImageDraw.Draw(picture), font(_px(TEXT, scale)), place
    draw.text((left, top), note, fill=GREY, font=used)
    first, last = (str(metrics[i].get("iteration", i % len(metrics)))[:12] for i in (0, -1)) if metrics else ("", "")
    draw.text((right, top), f"iteration {last}" if metrics else "no iteration yet", fill=GREY, font=used, anchor="ra")
    if first != last:
        draw.text((left + _px(158, scale), top), first, fill=GREY, font=used)


def _thumbnail(
    picture: Image.Image, sample: Sample, title: str, colour, box: tuple[int, int, int, int], scale: float
) -> None:
    """Title and score, the image in a coloured frame, and up to two lines of its prompt.

    box: left, top, right, bottom.
    """
    left, top, right, bottom = box
    draw, border = ImageDraw.Draw(picture), max(1, _px(4, scale))
    draw.text(
        (left, top + _px(10, scale)),
        f"{title} {_value(_number(sample.score))}",
        fill=colour,
        font=font(_px(24, scale)),
        anchor="lm",
    )
    room = (right - left - 2 * border, bottom - top - _px(28 + 54, scale) - 2 * border)
    if min(room) < 8:
        return
    image = _reduced(sample.image, room)
    at = (left + border, top + _px(28, scale) + border)
    draw.rectangle(
        [at[0] - border, at[1] - border, at[0] + image.width + border - 1, at[1] + image.height + border - 1],
        fill=colour,
    )
    picture.paste(image, at)
    below = at[1] + image.height + border + _px(3, scale)
    for i, line in enumerate(_two_lines(draw, _plain(sample.prompt), _px(18, scale), right - left)):
        draw.text((left, below + i * _px(22, scale)), line, fill=GREY, font=font(_px(18, scale)))


def _reduced(image: Tensor, room: tuple[int, int]) -> Image.Image:
    """[H, W, 3] as a picture as large as fits into room. Of a large image a part of the pixels is enough for that."""
    skip = max(1, min(image.shape[0] // (2 * room[1]), image.shape[1] // (2 * room[0])))
    small = to_picture(image.detach()[::skip, ::skip].float().nan_to_num(0.0))
    factor = min(room[0] / small.width, room[1] / small.height)
    size = (max(1, round(small.width * factor)), max(1, round(small.height * factor)))
    return small.resize(size, Image.Resampling.HAMMING if factor < 1 else Image.Resampling.NEAREST)


def _two_lines(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> list[str]:
    """The beginning of a text broken at a space; the second line is shortened."""
    words, first = text[:200].split(), ""
    while words and draw.textlength(f"{first} {words[0]}".strip(), font(size)) <= width:
        first = f"{first} {words.pop(0)}".strip()
    lines = [first, " ".join(words)] if first else [" ".join(words)]
    return [shortened(draw, line[:48], size, width) for line in lines if line]


def _series(metrics: list[dict], key: str) -> list[float]:
    return [_number(row.get(key)) for row in metrics]


def _number(value) -> float:
    """A float; NaN for whatever is no finite number of a drawable size."""
    usable = isinstance(value, (int, float)) and abs(value) < LARGEST  # NaN compares as False
    return float(value) if usable else math.nan


def _known(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _averaged(values: list[float]) -> list[float]:
    """At most POINTS values: the means of as many stretches of equal length, NaN where a stretch has none."""
    if len(values) <= POINTS:
        return values
    edges = [round(i * len(values) / POINTS) for i in range(POINTS + 1)]
    stretches = (_known(values[a:b]) for a, b in zip(edges, edges[1:]))
    return [sum(known) / len(known) if known else math.nan for known in stretches]


def _runs(values: list[float]) -> list[list[int]]:
    """Stretches of numbers without a gap, as lists of their places."""
    runs = [[]]
    for i, value in enumerate(values):
        if not math.isnan(value):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _range(values: list[float], from_zero: bool) -> tuple[float, float]:
    """Lowest and highest value of a scale: at least a twentieth of the largest value apart, so that what hardly changes
    looks flat.
    """
    known = _known(values) + ([0.0] if from_zero else [])
    low, high = min(known, default=0.0), max(known, default=1.0)
    missing = max(0.05 * max(abs(low), abs(high)) - (high - low), 0.0) or (1.0 if low == high else 0.0)
    return (low, high + missing) if from_zero else (low - missing / 2, high + missing / 2)


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float, radius: int, colour) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def _ring(draw: ImageDraw.ImageDraw, x: float, y: float, radius: int, width: int) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=PAPER, outline=INK, width=width)


def _px(size: float, scale: float) -> int:
    return max(1, round(size * scale))


def _plain(text: str) -> str:
    """A text on one line that any font call takes."""
    return " ".join(str(text)[:400].encode("utf-8", "replace").decode().split())


def _value(value: float, percent: bool = False) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.0f} %" if percent else brief(value)


def brief(value: float) -> str:
    """About three digits, no leading zero: .412, 24.1, -1.03, 1.2e-4."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "no number"
    size = abs(float(f"{value:.3g}"))
    if size < 1e-3 or size >= 1e5:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits}e{int(power)}"
    return _no_zero(f"{value:.{min(3 if size >= 1e-2 else 4, max(0, 2 - math.floor(math.log10(size))))}f}")


def _no_zero(text: str) -> str:
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def status_line(row: dict, done: int, total: int, seconds_per_iteration: float, memory_bytes: int | None = None) -> str:
    """'iteration 12/100 · reward .412 ± .031 · KL 1.2e-4 · 310 forwards/s · 11.3 GB · 4 min left'; what is not known is
    left out.

    row: the newest metrics. done, total: iterations; total 0 = no end. memory_bytes: in use or at its peak, as the
    caller counts it.
    """
    parts = [f"iteration {done}/{total}" if total else f"iteration {done}"]
    reward, spread, kl, speed = (_number(row.get(key)) for key in ("reward", "reward_std", "kl", "forwards"))
    if "reward" in row:
        text = brief(reward)
        decimals = len(text.partition(".")[2]) if "e" not in text else None
        band = (
            ""
            if math.isnan(spread)
            else f" ± {brief(spread) if decimals is None else _no_zero(f'{spread:.{decimals}f}')}"
        )
        parts.append("reward is no number" if math.isnan(reward) else f"reward {text}{band}")
    if kl > 0:
        parts.append(f"KL {brief(kl)}")
    seconds = _number(row.get("seconds"))
    if seconds > 0 and speed > 0:
        parts.append(f"{brief(speed / seconds)} forwards/s")
    if memory_bytes:
        parts.append(f"{memory_bytes / 1e9:.1f} GB")
    if total and math.isfinite(seconds_per_iteration):
        parts.append(_time_left((total - done) * seconds_per_iteration))
    return " · ".join(parts)


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
