"""What a network of true size allocates on a GPU, without one: ComfyUI's own network with the adapters runs on tensors
that have shapes and no numbers, and every allocation is counted.

    python3 run.py bench allocations [--model flux|sd35_medium|sd35_large] [--dtype fp8] [--size 512] [--batch 1]
    python3 run.py bench allocations --fit [--size 512]     (what VRAM Preflight advises for cards of 8 to 24 GB)

Beside it: what ComfyPolicy, and so VRAM Preflight, estimates. Weights and what comes with the adapters (gradients,
AdamW) are not counted in either. Not counted at all: the allocator's rounding, workspaces of cuBLAS and attention.
"""

import argparse
import contextlib
import math
import sys
import weakref
from types import SimpleNamespace

import host
from engines import GB, MODELS, build, network_config


class Allocations:
    """A dispatch mode that counts the bytes of all living tensors made inside it: `live` and `peak`."""

    def __new__(cls, known=()):
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        class Mode(TorchDispatchMode):
            def __init__(self):
                super().__init__()
                self.live = self.peak = 0
                self.seen = weakref.WeakKeyDictionary()
                for tensor in known:
                    self.seen[tensor.untyped_storage()] = None

            def _freed(self, size: int) -> None:
                self.live -= size

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                import torch

                result = function(*args, **(kwargs or {}))
                for tensor in tree_leaves(result):
                    storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
                    if storage is not None and storage not in self.seen:
                        self.seen[storage] = None
                        self.live += storage.nbytes()
                        weakref.finalize(storage, self._freed, storage.nbytes())
                        self.peak = max(self.peak, self.live)
                return result

        return Mode()


def network_calls(network, adapters, call, checkpointing: bool) -> dict[str, int]:
    """Bytes of a forward ("sampling"), of what its graph keeps ("graph"), and of a forward and backward ("learning").

    All inside a FakeTensorMode. call: () -> the network's output.
    """
    import torch

    from core.hosts.comfy_gradients import checkpointed

    known = [*network.parameters(), *network.buffers(), *adapters.parameters()]
    with torch.no_grad(), Allocations(known) as counted:
        call()
    found = {"sampling": counted.peak}
    with (
        torch.enable_grad(),
        Allocations(known) as counted,
        checkpointed(network) if checkpointing else contextlib.nullcontext(),
    ):
        output = call()
        found["graph"] = counted.live
        gradients = torch.autograd.grad(output.float().square().sum(), adapters.parameters(), allow_unused=True)
        kept = sum(gradient.nbytes for gradient in gradients if gradient is not None)
    return found | {"learning": counted.peak, "gradients": kept}


def measure(
    model: str,
    *,
    size: int = 512,
    batch: int = 1,
    dtype: str = "bf16",
    checkpointing: bool = True,
    targets: str = "attention",
    rank: int = 32,
    tokens: int = 256,
    **smaller,
) -> dict[str, dict]:
    """{"counted", "estimated"} of one network. smaller: changes of its configuration, such as fewer blocks."""
    import comfy.model_management
    import comfy.ops
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from core.hosts.comfy_gradients import adapted_norms
    from core.hosts.comfy_memory import activations
    from core.lora.adapters import Adapters

    config, weights = network_config(model) | smaller, torch.float8_e4m3fn if dtype == "fp8" else torch.bfloat16
    operations = comfy.ops.manual_cast if dtype == "fp8" else comfy.ops.disable_weight_init
    with FakeTensorMode(allow_non_fake_inputs=True), as_when_training():
        network = build(model, config, dtype=weights, operations=operations).requires_grad_(False)
        presets = {name: pattern for name, pattern in architecture(model).presets().items()}
        adapters = Adapters.create(network, rank, 2.0 * rank, targets, presets=presets)
        adapters.inject(network)
        hooks = adapted_norms(network) if architecture(model).in_place else []
        side = size // 8
        x = torch.zeros(batch, 16, side, side, dtype=torch.bfloat16)
        given = {
            "context": torch.zeros(batch, tokens, 4096, dtype=torch.bfloat16),
            "y": torch.zeros(batch, MODELS[model]["pooled"], dtype=torch.bfloat16),
            "transformer_options": {},
        }
        if model == "flux":
            given["guidance"] = torch.ones(batch)
        time = torch.ones(batch)
        counted = network_calls(network, adapters, lambda: network(x, time, **given), checkpointing)
        for hook in hooks:
            hook.remove()
        estimated = activations(network, batch * ((side // 2) ** 2 + tokens), 2, checkpointing, dtype == "fp8")
    return {"counted": counted, "estimated": estimated}


def advice(model: str, size: int, rank: int) -> list[str]:
    """VRAM Preflight's advice per card, for a base model in bfloat16 and a template's tree, 3 x 3, at micro_batch 4."""
    import comfy.latent_formats
    import comfy.ops
    import comfy.supported_models
    import torch

    look = sys.modules["treerpo_pack"].nodes.preflight
    core = sys.modules["treerpo_pack"].core
    with torch.device("meta"):
        network = build(model, network_config(model), dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
        adapters = core.lora.adapters.Adapters.create(
            network, rank, 2.0 * rank, "attention", presets=architecture(model).presets()
        )
    config = comfy.supported_models.Flux if model == "flux" else comfy.supported_models.SD3
    base = SimpleNamespace(
        diffusion_model=network,
        manual_cast_dtype=None,
        memory_required=lambda shape: shape[0] * math.prod(shape[2:]) * 0.02 * config.memory_usage_factor * 2**20,
    )
    patcher = SimpleNamespace(
        model=base,
        model_size=lambda: sum(tensor.nbytes for tensor in network.state_dict().values()),
        model_dtype=lambda: torch.bfloat16,
    )
    policy = object.__new__(core.hosts.comfy.ComfyPolicy)
    policy.model, policy.adapters, policy.checkpointing = patcher, adapters, True
    shape = core.method.tree.TreeShape(branching=3, depth=3)
    cfg = architecture(model).cfg
    run = look.Foreseen(policy, (16, size // 8, size // 8), shape, 1, cfg, None, None, False, look.Plan(4))
    lines = []
    for name, room in look.CARDS.items():
        plan = run.fitting(room)
        said = look.advice(run, plan, room) if plan and plan != run.plan else "as it is" if plan else "does not fit"
        needed = max(run.phase(phase, plan) for phase in run.widest) / GB if plan else math.nan
        lines.append(f"{name}: {said} ({needed:.1f} GB)")
    return lines


def architecture(model: str):
    from core.hosts.architectures import ARCHITECTURES

    return next(row for row in ARCHITECTURES if row.config == ("Flux" if model == "flux" else "SD3"))


@contextlib.contextmanager
def as_when_training():
    """ComfyUI's differentiable kernels, and PyTorch's attention, as on a GPU."""
    import comfy.ldm.flux.math
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
    import comfy.model_management

    places = (attention, comfy.ldm.flux.math, mmdit)
    before = [place.optimized_attention for place in places], getattr(comfy.model_management, "in_training", None)
    try:
        comfy.model_management.in_training = True
        for place in places:
            place.optimized_attention = attention.attention_pytorch
        yield
    finally:
        for place, plain in zip(places, before[0]):
            place.optimized_attention = plain
        comfy.model_management.in_training = before[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", choices=tuple(MODELS))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp8"))
    parser.add_argument("--targets", default="attention", choices=("attention", "attention+mlp", "all linear"))
    for name, default, text in (("size", 512, "pixels"), ("batch", 1, "latents"), ("rank", 32, "of the LoRA"),
                                ("tokens", 256, "of text")):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--fit", action="store_true", help="what VRAM Preflight advises, per card and model")
    options = vars(parser.parse_args())
    if options.pop("fit"):
        host.load_pack()
        sys.path.append(str(host.ROOT))
        for model in MODELS:
            print("\n".join([f"{model}, {options['size']} px", *advice(model, options["size"], options["rank"])]))
        return
    host.load_comfyui()
    sys.path.append(str(host.ROOT))  # after ComfyUI, whose nodes.py the pack's nodes would hide
    for checkpointing in (True, False):
        found = measure(**options, checkpointing=checkpointing)
        print(f"checkpointing {'on' if checkpointing else 'off'}; GB")
        for name, estimate in found["estimated"].items():
            counted = found["counted"][name]
            print(f"  {name:10}{counted / GB:8.3f} counted {estimate / GB:8.3f} estimated {estimate / counted:6.2f}")
        print(f"  gradients {found['counted']['gradients'] / GB:8.3f}, counted among learning too")


if __name__ == "__main__":
    main()
