"""Simple Trainer in real ComfyUI: what lies between a model and a LoRA is chosen by the node."""

import dataclasses
import json
from pathlib import Path

import families
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
    assert status.endswith("\nNext: Open the template compare to see before and after. Run learns on.")
    assert load_file(path).keys() and len(rows(tmp_path)) == 2
    positive, _ = graph.prompts("a red circle on a white background")
    before, after = (graph.ksampler(model, positive) for model in (graph.model, tuned))
    again = graph.ksampler(graph.model, positive)
    assert not torch.equal(before, after) and torch.equal(before, again), "the model itself is as it was"
    *_, status = simple(graph, iterations=1)
    assert len(rows(tmp_path)) == 3, "the next Run learns on"
    assert status.startswith("3 iterations done. This Run went on at iteration 3. Saved as style.safetensors.")


def test_a_new_name_begins_from_an_older_checkpoint(flux, tmp_path):
    simple(flux, iterations=1)
    simple(flux, "again", iterations=1, begin_from="style @ newest")
    whole = rows(tmp_path, "again")
    assert len(whole) == 2 and whole[0] == rows(tmp_path)[0] and len(rows(tmp_path)) == 1
    with pytest.raises(ValueError, match="^There is no checkpoint 'style @ 7': choose another one under begin_from"):
        simple(flux, "third", iterations=1, begin_from="style @ 7")


def settings(tmp_path, name):
    return json.loads((tmp_path / "output/treerpo" / name / "config.json").read_text())["trainer"]


def test_a_fifth_of_the_prompts_is_only_checked_on(flux, tmp_path):
    simple(flux, iterations=1)
    written = yaml.safe_load((tmp_path / "output/treerpo/style/run.yaml").read_text())["prompts"]
    count = len(PROMPTS.splitlines())
    assert (
        len(set(written["held_out"])) == count // 5 > 0
        and len(written["held_out"]) >= 16
        and len(written["train"]) == count - count // 5
    )
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
    assert "\nNext: Run goes on." in status


def test_a_stopped_run_has_saved_its_lora(flux, tmp_path, monkeypatch):
    import comfy.model_management as management

    asked = []

    def stop():
        asked.append(1)
        if len(rows(tmp_path)) if (tmp_path / "output/treerpo/style/metrics.jsonl").exists() else 0:
            raise management.InterruptProcessingException()

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", stop)
    said = []
    monkeypatch.setattr(flux.pack.nodes.live, "send_text", lambda text, node_id: said.append(text))
    with pytest.raises(management.InterruptProcessingException):
        simple(flux, text="a red circle", iterations=5)
    assert said[-1].startswith("Stopped at 1 of 5, saved.\nNext: Run goes on.")
    import folder_paths

    assert asked and (Path(folder_paths.get_folder_paths("loras")[0]) / "style.safetensors").exists()


def test_missing_prompts_are_told_before_any_model_is_loaded(pack):
    with pytest.raises(ValueError, match="prompt list has no prompt"):
        pack.nodes.simple.SimpleTrainerNode.check_lazy_status(prompts=" ", model=None, clip=None)
    needed = pack.nodes.simple.SimpleTrainerNode.check_lazy_status(prompts="a cat", model=None, clip=None)
    assert needed == ["model", "clip"]


FITS = {  # family, name of its file -> cfg, steps
    ("FLUX.1-dev", None): (1.0, 10),
    ("FLUX.1-schnell", None): (1.0, 4),
    ("FLUX.2", "flux2_dev_fp8mixed"): (1.0, 10),
    ("FLUX.2 klein", "flux-2-klein-4b-fp8"): (1.0, 4),
    ("FLUX.2 klein", "flux-2-klein-base-4b-fp8"): (5.0, 10),
    ("SD3", None): (4.5, 10),
    ("SD3.5", "sd3.5_large_fp8_scaled"): (4.5, 10),
    ("Z-Image", None): (4.0, 10),
    ("Z-Image", "z_image_turbo_bf16"): (1.0, 8),
    ("HiDream-I1", "hidream_i1_full_fp8"): (5.0, 10),
    ("Chroma", "Chroma1-HD-fp8mixed"): (3.5, 10),
}


@pytest.mark.parametrize("family, file", FITS)
def test_guidance_and_steps_go_by_the_architecture(pack, monkeypatch, family, file):
    """FLUX.1-schnell has no guidance inside either, and is drawn without cfg all the same."""
    monkeypatch.setattr(pack.nodes.simple, "TINY", 0)
    model = families.load(families.named(family))
    if file is not None:
        model.cached_patcher_init = (None, (f"models/diffusion_models/{file}.safetensors", {}))
    fitting = pack.nodes.simple.fit(model)
    assert (fitting.cfg, fitting.steps) == FITS[family, file] and fitting.size == 512
    assert fitting.tail == (1.0 if fitting.steps < 10 else 0.3), "of few steps none is left out"
    assert pack.nodes.simple.fit(model, 2.5).cfg == 2.5


def test_cfg_of_ones_own(flux, tmp_path):
    simple(flux, iterations=1, cfg=2.0)
    assert yaml.safe_load((tmp_path / "output/treerpo/style/run.yaml").read_text())["sampling"]["cfg"] == 2.0


def test_a_distilled_model_is_trained_in_its_few_steps(pack, flux, tmp_path, monkeypatch):
    """Of which none is left out, since there are no more."""
    usual = pack.nodes.simple.fit

    def few(model, cfg):
        return dataclasses.replace(usual(model, cfg), steps=4, tail=1.0)

    monkeypatch.setattr(pack.nodes.simple, "fit", few)
    simple(flux, iterations=1)
    row = rows(tmp_path)[0]
    assert row["window_start"] == 0 and row["grad_norm"] > 0
    assert row["rollout_forwards"] == 4 * (1 + 4 + 16 * 2), "4 prompts: two window steps, then two for all of 16 leaves"
    assert len(yaml.safe_load((tmp_path / "output/treerpo/style/run.yaml").read_text())["sampling"]["sigmas"]) == 5
