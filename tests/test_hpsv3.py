"""HPSv3: our network against the official code's scores (golden/make.py hpsv3), its texts against transformers' own
tokenizer, and its files.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import inputs, models
from graph import Graph
from hypothesis import given, settings
from hypothesis import strategies as st

from core.rewards import load
from core.rewards.hpsv3 import INSTRUCTION, SPECIAL, _tokenizer, smart_size

pytest.importorskip("tokenizers")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text("utf-8"))["hpsv3"]
IMAGES = [torch.from_numpy(np.array(inputs.rgb(image))).float() / 255 for image in inputs.images().values()]
SCORES = torch.tensor(GOLDEN["scores"])


def prompt(i: int, k: int) -> str:
    """The k-th of image i, as make.py has it."""
    return inputs.PROMPTS[(i + 7 * k) % len(inputs.PROMPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    assert models.blake2b("hpsv3") == GOLDEN["weights_blake2b"], "the weights are not those of the golden scores"
    return models.write("hpsv3", tmp_path_factory.mktemp("hpsv3")).parent


@pytest.fixture(scope="module")
def reward(folder):
    return load("hpsv3", folder)


@pytest.mark.parametrize("k", range(4))
def test_scores_are_the_official_ones(reward, k):
    """Every image once with each k of its prompts' quarter: 16 of the 64 golden scores."""
    rows = range(k, len(IMAGES), 4)
    found = torch.cat([reward.score(IMAGES[i][None], [prompt(i, k)]) for i in rows])
    assert SCORES.std() > 1
    torch.testing.assert_close(found, SCORES[list(rows), k], atol=2e-5, rtol=0)


def test_a_batch_scores_as_each_image_alone(reward):
    """Prompts of very different length: what fills up the short ones is never seen."""
    images = torch.stack([IMAGES[0], IMAGES[0].flip(1), IMAGES[0]])
    prompts = ["a", inputs.PROMPTS[12], ""]
    alone = torch.cat([reward.score(image[None], [text]) for image, text in zip(images, prompts)])
    torch.testing.assert_close(reward.score(images, prompts), alone, atol=2e-5, rtol=0)
    assert len(set(alone.tolist())) == 3


def test_a_gradient_reaches_the_pixels_and_points_uphill(reward):
    image = (IMAGES[6][None] * 0.8 + 0.1).requires_grad_()
    score = reward.score(image, ["a cat"], differentiable=True)
    torch.testing.assert_close(score.detach(), reward.score(image.detach(), ["a cat"]), atol=1e-4, rtol=0)
    [gradient] = torch.autograd.grad(score.sum(), image)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    step = 0.02 * gradient.sign()
    up, down = (float(reward.score((image + sign * step).detach(), ["a cat"])) for sign in (1, -1))
    assert up > float(score.detach()) > down


def test_weights_as_newer_libraries_name_them_are_the_same(folder, reward, tmp_path):
    from safetensors.torch import load_file, save_file

    renamed = {
        key.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1): value
        for key, value in load_file(folder / "HPSv3.safetensors").items()
    }
    save_file(renamed, tmp_path / "HPSv3.safetensors")
    other = load("hpsv3", tmp_path, tokenizer=folder)
    found, before = (model.score(IMAGES[6][None], ["a cat"]) for model in (other, reward))
    torch.testing.assert_close(found, before, atol=1e-5, rtol=0)


def test_the_head_stays_exact_and_a_gpu_gets_bfloat16(folder):
    half = load("hpsv3", folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.module.rm_head[0].weight.dtype == torch.float32
    found = torch.cat([half.score(IMAGES[i][None], [prompt(i, 0)]) for i in (0, 4, 8)])
    assert (found - SCORES[[0, 4, 8], 0]).abs().max() < 0.3 * SCORES.std()


@given(st.integers(1, 3000), st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_pictures_keep_about_their_shape_and_size(height, width):
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError, match="too long for HPSv3"):
            smart_size(height, width, 28)
        return
    high, wide = smart_size(height, width, 28)
    assert high % 28 == wide % 28 == 0 and min(high, wide) >= 28
    if max(height, width) / min(height, width) < 4:
        assert 0.75 < high * wide / (256 * 28 * 28) < 1.35
        assert 0.7 < (high / wide) / (height / width) < 1.4


def test_texts_are_cut_as_by_qwens_own_tokenizer(pack):
    """With the real vocabulary, which ComfyUI brings; <|Reward|> is the last of HPSv3's 151,658 tokens."""
    transformers = pytest.importorskip("transformers")
    folder = pack.nodes.reward_models.tokenizer_for("hpsv3")
    ours = _tokenizer(Path("none"), folder)
    theirs = transformers.Qwen2Tokenizer.from_pretrained(str(folder))
    assert ours.get_vocab_size() == 151658 and ours.token_to_id("<|Reward|>") == 151657
    assert [ours.token_to_id(token) for token in SPECIAL[:3]] == theirs.convert_tokens_to_ids(SPECIAL[:3])
    for text in [INSTRUCTION, *inputs.PROMPTS]:
        assert ours.encode(text).ids == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda w: w.pop("rm_head.5.weight"), "is not HPSv3: it holds"),
        (lambda w: w.pop("visual.blocks.1.norm1.bias"), "is not HPSv3: of its weights 1 missing"),
        (lambda w: w.update({"x": torch.ones(1)}), "1 unknown \\(x\\)"),
        (lambda w: w.update({"model.embed_tokens.weight": torch.ones(99, 256)}), "its weights 99: use Qwen2-VL's"),
    ],
)
def test_another_file_is_one_sentence(folder, tmp_path, change, sentence):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "HPSv3.safetensors")
    change(weights)
    save_file(weights, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=sentence) as caught:
        load("hpsv3", tmp_path, tokenizer=folder)
    assert "\n" not in str(caught.value)


def test_a_missing_vocabulary_names_its_files(folder, tmp_path):
    (tmp_path / "HPSv3.safetensors").write_bytes((folder / "HPSv3.safetensors").read_bytes())
    with pytest.raises(ValueError, match="vocab.json and merges.txt beside HPSv3.safetensors"):
        load("hpsv3", tmp_path)


def test_the_node_loads_and_scores(pack, folder, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    target = tmp_path / "models" / "rewards" / "HPSv3"
    target.mkdir(parents=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    graph = Graph(pack, tmp_path, "sd3")
    made = graph.call("HPSv3", file="rewards/HPSv3/HPSv3.safetensors")[0]
    made.tried = ""
    i = list(inputs.SIZES).index("model size")
    scores = graph.call("Score", reward_model=made, images=IMAGES[i][None], prompts=prompt(i, 0))[0]
    assert made.name == "HPSv3" and abs(float(scores.values["HPSv3"][0]) - float(SCORES[i, 0])) < 2e-5
