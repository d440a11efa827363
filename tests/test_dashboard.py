"""The picture and the line that show how a run is doing: right, legible, and never the reason why a run stops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from core.pictures import dashboard as module
from core.pictures.dashboard import Sample, brief, dashboard, status_line
from core.pictures.plot import BETTER, INK, WORSE
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
            "iteration": i + 1,
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


@pytest.mark.parametrize("size", [(900, 420), (1400, 600), (700, 420), (900, 700)], ids=str)
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
        "clipped",
        "10 %",
        "KL",
        "2.0e-4",
        "best .482",
        "worst .113",
        "1",
        "iteration 11",
    } <= set(texts)


def test_one_reward_shows_its_spread_and_where_it_came_from(drawn):
    one = dashboard(rows(50))
    assert {"reward", ".500", "from .200"} <= {text for text, _ in drawn}
    assert len(places(one, module.BAND)) > 1000 and len(places(dashboard(rows(50, ["a", "b"])), module.BAND)) == 0


def test_the_smallest_texts_can_be_read_at_400_pixels(monkeypatch):
    sizes, font = [], module.font
    monkeypatch.setattr(module, "font", lambda size: sizes.append(size) or font(size))
    dashboard(rows(500, ["a", "b", "c"], 20, True), BEST, WORST)
    assert min(sizes) * 400 / 900 >= 8


def test_a_rising_reward_rises_each_on_its_own_scale():
    picture = dashboard(rows(200, ["a", "b", "c"]))
    curves = places(picture, BETTER)
    for top, bottom in ((8, 105), (105, 202), (202, 300)):
        curve = curves[(curves[:, 0] >= top) & (curves[:, 0] < bottom)]
        left, right = curve[curve[:, 1] < 250, 0].float().mean(), curve[curve[:, 1] > 780, 0].float().mean()
        assert left - right > 40  # of the 80 pixels that it has


def test_what_hardly_changes_looks_flat():
    metrics = [{"reward": 5.9 + 0.001 * (i % 2)} for i in range(50)]
    heights = places(dashboard(metrics), BETTER)[:, 0]
    assert heights.max() - heights.min() < 20


def test_evaluations_are_rings_at_their_own_height():
    """Held-out scores far below the reward lie below the curve, in another colour."""
    metrics = [{"reward": 0.5, "reward_std": 0.01, **({"eval/reward": 0.1} if i % 10 == 0 else {})} for i in range(60)]
    picture = dashboard(metrics)
    plot = (170, 0, 900, 300)
    rings, curve = places(picture, INK, plot), places(picture, BETTER, plot)
    assert len(rings) > 50 and rings[:, 0].min() > curve[:, 0].max() + 100
    gaps = rings[:, 1].unique().diff()
    assert (gaps > 40).sum() == 5  # six rings


def test_the_newest_trees_images_are_shown_in_their_colours():
    picture = dashboard(rows(5), BEST, WORST)
    right = (700, 0, 900, 420)
    green, red = places(picture, (13, 153, 38), right), places(picture, (219, 20, 26), right)
    assert len(green) > 500 and len(red) > 500 and green[:, 0].max() < red[:, 0].min()
    assert places(picture, BETTER, right)[:, 0].max() < places(picture, WORSE, right)[:, 0].min()
    assert len(places(dashboard(rows(5)), (13, 153, 38))) == 0


@pytest.mark.parametrize("height, width", [(1, 1), (1024, 1024), (16, 900), (900, 16), (511, 1023)])
def test_images_of_any_size_fit(drawn, height, width):
    dashboard(rows(3), Sample(torch.rand(height, width, 3), 1.0, "noise"), WORST)
    pictures = [box for text, box in drawn if text == "<picture>"]
    assert all(right <= 900 and bottom <= 420 for _, _, right, bottom in pictures)
    assert max(box[2] - box[0] for box in pictures if box[0] > 690) >= 20


def test_long_runs_are_averaged_not_thinned():
    values = module._averaged([float(i % 3 == 0) for i in range(3000)])
    assert len(values) == module.POINTS and all(0.2 < value < 0.5 for value in values)
    assert module._averaged([math.nan] * 3000 + [1.0] * 3000)[79:81] == pytest.approx([math.nan, 1.0], nan_ok=True)
    short = [1.0, math.nan, 3.0]
    assert module._averaged(short) is short


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
    columns = places(dashboard(metrics), BETTER)[:, 1].unique()
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
        == "iteration 12/100 · reward .412 ± .031 · KL 1.2e-4 · 310 forwards/s · 11.3 GB · 4 min left"
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
