"""Reward models: `score(images [B, H, W, 3] in 0..1, prompts: list of B strings) -> Tensor [B]`, higher is better.

    reward = core.rewards.load("hps_v2", "HPS_v2.1_compressed.pt", device="cuda")
    reward.score(images, prompts)  # raw units of the official model, no gradient

contract.py says what a reward is. Those with a network (scorer.py) can also give a gradient back to the images:
score(images, prompts, differentiable=True).
"""

from pathlib import Path

import torch

from .contract import Reward

KINDS = (
    "image_reward",
    "hps_v2",
    "pickscore",
    "clipscore",
    "aesthetic",
    "hpsv3",
    "ocr",
    "measure",
    "drawing",
    "server",
)


def load(kind: str, path: str | Path = "", device="cpu", dtype: torch.dtype | None = None, **options) -> Reward:
    """A reward model of this kind, one of KINDS.

    path: the weights' file or its folder; for "measure" what to measure; for "server" the address; for "drawing"
    embedded/critic or embedded/judge; for "ocr" a recognition model's .onnx file, or "" for rapidocr's own.
    dtype: default float16 on CUDA (bfloat16 for "hpsv3"), float32 elsewhere. Sizes are read from the weights; heads,
    activation and tokenizer from the files beside them where there are any.
    options: `name` for all with weights; `tokenizer` (a file or folder, for weights without one beside them) for those
    that read prompts; `clip` (weights of the image tower, or an encoder) for "aesthetic"; the fields of Measure, Ocr
    and ServerReward for these, those of Judge for a "server" with a `preset`; `wish`, `follow`, `each` or `of` for
    "drawing" (see drawing.load). Raises ValueError with one sentence when the file is missing, damaged, not weights,
    or another model's.
    """
    if kind == "measure":
        from .measure import Measure

        return Measure(str(path) or "foreground size", **options)
    if kind == "server":
        if options.get("preset"):
            from .judge import Judge

            return Judge(str(path), **options)
        from .server import ServerReward

        return ServerReward(str(path), **options)
    if kind == "ocr":
        from .ocr import Ocr

        return Ocr(recognition=path, device=device, **options)
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of reward '{kind}': choose one of {', '.join(KINDS)}.")
    # what is loaded inside a ComfyUI node could never have gradients
    with torch.inference_mode(False), torch.no_grad():
        if kind == "image_reward":
            from . import image_reward

            return image_reward.load(Path(path), device, dtype, **options)
        if kind == "hpsv3":
            from . import hpsv3

            return hpsv3.load(Path(path), device, dtype, **options)
        if kind == "drawing":
            from . import drawing

            return drawing.load(path, **options)
        if kind == "aesthetic":
            from . import aesthetic

            return aesthetic.load(Path(path), device, dtype, **options)
        from . import clip

        return clip.load(kind, Path(path), device, dtype, **options)
