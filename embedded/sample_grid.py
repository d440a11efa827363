"""Sample the embedded models through ComfyUI's own loaders and KSampler, save a grid and report what the judge sees.

python embedded/sample_grid.py flux|sd3 --comfyui PATH [--grid FILE.png] [--each 2] [--steps 10] [--cfg 1]
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
if not __package__:  # run as a script
    sys.path.insert(0, str(FOLDER.parent))
from embedded import judge, shapes  # noqa: E402
from embedded.clip_l import SHORTEST, random_clip_l  # noqa: E402


def open_comfyui(path: str) -> None:
    """Put ComfyUI on the import path; on the CPU where there is no GPU."""
    sys.path.insert(0, str(path))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


def load(kind: str, folder: Path = FOLDER) -> tuple:
    """MODEL, CLIP and VAE as ComfyUI's loader nodes would give them."""
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(folder / f"{kind}.safetensors"))
    clip = comfy.sd.load_text_encoder_state_dicts([random_clip_l()], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    form = model.model.latent_format
    vae = comfy.sd.VAE(sd=shapes.vae_state_dict(form.scale_factor, form.shift_factor, folder / "vae.safetensors"))
    return model, clip, vae


def encode(clip, texts: list[str]) -> list:
    """One conditioning entry whose rows are the prompts, as short as the Tiny Shapes Model's."""
    known = {text: clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in set(texts)}
    found = [known[text] for text in texts]
    return [[torch.cat([c[:, :SHORTEST] for c, _ in found]), {"pooled_output": torch.cat([p for _, p in found])}]]


def sample(models: tuple, index: Tensor, steps: int, cfg: float, seed: int, size: int) -> tuple[Tensor, float]:
    """Images [B, 3, H, W] for caption indices, and the seconds that sampling and decoding took."""
    import nodes

    model, clip, vae = models
    captions = shapes.captions()
    positive = encode(clip, [captions[i] for i in index])
    negative = encode(clip, [""] * len(index))
    empty = {"samples": torch.zeros(len(index), 16, size // 8, size // 8)}
    start = time.monotonic()
    with torch.inference_mode():
        result = nodes.common_ksampler(model, seed, steps, cfg, "euler", "simple", positive, negative, empty)[0]
        images = vae.decode(result["samples"]).movedim(-1, 1).float()
    return images, time.monotonic() - start


def save_grid(images: Tensor, index: Tensor, path: Path, columns: int = 12) -> None:
    """A contact sheet, twice the size, each picture under its caption's words."""
    from PIL import Image, ImageDraw

    edge = images.shape[-1] * 2
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * edge, rows * (edge + 14)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (image, caption) in enumerate(zip(images, index)):
        x, y = place % columns * edge, place // columns * (edge + 14)
        pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
        sheet.paste(Image.fromarray(pixels).resize((edge, edge), Image.Resampling.NEAREST), (x, y + 14))
        _, colour, shape, _, _, background, _ = shapes.captions()[caption].split()
        pen.text((x + 2, y + 1), f"{colour} {shape} / {background}", fill="black", font_size=10)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("flux", "sd3"))
    parser.add_argument("--comfyui", required=True, help="folder of a ComfyUI checkout")
    parser.add_argument("--grid", type=Path, help="PNG to write")
    parser.add_argument("--shown", type=int, default=96, help="pictures in the grid")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the model's file is")
    parser.add_argument("--each", type=int, default=2, help="pictures per caption")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=shapes.SIZE)
    options = parser.parse_args()
    open_comfyui(options.comfyui)
    models = load(options.kind, options.folder)
    index = torch.arange(96).repeat(options.each)
    # sheets of 24, the batch that a small training run uses
    parts = [
        sample(models, part, options.steps, options.cfg, options.seed + number, options.size)
        for number, part in enumerate(index.split(24))
    ]
    images = torch.cat([part for part, _ in parts])
    if options.grid:
        save_grid(images[: options.shown], index[: options.shown], options.grid)
    found = judge.judge(images)
    right = {name: found[name] == number for name, number in zip(shapes.NAMED, shapes.labels(index))}
    report = {
        **{name: hit.double().mean() for name, hit in right.items()},
        "shape and colour": (right["shape"] & right["colour"]).double().mean(),
        **{values[1]: found[name].double().mean() for name, values in shapes.STYLES.items()},
        "quality": found["quality"].mean(),
        "quality above .8": (found["quality"] > 0.8).double().mean(),
    }
    report = {name: round(float(value), 3) for name, value in report.items()}
    report["seconds_per_24"] = round(sum(seconds for _, seconds in parts[1:]) / len(parts[1:]), 2)
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
