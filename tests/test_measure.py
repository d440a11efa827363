"""Rewards without weights: each measure against a hand-computed picture, and similarity against its definition."""

import io

import pytest
import torch
from PIL import Image

from core.rewards.measure import KINDS, Measure, Similarity, encoded, sharpness


def measure(kind, image, **settings):
    return float(Measure(kind, **settings).score(image, [""]))


def grey(rows):
    """[1, H, W, 3] from luminances."""
    return torch.tensor(rows, dtype=torch.float32)[None, :, :, None].expand(-1, -1, -1, 3).contiguous()


def noise(count=1, height=24, width=20, seed=0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def blurred(images, size):
    kernel = torch.ones(3, 1, size, size) / size**2
    channels = torch.nn.functional.pad(images.movedim(-1, 1), [size // 2] * 4, mode="reflect")
    return torch.nn.functional.conv2d(channels, kernel, groups=3).movedim(1, -1)


def pillow_bytes(image, **options):
    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().to(torch.uint8).numpy()).save(buffer, **options)
    return buffer.getvalue()


def test_foreground_is_what_differs_from_the_borders_median():
    image = torch.zeros(1, 8, 10, 3)
    image[0, 2:4, 3:8] = 1
    assert measure("foreground size", image) == pytest.approx(10 / 80)
    assert measure("foreground size", 0.1 * image) == 0
    assert measure("foreground size", 0.1 * image, threshold=0.17) == pytest.approx(10 / 80)  # 0.1 sqrt(3) = 0.173


def test_brightness_and_contrast_are_the_luminances_mean_and_spread():
    image = grey([[0, 1], [0.5, 0.5]])
    assert measure("brightness", image) == pytest.approx(0.5)
    assert measure("contrast", image) == pytest.approx((2 * 0.25 / 4) ** 0.5)
    green = torch.tensor([0.0, 1.0, 0.0]).expand(1, 4, 4, 3)
    assert measure("brightness", green) == pytest.approx(0.7152)


def test_colour_is_the_distance_of_the_mean():
    image = torch.tensor([[[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]])
    assert measure("colour", image) == pytest.approx(-0.5)
    assert measure("colour", image, target=(0.5, 0.3, 0.4)) == pytest.approx(-0.5)
    assert measure("colour", image, target=(0.5, 0.0, 0.0)) == 0


def test_saturation_is_the_mean_span_of_the_channels():
    assert measure("saturation", torch.tensor([[[[1.0, 0.2, 0.4], [0.5, 0.5, 0.5]]]])) == pytest.approx(0.4)
    assert measure("saturation", grey([[0.1, 0.9]])) == 0


def test_sharpness_by_hand():
    dot = torch.zeros(5, 5)
    dot[2, 2] = 1
    values = torch.tensor([0, 1, 0, 1, -4, 1, 0, 1, 0.0])  # the Laplacian on the 3 x 3 inner pixels
    assert measure("sharpness", grey(dot.tolist())) == pytest.approx(float(values.var(correction=0)))
    assert float(sharpness(dot[None])) == pytest.approx(20 / 9)
    ramp = torch.linspace(0, 1, 9).expand(6, 9)
    assert measure("sharpness", grey(ramp.tolist())) == pytest.approx(0, abs=1e-10)


def test_sharpness_falls_under_blur_and_under_enlarging():
    image = noise()
    sharp = [measure("sharpness", blurred(image, size)) for size in (1, 3, 5, 7)]
    assert sharp == sorted(sharp, reverse=True) and sharp[0] > 10 * sharp[1]
    larger = torch.nn.functional.interpolate(image.movedim(-1, 1), scale_factor=2, mode="bilinear").movedim(1, -1)
    assert measure("sharpness", larger) < sharp[0]


@pytest.mark.parametrize("scale", [0.5, 0.1])
def test_scales(scale):
    image = noise()
    for kind, power in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("sharpness", 2)):
        assert measure(kind, scale * image) == pytest.approx(scale**power * measure(kind, image), rel=1e-4)


@pytest.mark.parametrize("quality", [95, 30])
def test_jpeg_size_is_that_of_pillows_file(quality):
    image = noise()
    assert measure("jpeg size", image, quality=quality) == pytest.approx(
        len(pillow_bytes(image[0], format="JPEG", quality=quality)) / 1000
    )


def test_jpeg_size_knows_flat_from_busy_pictures():
    assert measure("jpeg size", noise(height=64, width=64)) > 3 * measure("jpeg size", torch.full((1, 64, 64, 3), 0.4))
    assert measure("jpeg size", noise(), quality=30) < measure("jpeg size", noise())


def test_png_bytes_hold_the_very_pixels():
    image = (noise()[0] * 255).round() / 255
    back = Image.open(io.BytesIO(encoded(image, "PNG")))
    assert back.format == "PNG" and back.tobytes() == (image * 255).round().byte().numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_what_holds_for_every_measure(kind):
    images = noise(5)
    more, less = Measure(kind), Measure(kind, sign=-1.0)
    scores = more.score(images, [""] * 5)
    assert scores.shape == (5,) and torch.isfinite(scores).all()
    assert torch.equal(less.score(images, [""] * 5), -scores) and less.name == f"less {kind}"
    one_by_one = torch.cat([more.score(image[None], [""]) for image in images])
    torch.testing.assert_close(scores, one_by_one, atol=1e-6, rtol=1e-6)
    with_alpha = torch.cat([images, noise(5, seed=1)[..., :1]], dim=-1)
    assert torch.equal(more.score(with_alpha, [""] * 5), scores)
    assert more.score(images[:0], []).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_picture_has_no_score_and_spoils_no_other(kind):
    images = noise(3)
    images[1, 2, 3, 0] = float("nan")
    scores = Measure(kind).score(images, [""] * 3)
    assert torch.isnan(scores).tolist() == [False, True, False]
    torch.testing.assert_close(scores[[0, 2]], Measure(kind).score(images[[0, 2]], [""] * 2), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Measure("beauty"), "Unknown measure 'beauty'"),
        (lambda: Measure("jpeg size", quality=0), "quality 0 does not exist"),
        (lambda: Measure("sharpness").score(torch.rand(1, 2, 9, 3), [""]), "these have 9 x 2"),
        (lambda: Similarity(torch.rand(1, 4, 4, 3), flat, of="worst"), "Unknown 'worst'"),
        (lambda: Similarity(torch.rand(4, 4, 3), flat), r"shape \[4, 4, 3\]"),
        (lambda: Similarity(torch.rand(0, 4, 4, 3), flat), "one or more images"),
        (
            lambda: Similarity(torch.rand(1, 4, 4, 3), lambda x: x.flatten(2)).score(torch.rand(1, 4, 4, 3), [""]),
            "it must give",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def flat(images):
    return images.flatten(1)


class Encoder:
    def __init__(self):
        self.sizes = []

    def __call__(self, images):
        self.sizes.append(len(images))
        return images.mean((1, 2)) - 0.5


def test_similarity_is_one_with_itself_and_the_cosine_else():
    images = noise(4)
    assert float(Similarity(images[:1], flat).score(images[:1], [""])) == pytest.approx(1)
    two = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]]).view(2, 1, 1, 3)
    assert Similarity(two[:1], flat).score(two, [""] * 2).tolist() == pytest.approx([1, 0.5**0.5])
    dimmer = Similarity(images, flat).score(0.3 * images, [""] * 4)
    torch.testing.assert_close(dimmer, Similarity(images, flat).score(images, [""] * 4))


def test_similarity_to_several_references_is_their_mean_or_the_best():
    references = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).view(2, 1, 1, 3)
    image = torch.tensor([3.0, 4.0, 0]).view(1, 1, 1, 3)
    assert float(Similarity(references, flat).score(image, [""])) == pytest.approx(0.7)
    assert float(Similarity(references, flat, "best").score(image, [""])) == pytest.approx(0.8)


def test_references_are_encoded_once_and_in_batches():
    encode, images = Encoder(), noise(5)
    reward = Similarity(noise(3, seed=1), encode, batch=2)
    first = reward.score(images, [""] * 5)
    assert encode.sizes == [2, 1, 2, 2, 1]
    torch.testing.assert_close(torch.cat([reward.score(image[None], [""]) for image in images]), first)
    assert encode.sizes == [2, 1, 2, 2, 1] + [1] * 5
    assert reward.score(images[:0], []).shape == (0,)


def test_references_of_another_size_and_alpha_do():
    assert Similarity(noise(1, 8, 8)[..., :3], Encoder()).score(torch.rand(2, 5, 9, 4), [""] * 2).shape == (2,)


def test_similarity_made_inside_inference_mode_serves_outside():
    with torch.inference_mode():
        reward = Similarity(noise(1).clone(), flat)
        inside = reward.score(noise(2), [""] * 2)
    assert not reward._known.is_inference()
    assert torch.equal(reward.score(noise(2), [""] * 2), inside)
