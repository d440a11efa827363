"""Teach My Taste and My Taste in real ComfyUI, with a person who is a function."""

import sys

import pytest
import torch
from graph import TRAIN

from core.rewards.drawing import load

PASTEL = {"wish": {"palette": "pastel"}, "follow": False}


@pytest.fixture
def teach(flux, monkeypatch):
    """A function that runs the node; its person picks the most pastel picture, and the questions are kept."""
    taste, questions = load(**PASTEL), []
    pick = sys.modules[f"{flux.pack.__name__}.nodes.pick"]

    def ask(question, seconds, node_id):
        if teach.stops_at == len(questions):
            import comfy.model_management

            raise comfy.model_management.InterruptProcessingException()
        questions.append(question)
        images = torch.stack(list(question.images))
        return str(1 + int(taste.score(images, [question.prompt] * len(images)).argmax()))

    def teach(**settings):
        known = dict(lora_name="mine", questions=8, show=4, settle=2, preset="normal")
        return flux.call(
            "Teach",
            model=flux.model,
            clip=flux.clip,
            vae=flux.vae,
            prompts=TRAIN.splitlines()[0],
            **{**known, **settings},
        )

    monkeypatch.setattr(pick.BROKER, "ask", ask)
    teach.questions, teach.stops_at = questions, None
    return teach


def test_eight_picks_leave_a_lora_a_taste_and_pictures_on_the_way(teach, flux):
    tuned, taste, path, dashboard, status = teach()
    assert len(teach.questions) == 8 and all(question.counted == "question" for question in teach.questions)
    assert "8 picks; it would have made" in status and "Saved as mine.safetensors" in status
    assert status.endswith("Open the template compare to see before and after. Raise questions to be asked more.")
    run = flux.folder / "output/treerpo/mine"
    assert (run / "taste.safetensors").is_file() and (run / "adapter.safetensors").is_file()
    assert len((run / "picks.jsonl").read_text().splitlines()) == 8
    again = teach()  # everything is asked and trained: nothing happens, and the outputs are the same
    assert len(teach.questions) == 8 and again[4].startswith("8 picks")
    assert again[4].endswith("\nNext: Raise questions to be asked more.")
    images = torch.rand(3, 64, 64, 3)
    assert torch.equal(taste.score(images, [""] * 3), again[1].score(images, [""] * 3))

    loaded, agreement = flux.call("MyTaste", run="mine")
    assert torch.allclose(loaded.score(images, [""] * 3), taste.score(images, [""] * 3), atol=1e-5)
    assert "8 picks" in agreement


def test_it_goes_on_where_it_was_stopped_and_asks_the_same_questions(teach, flux):
    import comfy.model_management

    through = [question.id for question in (teach(lora_name="through", questions=6), *teach.questions)[1:]]
    teach.questions.clear()
    for teach.stops_at in (2, 4):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            teach(questions=6)
        flux.forget()
    teach.stops_at = None
    teach(questions=6)
    assert [question.id for question in teach.questions] == through


def test_the_picks_of_several_runs_count_together_and_unknown_runs_are_named(teach, flux):
    for name in ("one", "two"):
        teach(lora_name=name, questions=5, settle=0, every=1)
    assert flux.call("MyTaste", run="one", more_runs="two")[1].startswith("10 picks")
    my_taste = flux.nodes["TreeRPOMyTaste"]
    before = my_taste.fingerprint_inputs("one")
    with pytest.raises(ValueError, match="no run 'three' with picks in it. Runs with picks: "):
        flux.call("MyTaste", run="one", more_runs="three")
    with pytest.raises(ValueError, match="no run '../one'"):
        my_taste.check_lazy_status("../one")
    teach(lora_name="one", questions=6, settle=0)
    assert my_taste.fingerprint_inputs("one") != before


def test_a_real_model_needs_eyes(flux):
    with pytest.raises(ValueError, match="connect a CLIP_VISION"):
        sys.modules[f"{flux.pack.__name__}.nodes.teach"].features_for(None, tiny=False)
