"""The files of benchmarks/rehearsal.py: what they hold, and that the template is shrunk and nothing else."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def made(comfy):
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    import rehearsal_files

    return rehearsal_files


# bytes of the published files; a header of names stands before the tensors
PUBLISHED = {
    "checkpoints/sd3.5_medium.safetensors": 5_107_104_110,
    "text_encoders/clip_l.safetensors": 246_144_152,
    "text_encoders/clip_g.safetensors": 1_389_382_176,
    "text_encoders/t5xxl_fp8_e4m3fn.safetensors": 4_893_934_904,
    "checkpoints/flux1-dev-fp8.safetensors": 17_246_524_772,
}


def test_files_are_as_large_as_the_published_ones(made):
    found = made.files("sd35_medium", "files") | made.files("flux", "checkpoint")
    assert found.keys() == PUBLISHED.keys()
    for path, tensors in found.items():
        size = sum(math.prod(shape) * made.SIZES[dtype][0] for shape, dtype in tensors.values())
        assert 0 < PUBLISHED[path] - size < 300_000, path


def test_a_written_file_is_what_was_asked_for(made, tmp_path, monkeypatch):
    monkeypatch.setattr(made, "POOL", 1009)  # smaller than the tensors
    wanted = {
        "blocks.0.weight": ((64, 32), "float8_e4m3fn"),
        "blocks.0.bias": ((64,), "bfloat16"),
        "blocks.0.norm.weight": ((7,), "float16"),
        "logit_scale": ((), "float32"),
    }
    size = made.Writer().write(tmp_path / "deep" / "a.safetensors", wanted)
    held = load_file(tmp_path / "deep" / "a.safetensors")
    assert {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in held.items()} == {
        name: (shape, f"torch.{dtype}") for name, (shape, dtype) in wanted.items()
    }
    assert size == (tmp_path / "deep" / "a.safetensors").stat().st_size
    weight = held["blocks.0.weight"].float()
    assert weight.std() * 32**0.5 == pytest.approx(1, abs=0.1) and len(weight.unique(dim=0)) == 64
    assert torch.equal(held["blocks.0.norm.weight"].float(), torch.ones(7)) and not held["blocks.0.bias"].any()


@pytest.mark.parametrize(("model", "layout"), [("sd35_medium", "files"), ("flux", "files"), ("flux", "checkpoint")])
def test_the_shipped_template_is_used_but_for_size_and_files(made, model, layout):
    sys.path.append(str(ROOT))
    import rehearsal

    options = SimpleNamespace(
        model=model, layout=layout, reward="clipscore", size=256, steps=3, branching=2, depth=1, prompts=2, words=9,
        iterations=1, checkpointing="on", lengths=[9],
    )  # fmt: skip
    graph, shipped = (
        rehearsal.training(options),
        rehearsal.load_graph(ROOT / "workflows" / "api" / f"{rehearsal.TEMPLATES[model]}.json"),
    )
    links = [value for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert all(number in graph for number, _ in links), "no link leads nowhere"
    trainers = [node for node in graph.values() if node["class_type"] == "TreeRPOTrainer"]
    [before] = [node for node in shipped.values() if node["class_type"] == "TreeRPOTrainer"]
    changed = {name for name in before["inputs"] if trainers[0]["inputs"].get(name) != before["inputs"][name]}
    relinked = {"clip", "vae"} if layout == "checkpoint" else set()
    assert changed == {"reward_model", "judge", "iterations", "per_iteration", "evaluate_every"} | relinked
    kinds = {node["class_type"] for node in graph.values()}
    assert {"TreeRPOPreflight", "TreeRPOSaveLora", "TreeRPOCLIPScore"} <= kinds and "TreeRPOHPS" not in kinds
