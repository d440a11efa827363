"""Our scores against those of the official packages, run once in isolated environments (tests/golden/make.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import inputs, models

from core.rewards import load

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "golden.json").read_text("utf-8"))
LOADED = {
    "image_reward": "image_reward",
    "hps_v2": "hps_v2",
    "clipscore_open_clip": "clipscore",
    "clipscore_hf": "clipscore",
    "pickscore": "pickscore",
    "aesthetic": "aesthetic",
}
IMAGES = [torch.from_numpy(np.array(inputs.rgb(image))).float() / 255 for image in inputs.images().values()]


@pytest.fixture(scope="module", params=LOADED)
def kind(request):
    if request.param in ("hps_v2", "clipscore_open_clip", "aesthetic"):
        pytest.importorskip("open_clip")
    if request.param in ("clipscore_hf", "pickscore"):
        pytest.importorskip("transformers")
    return request.param


@pytest.fixture(scope="module")
def reward(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    assert models.blake2b(kind) == GOLDEN[kind]["weights_blake2b"], "the weights are not those of the golden scores"
    options = {}
    if kind == "aesthetic":
        (folder / "clip").mkdir()
        options["clip"] = models.write("clipscore_open_clip", folder / "clip")
    return load(LOADED[kind], models.write(kind, folder), **options)


def golden(kind):
    """[images, prompts]; one column for a reward that reads no prompts."""
    scores = torch.tensor(GOLDEN[kind]["scores"], dtype=torch.float64)
    return scores[:, None] if scores.dim() == 1 else scores


def ours(reward, kind, **options):
    prompts = inputs.PROMPTS[: golden(kind).shape[1]]
    return torch.stack(
        [reward.score(image[None].expand(len(prompts), -1, -1, -1), prompts, **options).detach() for image in IMAGES]
    ).double()


def tolerance(kind, expected):
    return {"image_reward": 2e-5 * float(expected.std()), "pickscore": 1e-6 * float(expected.abs().max())}.get(
        kind, 1e-6
    )


def test_scores_are_the_official_ones(reward, kind):
    expected = golden(kind)
    assert len(IMAGES) >= 9 and (kind == "aesthetic" or expected.shape[1] >= 15)
    assert (ours(reward, kind) - expected).abs().max() <= tolerance(kind, expected)


def test_the_differentiable_path_gives_the_same_scores(reward, kind):
    expected = golden(kind)
    assert (ours(reward, kind, differentiable=True) - expected).abs().max() <= 1e-3 * expected.std()


def test_gradients_are_those_of_finite_differences(reward, kind, monkeypatch):
    """Without rounding to whole colours, whose gradient passes straight through, the score is smooth: in float64 the
    two agree closely.
    """
    from core.rewards import pixels

    resize = pixels.resize_with_gradient
    monkeypatch.setattr(pixels, "quantise", lambda images: images * 255)
    monkeypatch.setattr(
        pixels, "resize_with_pillow", lambda images, height, width: resize(images, height, width).detach()
    )
    monkeypatch.setattr("core.rewards.scorer.Tensor.float", torch.Tensor.double)
    image = IMAGES[0][None].double() * 0.8 + 0.1
    reward.module.double()
    if kind == "aesthetic":
        reward.layers.double()
    reward._texts.clear()
    try:
        own = image.clone().requires_grad_()
        [gradient] = torch.autograd.grad(reward.score(own, [inputs.PROMPTS[0]], differentiable=True).sum(), own)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            direction = torch.randn(image.shape, generator=generator, dtype=torch.float64)
            up, down = (
                float(reward.score(image + step * direction, [inputs.PROMPTS[0]], differentiable=True))
                for step in (1e-4, -1e-4)
            )
            assert (up - down) / 2e-4 == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-9)
    finally:
        reward.module.to(torch.float32)
        if kind == "aesthetic":
            reward.layers.to(torch.float32)
        reward._texts.clear()


def test_a_batch_scores_as_each_image_alone(reward, kind):
    same_size = [image for image in IMAGES if image.shape == IMAGES[0].shape][:1] * 2 + [IMAGES[0].flip(1)]
    prompts = inputs.PROMPTS[:3]
    together = reward.score(torch.stack(same_size), prompts)
    alone = torch.cat([reward.score(image[None], [prompt]) for image, prompt in zip(same_size, prompts)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
