"""Runs and LoRAs that an earlier version wrote (commit 70aa273, ComfyUI 0.33.0) load and go on as they would there.

tests/data/old_runs: per model the run after a graph iteration and the Trainer's second with ema 0.9, the LoRA saved
then, and in after.json what that version came to after two more iterations of each kind.
"""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from graph import Graph, timeless
from safetensors.torch import load_file
from test_graph import older_than
from test_two_paths import SMALL

DATA = Path(__file__).resolve().parent / "data/old_runs"
AFTER = json.loads((DATA / "after.json").read_text("utf-8"))


@pytest.fixture(params=["flux", "sd3"])
def old(request, pack, tmp_path, monkeypatch):
    model = request.param
    monkeypatch.setattr(pack.nodes.tiny, "decodes_in", lambda device: torch.float32)  # as that version did
    monkeypatch.setattr(pack.nodes.tiny, "SHORTEST", 77)  # the same
    own = functools.cache(pack.nodes.tiny._text_encoder.__wrapped__)  # nothing is cached for it yet
    monkeypatch.setattr(pack.nodes.tiny, "_text_encoder", own)
    if model == "flux" and older_than(0, 9):
        pytest.skip("this ComfyUI takes FLUX sizes as fixed: tiny FLUX files need 0.9 or newer")
    built = Graph(pack, tmp_path, model)
    built.forget()
    run = tmp_path / "output/treerpo" / f"old {model}"
    run.mkdir(parents=True)
    for name in ("state.pt", "adapter.safetensors", "config.json", "metrics.jsonl"):
        shutil.copy(DATA / model / name, run)
    built.open = lambda: built.policy(run.name, rank=1, alpha=2.0, targets="pattern", pattern=SMALL[model])
    built.kind = model
    return built


def test_an_old_run_goes_on(old):
    policy = old.open()
    assert policy.run.iteration == 2
    averaged = policy.run.lora(averaged=True)
    for name, tensor in load_file(DATA / old.kind / "adapter.safetensors").items():
        assert torch.equal(tensor, averaged[name])
    old.iteration(policy)
    old.train(policy, 4, ema=0.9)
    expected = AFTER[old.kind]
    for row, before in zip(timeless(policy.run.metrics), expected["metrics"], strict=True):
        assert row["reward"] == pytest.approx(before["reward"], abs=1e-4)
        assert row["forwards"] == before["forwards"] and row["iteration"] == before["iteration"]
    for name, tensor in policy.run.adapters.state_dict().items():
        torch.testing.assert_close(tensor.flatten()[:8], torch.tensor(expected["lora"][name]), rtol=0, atol=1e-4)


def test_an_old_lora_samples_and_saves_the_same(old):
    """ComfyUI's own loader on the old file draws what the old run's policy draws."""
    from comfy_extras.nodes_train import LoraModelLoader

    policy = old.open()
    file = load_file(DATA / old.kind / "lora.safetensors")
    old.call("SaveLora", policy=policy, lora_name="again")
    again = load_file(next((old.folder / "loras").glob("again*")))
    assert file.keys() == again.keys() and all(torch.equal(file[name], again[name]) for name in file)
    with torch.inference_mode():
        model = LoraModelLoader.execute(old.model, file, 1.0).result[0]
        plain, tuned = (old.ksampler(which, old.prompts()[0][:1], batch=2) for which in (old.model, model))
    assert not torch.equal(plain, tuned) and tuned.isfinite().all()
