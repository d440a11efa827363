"""Reward models without any host: pixels, batches, prompts, combinations. The official scores are in
test_rewards_golden.py.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from core.rewards import KINDS, load, pixels
from core.rewards.combine import Combined, combine, scores
from core.rewards.contract import Reward
from core.rewards.measure import Measure
from core.rewards.scorer import Scorer


def picture(height, width, seed=0):
    """Smooth, with some noise: [1, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (0.9 * smooth + 0.1 * torch.rand(1, 3, height, width, generator=generator)).movedim(1, -1)


SIZES = [(64, 64), (65, 97), (97, 65), (7, 5), (200, 31), (31, 200), (32, 32), (32, 47)]


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("rounded", [True, False])
def test_the_crop_is_torchvisions_or_transformers_own(height, width, rounded):
    image = picture(height, width)
    ours = pixels.short_side(image, 32, rounded)
    pil = Image.fromarray((image[0] * 255).round().byte().numpy())
    if rounded:
        transforms = pytest.importorskip("torchvision.transforms")
        bicubic = transforms.InterpolationMode.BICUBIC
        official = transforms.Compose(
            [
                transforms.Resize(32, bicubic),
                transforms.CenterCrop(32),
                transforms.ToTensor(),
                transforms.Normalize(pixels.MEAN, pixels.STD),
            ]
        )(pil)[None]
    else:
        transformers = pytest.importorskip("transformers")
        # in version 5 the other one resizes with torch
        kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        processor = kind(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_mean=pixels.MEAN,
            image_std=pixels.STD,
        )
        official = processor(pil, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, official, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.uint8])
def test_whole_colours_are_the_same_with_and_without_a_gradient(dtype):
    images = (torch.linspace(-0.5, 1.5, 4000).view(1, 25, 160) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    before = images.clone()
    plain, tracked = pixels.quantise(images), images.float().requires_grad_()
    assert torch.equal(plain, plain.round()) and plain.min() == 0 and plain.max() == 255 and not plain.requires_grad
    found = pixels.quantise(tracked)
    assert torch.equal(found, plain) and torch.equal(images, before)
    found.sum().backward()
    inside = (tracked >= 0) & (tracked <= 1)
    assert torch.equal(tracked.grad, 255.0 * inside)


@pytest.mark.parametrize("height, width", SIZES)
def test_the_differentiable_resize_is_within_a_step_of_pillow(height, width):
    image = (picture(height, width) * 255).round()
    new = (32, 40)
    near = pixels.resize_with_gradient(image, *new)
    assert (near - pixels.resize_with_pillow(image, *new)).abs().max() <= 1.5
    assert near.min() >= 0 and near.max() <= 255


def test_the_resize_has_the_right_gradient():
    image = (picture(9, 11) * 255).double()[:, :, :, :1].expand(-1, -1, -1, 3).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pixels.resize_with_gradient(x, 6, 5), image, eps=1e-3, atol=1e-4)


@pytest.mark.parametrize("height, width", SIZES)
def test_the_long_side_fits_and_the_rest_is_black(height, width):
    found = pixels.long_side(picture(height, width), 32)
    assert found.shape == (1, 3, 32, 32)
    black = pixels.normalise(torch.zeros(1, 3, 1, 1))
    short = round(32 / max(height, width) * min(height, width))
    edge = found[:, :, 0] if height < width else found[:, :, :, 0]
    assert short == 32 or (edge == black[..., 0]).all()


class Toy(Scorer):
    """Mean brightness plus the prompt's length; counts what it is asked."""

    def __init__(self, batch=4):
        super().__init__("toy", torch.nn.Linear(1, 1), batch=batch)
        self.texts_seen, self.batches = [], []

    def pixels(self, images, differentiable):
        return images.movedim(-1, 1)

    def texts(self, prompts):
        self.texts_seen += prompts
        return (torch.tensor([float(len(prompt)) for prompt in prompts]),)

    def compare(self, pixels, length):
        self.batches.append(len(pixels))
        return pixels.mean((1, 2, 3)) + length


def test_each_distinct_prompt_is_encoded_once_also_across_calls():
    toy, images = Toy(), torch.rand(10, 4, 4, 3)
    prompts = ["a", "bb", "a", "ccc", "bb", "a", "a", "a", "a", "ccc"]
    expected = images.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])
    torch.testing.assert_close(toy.score(images, prompts), expected)
    assert toy.texts_seen == ["a", "bb", "ccc"] and toy.batches == [4, 4, 2]
    toy.score(images[:2], ["bb", "new"])
    assert toy.texts_seen == ["a", "bb", "ccc", "new"]


def test_the_memory_of_prompts_is_bounded(monkeypatch):
    monkeypatch.setattr("core.rewards.scorer.REMEMBERED", 3)
    toy = Toy()
    for first in range(0, 12, 2):
        prompts = ["x" * (first + 1), "x" * (first + 2)]
        assert toy.score(torch.zeros(2, 2, 2, 3), prompts).tolist() == [first + 1, first + 2]
        assert len(toy._texts) <= 4
    five = ["x" * n for n in range(5)]
    assert toy.score(torch.zeros(5, 2, 2, 3), five).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda toy: toy.score(torch.rand(2, 4, 4, 3), ["a"]), "1 prompts for 2 images"),
        (lambda toy: toy.score(torch.rand(4, 4, 3), ["a"]), r"must be \[batch, height, width, 3\]"),
        (lambda toy: load("nonsense", ""), "Unknown kind of reward 'nonsense'"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(Toy())


def test_no_images_give_no_scores():
    assert Toy().score(torch.zeros(0, 4, 4, 3), []).shape == (0,)


def test_measures_and_servers_load_by_kind():
    assert load("measure", "brightness").score(torch.ones(2, 4, 4, 3), ["", ""]).tolist() == pytest.approx([1, 1])
    assert load("server", "http://127.0.0.1:1/score").name and load("ocr").name == "OCR"
    models = {"image_reward", "hps_v2", "pickscore", "clipscore", "aesthetic"}
    assert set(KINDS) == models | {"measure", "server", "drawing", "ocr", "hpsv3"}


def test_weights_multiply_through_nested_combinations_and_equal_names_are_numbered():
    a, b = Measure("brightness"), Measure("contrast")
    nested = combine([combine([a, b], [0.5, 0.25]), a], [2.0, 1.0])
    found = scores(nested, torch.rand(3, 4, 4, 3), [""] * 3)
    assert found.weights == {"brightness": 1.0, "contrast": 0.5, "brightness 2": 1.0} and not found.raw
    assert scores(combine([a, b], [1, 1], raw=True), torch.rand(3, 4, 4, 3), [""] * 3).raw


def test_images_of_several_sizes_score_like_each_alone():
    images = [picture(8, 8, 0)[0], picture(8, 8, 1)[0], picture(6, 9, 2)[0], picture(8, 8, 3)[0]]
    reward = Measure("brightness")
    together = scores(reward, images, [""] * 4, chunk=2).values["brightness"]
    assert together.tolist() == pytest.approx([float(reward.score(image[None], [""])) for image in images])


class GroupWise(Reward):
    """A judge that compares: the brightest of its group gets 1, the others 0."""

    name, group_wise = "judge", True

    def score(self, images, prompts):
        assert len(set(prompts)) == 1
        light = images.mean((1, 2, 3))
        return (light == light.max()).float()


def test_a_group_wise_reward_sees_whole_groups():
    images = torch.arange(1, 7).view(6, 1, 1, 1).expand(6, 4, 4, 3) / 10
    found = scores(GroupWise(), images, ["a"] * 4 + ["b"] * 2, chunk=2)
    assert found.values["judge"].tolist() == [0, 0, 0, 1, 0, 1]


class Gives(Reward):
    name = "mine"

    def __init__(self, given):
        self.given = given

    def score(self, images, prompts):
        return self.given


@pytest.mark.parametrize("given", [[0.5, 2], (0.5, 2), np.array([0.5, 2.0]), [torch.tensor(0.5), torch.tensor(2.0)]])
def test_a_reward_may_give_a_list_of_numbers(given):
    assert scores(Gives(given), torch.zeros(2, 4, 4, 3), ["a", "b"]).values["mine"].tolist() == [0.5, 2]


@pytest.mark.parametrize(
    "given, sentence",
    [
        (None, "gave None for 2 images: its score"),
        ("good", "gave 'good' for 2 images"),
        ([0.5, None], "gave .0.5, None. for 2 images"),
        (["a", "b"], "gave .'a', 'b'. for 2 images"),
        ([[1], [1, 2]], "for 2 images"),
        ([10**400, 1], "for 2 images"),
        ({"a": 1}, "for 2 images"),
        ([1.0], "one per image"),
        (3.0, "one per image"),
        ([[1.0, 2.0]], "one per image"),
    ],
)
def test_a_reward_that_gives_no_numbers_is_named(given, sentence):
    with pytest.raises(ValueError, match=f"The reward 'mine' .*{sentence}"):
        scores(Gives(given), torch.zeros(2, 4, 4, 3), ["a", "b"])


def test_a_reward_that_gives_too_few_scores_is_refused():
    class Wrong(Reward):
        name = "wrong"

        def score(self, images, prompts):
            return torch.zeros(1)

    with pytest.raises(ValueError, match="'wrong' gave .1,. scores for 3 images"):
        scores(Combined([(Wrong(), 1.0)]), torch.rand(3, 4, 4, 3), [""] * 3)


def test_a_stop_is_answered_before_every_pass():
    toy, asked = Toy(batch=2), []

    def check():
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt

    toy.check = check
    with pytest.raises(KeyboardInterrupt):
        toy.score(torch.rand(10, 4, 4, 3), ["a"] * 10)
    assert toy.batches == [2, 2]
