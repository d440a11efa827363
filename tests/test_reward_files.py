"""Files that are not the weights they claim to be: one sentence each, and nothing in them is run."""

import pickle

import pytest
import torch
from golden import models

from core.rewards import load
from core.rewards.files import find, open_weights


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def evil(tmp_path):
    return Evil(tmp_path / "was run")


def pickled(evil, path):
    path.write_bytes(pickle.dumps(evil))


def zipped(evil, path):
    torch.save({"state_dict": evil}, path)


def legacy(evil, path):
    torch.save({"state_dict": evil}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("kind", ["hps_v2", "image_reward", "pickscore", "clipscore", "aesthetic"])
@pytest.mark.parametrize("make", [pickled, zipped, legacy])
def test_code_is_refused_and_never_run(evil, tmp_path, kind, make):
    make(evil, tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match="weights.pt holds something else than weights, possibly code, and was not opened"
    ) as caught:
        load(kind, tmp_path / "weights.pt")
    assert "\n" not in str(caught.value) and not evil.path.exists()
    pickle.loads(pickle.dumps(evil)).close()
    assert evil.path.exists(), "the pickle would have done it"


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"<!DOCTYPE html><html>sign in</html>", "is a web page, not weights"),
        (b"\n  <html>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "only a pointer to the weights"),
        (b"", "damaged or cut short"),
        (b"hello", "damaged or cut short"),
        (b"\0" * 600, "damaged or cut short"),
    ],
)
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_what_is_no_weights_file(tmp_path, content, sentence, ending):
    path = tmp_path / f"file{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        open_weights(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["hps_v2", "image_reward", "pickscore"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_a_truncated_file(tmp_path, kind, share):
    path = models.write(kind, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="damaged or cut short .* download it again"):
        load(kind, path)


@pytest.mark.parametrize(
    "kind, other, sentence",
    [
        ("hps_v2", "image_reward", "is not a CLIP for HPSv2: it holds no CLIP"),
        ("image_reward", "hps_v2", "is not ImageReward"),
        ("aesthetic", "pickscore", "is not LAION's aesthetic head"),
        ("pickscore", "aesthetic", "is not a CLIP for PickScore"),
        ("image_reward", "aesthetic", "is not ImageReward"),
    ],
)
def test_another_models_weights(tmp_path, kind, other, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(kind, models.write(other, tmp_path))


def test_an_embedding_of_another_width_is_refused(tmp_path):
    pytest.importorskip("transformers")
    head = {
        f"layers.{i}.{part}": torch.zeros(*((out, fan) if part == "weight" else (out,)))
        for i, fan, out in ((0, 7, 4), (2, 4, 4), (4, 4, 4), (6, 4, 4), (7, 4, 1))
        for part in ("weight", "bias")
    }
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="takes embeddings of 7 numbers, but this CLIP makes"):
        load("aesthetic", tmp_path / "head.pth", clip=models.write("clipscore_hf", tmp_path / "clip"))


def test_half_a_clip_is_refused_where_prompts_matter(tmp_path):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    path = models.write("clipscore_hf", tmp_path)
    vision = {
        key: value for key, value in load_file(path).items() if key.startswith(("vision_model", "visual_projection"))
    }
    save_file(vision, path)
    with pytest.raises(ValueError, match="holds only CLIP's image half"):
        load("clipscore", path)


def test_folders(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        find(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="holds 0 weight files"):
        find(tmp_path)
    (tmp_path / "b.pt").write_bytes(b"")
    assert find(tmp_path).name == "b.pt"
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 2 weight files .a.safetensors, b.pt."):
        find(tmp_path)
    assert find(tmp_path, "b.pt").name == "b.pt"


def test_image_reward_without_a_vocabulary_says_which(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    path = models.write("image_reward", tmp_path / "weights")
    (path.parent / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="put its vocab.txt .231,508 bytes. beside ImageReward.pt"):
        load("image_reward", path)
