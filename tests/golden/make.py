"""Compute the golden scores with the official code. Run in an isolated environment (README.md), never by the tests:

    python make.py image_reward --out golden.json
    python make.py hpsv3 --out golden.json
    python make.py hps_v2 clipscore_open_clip clipscore_hf pickscore aesthetic --out golden.json

Kinds that are already in the file and not named stay as they are. What is replaced in the official code is only what
downloads and the sizes.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
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

# packages that hpsv3 imports for training and plots
UNUSED_BY_HPSV3 = (
    "matplotlib", "matplotlib.pyplot", "matplotlib.patches", "torch.utils.tensorboard", "pandas", "datasets", "peft",
    "trl", "fire",
)  # fmt: skip
# Qwen2-VL-7B-Instruct's, for a picture and a text
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are "
    "a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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


def hpsv3(folder: Path) -> dict:
    """hpsv3's own inferencer, in fp32 on the CPU; replaced: the sizes of Qwen2-VL, and packages that only its training
    needs. Every image with the prompts i, i + 7 ... of its number i: 16 x 4.
    """
    import transformers
    import transformers.trainer
    import yaml
    from transformers import AutoProcessor, HfArgumentParser, Qwen2VLForConditionalGeneration  # noqa: F401  before those below

    for name in UNUSED_BY_HPSV3:
        sys.modules[name] = unused = types.ModuleType(name)
        unused.__getattr__ = lambda part: None if part.startswith("__") else type(part, (), {})
    sys.modules["trl"].get_quantization_config = sys.modules["trl"].get_kbit_device_map = lambda *options: None

    file, base = models.write("hpsv3", folder), folder / "Qwen2-VL"
    weights, texts = models.build("hpsv3")
    base.mkdir()
    for name, text in texts.items():
        (base / name).write_bytes(text.encode())
    count = len(json.loads(texts["vocab.json"]))
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    special = {str(count + i): dict(flags, content=f"<|{name}|>") for i, name in enumerate(models.QWEN2_VL)}
    tokenizer = dict(
        add_prefix_space=False, added_tokens_decoder=special, chat_template=CHAT_TEMPLATE, eos_token="<|im_end|>",
        pad_token="<|endoftext|>", tokenizer_class="Qwen2Tokenizer", bos_token=None, unk_token=None, errors="replace",
        model_max_length=32768,
    )  # fmt: skip
    processor = dict(
        min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2VLProcessor",
    )  # fmt: skip
    for name, value in (("tokenizer_config", tokenizer), ("preprocessor_config", processor), ("chat_template", None)):
        (base / f"{name}.json").write_text(json.dumps(value or {"chat_template": CHAT_TEMPLATE}))
    text, vision = (weights[f"{name}.weight"].shape for name in ("model.embed_tokens", "visual.merger.ln_q"))
    config = transformers.Qwen2VLConfig(
        vocab_size=text[0] + 30, hidden_size=text[1], intermediate_size=2 * text[1], num_hidden_layers=2,
        num_attention_heads=text[1] // 128, num_key_value_heads=1, tie_word_embeddings=False, rope_theta=1e6,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]), rms_norm_eps=1e-6,
        vision_config=dict(depth=2, embed_dim=vision[0], hidden_size=text[1], num_heads=vision[0] // 80, mlp_ratio=4),
        **{f"{name}_token_id": count + models.QWEN2_VL.index(token) for name, token in (
            ("bos", "endoftext"), ("eos", "im_end"), ("vision_start", "vision_start"), ("vision_end", "vision_end"),
            ("vision_token", "vision_pad"), ("image", "image_pad"), ("video", "video_pad"))},
    )  # fmt: skip
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(base)
    settings = yaml.safe_load(
        (Path(importlib.util.find_spec("hpsv3").origin).parent / "config/HPSv3_7B.yaml").read_text()
    )
    settings |= dict(model_name_or_path=str(base), bf16=False, torch_dtype="float32", output_dir=str(folder / "out"))
    settings |= dict(disable_flash_attn2=True, report_to="none", eval_strategy="no")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    from hpsv3.inference import HPSv3RewardInferencer

    official, scores = HPSv3RewardInferencer(str(folder / "tiny.yaml"), str(file), device="cpu"), []
    with torch.no_grad():
        for i, picture in enumerate(pictures()):
            prompts = [inputs.PROMPTS[(i + 7 * k) % len(inputs.PROMPTS)] for k in range(4)]
            scores.append(official.reward([picture] * 4, prompts)[:, 0].tolist())
    return {"scores": scores}


def versions(kind: str) -> dict[str, str]:
    """Of Python and of every package that the environment's requirements name."""
    files = sorted(
        Path(__file__).parent.glob(
            f"requirements-{ {'image_reward': 'image-reward', 'hpsv3': 'hpsv3'}.get(kind, 'clip') }*.txt"
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
