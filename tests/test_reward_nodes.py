"""Reward nodes in ComfyUI, in this process: files, memory, ranking. The scores themselves are in
test_rewards_golden.py.
"""

import importlib.util
import json
import sys
import types

import pytest
import torch
from graph import Graph
from PIL import Image

from core.rewards.contract import Reward


@pytest.fixture
def graph(pack, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    (tmp_path / "models" / "rewards").mkdir(parents=True)
    (tmp_path / "input").mkdir()
    return Graph(pack, tmp_path, "sd3")  # older ComfyUI versions cannot load the tiny FLUX


@pytest.fixture(scope="module")
def hps():
    """A tiny HPSv2 in open_clip's format, as {"state_dict": ...}."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        32, dict(layers=1, width=64, patch_size=16, image_size=32), dict(width=64, heads=1, layers=1)
    )
    return {"state_dict": model.state_dict()}


def put(graph, file, content):
    path = graph.folder / "models" / "rewards" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return f"rewards/{file}"


def test_a_loader_lists_what_is_there_and_scores_with_it(graph, hps):
    file = put(graph, "HPS_v2.1_compressed.pt", hps)
    put(graph, "other/some.pt", {"a": torch.ones(1)})
    options = graph.nodes["TreeRPOHPS"].define_schema().inputs[0].options
    assert options == [file, "rewards/other/some.pt"]
    reward = graph.call("HPS", file=file)[0]
    images = torch.rand(3, 40, 48, 3)
    assert reward.name == "HPSv2.1"
    plain = reward.score(images, ["a", "b", "c"])
    own = images.clone().requires_grad_()
    with torch.enable_grad():
        scores = reward.score(own, ["a", "b", "c"], differentiable=True)
        gradient = torch.autograd.grad(scores.sum(), own)[0]
    torch.testing.assert_close(scores, plain, atol=1e-5, rtol=0)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_comfyui_loads_and_unloads_the_weights(graph, hps):
    import comfy.model_management as management

    reward = graph.call("HPS", file=put(graph, "HPS_v2.1_compressed.pt", hps))[0]
    reward.score(torch.rand(1, 32, 32, 3), ["a"])
    loaded = [entry.model for entry in management.current_loaded_models]
    assert reward.patcher in loaded
    management.unload_all_models()
    assert reward.patcher not in [entry.model for entry in management.current_loaded_models]
    assert reward.score(torch.rand(1, 32, 32, 3), ["a"]).isfinite().all(), "and loads it again when it is needed"


@pytest.mark.parametrize(
    "node, file, words",
    [
        ("HPS", "rewards/HPS_v2.1_compressed.pt", ("2.0 GB", "Apache-2.0", "xswu/HPSv2", "download")),
        ("ImageReward", "rewards/ImageReward/ImageReward.pt", ("1.8 GB", "zai-org/ImageReward")),
        ("PickScore", "rewards/PickScore_v1/model.safetensors", ("3.9 GB", "yuvalkirstain/PickScore_v1")),
        ("CLIPScore", "rewards/clip-vit-large-patch14/model.safetensors", ("1.7 GB", "openai/clip-vit-large-patch14")),
        ("Aesthetic", "rewards/sac+logos+ava1-l14-linearMSE.pth", ("4 MB",)),
    ],
)
def test_missing_weights_are_explained(graph, node, file, words):
    schema = graph.nodes[f"TreeRPO{node}"].define_schema()
    assert schema.inputs[0].default == file and file in schema.inputs[0].options
    with pytest.raises(ValueError, match="is not there yet") as caught:
        graph.call(node, file=file)
    assert all(word in str(caught.value) for word in words)
    kind = graph.nodes[f"TreeRPO{node}"]  # and when it is queued
    assert kind.validate_inputs(file=file) == str(caught.value)
    assert kind.validate_inputs(file=file, download=True) is True and kind.validate_inputs(file=None) is True


def test_a_missing_package_is_told_when_it_is_queued(graph, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "open_clip" else real(name))
    assert "pip install open_clip_torch" in graph.nodes["TreeRPOHPS"].validate_inputs(file=None)
    assert graph.nodes["TreeRPOImageReward"].validate_inputs(file=None) is True


@pytest.mark.parametrize("file", ["rewards/../../secret.pt", "rewards//etc/passwd", "nowhere/x.pt", "rewards/gone.pt"])
def test_a_file_outside_the_folders_is_never_opened(graph, file):
    (graph.folder / "secret.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="There is no file models/"):
        graph.call("HPS", file=file)


def test_downloads_only_when_asked_and_failures_say_what_to_do(graph, hps, monkeypatch):
    asked = []

    def download(source, remote, local_dir):
        asked.append((source, remote))
        if remote == "fails":
            raise OSError("no network")
        path = graph.folder / local_dir / remote
        torch.save(hps, path)
        return str(path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))
    reward = graph.call("HPS", file="rewards/HPS_v2.1_compressed.pt", download=True)[0]
    assert (
        asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt")]
        and reward.score(torch.rand(1, 32, 32, 3), ["a"]).isfinite().all()
    )
    graph.call("HPS", file="rewards/HPS_v2.1_compressed.pt", download=True)
    assert len(asked) == 1, "what is there is not fetched again"
    with pytest.raises(
        ValueError, match="could not be downloaded from a/b .OSError: no network.: download it yourself"
    ):
        graph.pack.nodes.reward_models.fetch("a/b", "fails", graph.folder / "models/rewards/fails")


def test_wrong_weights_are_one_sentence_and_free_the_memory(graph, hps):
    import comfy.model_management as management

    before = len(management.current_loaded_models)
    for content, sentence in (({"a": torch.ones(2)}, "is not a CLIP for HPSv2"), ([1, 2], "holds no weights by name")):
        with pytest.raises(ValueError, match=sentence):
            graph.call("HPS", file=put(graph, "HPS_v2.1_compressed.pt", content))
    broken = {
        "state_dict": {
            key: value[:1] if key == "visual.ln_post.weight" else value for key, value in hps["state_dict"].items()
        }
    }
    with pytest.raises(ValueError, match="does not fit a CLIP for HPSv2: size mismatch for visual.ln_post.weight"):
        graph.call("HPS", file=put(graph, "HPS_v2.1_compressed.pt", broken))
    short = {"state_dict": {key: value for key, value in hps["state_dict"].items() if key != "ln_final.bias"}}
    with pytest.raises(ValueError, match="1 missing .ln_final.bias."):
        graph.call("HPS", file=put(graph, "HPS_v2.1_compressed.pt", short))
    assert len(management.current_loaded_models) == before


def test_the_aesthetic_head_sits_on_a_clip_vision(graph):
    import comfy.clip_vision

    torch.manual_seed(0)
    config = graph.folder / "config.json"
    config.write_text(
        json.dumps(
            dict(
                hidden_size=64,
                intermediate_size=128,
                num_attention_heads=1,
                num_hidden_layers=2,
                image_size=32,
                patch_size=16,
                projection_dim=48,
                hidden_act="quick_gelu",
                layer_norm_eps=1e-5,
                num_channels=3,
                model_type="clip_vision_model",
            )
        )
    )
    tower = comfy.clip_vision.ClipVisionModel(str(config))
    tower.model.load_state_dict(
        {key: torch.randn(value.shape) * 0.1 for key, value in tower.model.state_dict().items()}
    )
    sizes = (48, 32, 16, 8, 4, 1)
    head = {
        f"layers.{i}.{part}": torch.randn(*((out, fan) if part == "weight" else (out,))) * 0.3
        for i, fan, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:])
        for part in ("weight", "bias")
    }
    file = put(graph, "sac+logos+ava1-l14-linearMSE.pth", head)
    reward = graph.call("Aesthetic", file=file, clip_vision=tower)[0]
    images = torch.rand(4, 40, 40, 3)
    scores = reward.score(images, [""] * 4)
    from core.rewards import pixels

    embedding = tower.model(pixel_values=pixels.short_side(images, 32, True), intermediate_output=-2)[2]
    x = embedding / embedding.norm(dim=-1, keepdim=True)
    for i in (0, 2, 4, 6, 7):
        x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    torch.testing.assert_close(scores, x[:, 0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="connect a CLIP_VISION, or choose clip_file"):
        graph.call("Aesthetic", file=file)
    similar = graph.call("Similarity", clip_vision=tower, reference=images[:1], of="mean")[0].score(images, [""] * 4)
    assert float(similar[0]) == pytest.approx(1, abs=1e-5) and similar.argmax() == 0


def pictures(graph, **files):
    for name, (size, grey, text) in files.items():
        Image.new("RGB", size, (grey,) * 3).save(graph.folder / "input" / f"{name}.png")
        if text is not None:
            (graph.folder / "input" / f"{name}.txt").write_text(text)


def test_a_folder_of_any_pictures_is_ranked(graph):
    pictures(graph, a=((64, 48), 100, "sky"), b=((48, 64), 250, None), c=((64, 48), 20, None), d=((64, 48), 180, None))
    images, names, prompts = graph.call("Folder", folder="", prompt="a house", limit=10)
    assert names == ["a.png", "b.png", "c.png", "d.png"] and prompts == ["sky", "a house", "a house", "a house"]
    light = graph.call("Measure", measure="brightness", direction="more")[0]
    rewards, table, sheet, best, order = graph.call(
        "Score", reward_model=light, images=images, prompts=prompts, names=names, best_n=2
    )
    assert order == [0, 1, 3, 2] and [image.shape[1:3] for image in best] == [(48, 64), (64, 48), (48, 64)]
    assert [line.split()[1] for line in table.splitlines()[1:]] == ["b.png", "d.png", "a.png", "c.png"]
    assert sheet.shape[-1] == 3 and len(rewards.values["brightness"]) == 4


@pytest.mark.parametrize(
    "folder, sentence",
    [
        ("../x", "not inside ComfyUI's input folder"),
        ("/etc", "not inside"),
        ("absent", "There is no folder 'absent'"),
        ("", "There is no picture"),
    ],
)
def test_only_folders_of_comfyui_are_shown(graph, folder, sentence):
    with pytest.raises(ValueError, match=sentence):
        graph.call("Folder", folder=folder, prompt="", limit=10)


class Some(Reward):
    def __init__(self, name, *values):
        self.name, self.values = name, torch.tensor(values)

    def score(self, images, prompts):
        return self.values[: len(images)].clone()


def test_several_rewards_rank_as_they_train(graph):
    images = torch.rand(4, 8, 8, 3)
    small, large = Some("small", 4.0, 3.0, 2.0, 1.0), Some("large", 100.0, 300.0, 200.0, 400.0)
    ranked = {
        mode: graph.call(
            "Score", reward_model=graph.combine([small, large], "1, 0.4", mode), images=images, prompts="p"
        )[4]
        for mode in ("z-score each, then weight", "raw weighted sum")
    }
    assert ranked == {"z-score each, then weight": [0, 1, 2, 3], "raw weighted sum": [3, 1, 2, 0]}


def test_an_image_without_a_score_is_last_and_says_so(graph):
    nan = float("nan")
    rewards, table, sheet, best, order = graph.call(
        "Score", reward_model=Some("judge", 1.0, nan, 3.0, 2.0), images=torch.rand(4, 8, 8, 3), prompts="p", best_n=4
    )
    assert order == [2, 3, 0, 1] and "1 without a score" in table and "no score  image   1" in table
    table = graph.call("Score", reward_model=Some("judge", nan, nan), images=torch.rand(2, 8, 8, 3), prompts="p")[1]
    assert table == "judge: no score for any of the 2 images"


@pytest.mark.parametrize("weights, sentence", [("1", "1 weights for 2 rewards"), ("1, x", "are not numbers")])
def test_weights_are_checked(graph, weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        graph.combine([Some("a", 1.0), Some("b", 1.0)], weights)
    with pytest.raises(ValueError, match="no reward connected"):
        graph.combine([])


def test_image_reward_finds_berts_vocabulary_in_the_models_folder(graph):
    from golden import models

    path = models.write("image_reward", graph.folder / "models" / "rewards" / "ImageReward")
    with_own = graph.call("ImageReward", file="rewards/ImageReward/ImageReward.pt")[0].score(
        torch.ones(1, 32, 32, 3), ["a cat"]
    )
    folder = graph.folder / "models" / "bert-base-uncased"
    folder.mkdir()
    (path.parent / "vocab.txt").rename(folder / "vocab.txt")
    again = graph.call("ImageReward", file="rewards/ImageReward/ImageReward.pt")[0].score(
        torch.ones(1, 32, 32, 3), ["a cat"]
    )
    assert torch.equal(with_own, again)
