"""Simple Trainer in real ComfyUI: what lies between a model and a LoRA is chosen by the node."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from graph import TRAIN
from safetensors.torch import load_file

PROMPTS = (
    TRAIN
    + "\na blue cross on a white background\na green square on a gray background\na red cross on a black background"
)


def simple(graph, name="style", text=PROMPTS, **settings):
    reward = graph.call("Measure", measure="foreground size", direction="more")[0]
    return graph.call(
        "Simple",
        model=graph.model,
        clip=graph.clip,
        vae=graph.vae,
        reward_model=reward,
        prompts=text,
        lora_name=name,
        **{"preset": "normal", "iterations": 2, **settings},
    )


def rows(tmp_path, name="style"):
    return [
        json.loads(line) for line in (tmp_path / "output/treerpo" / name / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_model_prompts_and_a_reward_become_a_lora(graph, tmp_path):
    tuned, path, picture, status = simple(graph)
    assert status.startswith("2 iterations done. Saved as style.safetensors.") and picture.std() > 0
    assert load_file(path).keys() and len(rows(tmp_path)) == 2
    positive, _ = graph.prompts("a red circle on a white background")
    before, after = (graph.ksampler(model, positive) for model in (graph.model, tuned))
    again = graph.ksampler(graph.model, positive)
    assert not torch.equal(before, after) and torch.equal(before, again), "the model itself is as it was"
    simple(graph, iterations=1)
    assert len(rows(tmp_path)) == 3, "the next Run learns on"


def settings(tmp_path, name):
    return json.loads((tmp_path / "output/treerpo" / name / "config.json").read_text())["trainer"]


def test_a_fifth_of_the_prompts_is_only_checked_on(flux, tmp_path):
    simple(flux, iterations=1)
    written = yaml.safe_load((tmp_path / "output/treerpo/style/run.yaml").read_text())["prompts"]
    count = len(PROMPTS.splitlines())
    assert len(written["held_out"]) == count // 5 > 0 and len(written["train"]) == count - count // 5
    assert settings(tmp_path, "style")["evaluate_every"] == 10
    simple(flux, "few", text="a red circle", iterations=1)
    assert settings(tmp_path, "few")["evaluate_every"] == 0, "too few to keep any aside"


def test_presets_differ_in_rate_and_anchor(flux, tmp_path):
    seen = []
    for preset in ("gentle", "normal", "strong"):
        simple(flux, preset, text="a red circle", preset=preset, iterations=1)
        config = settings(tmp_path, preset)
        seen.append((config["learning_rate"], config["objective"]["anchor"]))
    rates, anchors = zip(*seen)
    assert list(rates) == sorted(set(rates)) and list(anchors) == sorted(set(anchors), reverse=True)


def test_it_ends_when_the_minutes_are_over(flux, tmp_path):
    *_, status = simple(flux, text="a red circle", iterations=1000, minutes=1e-6)
    assert "minutes are over, at 1 of 1000 iterations" in status and len(rows(tmp_path)) == 1


def test_a_stopped_run_has_saved_its_lora(flux, tmp_path, monkeypatch):
    import comfy.model_management as management

    asked = []

    def stop():
        asked.append(1)
        if len(rows(tmp_path)) if (tmp_path / "output/treerpo/style/metrics.jsonl").exists() else 0:
            raise management.InterruptProcessingException()

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(management.InterruptProcessingException):
        simple(flux, text="a red circle", iterations=5)
    import folder_paths

    assert asked and (Path(folder_paths.get_folder_paths("loras")[0]) / "style.safetensors").exists()


def test_missing_prompts_are_told_before_any_model_is_loaded(pack):
    with pytest.raises(ValueError, match="prompt list has no prompt"):
        pack.nodes.simple.SimpleTrainerNode.check_lazy_status(prompts=" ", model=None, clip=None)
    needed = pack.nodes.simple.SimpleTrainerNode.check_lazy_status(prompts="a cat", model=None, clip=None)
    assert needed == ["model", "clip"]


def test_big_models_get_their_own_size_and_guidance(pack):
    """Stand-ins that only have the number of weights, on the meta device, and whether there is guidance inside."""

    class Model:
        def __init__(self, network):
            self.model = self
            self.diffusion_model = network

    def flux(guidance):
        network = torch.nn.Module()
        network.weight = torch.nn.Parameter(torch.empty(10**4, 10**5, device="meta"))
        network.params = type("Params", (), {"guidance_embed": guidance})
        return Model(network)

    assert pack.nodes.simple.fit(flux(True)).cfg == 1.0
    assert pack.nodes.simple.fit(flux(False)).cfg == 4.5 and pack.nodes.simple.fit(flux(False)).size == 512
