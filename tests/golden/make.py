"""Compute the golden scores with the official code. Run in an isolated environment (README.md), never by the tests:

    python make.py image_reward --out golden.json
    python make.py hps_v2 clipscore_open_clip clipscore_hf pickscore aesthetic --out golden.json

Kinds that are already in the file and not named stay as they are. What is replaced in the official code is only what
downloads and the sizes.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import inputs
import models
import numpy as np
import torch
from PIL import Image


def pictures() -> list:
    return [Image.fromarray(inputs.rgb(image)) for image in inputs.images().values()]


def by_image(columns: list[list[float]]) -> list[list[float]]:
    """A list per prompt -> a list per image."""
    return [list(map(float, row)) for row in zip(*columns)]


def image_reward(folder: Path) -> dict:
    """image-reward's own load and score; only the sizes (in its source) and the tokenizer's files are replaced."""
    import ImageReward

    network, blip = (importlib.import_module(f"ImageReward.{name}") for name in ("ImageReward", "models.BLIP.blip"))
    pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    weights = models.build("image_reward")[0]
    width, _, patch, _ = weights["blip.visual_encoder.patch_embed.proj.weight"].shape
    text, original = weights["mlp.layers.0.weight"].shape[1], (network.BLIP_Pretrain, network._transform, network.MLP)
    network.BLIP_Pretrain = lambda image_size, vit, med_config: original[0](
        med_config=med_config, image_size=models.IMAGE, vit=vit
    )
    network._transform, network.MLP = (lambda n_px: original[1](models.IMAGE)), (lambda input_size: original[2](text))
    pretrain.create_vit = lambda vit, size, checkpoint, layer, drop: (
        blip.VisionTransformer(
            img_size=size, patch_size=patch, embed_dim=width, depth=2, num_heads=width // 64, drop_path_rate=0.1
        ),
        width,
    )
    vocabulary, kind = folder / "vocab.txt", blip.BertTokenizer
    blip.BertTokenizer = types.SimpleNamespace(
        from_pretrained=lambda name: kind(str(vocabulary), do_lower_case=True, model_max_length=512)
    )
    file = models.write("image_reward", folder)
    model = ImageReward.load(str(file), device="cpu", med_config=str(folder / "med_config.json"))
    assert set(model.state_dict()) == set(weights), set(model.state_dict()) ^ set(weights)  # it loads with strict=False
    with torch.no_grad():
        scores = by_image([model.score(prompt, pictures()) for prompt in inputs.PROMPTS])
    assert abs(scores[0][0] - model.score(inputs.PROMPTS[0], pictures()[0])) < 1e-5
    tokens = [
        model.blip.tokenizer(prompt, padding="max_length", truncation=True, max_length=35).input_ids
        for prompt in inputs.PROMPTS
    ]
    return {"scores": scores, "tokens": tokens}


def hps_v2(folder: Path) -> dict:
    """hpsv2's own score, with its own copy of open_clip; only the size of the network is replaced."""
    import open_clip

    sys.modules["turtle"] = types.SimpleNamespace(forward=None)  # imported by mistake; needs a screen
    home = Path(importlib.import_module("hpsv2").__file__).parent / "src" / "open_clip"
    shutil.copy(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", home)  # 1.2.0 comes without it
    from hpsv2 import img_score

    file = models.write("hps_v2", folder)
    add_config(importlib.import_module("hpsv2.src.open_clip"), "hps_v2", folder)
    create = img_score.create_model_and_transforms
    img_score.create_model_and_transforms = lambda name, pretrained, **options: create("tiny_hps_v2", None, **options)
    return {"scores": by_image([img_score.score(pictures(), prompt, cp=str(file)) for prompt in inputs.PROMPTS])}


def add_config(open_clip, kind: str, folder: Path) -> str:
    file = folder / f"tiny_{kind}.json"
    file.write_text(json.dumps(models.open_clip_config(kind)))
    open_clip.add_model_config(file)
    return file.stem


def load_open_clip(folder: Path):
    """open_clip's own model, preprocessing and tokenizer of "clipscore_open_clip"."""
    import open_clip

    name, file = add_config(open_clip, "clipscore_open_clip", folder), models.write("clipscore_open_clip", folder)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(file))
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@torch.no_grad()
def clipscore_open_clip(folder: Path) -> dict:
    """The usage example of open_clip's README, without the logit scale."""
    model, preprocess, tokenizer = load_open_clip(folder)
    images = torch.cat([model.encode_image(preprocess(picture).unsqueeze(0)) for picture in pictures()])
    texts = torch.cat([model.encode_text(tokenizer([prompt])) for prompt in inputs.PROMPTS])
    images /= images.norm(dim=-1, keepdim=True)
    texts /= texts.norm(dim=-1, keepdim=True)
    return {"scores": (images @ texts.T).tolist()}


@torch.no_grad()
def aesthetic(folder: Path) -> dict:
    """simple_inference.py of improved-aesthetic-predictor, with open_clip in place of clip: the same network and
    preprocessing.
    """
    model, preprocess, _ = load_open_clip(folder)
    head = torch.nn.Sequential(
        torch.nn.Linear(64, 1024),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    )
    mlp = torch.nn.Module()
    mlp.layers = head
    mlp.load_state_dict(torch.load(models.write("aesthetic", folder)))
    mlp.eval()
    scores = []
    for picture in pictures():
        embedding = model.encode_image(preprocess(picture).unsqueeze(0)).cpu().detach().numpy()
        length = np.atleast_1d(np.linalg.norm(embedding, 2, -1))
        length[length == 0] = 1
        scores.append(head(torch.from_numpy(embedding / np.expand_dims(length, -1)).type(torch.FloatTensor)).item())
    return {"scores": scores}


@torch.no_grad()
def transformers_clip(kind: str, folder: Path) -> tuple[list[list[float]], float]:
    """The example of PickScore's model card: cosines [images, prompts] and exp(logit_scale)."""
    from transformers import AutoModel, AutoProcessor

    models.write(kind, folder)
    processor, model = AutoProcessor.from_pretrained(str(folder)), AutoModel.from_pretrained(str(folder)).eval()
    assert (
        type(processor.image_processor).__name__ == "CLIPImageProcessor"
        and type(processor.tokenizer).__name__ == "CLIPTokenizerFast"
    )
    columns = []
    for prompt in inputs.PROMPTS:
        image_inputs = processor(images=pictures(), padding=True, truncation=True, max_length=77, return_tensors="pt")
        text_inputs = processor(text=prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
        images = model.get_image_features(**image_inputs)
        images = images / torch.norm(images, dim=-1, keepdim=True)
        texts = model.get_text_features(**text_inputs)
        texts = texts / torch.norm(texts, dim=-1, keepdim=True)
        columns.append((texts @ images.T)[0])
    return columns, model.logit_scale.exp()


def clipscore_hf(folder: Path) -> dict:
    return {"scores": by_image([column.tolist() for column in transformers_clip("clipscore_hf", folder)[0]])}


def pickscore(folder: Path) -> dict:
    columns, scale = transformers_clip("pickscore", folder)
    return {"scores": by_image([(scale * column).tolist() for column in columns])}


def versions(kind: str) -> dict[str, str]:
    """Of Python and of every package that the environment's requirements name."""
    files = sorted(
        Path(__file__).parent.glob(
            "requirements-image-reward*.txt" if kind == "image_reward" else "requirements-clip*.txt"
        )
    )
    lines = [line for file in files for line in file.read_text().splitlines()]
    names = [re.match(r"[\w.-]+", line)[0] for line in lines if line and not line.startswith("#")]
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def as_text(found: dict) -> str:
    """JSON with a list of numbers or names to a line."""
    return (
        re.sub(r"\[[^\[\]{}]*\]", lambda part: " ".join(part[0].split()), json.dumps(found, indent=1, sort_keys=True))
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=models.FILES)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            scores = globals()[kind](Path(folder))
        hashes = {"weights_blake2b": models.blake2b(kind), "inputs_blake2b": inputs.blake2b()}
        found[kind] = {
            "versions": versions(kind),
            "seed": models.SEEDS[kind],
            **hashes,
            "images": list(inputs.SIZES),
            **scores,
        }
    options.out.write_text(as_text(found))


if __name__ == "__main__":
    main()
