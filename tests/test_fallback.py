"""standalone/demo.py: the demo without ComfyUI leaves what it promises, on the settings and the model of the demo with
it.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")
pytest.importorskip("peft")
from PIL import Image

from core.method import cost
from standalone import demo as fallback

EMBEDDED = Path(fallback.__file__).parents[1] / "embedded"
KINDS = [kind for kind in ("flux", "sd3") if (EMBEDDED / f"{kind}.safetensors").exists()]
FILES = ["metrics.jsonl", "reward_curve.png", "tree.png", "before.png", "after.png", "summary.json", "config.json"]


def small_graph(name: str, original=fallback.graph) -> dict:
    """The shipped graph with fewer steps, branches and prompts."""
    nodes = original(name)
    changes = {
        "Shape": {"branching": 2, "depth": 2, "trees": 1, "tail": 0.5, "window": "random"},
        "Sigmas": {"steps": 6},
        "Sample after": {"steps": 4},
    }
    for title in ("Prompts", "Held-out prompts"):
        if title in nodes:
            changes[title] = {"text": "\n".join(nodes[title]["text"].splitlines()[:2])}
    return {title: {**inputs, **changes.get(title, {})} for title, inputs in nodes.items()}


@pytest.fixture(scope="module")
def small():
    """The demo on a small graph, with the text features computed once."""
    import embedded.clip_l
    from core.hosts import diffusers_models as host

    nodes = {**small_graph("first_steps"), **small_graph("compare")}
    prompts = [line for title in ("Prompts", "Held-out prompts") for line in fallback.lines(nodes[title]["text"])]
    prompts = [embedded.clip_l.as_trained(prompt) for prompt in prompts]
    features = host.clip_l_features(embedded.clip_l.random_clip_l(), prompts, embedded.clip_l.SHORTEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fallback, "graph", small_graph)
        patch.setattr(
            host,
            "clip_l_features",
            lambda weights, wanted, shortest: features if wanted == prompts else pytest.fail("other prompts"),
        )
        patch.setattr(embedded.clip_l, "random_clip_l", lambda: None)
        yield fallback


@pytest.fixture(scope="module", params=KINDS)
def demo(request, small, tmp_path_factory):
    """(kind, folder, summary) of a finished demo of two iterations."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, small.train(request.param, 2, folder, seed=3)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_every_file_is_there(demo):
    kind, folder, summary = demo
    for name in [*FILES, f"treerpo-shapes-{kind}.safetensors"]:
        assert (folder / name).stat().st_size > 0, name
    pictures = [Image.open(folder / f"{when}.png") for when in ("before", "after")]
    assert pictures[0].size == pictures[1].size and pictures[0].tobytes() != pictures[1].tobytes(), (
        "training changed nothing"
    )
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["backend"] == "diffusers" and summary["held_out"]["before"] != summary["held_out"]["after"]
    for figure in ("taste", "follows", "quality", "diversity"):
        assert all(0 <= summary[figure][when] <= 1 for when in ("before", "after")), figure
    assert summary["quality"]["before"] != summary["quality"]["after"]
    assert summary["reward_first"] == pytest.approx(sum(row["reward"] for row in rows(folder)) / 2)


def test_metrics_of_every_iteration(demo):
    _, folder, _ = demo
    found = rows(folder)
    assert [row["iteration"] for row in found] == [0, 1]
    for row in found:
        assert {"reward", "reward_std", "forwards", "seconds", "ratio_mean", "clip_frac", "grad_norm"} <= row.keys()
        assert abs(row["ratio_mean"] - 1) < 1e-6 and row["grad_norm"] > 0 and 0 < row["reward"] < 1
        sampling, nodes = cost.forwards(6, row["window_start"], 2, 2, tail=0.5)
        assert row["forwards"] == 2 * (sampling + nodes + nodes)  # again per node: the base model, for the KL


def test_the_same_seed_gives_the_same_run_and_another_seed_another(small, tmp_path):
    adapters = []
    for number, seed in enumerate((3, 3, 4)):
        small.train(KINDS[0], 1, tmp_path / str(number), seed)
        adapters.append(load_file(tmp_path / str(number) / f"treerpo-shapes-{KINDS[0]}.safetensors"))
    first, second, other = adapters
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_comfyui_loads_every_key_of_the_lora(demo, comfy, caplog):
    import comfy.lora
    import comfy.sd

    kind, folder, _ = demo
    model = comfy.sd.load_diffusion_model(str(EMBEDDED / f"{kind}.safetensors"))
    lora = load_file(folder / f"treerpo-shapes-{kind}.safetensors")
    patches = comfy.lora.load_lora(lora, comfy.lora.model_lora_keys_unet(model.model, {}))
    assert "not loaded" not in caplog.text and len(patches) == len(lora) // 3
    assert len(model.clone().add_patches(patches)) == len(patches)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_comfyuis_ksampler(kind, small, comfy, monkeypatch):
    import comfy.sample
    import comfy.sd

    monkeypatch.setattr(fallback, "decodes_in", lambda device: torch.float32)  # to compare exactly
    demo = small.Demo(kind, 0)
    model = comfy.sd.load_diffusion_model(str(EMBEDDED / f"{kind}.safetensors"), model_options={"dtype": torch.float32})
    from embedded.shapes import vae_state_dict

    form = model.model.latent_format
    vae = comfy.sd.VAE(sd=vae_state_dict(form.scale_factor, form.shift_factor), dtype=torch.float32)
    texts = [*demo.prompts.train, *demo.prompts.held_out][:3]
    features, pooled = map(torch.stack, zip(*(demo.host.features[text] for text in texts)))
    positive = [[features, {"pooled_output": pooled}]]
    empty = torch.zeros(3, *demo.latent)
    samples = comfy.sample.sample(
        model, comfy.sample.prepare_noise(empty, 11), 5, 1.0, "euler", "simple", positive, positive, empty, seed=11
    )
    expected = vae.decode(samples)
    assert expected.std() > 0.05
    torch.testing.assert_close(demo.draw(texts, 11, 5), expected, rtol=0, atol=1e-4)


def test_the_shipped_graphs_are_understood():
    settings, comparison = fallback.graph("first_steps"), fallback.graph("compare")
    assert fallback.tree_shape(settings["Shape"]).leaves >= 2
    fallback.noise_schedule({**settings["Noise"], "shape": "list", "list": "0.5, 0.7"}).levels(2)
    trained, held_out = (
        fallback.lines(settings["Prompts"]["text"]),
        fallback.lines(comparison["Held-out prompts"]["text"]),
    )
    assert trained and held_out and not set(trained) & set(held_out)
    for title, inputs in (("Sample after", comparison), ("Sample before", comparison)):
        assert (
            inputs[title]["sampler_name"] == "euler"
            and inputs[title]["scheduler"] == "simple"
            and inputs[title]["cfg"] == 1
        )
    assert (
        settings["Sigmas"]["scheduler"] == "simple"
        and settings["Sampler"]["cfg"] == 1
        and settings["Sampler"]["new_noise"]
    )


def test_no_iterations_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["fallback", "--iterations", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        fallback.main()
    assert "at least 1" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["fallback", "--out", str(tmp_path)])
    monkeypatch.setitem(fallback.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit):
        fallback.main()
    assert "pip install no-such-package" in capsys.readouterr().err
