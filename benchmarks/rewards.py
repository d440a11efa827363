"""Reward models in full size, with random weights in the official file formats: load time, seconds per image, memory.

    python3 run.py bench rewards [--models hps_v2,clipscore,pickscore,image_reward,aesthetic] [--images 8] [--size 512]

Each loads in a process of its own, ours and the official package's where that runs here: open_clip for HPSv2 (as
hpsv2's img_score does, one image at a time), transformers for PickScore and CLIPScore (the model cards' snippets). The
package image-reward needs libraries of 2023; where it cannot be imported its row is left out. Needs 5 GB of disk and 9
GB of memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
KINDS = ("hps_v2", "clipscore", "pickscore", "image_reward", "aesthetic")
PROMPTS = ["a photo of a cat on a mat", "an oil painting of a ship in a storm, dramatic light"]


def random_weights(shapes: dict[str, torch.Size], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Small numbers of one seed; norms 1, biases 0."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes.items():
        norm = len(shape) == 1 and name.endswith("weight")
        value = (
            torch.ones(shape)
            if norm
            else torch.zeros(shape)
            if name.endswith("bias")
            else torch.randn(shape, generator=generator) * 0.02
        )
        made[name] = value.to(dtype)
    return made


def hf_clip(folder: Path, large: bool, dtype: torch.dtype) -> Path:
    import transformers
    from safetensors.torch import save_file

    sizes = (
        (768, 12, 12, 3072, 1024, 16, 24, 4096, 768, "quick_gelu")
        if large
        else (1024, 16, 24, 4096, 1280, 16, 32, 5120, 1024, "gelu")
    )
    text = dict(zip(("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"), sizes[:4])) | {
        "hidden_act": sizes[9]
    }
    vision = dict(zip(("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"), sizes[4:8])) | {
        "patch_size": 14,
        "hidden_act": sizes[9],
    }
    config = transformers.CLIPConfig(
        text_config=text | {"projection_dim": sizes[8]},
        vision_config=vision | {"projection_dim": sizes[8]},
        projection_dim=sizes[8],
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in transformers.CLIPModel(config).state_dict().items()}
    save_file(random_weights(shapes, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder / "model.safetensors"


def image_reward_shapes() -> dict[str, torch.Size]:
    """BLIP's ViT-L/16 at 224 and BERT-base with cross-attention, as ImageReward.pt names them."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, fan_in: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, fan_in), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    shapes |= {
        f"{see}.cls_token": (1, 1, 1024),
        f"{see}.pos_embed": (1, 197, 1024),
        f"{see}.patch_embed.proj.weight": (1024, 3, 16, 16),
        f"{see}.patch_embed.proj.bias": (1024,),
        f"{read}.embeddings.word_embeddings.weight": (30524, 768),
        f"{read}.embeddings.position_embeddings.weight": (512, 768),
    }
    for i in range(24):
        for name, out, fan_in in (
            ("attn.qkv", 3072, 1024),
            ("attn.proj", 1024, 1024),
            ("mlp.fc1", 4096, 1024),
            ("mlp.fc2", 1024, 4096),
        ):
            linear(f"{see}.blocks.{i}.{name}", out, fan_in)
        norm(f"{see}.blocks.{i}.norm1", 1024)
        norm(f"{see}.blocks.{i}.norm2", 1024)
    norm(f"{see}.norm", 1024)
    norm(f"{read}.embeddings.LayerNorm", 768)
    for i in range(12):
        layer = f"{read}.encoder.layer.{i}"
        for attention, context in (("attention", 768), ("crossattention", 1024)):
            for part, fan_in in (("query", 768), ("key", context), ("value", context)):
                linear(f"{layer}.{attention}.self.{part}", 768, fan_in)
            linear(f"{layer}.{attention}.output.dense", 768, 768)
            norm(f"{layer}.{attention}.output.LayerNorm", 768)
        linear(f"{layer}.intermediate.dense", 3072, 768)
        linear(f"{layer}.output.dense", 768, 3072)
        norm(f"{layer}.output.LayerNorm", 768)
    linear("blip.vision_proj", 256, 1024)
    linear("blip.text_proj", 256, 768)
    sizes = (768, 1024, 128, 64, 16, 1)
    for i, fan_in, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        linear(f"mlp.layers.{i}", out, fan_in)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def make(kind: str, folder: Path) -> Path:
    """The official file, in full size."""
    if kind == "hps_v2":
        import open_clip

        with torch.device("meta"):
            model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
        file = folder / "HPS_v2.1_compressed.pt"
        torch.save(
            {
                "state_dict": random_weights(
                    {name: value.shape for name, value in model.state_dict().items()}, torch.float16
                )
            },
            file,
        )
    elif kind == "image_reward":
        file = folder / "ImageReward.pt"
        torch.save(random_weights(image_reward_shapes(), torch.float32), file)
        (folder / "med_config.json").write_text(
            json.dumps(
                dict(
                    num_attention_heads=12,
                    num_hidden_layers=12,
                    hidden_size=768,
                    intermediate_size=3072,
                    vocab_size=30524,
                    layer_norm_eps=1e-12,
                    add_cross_attention=True,
                    hidden_act="gelu",
                )
            )
        )
        (folder / "vocab.txt").write_text(
            "\n".join(
                [
                    "[PAD]",
                    "[UNK]",
                    "[CLS]",
                    "[SEP]",
                    "[MASK]",
                    *"abcdefghijklmnopqrstuvwxyz",
                    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz,"),
                ]
            )
        )
    elif kind == "aesthetic":
        sizes = (768, 1024, 128, 64, 16, 1)
        shapes = {
            f"layers.{i}.{part}": torch.Size((out, fan_in) if part == "weight" else (out,))
            for i, fan_in, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:])
            for part in ("weight", "bias")
        }
        file = folder / "sac+logos+ava1-l14-linearMSE.pth"
        torch.save(random_weights(shapes, torch.float32), file)
        hf_clip(folder, True, torch.float32)
    else:
        file = hf_clip(folder, kind == "clipscore", torch.float32)
    return file


def ours(kind: str, file: Path):
    from core.rewards import load

    options = {"clip": file.with_name("model.safetensors")} if kind == "aesthetic" else {}
    reward = load(kind, file, "cpu", **options)
    return lambda images, prompts: reward.score(images, prompts)


def official(kind: str, file: Path):
    """The official code as its authors show it, or None where there is none that runs here."""
    from PIL import Image

    def pictures(images):
        return [Image.fromarray((image * 255).round().byte().numpy()) for image in images]

    if kind == "hps_v2":
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        model = open_clip.create_model("ViT-H-14").eval()
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
        preprocess, tokenizer = (
            image_transform_v2(PreprocessCfg(resize_mode="longest"), is_train=False),
            open_clip.get_tokenizer("ViT-H-14"),
        )

        def score(images, prompts):
            with torch.no_grad():
                return [
                    float(
                        (model.encode_image(preprocess(p)[None], True) @ model.encode_text(tokenizer([t]), True).T)[
                            0, 0
                        ]
                    )
                    for p, t in zip(pictures(images), prompts)
                ]

        return score
    if kind in ("pickscore", "clipscore"):
        import open_clip
        import transformers

        model = transformers.CLIPModel.from_pretrained(file.parent).eval()
        processor, tokenizer = transformers.CLIPImageProcessor(), open_clip.get_tokenizer("ViT-H-14")

        def feature(output):
            return torch.nn.functional.normalize(output if torch.is_tensor(output) else output.pooler_output, dim=-1)

        def score(images, prompts):
            with torch.no_grad():
                return [
                    float(
                        (
                            feature(model.get_image_features(**processor(p, return_tensors="pt")))
                            @ feature(model.get_text_features(input_ids=tokenizer([t]))).T
                        )[0, 0]
                    )
                    for p, t in zip(pictures(images), prompts)
                ]

        return score
    if kind == "image_reward":
        try:
            import ImageReward

            model = ImageReward.load(str(file), device="cpu", med_config=str(file.with_name("med_config.json")))
        except Exception:
            return None
        return lambda images, prompts: [model.score(t, p) for p, t in zip(pictures(images), prompts)]
    return None


def measure(kind: str, who: str, file: Path, count: int, size: int) -> dict | None:
    """In a process of its own: seconds to load, seconds per image after a first one, gigabytes at the peak."""
    images = torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(1))
    prompts = [PROMPTS[i % 2] for i in range(count)]
    began = time.perf_counter()
    score = (ours if who == "ours" else official)(kind, file)
    if score is None:
        return None
    loaded = time.perf_counter()
    score(images[:1], prompts[:1])
    first = time.perf_counter()
    score(images, prompts)
    return {
        "load_seconds": loaded - began,
        "seconds_per_image": (time.perf_counter() - first) / count,
        "peak_gb": peak() / 1e9,
    }


def peak() -> int:
    """Bytes of this process at its largest. (getrusage also counts the process it was forked from.)"""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import psutil

    return psutil.Process().memory_info().rss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(KINDS))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("KIND", "WHO", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, who, file = options.worker
        print("RESULT " + json.dumps(measure(kind, who, Path(file), options.images, options.size)))
        return
    results = {
        "images": options.images,
        "size": options.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "models": {},
    }
    for kind in options.models.split(","):
        if kind not in KINDS:
            parser.error(f"unknown model '{kind}': choose among {', '.join(KINDS)}")
        with tempfile.TemporaryDirectory() as folder:
            file = make(kind, Path(folder))
            found = {}
            for who in ("ours", "official"):
                command = [
                    sys.executable,
                    __file__,
                    "--images",
                    str(options.images),
                    "--size",
                    str(options.size),
                    "--worker",
                    kind,
                    who,
                    str(file),
                ]
                done = subprocess.run(
                    command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
                )
                lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not lines:
                    sys.exit(f"{kind}, {who}: failed\n{done.stderr[-2000:]}")
                found[who] = json.loads(lines[0][7:])
                if found[who]:
                    print(
                        f"{kind:13} {who:9}" + "".join(f"  {name} {value:.2f}" for name, value in found[who].items()),
                        flush=True,
                    )
            if found["official"]:
                found["faster_than_official"] = (
                    found["official"]["seconds_per_image"] / found["ours"]["seconds_per_image"]
                )
                print(f"{kind:13} seconds per image, official / ours: {found['faster_than_official']:.2f}")
            results["models"][kind] = found
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
