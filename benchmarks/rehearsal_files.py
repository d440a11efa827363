"""Model files of true shape, precision and key names with random weights, written tensor by tensor: for the benchmark
rehearsal.

Names and shapes are those of ComfyUI's own classes, made on "meta". Every file takes the place, under its published
name, where ComfyUI looks for it.
"""

import json
import math
import random
from pathlib import Path

import host
from engines import MODELS, network_file, spread, vae_file

POOL = 4_194_319  # random numbers, a prime, so that no two rows of a matrix begin at the same one
SIZES = {"float8_e4m3fn": (1, "F8_E4M3"), "float16": (2, "F16"), "bfloat16": (2, "BF16"), "float32": (4, "F32")}


class Writer:
    """Writes safetensors files; holds a few million random numbers, whatever the file's size."""

    def __init__(self, seed: int = 0):
        import torch

        self.torch = torch
        self.numbers = torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
        self.places = random.Random(seed)
        self.pools: dict[tuple, memoryview] = {}

    def write(self, path: Path, tensors: dict[str, tuple], metadata: dict | None = None) -> int:
        """tensors: name -> (shape, precision by torch's name). Returns the file's bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        header, end = {"__metadata__": metadata} if metadata else {}, 0
        for name, (shape, dtype) in tensors.items():
            begin, end = end, end + math.prod(shape) * SIZES[dtype][0]
            header[name] = {"dtype": SIZES[dtype][1], "shape": list(shape), "data_offsets": [begin, end]}
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with open(path, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name, (shape, dtype) in tensors.items():
                self._numbers(file, name, shape, dtype)
        return path.stat().st_size

    def _numbers(self, file, name: str, shape, dtype: str) -> None:
        bytes_of, left = SIZES[dtype][0], math.prod(shape)
        mean, std = spread(name, shape)
        pool = self._pool(mean, std, dtype)
        place = self.places.randrange(POOL) if std else 0
        while left:
            count = min(left, POOL - place)
            file.write(pool[place * bytes_of : (place + count) * bytes_of])
            left, place = left - count, 0

    def _pool(self, mean: float, std: float, dtype: str) -> memoryview:
        """The random numbers in this size and precision, as bytes."""
        key = (mean, round(std, 8), dtype)
        if key not in self.pools:
            if len(self.pools) > 8:
                self.pools.pop(next(iter(self.pools)))
            made = (self.numbers * std + mean).to(getattr(self.torch, dtype))
            self.pools[key] = memoryview(made.view(self.torch.uint8).numpy()).cast("B")
        return self.pools[key]


def alike(tensors: dict, dtype: str, prefix: str = "") -> dict[str, tuple]:
    """All tensors in one precision, as Writer.write takes them."""
    return {prefix + name: (tuple(tensor.shape), dtype) for name, tensor in tensors.items()}


def text_file(kind: str) -> dict:
    """What a file of this text encoder holds, on "meta"."""
    import torch
    from comfy.sd1_clip import SDClipModel
    from comfy.sdxl_clip import SDXLClipG
    from comfy.text_encoders.sd3_clip import T5XXLModel

    made = {"clip_l": SDClipModel, "clip_g": SDXLClipG, "t5xxl": T5XXLModel}[kind](device="meta", dtype=torch.float16)
    return {
        name.removeprefix("transformer."): tensor
        for name, tensor in made.state_dict().items()
        if name.startswith("transformer.")
    }


def files(model: str, layout: str, blocks: int = 0) -> dict[str, dict[str, tuple]]:
    """{path below models/: its tensors}. layout: "files" = as the shipped template loads them, "checkpoint" = all of
    FLUX in one fp8 file. blocks: of FLUX's network, of either kind; 0 = all.
    """
    network = network_file(model, MODELS[model] | ({"blocks": blocks, "single": blocks} if blocks else {}))
    clip_l, t5 = text_file("clip_l"), text_file("t5xxl")
    clip_alone = {name: tensor for name, tensor in clip_l.items() if name != "text_projection.weight"}
    t5_alone = t5 | {"encoder.embed_tokens.weight": t5["shared.weight"]}  # the published file has it twice
    if layout == "checkpoint":
        parts = {"clip_l": alike(clip_l, "float16"), "t5xxl": alike(t5, "float8_e4m3fn")}
        whole = alike(network, "float8_e4m3fn", "model.diffusion_model.") | alike(vae_file(), "float32", "vae.")
        for part, tensors in parts.items():
            whole |= {f"text_encoders.{part}.transformer.{name}": value for name, value in tensors.items()}
            whole |= {f"text_encoders.{part}.logit_scale": ((), "float32")}
        return {"checkpoints/flux1-dev-fp8.safetensors": whole}
    texts = {
        "text_encoders/clip_l.safetensors": alike(clip_alone, "float16"),
        "text_encoders/t5xxl_fp8_e4m3fn.safetensors": alike(t5_alone, "float8_e4m3fn"),
    }
    if model == "flux":
        return {
            "diffusion_models/flux1-dev.safetensors": alike(network, "float8_e4m3fn"),
            **texts,
            "vae/ae.safetensors": alike(vae_file(), "float32"),
        }
    checkpoint = alike(network, "float16", "model.diffusion_model.")
    return {
        "checkpoints/sd3.5_medium.safetensors": checkpoint | alike(vae_file(), "float16", "first_stage_model."),
        **texts,
        "text_encoders/clip_g.safetensors": alike(text_file("clip_g"), "float16"),
    }


def write_all(models: Path, model: str, layout: str, reward: str, blocks: str) -> None:
    """All files of a rehearsal below models/; a process of its own, whose memory ends with it."""
    host.load_comfyui()
    writer = Writer()
    for path, tensors in files(model, layout, int(blocks)).items():
        print(f"{path}: {writer.write(models / path, tensors) / 1e9:.2f} GB, {len(tensors)} tensors", flush=True)
    if reward != "none":
        import rewards

        folder = models / REWARDS[reward][1]
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{reward}: {rewards.make(reward, folder).stat().st_size / 1e9:.2f} GB", flush=True)


# kind -> (class of its node, folder below models/, its choice there)
REWARDS = {
    "clipscore": (
        "TreeRPOCLIPScore",
        "clip_vision/clip-vit-large-patch14",
        "clip_vision/clip-vit-large-patch14/model.safetensors",
    ),
    "hps_v2": ("TreeRPOHPS", "rewards", "rewards/HPS_v2.1_compressed.pt"),
    "pickscore": ("TreeRPOPickScore", "rewards/PickScore_v1", "rewards/PickScore_v1/model.safetensors"),
    "image_reward": ("TreeRPOImageReward", "rewards/ImageReward", "rewards/ImageReward/ImageReward.pt"),
}
