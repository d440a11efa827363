"""The picture and the line that show how a run is doing: right, legible, and never the reason why a run stops."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from core.pictures import curve, plot
from core.pictures import dashboard as module
from core.pictures.curve import reward_curve, shortened, smoothed, tick_texts, ticks, wrapped
from core.pictures.dashboard import HEIGHT, WIDTH, Sample, brief, dashboard, status_line
from core.pictures.theme import DARK, LIGHT, font
from embedded.shapes import captions, draw


def sample(index, score, prompt=None, size=96):
    return Sample(
        draw(
            torch.tensor([index]),
            torch.Generator().manual_seed(0),
            size=size,
            styles=torch.zeros(1, 5, dtype=torch.long),
        ).movedim(1, -1)[0],
        score,
        prompt or captions()[index],
    )


BEST, WORST = (
    sample(3, 0.4821),
    sample(50, 0.1133, "a photo of a purple square on a gray background, studio light, " * 9),
)


def rows(count, names=("size",), every=0, judge=False):
    """A run whose rewards rise; each reward on a scale of its own."""
    run = []
    for i in range(count):
        part = i / max(count - 1, 1)
        row = {
            "iteration": i,
            "reward": 0.2 + 0.3 * part,
            "reward_std": 0.04,
            "clip_frac": 0.1 * part,
            "kl": 2e-4 * part,
            "seconds": 4.0,
            "forwards": 1240,
        }
        row |= {f"rewards/{name}/mean": 100**k * (0.2 + 0.3 * part) for k, name in enumerate(names)}
        if every and i % every == 0:
            row |= {"eval/reward": 0.2 + 0.2 * part} | ({"eval/judge": 0.27 - 0.02 * part} if judge else {})
        run.append(row)
    return run


def places(picture, colour, box=None):
    """Rows and columns [n, 2] of the pixels of a colour, within box (left, top, right, bottom)."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
    left, top, right, bottom = box or (0, 0, picture.width, picture.height)
    return (
        (pixels == torch.tensor(colour, dtype=torch.uint8)).all(2)[top:bottom, left:right]
    ).nonzero() + torch.tensor([top, left])


@pytest.fixture
def drawn(monkeypatch):
    """Boxes of all texts, with the texts, and of all curves and images pasted."""
    boxes, text, paste = [], ImageDraw.ImageDraw.text, Image.Image.paste

    def text_too(self, xy, value, **options):
        if value:
            boxes.append((value, self.textbbox(xy, value, font=options["font"], anchor=options.get("anchor"))))
        text(self, xy, value, **options)

    def paste_too(self, image, box=None, *rest):
        if isinstance(image, Image.Image):
            boxes.append(("<picture>", (*box, box[0] + image.width, box[1] + image.height)))
        paste(self, image, box, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text_too)
    monkeypatch.setattr(Image.Image, "paste", paste_too)
    return boxes


MODELS = (["size"], ["HPSv2.1", "ImageReward", "aesthetic predictor v2.5"], [f"model {i}" for i in range(9)])
CASES = [
    rows(n, names, every, judge)
    for n in (1, 5, 500)
    for names in MODELS
    for every, judge in ((0, False), (2, False), (2, True))
]


@pytest.mark.parametrize("size", [(900, 420), (1400, 600), (700, 420), (900, 700), (WIDTH, HEIGHT)], ids=str)
@pytest.mark.parametrize("metrics", [[], *CASES], ids=lambda m: f"{len(m)}x{len(m[0]) if m else 0}")
def test_nothing_overlaps_or_is_cut_off(drawn, metrics, size):
    for best, worst in ((BEST, WORST), (None, WORST), (None, None)):
        drawn.clear()
        dashboard(metrics, best, worst, *size, judge="a second judge with a long name")
        for i, (name, a) in enumerate(drawn):
            assert 0 <= a[0] <= a[2] <= size[0] and 0 <= a[1] <= a[3] <= size[1], (name, a)
            for other, b in drawn[:i]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (name, a, other, b)


def test_the_newest_values_are_written(drawn):
    dashboard(rows(11, ["HPSv2.1", "ImageReward"], every=5, judge=True), BEST, WORST, judge="PickScore")
    texts = [text for text, _ in drawn]
    assert {
        "HPSv2.1",
        ".500",
        "ImageReward",
        "50.0",
        "held-out",
        ".400",
        "PickScore",
        ".250",
        "held back",
        "10 %",
        "change",
        "2.0e-4",
        "best .482",
        "worst .113",
        "2",
        "iteration",
        "11",
    } <= set(texts)


def test_the_signal_is_drawn_where_nothing_is_held_back(drawn):
    signal = [{**row, "clip_frac": 0.0, "gradient_snr": -0.01 + 0.01 * i} for i, row in enumerate(rows(14))]
    dashboard(signal)
    texts = {text for text, _ in drawn}
    assert {"signal", ".120"} <= texts and "held back" not in texts
    drawn.clear()
    dashboard([{**row, "clip_frac": 0.1} for row in signal])
    assert "held back" in {text for text, _ in drawn} and "signal" not in {text for text, _ in drawn}


def test_one_reward_shows_its_spread_and_where_it_came_from(drawn):
    one = dashboard(rows(50))
    assert {"size", ".500", "from .200"} <= {text for text, _ in drawn}
    assert len(places(one, LIGHT.band)) > 1000 and len(places(dashboard(rows(50, ["a", "b"])), LIGHT.band)) == 0


def test_the_smallest_texts_can_be_read_at_400_pixels(monkeypatch):
    sizes, font = [], module.font
    monkeypatch.setattr(module, "font", lambda size: sizes.append(size) or font(size))
    dashboard(rows(500, ["a", "b", "c"], 20, True), BEST, WORST)
    assert min(sizes) * 400 / 900 >= 10


def test_a_rising_reward_rises_each_on_its_own_scale():
    picture = dashboard(rows(200, ["a", "b", "c"]))
    curves = places(picture, LIGHT.better)
    for top, bottom in ((8, 129), (129, 250), (250, 372)):
        drawn = curves[(curves[:, 0] >= top) & (curves[:, 0] < bottom)]
        left, right = drawn[drawn[:, 1] < 300, 0].float().mean(), drawn[drawn[:, 1] > 780, 0].float().mean()
        assert left - right > 60  # of the 95 pixels that it has


def test_what_hardly_changes_looks_flat():
    metrics = [{"reward": 5.9 + 0.001 * (i % 2)} for i in range(50)]
    heights = places(dashboard(metrics), LIGHT.better)[:, 0]
    assert heights.max() - heights.min() < 20


def test_evaluations_are_rings_at_their_own_height():
    """Held-out scores far below the reward lie below the curve, in another colour."""
    metrics = [{"reward": 0.5, "reward_std": 0.01, **({"eval/reward": 0.1} if i % 10 == 0 else {})} for i in range(60)]
    picture = dashboard(metrics)
    plot = (250, 0, 900, 360)
    rings, curve = places(picture, LIGHT.ink, plot), places(picture, LIGHT.better, plot)
    assert len(rings) > 50 and rings[:, 0].min() > curve[:, 0].max() + 100
    gaps = rings[:, 1].unique().diff()
    assert (gaps > 40).sum() == 5  # six rings


def test_the_newest_trees_images_are_shown_in_their_colours():
    picture = dashboard(rows(5), BEST, WORST)
    right = (680, 0, WIDTH, HEIGHT)
    green, red = places(picture, (13, 153, 38), right), places(picture, (219, 20, 26), right)
    assert len(green) > 500 and len(red) > 500 and green[:, 0].max() < red[:, 0].min()
    assert places(picture, LIGHT.better, right)[:, 0].max() < places(picture, LIGHT.worse, right)[:, 0].min()
    assert len(places(dashboard(rows(5)), (13, 153, 38))) == 0


@pytest.mark.parametrize("height, width", [(1, 1), (1024, 1024), (16, 900), (900, 16), (511, 1023)])
def test_images_of_any_size_fit(drawn, height, width):
    dashboard(rows(3), Sample(torch.rand(height, width, 3), 1.0, "noise"), WORST)
    pictures = [box for text, box in drawn if text == "<picture>"]
    assert all(right <= WIDTH and bottom <= HEIGHT for _, _, right, bottom in pictures)
    assert max(box[2] - box[0] for box in pictures if box[0] > 680) >= 20


def test_long_runs_are_averaged_not_thinned():
    values = curve.averaged([float(i % 3 == 0) for i in range(3000)])
    assert len(values) == curve.POINTS and all(0.2 < value < 0.5 for value in values)
    assert curve.averaged([math.nan] * 3000 + [1.0] * 3000)[79:81] == pytest.approx([math.nan, 1.0], nan_ok=True)
    short = [1.0, math.nan, 3.0]
    assert curve.averaged(short) is short


VALUE = st.one_of(
    st.floats(allow_nan=True), st.integers(-(10**40), 10**40), st.none(), st.text(max_size=3), st.just(0.3)
)
KEYS = [
    "iteration",
    "reward",
    "reward_std",
    "clip_frac",
    "kl",
    "rewards/a/mean",
    "rewards/b/mean",
    "rewards//mean",
    "rewards/\ud800\n/mean",
    "eval/reward",
    "eval/judge",
    "forwards",
    "seconds",
]
SIZES = [(900, 420), (400, 187), (64, 64), (30, 500), (2000, 90)]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(KEYS), VALUE), max_size=12),
    st.integers(1, 300),
    st.sampled_from(SIZES),
    st.text(max_size=300),
    st.floats(),
)
def test_nothing_in_the_metrics_raises(metrics, times, size, text, score):
    image = Sample(torch.full((20, 30, 3), math.nan), score, text + "\n\ud800")
    picture = dashboard(metrics * times, image, image, *size, judge=text)
    assert picture.size == size
    for row in metrics:
        assert "\n" not in status_line(row, 3, 10, score, 5)


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, 1e300, 10**40, None, "3"], ids=str)
def test_a_senseless_number_is_a_gap(wrong):
    metrics = rows(30)
    metrics[12]["reward"] = metrics[20]["reward_std"] = metrics[20]["kl"] = math.nan
    expected = dashboard(metrics).tobytes()
    metrics[12]["reward"] = metrics[20]["reward_std"] = metrics[20]["kl"] = wrong
    assert dashboard(metrics).tobytes() == expected


def test_gaps_stay_gaps():
    metrics = [{"reward": math.nan if 20 <= i < 40 else 0.5} for i in range(60)]
    columns = places(dashboard(metrics), LIGHT.better)[:, 1].unique()
    assert columns.diff().max() > 200  # of 726 pixels


@given(st.floats(-1e12, 1e12).filter(lambda v: v == 0 or abs(v) > 1e-9))
def test_brief_numbers_are_short_and_right(value):
    text = brief(value)
    assert len(text) <= 8 and not text.startswith(("0.", "-0."))
    assert float(text) == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize(
    "value, text",
    [
        (0.412, ".412"),
        (0.0312, ".031"),
        (-0.5, "-.500"),
        (24.13, "24.1"),
        (1234.5, "1234"),
        (1.2e-4, "1.2e-4"),
        (9.999, "10.0"),
        (99999.9, "1.0e5"),
        (0.99999, "1.00"),
        (0, "0"),
        (-1.034, "-1.03"),
    ],
)
def test_brief_numbers(value, text):
    assert brief(value) == text


def test_the_line():
    row = {"reward": 0.412, "reward_std": 0.0308, "kl": 1.2e-4, "forwards": 1240, "seconds": 4.0}
    assert (
        status_line(row, 12, 100, 2.7, 11.3e9)
        == "iteration 12/100 · reward .412 ± .031 · change 1.2e-4 · 11.3 GB · 4 min left"
    )
    assert status_line({"reward": 24.13, "reward_std": 0.5, "kl": 0.0}, 1, 0, 9.0) == "iteration 1 · reward 24.1 ± .5"
    assert status_line({"reward": 1.2e-4, "reward_std": 3e-5}, 1, 0, 9.0) == "iteration 1 · reward 1.2e-4 ± 3.0e-5"
    assert status_line({"reward": math.nan}, 100, 100, 2.0) == "iteration 100/100 · reward is no number · done"
    assert status_line({}, 0, 5, math.nan) == "iteration 0/5"


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.2, "1 s left"),
        (89, "89 s left"),
        (91, "2 min left"),
        (5940, "99 min left"),
        (6100, "1 h 42 min left"),
        (36000, "10 h left"),
        (3600 * 50, "2 days 2 h left"),
    ],
)
def test_time_left(seconds, text):
    assert status_line({}, 0, 1, seconds).endswith(text)


# two palettes


def contrast(one, other):
    """Of WCAG 2: (L1 + .05) / (L2 + .05) of the relative luminances."""

    def luminance(colour):
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def tree():
    forest = SimpleNamespace(leaves_per_prompt=4, prompts=["a"], depth=2, branching=2, start=0)
    layers = [torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0, 0.2, -0.2])]
    return forest, layers, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.rand(4, 32, 32, 3), ["a cat"] * 4


PICTURES = {
    "dashboard": lambda theme: dashboard(rows(30, ["a", "b"], 5, True), BEST, WORST, theme=theme),
    "all even": lambda theme: dashboard(rows(1), BEST, BEST, theme=theme),
    "reward curve": lambda theme: reward_curve(rows(30), theme=theme),
    "tree": lambda theme: plot.tree_picture(*tree(), theme=theme),
    "scores": lambda theme: plot.score_sheet(*tree()[3:1:-1], ["a", "b", "c", "d"], "size", theme=theme),
    "numbers": lambda theme: plot.numbered_sheet(tree()[3], [[0], [1, 2], [3]], "a", theme=theme)[0],
    "noise": lambda theme: plot.noise_picture([0.2, 0.5], "cps", theme=theme),
    "strips": lambda theme: plot.with_strips(
        dashboard(rows(2), theme=theme), [("1", plot.strip(tree()[3]))], theme, "a"
    ),
}


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("name", PICTURES)
def test_every_text_has_contrast_in_both_palettes(monkeypatch, name, theme):
    used, text = set(), ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, xy, value, **more: used.add(more["fill"]) or text(self, xy, value, **more),
    )
    picture = PICTURES[name](theme)
    assert used and min(contrast(colour, theme.paper) for colour in used) >= 4.5
    corners = {picture.getpixel((x, y)) for x in (0, picture.width - 1) for y in (0, picture.height - 1)}
    assert corners == {theme.paper}, "nothing of the other palette is left"


# axes, smoothing and words


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6), st.integers(2, 12))
def test_ticks_are_round_and_apart(low, size, most):
    high = low + size
    found = ticks(low, high, (high - low) / most)
    assert 1 <= len(found) <= most + 1
    assert all(low - 1e-6 * size <= tick <= high + 1e-6 * size for tick in found)
    for gap in (b - a for a, b in zip(found, found[1:])):
        assert len(found) == 2 or f"{gap:.3e}".startswith(("1.000", "2.000", "5.000"))
        assert gap >= (high - low) / most * (1 - 1e-6)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(1e-4, 1e6))
def test_ticks_of_iterations_are_whole_numbers(first, more, apart):
    found = ticks(first, first + more, apart, whole=True)
    assert found and all(tick == round(tick) for tick in found) and found == sorted(set(found))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [(900, 300), (2000, 300), (300, 100)])
def test_short_runs_have_a_curve(count, size):
    assert reward_curve(rows(count), *size).size == size


@pytest.mark.parametrize(
    "values, texts",
    [([0.2, 0.4], [".2", ".4"]), ([-0.25, 0.0, 0.25], ["-.25", "0", ".25"]), ([2000, 4000], ["2000", "4000"]),
     ([1e-4, 1.5e-4], ["1e-4", "1.5e-4"]), ([1.0, 2.5], ["1.0", "2.5"]), ([1e6, 2e6], ["1e6", "2e6"]),
     ([-1e-17, 0.1], ["0", ".1"]), ([], [])],
)  # fmt: skip
def test_ticks_have_the_digits_they_need(values, texts):
    assert tick_texts(values) == texts


def test_iterations_are_counted_as_checkpoints_are(drawn):
    """The row of the twelfth iteration has the number 11, and its checkpoint is 12."""
    dashboard(rows(12))
    below = [text for text, box in drawn if text.isdigit() and 370 < box[1] < 420]
    assert below[0] == "12" and below[1:] == [str(n) for n in sorted(map(int, below[1:]))] and len(below) >= 3
    assert curve.done([{"iteration": 4}, {"iteration": 2}]) == [1, 2], "where the numbers make no sense"


@given(st.lists(st.one_of(st.floats(-100, 100), st.just(math.nan)), min_size=30, max_size=120))
def test_smoothing_stays_within_the_values_and_keeps_gaps(values):
    found = smoothed(values)
    known = curve.known(values)
    assert [math.isnan(v) for v in found] == [math.isnan(v) for v in values]
    assert all(min(known) - 1e-9 <= v <= max(known) + 1e-9 for v in curve.known(found))
    line = [float(i) for i in range(len(values))]
    assert smoothed(line)[10:-10] == pytest.approx(line[10:-10]), "a slope is no noise"


def test_a_noisy_reward_is_drawn_smooth_over_its_points():
    metrics = [{"reward": 0.5 + 0.2 * (-1) ** i} for i in range(60)]
    picture = dashboard(metrics)
    smooth, faint = (places(picture, colour)[:, 0] for colour in (LIGHT.better, LIGHT.faint))
    assert faint.max() - faint.min() > max(250, 2 * (smooth.max() - smooth.min()))


@given(st.text(st.sampled_from("abcdefghij  \n,."), max_size=120), st.integers(40, 400), st.integers(1, 3))
def test_texts_are_cut_between_words_and_say_so(text, width, lines):
    whole = " ".join(text.split())
    for short in ([shortened(text, 20, width)], wrapped(text, 20, width, lines)):
        assert len(short) <= lines and all(font(20).getlength(line) <= width for line in short)
        if " ".join(short) == whole:
            continue
        assert not whole or not short or any(line.endswith("…") for line in short)
        for line in short:
            kept = line.removesuffix("…").split()
            assert set(kept[1:-1]) <= set(whole.split()), "only the first word of a line may be cut, if it is too long"


def test_no_image_is_best_where_all_are_even(drawn):
    picture = dashboard(rows(3), sample(3, 0.5), sample(50, 0.5))
    texts = [text for text, _ in drawn]
    assert "all even" in texts and not any(text.startswith(("best", "worst")) for text in texts)
    assert len(places(picture, (13, 153, 38))) == 0, "neither image is drawn"
    assert "all even" in status_line({"reward": 0.5, "reward_std": 0.0, "frac_reward_zero_std": 1.0}, 1, 2, 1.0)


def test_before_the_first_iteration_there_is_something_to_see(drawn):
    dashboard([], theme=DARK)
    assert "The curve begins after" in " ".join(text for text, _ in drawn)


def test_the_reward_curve_has_the_rewards_name_and_round_ticks(drawn):
    reward_curve(rows(20, ["aesthetic predictor"]))
    texts = [text for text, _ in drawn]
    assert texts[0].startswith("aesthetic predictor .500") and {".2", ".4", "iteration", "20"} <= set(texts)
    for i, (name, a) in enumerate(drawn):
        for other, b in drawn[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (name, other)


# sheets and strips


def test_a_ranked_sheet_shows_the_best_first(drawn):
    shades = torch.tensor([0.2, 0.8, 0.4, 0.6])
    images = shades[:, None, None, None].expand(4, 64, 64, 3)
    picture = plot.score_sheet(images, shades, ["a cat on a mat"] * 4, "brightness", ranked=[[1, 3, 2, 0]], theme=DARK)
    pasted = [box for name, box in drawn if name == "<picture>"]
    seen = [
        picture.getpixel(((left + right) // 2, (top + bottom) // 2))[0] / 255 for left, top, right, bottom in pasted
    ]
    assert seen == sorted(seen, reverse=True) and len(seen) == 4
    texts = [text for text, _ in drawn]
    assert {"1.  .800", "2.  .600", "4.  .200", "#1", "#0"} <= set(texts) and texts.count("a cat on a mat") == 1


def test_a_sheet_of_one_image_per_prompt_has_whole_prompts_and_no_places(drawn):
    prompts = ["a purple triangle on a white background", "a cat"]
    plot.score_sheet(torch.rand(2, 64, 64, 3), torch.tensor([0.5, 0.25]), prompts, "size", ranked=[[0], [1]])
    texts = [text for text, _ in drawn]
    assert {".500", ".250", "a cat"} <= set(texts) and prompts[0] in " ".join(texts)


def test_an_even_sheet_frames_nothing():
    sheet = plot.score_sheet(torch.rand(3, 64, 64, 3), torch.ones(3), ["a"] * 3, "size")
    assert len(places(sheet, LIGHT.better)) == len(places(sheet, LIGHT.worse)) == 0


def test_strips_fit_below_the_dashboard_and_have_a_heading(drawn):
    strip = plot.strip(torch.rand(8, 64, 96, 3) / 3)
    picture = dashboard(rows(3), theme=DARK)
    drawn.clear()
    whole = plot.with_strips(picture, [("before", strip), ("12345", strip)], DARK, "same prompts, same noise")
    assert [text for text, _ in drawn if text != "<picture>"] == ["same prompts, same noise", "before", "12345"]
    assert all(0 <= a[0] <= a[2] <= whole.width and a[3] <= whole.height for _, a in drawn)
    right = {text: box[2] for text, box in drawn}
    assert right["before"] == right["12345"], "labels end where the pictures begin"
    assert len(places(whole, (255, 255, 255))) == 0, "nothing white between the pictures"
