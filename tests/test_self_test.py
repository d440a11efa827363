"""Reward health: what the known pairs notice, and that they only warn."""

import logging
from types import SimpleNamespace

import pytest
import torch
from golden import models
from graph import Graph

from core.rewards import load
from core.rewards.combine import combine
from core.rewards.contract import Reward, Trial
from core.rewards.drawing import Drawing
from core.rewards.measure import Measure, Similarity
from core.rewards.self_test import PROMPTS, doubts, noisy, scenes, scrambled


class Fake(Reward):
    """Knows the scenes by their colours: likes red beside "red" and smooth pictures; times `sign`."""

    reads_prompts = True

    def __init__(self, sign=1.0, name="fake <b>"):
        self.sign, self.name, self.calls = sign, name, 0

    def trial(self):
        return scenes(self.reads_prompts)

    def score(self, images, prompts):
        self.calls += 1
        rough = (images[:, 1:] - images[:, :-1]).abs().mean((1, 2, 3))
        orange = torch.tensor([1.0 if "sun" in prompt else -1.0 for prompt in prompts])
        warm = (images[..., 0] - images[..., 1]).mean((1, 2)) - 0.05
        return self.sign * (orange * warm - rough)


EMBEDDED = [
    ("embedded/critic", {}),
    ("embedded/critic", {"wish": {"palette": "pastel", "face": "smiling"}}),
    ("embedded/critic", {"wish": {"frame": "framed", "fill": "outline"}, "follow": False}),
    ("embedded/judge", {"of": "quality"}),
    ("embedded/judge", {"of": "prompt"}),
    ("embedded/judge", {"of": "both"}),
]


@pytest.mark.parametrize("path, options", EMBEDDED)
def test_real_weights_pass(path, options):
    assert doubts(load("drawing", path, **options)) == ""


def test_ocr_passes_with_its_real_weights():
    pytest.importorskip("rapidocr")
    assert doubts(load("ocr")) == ""


@pytest.mark.parametrize("read", ["GOODBYE", "X", ""])
def test_an_ocr_that_reads_something_else_fails(read):
    """As with a recognition model whose letters are those of another."""
    reward = load("ocr")
    reward._engine, reward._known = lambda picture: SimpleNamespace(txts=[read]), frozenset("HELO25GDBY")
    assert "A reward model failed its self-test: it put" in doubts(reward)


def test_a_critic_with_a_wrong_file_fails():
    """Its last layer's rows in another order, as when a file's heads are not those of the network."""
    reward = load("drawing")
    with torch.no_grad():
        last = reward.critic.net[-1]
        last.weight.copy_(last.weight.roll(5, 0))
    assert "A reward model failed its self-test: it put" in doubts(reward)


@pytest.mark.parametrize("reads", [True, False])
def test_a_reward_the_wrong_way_round_fails_and_every_model_is_tried_once(reads, caplog, monkeypatch):
    monkeypatch.setattr(Fake, "reads_prompts", reads)
    well, wrong = Fake(), Fake(-1.0)
    with caplog.at_level(logging.WARNING, "treerpo"):
        found = doubts(combine([well, wrong, Measure()], [1, 1, 1]), None)
    assert found.count("self-test") == 1 and "4 of 4 known pairs in the wrong order" in found
    assert "<b>" not in found and [record.args[0] for record in caplog.records] == ["fake <b>"]
    assert doubts(combine([well, wrong], [1, 1])) == found and (well.calls, wrong.calls) == (1, 1)


def test_scores_that_are_no_numbers_are_told(monkeypatch):
    monkeypatch.setattr(Fake, "score", lambda self, images, prompts: torch.full((len(images),), torch.nan))
    assert doubts(Fake()).startswith("A reward model has no score for 6 of 6 known pictures")


KINDS = {  # tiny weights: the kind that reads them, and its last matrix over the picture
    "hps_v2": ("hps_v2", "model.visual.proj"),
    "clipscore_open_clip": ("clipscore", "model.visual.proj"),
    "clipscore_hf": ("clipscore", "model.visual_projection.weight"),
    "pickscore": ("pickscore", "model.visual_projection.weight"),
    "image_reward": ("image_reward", "mlp.layers.6.weight"),
    "aesthetic": ("aesthetic", "model.visual.proj"),
    "hpsv3": ("hpsv3", "rm_head.5.weight"),
}


def taught(reward):
    """Trained until it orders the known pictures, a few steps: what stands for published weights here."""
    trial, weights = reward.trial(), [value.requires_grad_() for value in reward.module.parameters()]
    better, worse = (list(numbers) for numbers in zip(*trial.pairs))
    adam = torch.optim.Adam(weights, 1e-3)
    for _ in range(40):
        scores = reward.score(trial.images, trial.prompts, differentiable=True)
        gaps = (scores[better] - scores[worse]) / scores.detach().std()
        if gaps.min() > 0.2:
            break
        adam.zero_grad()
        torch.nn.functional.softplus(-gaps).sum().backward()
        adam.step()
    return reward


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_file_of_every_kind_is_noticed(kind, tmp_path):
    """Random weights under the right name fail; those that know the pictures pass; the same fail when the rows of one
    matrix are those of another network.
    """
    pytest.importorskip("open_clip" if "visual.proj" in KINDS[kind][1] else "transformers")
    name, last = KINDS[kind]
    options = {"clip": models.write("clipscore_open_clip", tmp_path / "clip")} if kind == "aesthetic" else {}
    reward = load(name, models.write(kind, tmp_path), **options)
    before = torch.get_rng_state()
    assert doubts(reward).startswith("A reward model failed its self-test: it put")
    assert torch.equal(torch.get_rng_state(), before), "no noise of the run is drawn for it"
    taught(reward).tried = None
    assert doubts(reward) == ""
    with torch.no_grad():
        matrix = reward.module.get_parameter(last)
        matrix.copy_(matrix.roll(5, 0))
    reward.tried = None
    assert doubts(reward).startswith("A reward model failed its self-test: it put")


def test_the_known_pictures():
    trial = scenes()
    assert trial.images.shape == (6, 256, 256, 3) and 0 <= trial.images.min() and trial.images.max() <= 1
    assert trial.prompts == [*PROMPTS, *PROMPTS, *PROMPTS[::-1]]
    image = torch.rand(1, 37, 50, 3)
    mixed = scrambled(image)
    assert not torch.equal(mixed, image) and torch.equal(mixed[:, 32:], image[:, 32:])
    torch.testing.assert_close(mixed.flatten().sort().values, image.flatten().sort().values)
    assert torch.equal(noisy(image), noisy(image))


def test_likeness_to_a_reference_is_tried_with_the_reference():
    reference = scenes().images[:1]
    fine = Similarity(reference, lambda images: images.flatten(1))
    blind = Similarity(reference, lambda images: images.double().mean((1, 2)))
    assert doubts(fine) == "" and "1 of 1 known pairs" in doubts(blind)


def test_the_trainer_and_score_images_say_it_and_go_on(pack, tmp_path):
    graph = Graph(pack, tmp_path, "sd3")
    contract, own = pack.core.rewards.contract.Reward, pack.core.rewards.contract.Trial

    class Upside(contract):
        name = "upside"

        def trial(self):
            return own(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 64, 64, 3), ["", ""], [(0, 1)])

        def score(self, images, prompts):
            return images.mean((1, 2, 3)).cpu()

    policy = graph.policy()
    *_, status = graph.train(policy, 1, reward=Upside())
    assert policy.run.iteration == 1 and "failed its self-test: it put 1 of 1 known pairs" in status
    node = graph.nodes["TreeRPOScore"]
    found = node.execute([Upside()], [torch.rand(2, 64, 64, 3)], ["a"])
    assert "failed its self-test" in found.ui["text"][0]


def test_a_trial_of_drawings_asks_for_nothing_that_the_wish_forbids():
    reward = Drawing(load("drawing").critic, {"colour": "green", "palette": "vivid"})
    trial = reward.trial()
    assert isinstance(trial, Trial) and all("green" in prompt for prompt in trial.prompts)
    assert doubts(reward) == ""
