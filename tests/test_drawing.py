"""The embedded world: what is drawn, the judge by rules, the critic, and the rewards made of them."""

import math

import pytest
import torch
from torch.nn import functional as F

from core.rewards import drawing, load
from core.rewards.drawing import EACH, RULES
from embedded import judge, shapes

RIGHT = ("shape", "colour", "background", *shapes.STYLES)


@pytest.fixture(scope="module")
def drawn():
    """(images [B, 3, 64, 64], what each shows by name)."""
    generator = torch.Generator().manual_seed(5)
    index, styles = torch.randint(96, (48,), generator=generator), shapes.random_styles(48, generator)
    shown = dict(zip(RIGHT, [*shapes.labels(index), *styles.T]))
    return shapes.draw(index, generator, styles=styles), shown, [shapes.captions()[i] for i in index]


def test_captions_name_everything_but_the_styles():
    for index in range(96):
        asked = shapes.asked(shapes.captions()[index])
        assert list(asked.values()) == [int(label) for label in shapes.labels(torch.tensor(index))]
    assert shapes.asked("A GREY, triangle") == {"shape": 2, "background": 1}
    assert not any(word in " ".join(shapes.captions()) for values in shapes.STYLES.values() for word in values)


def test_wrong_captions_come_in_pairs_and_as_often_as_said():
    index = torch.arange(96).repeat(200)
    wrong = shapes.confused(index, torch.Generator().manual_seed(0))
    (shape, colour, background), (other_shape, other_colour, same) = shapes.labels(index), shapes.labels(wrong)
    assert torch.equal(background, same)
    for was, now in ((shape, other_shape), (colour, other_colour)):
        assert float((was != now).double().mean()) == pytest.approx(shapes.CONFUSED, abs=0.01)
        assert all(len(now[was == value].unique()) == 2 for value in was.unique())
    assert torch.equal(torch.tensor(shapes.PARTNERS)[torch.tensor(shapes.PARTNERS)], torch.arange(8))


def test_the_judge_reads_every_drawing(drawn):
    images, shown, _ = drawn
    found = judge.judge(images)
    for name in RIGHT:
        assert torch.equal(found[name], shown[name]), name
    assert float(found["quality"].min()) > 0.9
    comfy = judge.judge(images.movedim(1, -1))
    assert all(torch.equal(found[name], comfy[name]) for name in found)


@pytest.mark.parametrize("ink", [0.06, 0.97])
def test_the_judge_sees_a_face_in_any_ink_faint_and_a_little_off(ink):
    index, where = torch.arange(96), torch.tensor([1.0, -1.0, 19.0]).repeat(96, 1)
    styles = torch.tensor([[0, 0, 1, 0, 0]]).repeat(96, 1)
    plain = shapes.render(index, styles, where[:, :2], where[:, 2])
    grid = torch.arange(shapes.SIZE) + 0.5 - shapes.SIZE / 2
    u, v = (grid[None, None] - 3).expand(96, shapes.SIZE, -1), (grid[None, :, None] + 3).expand(96, -1, shapes.SIZE)
    shape = shapes.labels(index)[0]
    face = (0.5 - shapes.smile(shape[:, None, None], u, v, where[:, 2, None, None])).clamp(0, 1)
    smiling = plain + 0.5 * face[:, None] * (ink - plain)
    visible = ((plain[:, :, 31, 31] - ink).mul(torch.tensor([0.3, 0.59, 0.11])).sum(1).abs() * 0.5) > 0.15
    assert int(visible.sum()) > 40
    assert judge.judge(smiling)["face"][visible].float().mean() > 0.97
    assert not judge.judge(plain)["face"].any()


@pytest.mark.parametrize("spoil", ["blurred", "blended", "warped", "empty"])
def test_the_judge_sees_what_is_drawn_badly(drawn, spoil):
    images = drawn[0]
    wave = torch.sin(torch.linspace(0, 9, shapes.SIZE)) * 0.1
    still = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    bent = still + torch.stack([wave[:, None].expand(-1, shapes.SIZE), wave[None].expand(shapes.SIZE, -1)], -1)
    spoiled = {
        "blurred": F.avg_pool2d(images, 9, 1, 4, count_include_pad=False),
        "blended": (images + images.roll(1, 0)) / 2,
        "warped": F.grid_sample(images, bent, padding_mode="border", align_corners=False),
        "empty": images[:, :, :1, :1].expand_as(images),
    }[spoil]
    whole, bad = judge.judge(images)["quality"], judge.judge(spoiled)["quality"]
    assert float(bad.mean()) < float(whole.mean()) - 0.1 and bad.isfinite().all()


def test_the_critic_reads_every_drawing_and_knows_a_spoiled_one(drawn):
    from embedded.train import spoiled

    images, shown, _ = drawn
    found = load("drawing").critic(images)
    for name in RIGHT:
        assert float((found[name].argmax(1) == shown[name]).double().mean()) > 0.95, name
    bad = load("drawing").critic(spoiled(48, torch.Generator().manual_seed(3)))["drawn"]
    assert float((found["drawn"].argmax(1) == 0).double().mean()) > 0.85
    assert float((bad.argmax(1) == 1).double().mean()) > 0.8


def test_the_reward_is_full_where_all_is_as_wished_and_never_more(drawn):
    images, shown, prompts = drawn
    reward = load("drawing", wish={"palette": "pastel", "face": "smiling"})
    scores = reward.score(images.movedim(1, -1), prompts)
    met = (shown["palette"] + shown["face"] == 2).nonzero().flatten()
    assert len(met) > 3 and (scores <= 1).all() and (scores >= 0).all()
    assert float(scores[met].median()) > 0.9 > float(scores[shown["palette"] == 0].max())
    others = [shapes.captions()[(shapes.captions().index(text) + 24) % 96] for text in prompts]  # the next shape
    assert float(reward.score(images.movedim(1, -1), others)[met].mean()) < float(scores[met].mean()) - 0.1


@pytest.mark.parametrize("each", EACH)
def test_one_wish_that_fails_costs_its_share_or_everything(drawn, each):
    images, shown, prompts = drawn
    wish = {name: shapes.STYLES[name][1] for name in shapes.STYLES}
    reward = load("drawing", wish=wish, follow=False, each=each)
    scores, missing = reward.score(images.movedim(1, -1), prompts), 5 - sum(shown[name] for name in shapes.STYLES)
    one = scores[missing == 1]
    assert (
        len(one) and float(one.median()) == pytest.approx(0.8, abs=0.05) if each == "mean" else float(one.max()) < 0.5
    )


def test_words_of_the_prompt_are_wishes_where_they_are_followed():
    follows, taste = load("drawing"), load("drawing", wish={"face": "smiling"}, follow=False)
    asked = follows.wanted("a pastel red circle, on a grey background")
    assert asked == {"shape": "circle", "colour": "red", "background": "gray", "palette": "pastel"}
    assert taste.wanted("a red circle") == {"face": "smiling"}
    both = load("drawing", wish={"palette": "vivid"})
    assert both.wanted("a pastel circle") == {"shape": "circle", "palette": "vivid"}
    assert [reward.name for reward in (follows, taste, both)] == ["follows", "taste", "taste and prompt"]


def test_what_cannot_be_scored_is_nan(drawn):
    images = drawn[0][:3].movedim(1, -1).clone()
    images[1] = math.nan
    scores = load("drawing").score(images, ["a red circle", "a red circle", "a house"])
    assert scores.isnan().tolist() == [False, True, True]
    scores = load("drawing", "embedded/judge", of="prompt").score(images, ["a red circle", "a red circle", "a house"])
    assert scores.isnan().tolist() == [False, True, True]
    assert load("drawing").score(images[:0], []).shape == (0,)


def test_the_judge_as_a_reward(drawn):
    images, shown, prompts = drawn
    pictures = images[:12].movedim(1, -1)
    quality, prompt, both = (load("drawing", "embedded/judge", of=of).score(pictures, prompts[:12]) for of in RULES)
    assert torch.equal(prompt, torch.ones(12)) and torch.equal(both, quality)
    wrong = load("drawing", "embedded/judge", of="both").score(pictures, prompts[12:24])
    right = [a == b for a, b in zip(prompts[:12], prompts[12:24])]
    assert [bool(score) for score in wrong] == right


def test_any_size_of_picture(drawn):
    images, _, prompts = drawn
    large = F.interpolate(images[:6], scale_factor=4, mode="bilinear").movedim(1, -1)
    for reward in (load("drawing"), load("drawing", "embedded/judge")):
        small = reward.score(images[:6].movedim(1, -1), prompts[:6])
        torch.testing.assert_close(reward.score(large, prompts[:6]), small, rtol=0, atol=0.15)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"wish": {"face": "angry"}}, "The critic knows no 'angry' for 'face'. It knows shape: circle"),
        ({"wish": {"mood": "good"}}, "The critic knows no 'good' for 'mood'"),
        ({"each": "some"}, "Unknown 'some': choose one of mean, all."),
        ({"follow": False}, "Nothing is wished for"),
        ({"path": "embedded/judge", "of": "taste"}, "Unknown 'taste': choose one of quality, prompt, both."),
        ({"path": "nowhere.safetensors"}, "There is no file nowhere.safetensors"),
        ({"path": str(shapes.FOLDER / "vae.safetensors")}, "vae.safetensors is not a critic of drawings"),
    ],
)
def test_bad_options_are_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        load("drawing", **options)


def test_what_is_exported_loads_the_same():
    for reward in (load("drawing", wish={"fill": "outline"}, each="all"), load("drawing", "embedded/judge", of="both")):
        kind, path, options = reward.origin
        again = load(kind, path, **options)
        assert type(again) is type(reward) and again.name == reward.name and again.origin == reward.origin
    assert drawing.CRITIC == load("drawing").origin[1]


def test_quality_like_for_like_is_that_of_the_styles_alone():
    """Pictures of one style, drawn as the others of that style, are as good as expected; blurred ones are worse."""
    numbers = torch.arange(48) * 2
    styles = shapes.random_styles(48, torch.Generator().manual_seed(3))
    images = shapes.draw(numbers, torch.Generator().manual_seed(4), styles=styles)
    drawn = judge.judge(images)
    likely = judge.expected_quality(drawn, drawn)
    assert likely.mean() == pytest.approx(float(drawn["quality"].mean()), abs=1e-4)
    blurred = judge.judge(F.avg_pool2d(images, 5, 1, 2))
    assert blurred["quality"].mean() < judge.expected_quality(drawn, blurred).mean() - 0.02


def test_the_vaes_zero_blocks_are_left_out_and_the_pictures_are_the_same(drawn, comfy):
    import comfy.sd

    whole, lean = (comfy.sd.VAE(sd=shapes.vae_state_dict(), dtype=torch.float32) for _ in range(2))
    shapes.skip_zero_blocks(lean.first_stage_model)
    ran = []
    for name, module in lean.first_stage_model.named_modules():
        if name.startswith("taesd_decoder.") and name.endswith(".conv"):
            module.register_forward_hook(lambda *_, name=name: ran.append(int(name.split(".")[1])))
    latents = whole.encode(drawn[0][:2].movedim(1, -1))
    assert torch.equal(lean.encode(drawn[0][:2].movedim(1, -1)), latents)
    expected = whole.decode(latents)
    assert expected.std() > 0.05 and torch.equal(lean.decode(latents), expected)
    assert len(ran) == 5 and not set(ran) & set(shapes.ZERO_BLOCKS["taesd_decoder"])
