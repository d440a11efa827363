"""Linked into the rehearsal's ComfyUI as a custom node: how long each phase takes and how much memory it needs, and
whether a MODEL is what it was.

Nothing of ComfyUI's or TreeRPO's work is replaced, only watched: functions are wrapped when the first graph is queued.
TREERPO_REHEARSAL_LOG: file that gets a JSON line per phase. TREERPO_REHEARSAL_AS_GPU=1: on a CPU, weights and
activations have the precisions that ComfyUI chooses on a GPU (bfloat16), so that memory is a GPU's.
"""

import contextlib
import ctypes
import functools
import gc
import json
import os
import sys
import threading
import time

import comfy.model_management
import server
import torch

import nodes

LOADERS = ("CheckpointLoaderSimple", "UNETLoader", "DualCLIPLoader", "TripleCLIPLoader", "VAELoader")
OTHERS = ("KSampler", "LoraLoaderModelOnly", "LoraLoaderBypassModelOnly")


def as_on_a_gpu() -> None:
    """bfloat16 where a GPU would have it, and memory estimated as with its attention (a CPU's is fused as well)."""
    comfy.model_management.should_use_bf16 = lambda *args, **kwargs: True
    comfy.model_management.pytorch_attention_flash_attention = lambda: True


if os.environ.get("TREERPO_REHEARSAL_AS_GPU") == "1" and not torch.cuda.is_available():
    as_on_a_gpu()


def memory() -> dict[str, int]:
    """Bytes in use: `own` = the GPU's allocations, or what this process alone holds in memory and swap; `mapped` =
    pages of files, which the system may drop.
    """
    if torch.cuda.is_available():
        return {"own": torch.cuda.memory_allocated(), "mapped": 0}
    with open("/proc/self/status") as file:
        found = {key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in file)
                 if key in ("RssAnon", "RssFile", "RssShmem", "VmSwap")}  # fmt: skip
    return {"own": found["RssAnon"] + found["RssShmem"] + found["VmSwap"], "mapped": found["RssFile"]}


class Watch:
    """The highest memory since the last look, by looking every 5 ms (on a GPU by its own count)."""

    def __init__(self):
        self.highest, self.running = 0, not torch.cuda.is_available()
        if self.running:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            self.highest = max(self.highest, memory()["own"])
            time.sleep(0.005)

    def begin(self) -> dict:
        """Memory that was freed is handed back first, so that it does not hide what the phase takes."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)
        found = memory()
        self.highest = found["own"]
        return found

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else max(self.highest, memory()["own"])


WATCH = Watch()


@contextlib.contextmanager
def phase(name: str, weights: int = 0):
    """weights: bytes of the model at work, which are there before and after."""
    before, began = WATCH.begin(), time.perf_counter()
    try:
        yield
    finally:
        seconds, peak, after = time.perf_counter() - began, WATCH.peak(), memory()
        row = {"phase": name, "seconds": seconds, "weights": weights, "before": before["own"], "peak": peak}
        write(**row, after=after["own"], mapped=after["mapped"])


def write(**row) -> None:
    with open(os.environ["TREERPO_REHEARSAL_LOG"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def watched(owner, attribute: str, name: str, weights=lambda *args: 0) -> None:
    """owner.attribute, each call a phase. weights: of the call's first argument."""
    plain = getattr(owner, attribute)

    @functools.wraps(plain)
    def wrapped(*args, **kwargs):
        with phase(name, weights(*args[:1])):
            return plain(*args, **kwargs)

    setattr(owner, attribute, wrapped)


@functools.cache
def watch_all() -> None:
    for name in (*LOADERS, *OTHERS):
        if kind := nodes.NODE_CLASS_MAPPINGS.get(name):
            if "execute" not in vars(kind):  # a V3 node is locked
                watched(kind, kind.FUNCTION, name)
    trainer, comfy_host = pack("core.runs.trainer"), pack("core.hosts.comfy_host").ComfyHost
    watched(trainer, "sample", "rollout", lambda velocity: velocity.policy.model.model_size())
    watched(trainer, "learn", "update", lambda velocity: velocity.policy.model.model_size())
    watched(trainer, "scores", "reward", lambda reward: reward.patcher.model_size())
    watched(comfy_host, "encode", "encode")
    watched(comfy_host, "decode", "decode", lambda host: host.vae.patcher.model_size())
    watched(pack("core.runs.run").Run, "save", "save")


def pack(name: str):
    """TreeRPO's own module of this name, under whatever name ComfyUI has loaded it."""
    return next(module for key, module in sys.modules.items() if key.endswith(f"TreeRPO.{name}"))


def on_prompt(prompt):
    watch_all()
    return prompt


if getattr(server.PromptServer, "instance", None):
    server.PromptServer.instance.add_on_prompt_handler(on_prompt)


def checksum(model) -> dict:
    """Of all weights and buffers of a MODEL's network, and what may hang on its modules."""
    total, count, kinds = 0, 0, {}
    network = model.model.diffusion_model
    for number, tensor in enumerate(network.state_dict().values()):
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        whole = len(data) // 8 * 8
        words = int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())
        total = (total * 31 + words + number) % (1 << 63)
        count += tensor.numel()
        kind = str(tensor.dtype).removeprefix("torch.")
        kinds[kind] = kinds.get(kind, 0) + tensor.numel()
    modules = list(network.modules())
    return {
        "sum": total,
        "numbers": count,
        "precisions": kinds,
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules),
        "swapped_forwards": sum("forward" in vars(m) for m in modules),
        "trainable": sum(p.requires_grad for p in network.parameters()),
        "computes_in": str(model.model.get_dtype_inference()).removeprefix("torch."),
    }


class Checksum:
    """Numbers about a MODEL as text."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "when": ("STRING", {"default": ""})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "rehearsal"

    def run(self, model, when):
        return {"ui": {"text": [json.dumps(checksum(model))]}}


class Shapes:
    """The conditioning of prompts, a JSON list: shape, size and whether it is finite; encoded one by one as the Trainer
    does, which then need not do it again. Gives the first one.
    """

    INPUT_TYPES = classmethod(lambda cls: {"required": {"clip": ("CLIP",), "texts": ("STRING", {"multiline": True})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = ("CONDITIONING",), "run", True, "rehearsal"

    def run(self, clip, texts):
        found, encode = [], pack("core.hosts.comfy_host").encode
        texts = json.loads(texts)
        for text in texts:
            with phase("encode one prompt"):
                [[context, options]] = encode(clip, text)
            pooled = options.get("pooled_output")
            found.append(
                {
                    "words": len(text.split()),
                    "shape": list(context.shape),
                    "pooled": list(pooled.shape) if pooled is not None else None,
                    "finite": bool(context.isfinite().all() and (pooled is None or pooled.isfinite().all())),
                    "rms": float(context.float().square().mean().sqrt()),
                }
            )
        return {"ui": {"text": [json.dumps(found)]}, "result": (encode(clip, texts[0]),)}


class Latents:
    """How far latents are from the first one, relative to it."""

    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {"base": ("LATENT",)},
            "optional": {name: ("LATENT",) for name in ("merged", "bypass")},
        }
    )
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "rehearsal"

    def run(self, base, **others):
        first = base["samples"].float()
        found = {"rms": float(first.square().mean().sqrt()), "finite": bool(first.isfinite().all())}
        found["sum"] = float((first.double().flatten() * torch.arange(1, first.numel() + 1)).sum())
        for name, latent in others.items():
            found[name] = float((latent["samples"].float() - first).norm() / first.norm())
        return {"ui": {"text": [json.dumps(found)]}}


class Patches:
    """What a LoRA loader has put on a MODEL: how many weights, and whether each is what the file says."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "file": ("STRING", {"default": ""})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "rehearsal"

    def run(self, model, file):
        import comfy.utils
        import folder_paths

        held = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", file))
        wanted = {key.rpartition(".lora_up")[0] for key in held if key.endswith(".lora_up.weight")}
        equal = 0
        for key, patches in model.patches.items():
            module = key.removesuffix(".weight")
            [(_, adapter, *_)] = patches
            up, down = adapter.weights[:2]
            equal += torch.equal(up, held[f"{module}.lora_up.weight"]) and torch.equal(
                down, held[f"{module}.lora_down.weight"]
            )
        moved = sum(bool(held[f"{module}.lora_up.weight"].any()) for module in wanted)
        found = {"layers": len(wanted), "patched": len(model.patches), "equal": int(equal), "moved": moved}
        return {"ui": {"text": [json.dumps(found)]}}


NODE_CLASS_MAPPINGS = {f"Rehearsal{kind.__name__}": kind for kind in (Checksum, Shapes, Latents, Patches)}
