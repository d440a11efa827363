"""Score with every kind of reward model in the environment this runs in, and compare with the golden scores. Prints one
line of JSON.

    python tests/compat/check.py [--golden FILE]

The models are tiny and random, in the official file formats (tests/golden/models.py). Needs torch, numpy, Pillow,
safetensors and what is to be checked.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import pkgutil
import platform
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "golden")]

import inputs
import models

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "open_clip_torch",
    "timm",
    "safetensors",
    "numpy",
    "pillow",
    "image-reward",
    "fairscale",
)
HEAVY = ("transformers", "open_clip", "ImageReward", "timm")
TOLERANCE = 1e-6  # of a cosine; as in test_rewards_golden.py


def eager_imports() -> list[str]:
    """Heavy packages that importing all of core.rewards imports: there must be none."""
    package = importlib.import_module("core.rewards")
    for module in pkgutil.iter_modules(package.__path__, "core.rewards."):
        importlib.import_module(module.name)
    return [name for name in HEAVY if name in sys.modules]


def pictures() -> dict[str, torch.Tensor]:
    """The golden images as IMAGE tensors [1, H, W, 3]."""
    return {name: torch.from_numpy(inputs.rgb(image))[None] / 255 for name, image in inputs.images().items()}


def table(scorer) -> torch.Tensor:
    """Scores [images, prompts] of the golden images and prompts; [images, 1] where prompts do not matter."""
    prompts = inputs.PROMPTS if scorer.reads_prompts else [""]
    return torch.stack([scorer.score(image.expand(len(prompts), -1, -1, -1), prompts) for image in pictures().values()])


def gradient_fault(scorer) -> str:
    """What is wrong with the gradient to the images; "" where nothing is."""
    images = torch.rand(2, 45, 38, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scorer.score(images, inputs.PROMPTS[:2], differentiable=True).sum().backward()
    if images.grad is None or not images.grad.isfinite().all():
        return "its gradient is not finite"
    return "" if images.grad.abs().amax((1, 2, 3)).min() > 0 else "its gradient is zero"


def compare(kind: str, load, golden: dict | None, tolerance: float, rows=slice(None), columns=slice(None)) -> dict:
    """Load twice, as inside a ComfyUI node; the scores must be finite, twice the same, differentiable and the golden
    ones.
    """
    started = time.monotonic()
    with torch.inference_mode():
        scorer, again = load(), load()
    found = table(scorer)
    faults = [] if found.isfinite().all() else [f"{int((~found.isfinite()).sum())} scores are not finite"]
    if not torch.equal(found, table(again)):
        faults.append("it is not deterministic")
    faults += [fault] if (fault := gradient_fault(scorer)) else []
    result = {"network": type(scorer.module).__name__, "spread": float(found.std()), "tolerance": tolerance}
    if golden is None:
        faults.append("there are no golden scores")
    else:
        hashes = {"weights": models.blake2b(kind), "inputs": inputs.blake2b()}
        faults += [
            f"the {name} are not those of the golden scores"
            for name, ours in hashes.items()
            if golden[f"{name}_blake2b"] != ours
        ]
        expected = torch.tensor(golden["scores"], dtype=torch.float64).reshape(len(found), -1)
        result["difference"] = float((found - expected)[rows][:, columns].abs().max())
        if not result["difference"] <= tolerance:
            faults.append(f"the golden scores differ by {result['difference']:.1e}")
    return {"ok": not faults, "why": "; ".join(faults), **result, "seconds": round(time.monotonic() - started, 1)}


def as_transformers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP in open_clip's format under transformers' names."""
    renamed = [
        ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
        ("transformer.resblocks.", "text_model.encoder.layers."),
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.ln_pre.", "vision_model.pre_layrnorm."),
        ("visual.ln_post.", "vision_model.post_layernorm."),
        ("visual.proj", "visual_projection.weight"),
        ("text_projection", "text_projection.weight"),
        ("token_embedding.", "text_model.embeddings.token_embedding."),
        ("ln_final.", "text_model.final_layer_norm."),
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        (".ln_1.", ".layer_norm1."),
        (".ln_2.", ".layer_norm2."),
        (".attn.out_proj.", ".self_attn.out_proj."),
        (".mlp.c_fc.", ".mlp.fc1."),
        (".mlp.c_proj.", ".mlp.fc2."),
    ]
    found = {}
    for key, value in weights.items():
        for old, new in renamed:
            if key.startswith(old) or (old.startswith(".") and old in key):
                key = key.replace(old, new, 1)
        if ".attn.in_proj_" in key:
            for part, third in zip("qkv", value.chunk(3)):
                found[key.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = third.clone()
        else:
            found[key] = value.T.contiguous() if key.endswith("_projection.weight") else value
    return found


def without_tokenizer(folder: Path, golden: dict) -> dict:
    """A CLIP in transformers' format with no files beside it. It is the one of "clipscore_open_clip", whose golden
    scores hold wherever the two formats' rules for cropping and for cleaning prompts agree.
    """
    from safetensors.torch import save_file

    from core.rewards import load, pixels

    kind, file, side = "clipscore_open_clip", folder / "model.safetensors", models.IMAGE
    save_file(as_transformers(models.build(kind)[0]), str(file))

    def same_crop(size):
        lengths = [n * side // min(size) for n in size]
        return all(
            pixels.crop_offset(length, side, True) == pixels.crop_offset(length, side, False) for length in lengths
        )

    rows = [i for i, (*size, _) in enumerate(inputs.SIZES.values()) if same_crop(size)]
    columns = [i for i, prompt in enumerate(inputs.PROMPTS) if prompt.isascii() and not set("&<") & set(prompt)]
    assert len(rows) > 8 and len(columns) > 8
    return compare(kind, lambda: load("clipscore", file), golden.get(kind), TOLERANCE, rows, columns)


def aesthetic(folder: Path, golden: dict) -> dict:
    from core.rewards import load

    clip, file = models.write("clipscore_open_clip", folder / "clip"), models.write("aesthetic", folder)
    return compare("aesthetic", lambda: load("aesthetic", file, clip=clip), golden.get("aesthetic"), 1e-6)


def image_reward(folder: Path, golden: dict) -> dict:
    """Where the package is installed, its network comes in full size only, so the tiny one is our own."""
    from core.rewards import load

    file, expected = models.write("image_reward", folder), golden.get("image_reward")
    spread = float(torch.tensor(expected["scores"]).std()) if expected else 1.0
    return compare("image_reward", lambda: load("image_reward", file), expected, 2e-5 * spread)


def simple(kind: str, golden_kind: str):
    """A check of CLIP's scores. PickScore's are cosines times about 100, so its tolerance grows with them."""

    def check(folder: Path, golden: dict) -> dict:
        from core.rewards import load

        file = models.write(golden_kind, folder)
        scale = float(torch.tensor(golden["pickscore"]["scores"]).abs().max()) if kind == "pickscore" else 1.0
        return compare(golden_kind, lambda: load(kind, file), golden.get(golden_kind), TOLERANCE * scale)

    return check


def official(result: dict) -> dict:
    """The package's network must have been used."""
    if result["network"] != "OfficialNetwork":
        result.update(ok=False, why="; ".join(filter(None, [result["why"], "the package's network was not used"])))
    return result


def package_tiny(folder: Path, golden: dict) -> dict:
    """The package's own network, with only the sizes in its source replaced."""
    network, blip = (importlib.import_module(f"ImageReward.{name}") for name in ("ImageReward", "models.BLIP.blip"))
    pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    weights = models.build("image_reward")[0]
    width, _, patch_size, _ = weights["blip.visual_encoder.patch_embed.proj.weight"].shape
    text, pretrained, mlp = weights["mlp.layers.0.weight"].shape[1], network.BLIP_Pretrain, network.MLP

    def tiny_vit(vit, size, checkpoint, layer, drop):
        tower = blip.VisionTransformer(
            img_size=size, patch_size=patch_size, embed_dim=width, depth=2, num_heads=width // 64, drop_path_rate=0.1
        )
        return tower, width

    def tiny_blip(image_size, vit, med_config):
        return pretrained(med_config=med_config, image_size=models.IMAGE, vit=vit)

    with (
        patch.object(network, "BLIP_Pretrain", tiny_blip),
        patch.object(network, "MLP", lambda size: mlp(text)),
        patch.object(pretrain, "create_vit", tiny_vit),
    ):
        return official(image_reward(folder, golden))


def package_full(folder: Path, golden: dict) -> dict:
    """The package's network in full size with random weights, against our own with the same weights."""
    from core.rewards import image_reward as ours

    network = importlib.import_module("ImageReward.ImageReward")
    texts = models.build("image_reward")[1]
    config = json.loads(texts["med_config.json"])
    config.update(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, vocab_size=30524
    )
    (folder / "med_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_bytes(texts["vocab.txt"].encode())
    torch.manual_seed(0)
    with patch.object(sys.modules["ImageReward.models.BLIP.blip_pretrain"], "init_tokenizer", lambda: None):
        weights = network.ImageReward(str(folder / "med_config.json")).state_dict()
    torch.save(livelier(weights), folder / "ImageReward.pt")
    del weights
    started, prompts = time.monotonic(), inputs.PROMPTS[:4]
    images = torch.cat([picture[:, :20, :20] for picture in list(pictures().values())[8:12]])
    theirs = ours.load(folder)
    result, expected, faults = (
        {"network": type(theirs.module).__name__},
        theirs.score(images, prompts),
        [gradient_fault(theirs)],
    )
    del theirs
    with patch.object(ours, "_official", lambda weights, config: None):
        difference = float((ours.load(folder).score(images, prompts) - expected).abs().max())
    result.update(spread=float(expected.std()), tolerance=2e-5 * float(expected.std()), difference=difference)
    if result["spread"] < 0.1 or not difference <= result["tolerance"]:
        faults.append(f"our own network differs by {difference:.1e} over a spread of {result['spread']:.1e}")
    faults = list(filter(None, faults))
    return official(
        {"ok": not faults, "why": "; ".join(faults), **result, "seconds": round(time.monotonic() - started, 1)}
    )


def livelier(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the package's initial numbers every score would be the same."""
    generator = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if value.dim() == 2 and "embeddings" not in name:
            value.normal_(0, 1.5 / value.shape[1] ** 0.5, generator=generator)
    return weights


CHECKS = {
    "ImageReward": image_reward,
    "HPSv2": simple("hps_v2", "hps_v2"),
    "PickScore": simple("pickscore", "pickscore"),
    "CLIPScore, transformers": simple("clipscore", "clipscore_hf"),
    "CLIPScore, no tokenizer": without_tokenizer,
    "CLIPScore, open_clip": simple("clipscore", "clipscore_open_clip"),
    "aesthetic": aesthetic,
}
PACKAGE_CHECKS = {"ImageReward, package, tiny": package_tiny, "ImageReward, package, full size": package_full}


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def attempt(check, golden: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return check(Path(folder), golden)
        except Exception as error:  # another model may still work
            logging.exception("failed")
            return {"ok": False, "why": f"{type(error).__name__}: {error}".splitlines()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, default=TESTS / "golden" / "golden.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    eager = eager_imports()
    golden = json.loads(options.golden.read_text("utf-8"))
    checks = dict(CHECKS, **(PACKAGE_CHECKS if importlib.util.find_spec("ImageReward") else {}))
    found = {name: attempt(check, golden) for name, check in checks.items()}
    versions = {name: version(name) for name in PACKAGES}
    print(
        json.dumps({"python": platform.python_version(), "versions": versions, "eager_imports": eager, "models": found})
    )


if __name__ == "__main__":
    main()
