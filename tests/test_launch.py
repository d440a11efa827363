"""standalone/launch.py and core/runs/config.py: run.yaml, its mistakes, and the Trainer node's runs trained without
ComfyUI.
"""

import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from graph import Graph, timeless

from core.method import ranks as parallel
from core.method.published import PRESETS
from core.rewards.contract import Reward
from core.runs import config as configs
from core.runs.config import Config, RewardConfig, dump, load, parse
from standalone import launch

ROOT = Path(__file__).resolve().parent.parent
GOOD = {
    "model": {"source": "embedded/flux"},
    "prompts": {"train": ["a circle"]},
    "rewards": [{"kind": "measure", "path": "brightness"}],
}


def train(path: Path, folder: Path | None = None, iterations: int | None = None):
    """The run of a run.yaml, in this process."""
    config = load(path)
    config.run.folder, config.run.iterations = (
        str(folder or config.path(config.run.folder)),
        iterations or config.run.iterations,
    )
    trainer = launch.prepare(config, parallel.ALONE, torch.device("cpu"))
    trainer.train(config.run.iterations)
    return trainer.run


def close(found, expected, atol=1e-4):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=atol)


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_a_run_of_the_trainer_node_goes_on_without_comfyui_and_back(model, pack, tmp_path, monkeypatch):
    """The exported run.yaml gives the same first metrics and LoRA as the node; a run that changes hands twice is the
    run that never did.
    """
    monkeypatch.setattr(pack.nodes.tiny, "decodes_in", lambda device: torch.float32)  # as without ComfyUI
    graph = Graph(pack, tmp_path, model)
    settings = dict(
        text="a red circle on a white background\na blue square on a black background\na green star",
        held_out=1,
        evaluate_every=1,
        ema=0.5,
        shape=graph.shape(trees=2),
    )
    graph.train(through := graph.policy("through"), 3, **settings)
    graph.train(graph.policy("shared"), 1, **settings)
    folder = tmp_path / "output" / "treerpo" / "shared"
    first = train(folder / "run.yaml", tmp_path / "apart")
    assert [first.metrics[0].keys()] == [through.run.metrics[0].keys()]
    for key, value in timeless(first.metrics)[0].items():
        assert value == pytest.approx(timeless(through.run.metrics)[0][key], rel=1e-4, abs=1e-4), key
    graph.forget()
    close(first.adapters.state_dict(), graph.policy("shared").run.adapters.state_dict())
    assert [row["iteration"] for row in train(folder / "run.yaml", iterations=2).metrics] == [0, 1]
    graph.forget()
    graph.train(back := graph.policy("shared"), 3, **settings)
    found, expected = (
        torch.cat([tensor.flatten() for tensor in run.adapters.parameters()]) for run in (back.run, through.run)
    )
    moved = expected - torch.cat([tensor.flatten() for tensor in graph.policy("untrained").run.adapters.parameters()])
    # not elementwise: where a gradient is nothing but rounding, Adam makes a whole step of it
    assert (found - expected).norm() < 0.01 * moved.norm()
    for row, expected in zip(back.run.metrics, through.run.metrics, strict=True):
        assert row["reward"] == pytest.approx(expected["reward"], abs=1e-4) and row["forwards"] == expected["forwards"]


def test_what_the_node_cannot_name_is_left_to_fill_in(pack, tmp_path):
    class Own(Reward):
        name = "my own"

        def score(self, images, prompts):
            return images.mean((1, 2, 3))

    graph = Graph(pack, tmp_path)
    measure = graph.call("Measure", measure="colour", direction="less", colour="#00ff00")[0]
    graph.train(graph.policy("one"), 1, reward=graph.combine([measure, Own()], "0.5, -2"))
    path = tmp_path / "output" / "treerpo" / "one" / "run.yaml"
    assert "'my own' has no file that could be named here" in path.read_text()
    with pytest.raises(ValueError, match="rewards, entry 2: kind still has to be filled in"):
        load(path)
    path.write_text(
        path.read_text().replace("kind: fill in", "kind: measure").replace("path: fill in", "path: brightness")
    )
    config = load(path)
    reward = launch.load_rewards(config, config.rewards, torch.device("cpu"))
    assert [(model.name, weight) for model, weight in reward.parts] == [("less colour", 0.5), ("brightness", -2.0)]
    assert reward.parts[0][0].target == pytest.approx((0, 1, 0))


def test_a_run_is_not_touched_by_an_export_that_fails(pack, tmp_path, monkeypatch, caplog):
    graph = Graph(pack, tmp_path)
    monkeypatch.setattr(pack.nodes.export, "dump", lambda *arguments: 1 / 0)
    graph.train(policy := graph.policy("one"), 1)
    assert policy.run.iteration == 1 and "run.yaml was not written" in caplog.text


def test_a_file_that_is_written_reads_back_the_same(tmp_path):
    config = parse(GOOD)
    config.settings.learning_rate, config.prompts.train = 1e-5, ["off", "a: b # c", 'it\'s "é"', "1e-5", "- x", "null"]
    config.judge, config.sampling.sigmas = (
        [RewardConfig("server", "http://127.0.0.1:1/score", -0.5, options={"retries": 3, "group": True})],
        [1.0, 0.3, 0.0],
    )
    config.settings.on_alarm, config.noise.values = "off", [1e-7, 0.5]
    (tmp_path / "run.yaml").write_text(dump(config), "utf-8")
    again = load(tmp_path / "run.yaml")
    again.home = config.home
    assert again == config
    assert "# prompts per iteration; 0 = all" in dump(config)


def test_a_preset_sets_what_the_file_does_not():
    config = parse({**GOOD, "preset": "treegrpo_code", "shape": {"interval": 7}})
    shape, settings = config.shape, config.settings
    assert (shape.branching, shape.depth, shape.window, shape.interval) == (2, 4, "sliding", 7)
    assert (settings.weights, settings.inner_updates) == ("uniform", 2) and config.sampling.cfg == 4.5
    assert parse(GOOD).shape == Config().shape and parse({**GOOD, "preset": "treegrpo_paper"}).shape.branching == 3
    assert PRESETS["treegrpo_code"]["shape"].interval == 50, "the preset itself is not changed"
    with pytest.raises(ValueError, match="there is no 'x': choose one of treegrpo_paper, treegrpo_code"):
        parse({**GOOD, "preset": "x"})


def test_every_field_has_its_comment():
    for kind in {type(getattr(Config(), name)) for name in configs.SECTIONS} - {list} | {RewardConfig}:
        bare = {f.name for f in fields(kind)} - configs.comments(kind).keys() - set(configs.RECORDED)
        assert not bare, kind


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"modell": {}}, "run.yaml has no 'modell': did you mean 'model'"),
        ({"settings": {"lerning_rate": 1}}, "settings has no 'lerning_rate': did you mean 'learning_rate'"),
        ({"settings": {"learning_rate": "fast"}}, "settings: learning_rate must be a number, not 'fast'"),
        ({"settings": {"seed": True}}, "settings: seed must be a whole number"),
        ({"settings": {"on_alarm": "stop"}}, "on_alarm is 'stop': choose one of pause, warn, off"),
        ({"settings": 3}, "settings must be lines such as"),
        ({"shape": {"branching": 0}}, "shape: Branching, depth and trees must each be at least 1"),
        ({"objective": {"ratio": "no"}}, "objective: Unknown ratio 'no'"),
        ({"objective": {"sft": 0.1, "target": "images"}}, "needs the images of the Trainer node"),
        ({"model": {"source": ""}}, "model: source is missing"),
        ({"model": {"source": "fill in"}}, "model: source still has to be filled in"),
        ({"model": {"source": "embedded/flux", "dtype": "int8"}}, "model: dtype is 'int8'"),
        ({"rewards": []}, "rewards: there is none"),
        ({"rewards": [{"kind": "measure", "pth": "x"}]}, "rewards, entry 1 has no 'pth': did you mean 'path'"),
        ({"prompts": {}}, "give either train, a list, or file"),
        ({"prompts": {"train": ["a", ""]}}, "train must be a list of texts"),
        ({"prompts": {"train": "a circle"}}, "prompts: train must be a list"),
        ({"sampling": {"width": 100}}, "must be multiples of 16"),
    ],
)
def test_mistakes_are_told_in_one_sentence(changes, words):
    with pytest.raises(ValueError, match=words) as told:
        parse({**GOOD, **changes})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("model: [", "run.yaml is not YAML, line"),
        ("- a", "run.yaml must be lines such as"),
        ("", "model: source is missing"),
        ("[" * 20000, "run.yaml is nested too deeply"),
        ("a: " + "{a: " * 20000, "run.yaml is nested too deeply"),
        ("model: {source: 2026-99-99}", "run.yaml is not YAML"),
        ("model: {source: " + "9" * 9000 + "}", "run.yaml is not YAML"),
        ("adapter: {alpha: " + "9" * 400 + "}", "adapter: alpha must be a number"),
        (
            "\n".join(["a: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])
            + "\nmodel: *a29",
            "run.yaml has no 'a'",
        ),
        (
            "model:\n  name:\n"
            + "".join(f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(30)),
            "model: name must be text, not",
        ),
    ],
)
def test_a_file_that_is_no_run_is_refused(text, words, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match="There is no run file"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": {"source": "nowhere.safetensors"}}, "There is no file or folder .*nowhere.safetensors"),
        ({"model": {"source": "."}}, "has no model_index.json"),
        ({"rewards": [{"kind": "best"}]}, "Unknown kind of reward 'best'"),
        (
            {"rewards": [{"kind": "measure", "path": "brightness", "options": {"colour": 1}}]},
            "Reward 1 .measure. cannot be loaded with these options",
        ),
    ],
)
def test_what_is_not_there_is_named(changes, words, tmp_path):
    config = parse({**GOOD, **changes})
    config.home = tmp_path
    with pytest.raises(ValueError, match=words):
        launch.load_rewards(config, config.rewards, "cpu")
        launch.prepare(config, parallel.ALONE, torch.device("cpu"))


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    from test_parallel import same, write

    path = write(tmp_path, "stopped", iterations=4, settings=dict(save_every=100, evaluate_every=0))
    command = [sys.executable, "-m", "standalone.launch", "train", "--config", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("iteration 1/"):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(300) == 128 + signal.SIGTERM and "goes on" in rest
    finally:
        process.kill()
    done = torch.load(tmp_path / "stopped" / "state.pt", weights_only=True)["iteration"]
    assert 1 <= done < 4
    assert launch.main(["train", "--config", str(path)]) == 0
    assert launch.main(["train", "--config", str(path), "--folder", str(tmp_path / "through")]) == 0
    same(tmp_path / "through", tmp_path / "stopped")


def test_a_mistake_ends_the_command_with_its_sentence(tmp_path, caplog):
    (tmp_path / "run.yaml").write_text("modell: {}")
    assert launch.main(["train", "--config", str(tmp_path / "run.yaml")]) == 1
    assert "did you mean 'model'" in caplog.text and "Traceback" not in caplog.text


def test_convert_and_back(tmp_path):
    from core.hosts.diffusers_models import open_model
    from core.hosts.peft import new_adapters

    adapters = new_adapters(open_model("embedded/sd3").transformer, 4, 8.0, "attention")
    for parameter in adapters.parameters():
        parameter.data.normal_()
    source, there, back = (tmp_path / f"{name}.safetensors" for name in ("source", "there", "back"))
    save_file(adapters.state_dict(), source)
    assert launch.main(["convert", str(source), str(there), "--to", "diffusers"]) == 0
    assert all(key.startswith("transformer.") for key in load_file(there))
    assert launch.main(["convert", str(there), str(back), "--to", "comfyui"]) == 0
    found, expected = load_file(back), adapters.state_dict()
    for key in (key for key in expected if key.endswith("up.weight")):
        down, alpha = (key.replace("lora_up.weight", other) for other in ("lora_down.weight", "alpha"))
        delta = [state[key] @ state[down] * state[alpha] / len(state[down]) for state in (found, expected)]
        torch.testing.assert_close(*delta)
    assert launch.main(["convert", str(source), str(there), "--to", "diffusers"]) == 1, "nothing is replaced"


def test_convert_asks_for_the_network_where_a_file_does_not_tell(tmp_path, caplog):
    """q, k and v of a small transformer: FLUX and SD3 both have them."""
    both = {
        f"transformer.transformer_blocks.0.attn.to_{part}.lora_{side}.weight": torch.randn(*shape)
        for part in "qkv"
        for side, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    source, target = tmp_path / "small.safetensors", tmp_path / "comfyui.safetensors"
    save_file(both, source)
    command = ["convert", str(source), str(target), "--to", "comfyui"]
    assert launch.main(command) == 1 and "say which it is" in caplog.text and not target.exists()
    assert launch.main([*command, "--network", "sd3"]) == 0
    assert all(key.startswith("diffusion_model.joint_blocks.0.x_block.attn.qkv.") for key in load_file(target))


def test_the_old_command_still_works():
    done = subprocess.run(
        [sys.executable, "-m", "core.launch", "train", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--config" in done.stdout


@pytest.mark.parametrize("kind", ["z-image", "qwen-image"])
def test_other_pipelines_train_and_go_on(comfy, kind, tmp_path):
    """From the folder of a tiny pipeline: the first ratio is 1, something is learnt, and a second call goes on."""
    from conftest import COMFYUI
    from test_backend_diffusers import other_pipeline

    from core.lora.find_network import find_network
    from core.lora.interchange import comfy_pairs

    other_pipeline(kind, COMFYUI).save_pretrained(str(tmp_path / "pipeline"))
    path = tmp_path / "run.yaml"
    config = parse(
        {
            **GOOD,
            "model": {"source": str(tmp_path / "pipeline"), "checkpointing": True},
            "sampling": {"width": 64, "height": 64, "steps": 4, "scheduler": "pipeline"},
            "shape": {"branching": 2, "depth": 2, "trees": 1},
            "adapter": {"rank": 2, "alpha": 2.0},
            "run": {"name": "other", "folder": str(tmp_path / "run"), "iterations": 1},
        }
    )
    path.write_text(dump(config), "utf-8")
    fresh = train(path, tmp_path / "fresh", 1)
    assert fresh.metrics[0]["ratio_mean"] == pytest.approx(1, abs=1e-6) and fresh.metrics[0]["grad_norm"] > 0
    assert any(bool(lora.up.any()) for lora in fresh.adapters.loras.values())
    assert [row["iteration"] for row in train(path, tmp_path / "fresh", 2).metrics] == [0, 1]
    assert find_network(comfy_pairs(fresh.lora(), network=kind), "comfyui", kind) == kind


@pytest.mark.parametrize("name", ["FLUX.2", "Z-Image", "Qwen-Image", "Krea 2", "FLUX.1-dev"])
def test_text_features_are_written_for_what_the_engine_runs(pack, tmp_path, monkeypatch, name):
    """Read back they are the prompt's, filled up for FLUX.2 as ComfyUI does; with a mask nothing is written."""
    import families

    from core.hosts.diffusers_models import Precomputed
    from core.hosts.diffusers_networks import KINDS

    export, family, network = pack.nodes.export, families.named(name), {"FLUX.1-dev": "flux", "FLUX.2": "flux2"}
    policy = SimpleNamespace(model=families.load(family))
    host = SimpleNamespace(clip=None, cfg=1.0, policy=policy, start=torch.zeros(1))
    [[context, options]] = families.conditioning(family)
    options = {key: value for key, value in options.items() if key == "pooled_output"}
    monkeypatch.setattr(export, "encode", lambda clip, text: [[context, options]])
    path = tmp_path / "conditioning.safetensors"
    written = export.write_conditioning(path, host, ["a fox"])
    assert bool(written) == path.is_file() == (name != "Krea 2")
    if written:
        kind = KINDS[network.get(name, name.lower())]
        [(embeds, pooled)] = Precomputed(path, kind)(["a fox"])
        assert len(embeds) == max(7, kind.least_text) and torch.equal(embeds[-7:], context[0])
        assert not embeds[:-7].any() and (pooled is None) == (name != "FLUX.1-dev")
        options["attention_mask"] = torch.ones(1, 7)
        assert not export.write_conditioning(tmp_path / "other.safetensors", host, ["a fox"])
