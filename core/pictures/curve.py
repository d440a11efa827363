"""Curves over the iterations of a run: series from metrics, round ticks, smoothing, and the drawing itself."""

import bisect
import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .theme import LIGHT, Theme, font

POINTS = 160  # of a curve: a longer run is averaged down to so many
SMOOTHED = 12  # from so many points on a curve is smoothed; with fewer each can be seen
FINE = 2  # curves are drawn this much larger and averaged, which smooths their edges
LARGEST = 1e30  # beyond it a number is taken for a missing one
SMALLEST = 1e-30  # below it a number is taken for 0
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass
class Curve:
    """Values over the iterations; NaN = missing."""

    values: list[float]
    spread: list[float] | None = None  # half the width of a band around the values
    marks: list[float] | None = None  # points on the same scale: evaluations on held-out prompts
    held_out: bool = False  # values are evaluations, missing in most iterations
    small: bool = False  # thin, in grey and with a scale from 0
    percent: bool = False


def reward_curve(metrics: list[dict], width: int = 900, height: int = 300, theme: Theme = LIGHT) -> Image.Image:
    """Mean reward per iteration under its name, smoothed, with the spread within the groups as a band."""
    picture, size = Image.new("RGB", (width, height), theme.paper), max(10, round(24 * min(width / 900, height / 300)))
    draw, values = ImageDraw.Draw(picture), series(metrics, "reward")
    now, names = known(values), reward_names(metrics)
    value = value_text(now[-1] if now else math.nan)
    title = shortened(names[0] if len(names) == 1 else "reward", size, width - 4 * size)
    title = shortened(f"{title} {value} · band: spread within a prompt's group", size, width - 2 * size)
    draw.text((size // 2, size // 3), title, fill=theme.ink, font=font(size))
    curve = Curve(values, series(metrics, "reward_std"))
    box = (round(4.6 * size), round(1.8 * size), width - size // 2, height - round(1.7 * size))
    if box[2] - box[0] > 8 and box[3] - box[1] > 8:
        draw_curve(picture, curve, box, size, theme)
        draw_iterations(picture, metrics, (box[0], box[3] + size // 4, box[2]), size, theme)
    return picture


def reward_names(metrics: list[dict]) -> list[str]:
    """Names of the rewards in the newest iterations."""
    keys = (key for row in metrics[-10:] for key in row if key.startswith("rewards/") and key.endswith("/mean"))
    return [key[len("rewards/") : -len("/mean")] for key in dict.fromkeys(keys)]


def draw_curve(picture: Image.Image, curve: Curve, box: Box, size: int, theme: Theme = LIGHT) -> None:
    """Numbered grid lines, band, points, curve and rings into box; the numbers, `size` high, left of it."""
    wide, high, edge = (box[2] - box[0]) * FINE, (box[3] - box[1]) * FINE, round(size / 2.5 * FINE)
    part = Image.new("RGB", (wide, high), theme.paper)
    draw, values = ImageDraw.Draw(part), averaged(curve.values)
    if not known(values):
        return
    spread = averaged(curve.spread) if curve.spread else [0.0] * len(values)
    spread = [0.0 if math.isnan(s) else abs(s) for s in spread]
    bottom, top = scale_of(curve, values, spread)

    def y(value):
        return high - edge - (high - 2 * edge) * (value - bottom) / (top - bottom)

    def x(i, of):
        return edge + (wide - 2 * edge) * (i / (of - 1) if of > 1 else 0.5)

    room = high - 2 * edge
    apart = FINE * max(0.95 * size, min(2.4 * size, room / FINE / 3))
    lines = ticks(bottom, top, apart * (top - bottom) / room) if room > 0 else []
    for tick in lines:
        draw.line([(0, y(tick)), (wide, y(tick))], fill=theme.pale, width=FINE)
    _draw_values(draw, curve, values, spread, x, y, size * FINE / 20, theme)
    picture.paste(part.reduce(FINE), box[:2])
    pen = ImageDraw.Draw(picture)
    texts = [value_text(tick, True) for tick in lines] if curve.percent else tick_texts(lines)
    for tick, text in zip(lines, texts):
        place = box[0] - size // 4, box[1] + y(tick) / FINE
        pen.text(place, text, fill=theme.grey, font=font(size), anchor="rm")


def _draw_values(draw, curve: Curve, values, spread, x, y, unit: float, theme: Theme) -> None:
    """Band, points, curve and rings; unit: pixels that count as one."""
    count, marks = len(values), curve.marks or []
    there = [i for i, v in enumerate(values) if not math.isnan(v)]
    colour = theme.grey if curve.small else theme.ink if curve.held_out else theme.better
    lines = values if curve.held_out else smoothed(values)
    for run in [there] if curve.held_out and there else stretches(values):
        ends = [[(x(i, count), y(values[i] + side * spread[i])) for i in run] for side in (1, -1)]
        if curve.spread and len(run) > 1:
            draw.polygon(ends[0] + ends[1][::-1], fill=theme.band)
        elif curve.spread:
            draw.line([ends[0][0], ends[1][0]], fill=theme.band, width=round(8 * unit))
        if lines is not values:
            for i in run:
                dot(draw, x(i, count), y(values[i]), _px(2.2 * unit), theme.pale if curve.small else theme.faint)
        points = [(x(i, count), y(lines[i])) for i in run]
        if len(points) > 1:
            draw.line(points, fill=colour, width=_px((2 if curve.small else 3.5) * unit), joint="curve")
        dot(draw, *points[-1], _px((3.5 if curve.small else 5) * unit), colour)
    rings = [(i, v, len(marks)) for i, v in enumerate(marks) if not math.isnan(v)] or [
        (i, values[i], count) for i in there if curve.held_out
    ]
    for i, value, of in rings[:: -(-(-len(rings) // 30) or 1)]:
        ring(draw, x(i, of), y(value), _px(5 * unit), _px(2 * unit), theme)


def draw_iterations(
    picture: Image.Image, metrics: list[dict], place: tuple[int, int, int], size: int, theme: Theme = LIGHT
) -> None:
    """The axis below curves: round numbers of iterations, counted as those that are done. place: left, top, right of
    the curves.
    """
    draw, used, (left, top, right), edge = ImageDraw.Draw(picture), font(size), place, round(size / 2.5)
    if not metrics:
        draw.text((right, top), "no iteration yet", fill=theme.grey, font=used, anchor="ra")
        return
    numbers = done(metrics)
    last = str(numbers[-1])
    draw.text((left - size // 4, top), "iteration", fill=theme.grey, font=used, anchor="ra")
    draw.text((right, top), last, fill=theme.grey, font=used, anchor="ra")
    end = right - draw.textlength(last, used) - size // 2
    apart = 3 * size * (numbers[-1] - numbers[0]) / max(right - left, 1)
    for tick in ticks(numbers[0], numbers[-1], apart, whole=True) if len(numbers) > 1 else []:
        share = bisect.bisect_left(numbers, tick) / (len(numbers) - 1)
        at, half = left + edge + (right - left - 2 * edge) * share, draw.textlength(f"{tick:.0f}", used) / 2
        if max(at, left + half) + half < end:
            draw.text((max(at, left + half), top), f"{tick:.0f}", fill=theme.grey, font=used, anchor="ma")


def done(metrics: list[dict]) -> list[int]:
    """How many iterations were done after each row, as checkpoints count them: a row's own number plus one."""
    numbers = [number(row.get("iteration")) for row in metrics]
    if any(math.isnan(n) or abs(n) > 1e12 for n in numbers) or any(a >= b for a, b in zip(numbers, numbers[1:])):
        return [i + 1 for i in range(len(metrics))]
    return [int(n) + 1 for n in numbers]


# numbers


def series(metrics: list[dict], key: str) -> list[float]:
    return [number(row.get(key)) for row in metrics]


def number(value) -> float:
    """A float; NaN for whatever is no finite number of a drawable size."""
    usable = isinstance(value, (int, float)) and abs(value) < LARGEST  # NaN compares as False
    return (float(value) if abs(value) > SMALLEST else 0.0) if usable else math.nan


def known(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def averaged(values: list[float]) -> list[float]:
    """At most POINTS values: the means of as many stretches of equal length, NaN where a stretch has none."""
    if len(values) <= POINTS:
        return values
    edges = [round(i * len(values) / POINTS) for i in range(POINTS + 1)]
    parts = (known(values[a:b]) for a, b in zip(edges, edges[1:]))
    return [sum(part) / len(part) if part else math.nan for part in parts]


def smoothed(values: list[float]) -> list[float]:
    """The means of a twelfth of the curve on either side, shorter at its ends, so that nothing lags behind; `values`
    itself where there are too few. What is missing stays missing.
    """
    if len(known(values)) < SMOOTHED:
        return values
    reach = max(2, len(values) // 12)
    means = []
    for i, value in enumerate(values):
        near = max(min(reach, i, len(values) - 1 - i), reach // 2)  # the same on both sides, or a slope would bend
        window = known(values[max(i - near, 0) : i + near + 1])
        means.append(math.nan if math.isnan(value) else sum(window) / len(window))
    return means


def stretches(values: list[float]) -> list[list[int]]:
    """Stretches of numbers without a gap, as lists of their places."""
    runs = [[]]
    for i, value in enumerate(values):
        if not math.isnan(value):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def scale_of(curve: Curve, values: list[float], spread: list[float]) -> tuple[float, float]:
    """Lowest and highest value of a curve's scale: at least a twentieth of the largest value apart, so that what hardly
    changes looks flat.
    """
    ends = [v + side * s for v, s in zip(values, spread) for side in (1, -1)]
    all_known = known([*ends, *(curve.marks or []), *([0.0] if curve.small else [])])
    low, high = min(all_known, default=0.0), max(all_known, default=1.0)
    missing = max(0.05 * max(abs(low), abs(high)) - (high - low), 0.0) or (1.0 if low == high else 0.0)
    low, high = (low, high + missing) if curve.small else (low - missing / 2, high + missing / 2)
    if len(values) == 1 and not curve.small:  # a lone point's band would fill the whole height
        low, high = 2 * low - high, 2 * high - low
    return low, high


def ticks(low: float, high: float, apart: float, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high, as many as are `apart` from each other; where that
    gives less than two, the first and the last of a finer step, or one where there is no room for two.
    """
    if not high > low:
        return [low]
    apart = min(max(apart, (high - low) / 1000, 1.0 if whole else 0.0), high - low)
    power, finer, found = math.floor(math.log10(apart)) - 1, [], []
    for step in (factor * 10.0**at for at in range(power, power + 3) for factor in (1, 2, 5)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if whole and step < 1:
            continue
        found = [i * step for i in range(first, last + 1)]
        if step >= apart and len(found) > 1:
            return found
        if step >= apart:
            break
        finer = found or finer
    ends = [finer[0], finer[-1]] if finer else []
    return ends if ends and ends[1] - ends[0] >= apart else found or finer[len(finer) // 2 :][:1]


def tick_texts(values: list[float]) -> list[str]:
    """Numbers with as many digits as all of them need."""
    largest = max((abs(v) for v in values), default=0.0)
    values = [0.0 if abs(v) < 1e-9 * largest else v for v in values]
    for digits in range(4):
        if largest < 1e5 and all(abs(round(v, digits) - v) <= 1e-6 * largest for v in values):
            return [no_zero(f"{v:.{digits}f}") if v else "0" for v in values]
    return [_power(v) if v else "0" for v in values]


def _power(value: float) -> str:
    """1e-4, 1.5e-4, 123457: with the digits it needs, six at most."""
    digits, power = f"{value:.5e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def value_text(value: float, percent: bool = False) -> str:
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
    return no_zero(f"{value:.{min(3 if size >= 1e-2 else 4, max(0, 2 - math.floor(math.log10(size))))}f}")


def no_zero(text: str) -> str:
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


# texts and dots


def plain(text: str) -> str:
    """A text on one line that any font call takes."""
    return " ".join(str(text)[:4000].encode("utf-8", "replace").decode().split())


def shortened(text: str, size: int, width: float) -> str:
    """As many words of the text as fit into `width` pixels, and an ellipsis where some do not; a word that alone is too
    long is cut.
    """
    text = plain(text)
    if len(text) <= 400 and font(size).getlength(text) <= width:
        return text
    words, short = text[:400].split(), ""
    while words and font(size).getlength(f"{short} {words[0]}…".strip()) <= width:
        short = f"{short} {words.pop(0)}".strip()
    if not short and words:
        short = words[0]
        while short and font(size).getlength(f"{short}…") > width:
            short = short[:-1]
    return f"{short.rstrip(' ,;:.')}…" if short else ""


def wrapped(text: str, size: int, width: float, lines: int = 2) -> list[str]:
    """A text broken at spaces into at most so many lines, the last of them shortened."""
    words, broken = plain(text)[:400].split(), []
    while words and len(broken) < lines - 1:
        line = words.pop(0)
        while words and font(size).getlength(f"{line} {words[0]}") <= width:
            line = f"{line} {words.pop(0)}"
        broken.append(shortened(line, size, width))
    rest = " ".join(words) + ("…" if len(plain(text)) > 400 else "")
    return [line for line in [*broken, shortened(rest, size, width)] if line]


def dot(draw: ImageDraw.ImageDraw, x: float, y: float, radius: int, colour) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def ring(draw: ImageDraw.ImageDraw, x: float, y: float, radius: int, width: int, theme: Theme) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=theme.paper, outline=theme.ink, width=width)


def _px(size: float) -> int:
    return max(1, round(size))
