"""What only a GPU can show: bf16 and fp8 in ComfyUI, dynamic VRAM, foreign attention, memory as estimated, running out
of it, fp16 rewards.

TREERPO_GPU_TESTS_ON_CPU=1 runs them on the CPU instead, through the same code, where that means anything; the others
stay skipped.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

CUDA = torch.cuda.is_available()
ON_CPU = os.environ.get("TREERPO_GPU_TESTS_ON_CPU") == "1" and not CUDA
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or ON_CPU), reason="no GPU (TREERPO_GPU_TESTS_ON_CPU=1 runs these on the CPU)"),
]
only_cuda = pytest.mark.skipif(not CUDA, reason="no GPU, and on a CPU this means nothing")
ARCHITECTURES = ("flux", "sd3.5")
SIDE = 64 if CUDA else 8  # of the latents: a picture of 512 pixels, or a small one where it only has to run
SEED = 5
ROUNDING = 0.02  # relative error: bf16 has 8 bits, and sums of thousands of terms lose less than one of them


def weights(architecture: str, big: bool = False) -> dict[str, torch.Tensor]:
    """Big: 40-50 million parameters on a GPU, so that memory is more than the allocator's rounding."""
    if not (big and CUDA):
        return tiny.state_dict(architecture)
    return tiny.flux(double=4, single=4, h=512) if architecture == "flux" else tiny.sd3(d=8, qk_norm=True)


def new_policy(model, **settings):
    """A policy whose adapters change the velocity visibly, as after training."""
    from core.hosts.comfy import ComfyPolicy

    policy = ComfyPolicy.create(model, 8, 16.0, "attention", **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.inference_mode(False), torch.no_grad():
        for lora in policy.adapters.loras.values():
            lora.up.copy_(0.05 * torch.randn(lora.up.shape, generator=generator))
    return policy


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors])


def gradient(policy, side: int = 8) -> torch.Tensor:
    """Of one batch of two prompts with respect to all adapter values."""
    with policy.session(tiny.conditioning(2), shape=(16, side, side)) as velocity, velocity.grad():
        loss = velocity(tiny.latents(2, side), 0.7, [0, 1]).square().sum()
        return flat(torch.autograd.grad(loss, velocity.parameters()))


def tree(velocity, micro_batch, side: int, branching: int = 3, prompts: int = 2):
    """(forest, edge advantages) of a small tree per prompt."""
    from core.method import noise
    from core.method.advantage import backup
    from core.method.noise import NoiseSchedule
    from core.method.rollout import grow
    from core.method.tree import TreeShape

    roots = noise.roots((16, side, side), SEED, 1, list(range(prompts)), 1).to(velocity.device)
    forest = grow(
        velocity,
        roots,
        torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]),
        TreeShape(branching, 2, window="fixed"),
        NoiseSchedule("cps", 0.7),
        start=0,
        prompts=list(range(prompts)),
        seed=SEED,
        micro_batch=micro_batch,
    )
    leaf = torch.randn(len(forest.leaves), generator=torch.Generator().manual_seed(3))
    return forest, backup([p.cpu() for p in forest.log_probs], leaf, branching)


def iteration(velocity, optimizer, micro_batch, side: int) -> dict[str, float]:
    from core.method.objective import Objective
    from core.method.update import update

    forest, advantages = tree(velocity, micro_batch, side)
    return update(velocity, forest, advantages, optimizer, Objective(1e-2, 1e-2), micro_batch=micro_batch)


def euler(model) -> torch.Tensor:
    """One picture by ComfyUI's own KSampler."""
    text = tiny.conditioning(1)
    return tiny.euler(model, text, text).float().cpu()


# bf16 and fp8


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_ratio_is_one_before_any_update(comfy, dtype, architecture, micro_batch, checkpointing):
    """Old and new log-probabilities come from the same slices, so that rounding is the same in both."""
    from core.method.memory import MicroBatch
    from core.method.objective import Objective
    from core.method.update import policy_gradient

    policy, batch = (
        new_policy(tiny.load_weights(weights(architecture, big=True), dtype), checkpointing=checkpointing),
        MicroBatch(micro_batch),
    )
    with policy.session(tiny.conditioning(2), shape=(16, SIDE, SIDE)) as velocity:
        forest, advantages = tree(velocity, batch, SIDE)
        metrics = policy_gradient(velocity, forest, advantages, Objective(1e-6, 1e-6), micro_batch=batch)
        assert batch.size == micro_batch, "memory must not have run out here"
        assert all(bool(p.grad.isfinite().all()) for p in velocity.parameters() if p.grad is not None)
        assert sum(float(p.grad.norm()) for p in velocity.parameters() if p.grad is not None) > 0
    assert (
        metrics["edges_trained"] == 2 * (3 + 9) and metrics["clip_frac"] == 0 and abs(metrics["ratio_mean"] - 1) < 1e-6
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp8_weights_give_the_gradient_of_the_same_weights_in_bf16(comfy, architecture, checkpointing):
    rounded = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in weights(architecture).items()}
    models = [tiny.load_weights(rounded, dtype) for dtype in (torch.float8_e4m3fn, torch.bfloat16)]
    assert [next(m.model.diffusion_model.parameters()).dtype for m in models] == [torch.float8_e4m3fn, torch.bfloat16]
    packed, plain = (gradient(new_policy(model, checkpointing=checkpointing)) for model in models)
    assert plain.norm() > 1
    assert (packed - plain).norm() < ROUNDING * plain.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_gradients_are_those_of_fp32(comfy, architecture):
    exact, half = (
        gradient(new_policy(tiny.load_weights(weights(architecture), dtype)))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.nn.functional.cosine_similarity(half, exact, dim=0) > 0.995


# where ComfyUI keeps the weights

DYNAMIC = """
import json, sys
sys.path[:0] = [{comfyui!r}, {tests!r}]
sys.path.append({root!r})
import torch
from comfy.cli_args import args
args.cpu = args.cpu or not torch.cuda.is_available()
dynamic = {dynamic}
if dynamic:  # as main.py does it
    import comfy_aimdo.control
    comfy_aimdo.control.init()
import comfy.memory_management, comfy.model_management, comfy.model_patcher
if dynamic:
    devices = [device.index for device in comfy.model_management.get_all_torch_devices()]
    try:
        started = comfy_aimdo.control.init_devices((index, 0) for index in devices)
    except TypeError:
        started = comfy_aimdo.control.init_devices(devices)
    if not started:
        print(json.dumps({{"missing": "comfy-aimdo does not work on this machine"}}))
        sys.exit()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
import test_gpu
print(json.dumps(test_gpu.train_as_loaded({file!r}, {no_vram})))
"""


def train_as_loaded(file: str, no_vram: bool) -> dict:
    """Two iterations on a MODEL from a core loader, and what they did to it; runs in a process of its own."""
    import comfy.model_management
    import comfy.sd

    from core.method.memory import MicroBatch

    if no_vram:
        comfy.model_management.vram_state = comfy.model_management.VRAMState.NO_VRAM
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(file)
    before, first = euler(model), [p.detach().cpu().clone() for p in model.model.diffusion_model.parameters()]
    rows = []
    with torch.inference_mode():  # as in ComfyUI's executor
        policy = new_policy(model, checkpointing=True)
        start = flat(policy.adapters.parameters())
        for _ in range(2):
            with policy.session(tiny.conditioning(2), shape=(16, 8, 8)) as velocity:
                with torch.inference_mode(False), torch.enable_grad():
                    optimizer = torch.optim.AdamW(velocity.parameters(), lr=1e-3)
                rows.append(iteration(velocity, optimizer, MicroBatch(2), 8))
            middle = euler(model)
    same = all(torch.equal(a, b.detach().cpu()) for a, b in zip(first, model.model.diffusion_model.parameters()))
    on_cpu = sum(p.device.type == "cpu" for p in policy._clone().model.diffusion_model.parameters())
    return {
        "dynamic": bool(getattr(model, "is_dynamic", bool)()),
        "weights_unchanged": same,
        "difference": float((middle - before).abs().max()),
        "spread": float(before.std()),
        "learned": float((flat(policy.adapters.parameters()) - start).abs().max()),
        "weights_on_cpu": on_cpu,
        "ratios": [row["ratio_first"] for row in rows],
        "gradients": [row["grad_norm"] for row in rows],
        "skipped": [row["skipped"] for row in rows],
    }


@pytest.mark.parametrize("place", ["dynamic", "no vram", "plain"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_leaves_the_model_alone_wherever_its_weights_are(comfy, architecture, place, tmp_path):
    """Dynamic VRAM is ComfyUI's default on NVIDIA;

    "no vram" keeps every weight in main memory until its layer runs. Each needs a process of its own.
    """
    from conftest import COMFYUI, ROOT
    from safetensors.torch import save_file

    if place != "plain" and not CUDA:
        pytest.skip("no GPU, and without one there is no VRAM to leave weights out of")
    if place == "dynamic":
        pytest.importorskip("comfy_aimdo")
    file = tmp_path / "model.safetensors"
    save_file({key: tensor.to(torch.bfloat16) for key, tensor in weights(architecture).items()}, file)
    code = DYNAMIC.format(
        comfyui=str(COMFYUI),
        tests=str(ROOT / "tests"),
        root=str(ROOT),
        dynamic=place == "dynamic",
        file=str(file),
        no_vram=place == "no vram",
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if "missing" in found:
        pytest.skip(found["missing"])
    assert found["dynamic"] == (place == "dynamic")
    assert found["weights_unchanged"] and found["spread"] > 0.1 and found["difference"] < 1e-6
    assert found["learned"] > 1e-4 and found["skipped"] == [0, 0] and min(found["gradients"]) > 0
    assert all(abs(ratio - 1) < 1e-6 for ratio in found["ratios"])
    if place == "no vram":
        assert found["weights_on_cpu"] > 0


# attention


def without_backward(function):
    """What sage and flash attention are to autograd: numbers with no way back."""

    def attention(*args, **kwargs):
        with torch.no_grad():
            return function(*args, **kwargs)

    return attention


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_that_comfyui_chose_does_not_break_gradients(comfy, architecture, checkpointing, monkeypatch):
    """The real package where there is one, else its like: the session has PyTorch's attention all the same."""
    import comfy.ldm.flux.math
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit

    model = tiny.load_weights(weights(architecture), torch.bfloat16)
    expected = gradient(new_policy(model, checkpointing=checkpointing))
    assert expected.norm() > 1
    real = [
        getattr(attention, f"attention_{name}")
        for name in ("sage", "flash")
        if getattr(attention, f"{name.upper()}_ATTENTION_IS_AVAILABLE", False)
    ]
    for chosen in (attention.wrap_attn(without_backward(attention.attention_basic)), *real):
        for module in (attention, comfy.ldm.flux.math if architecture == "flux" else mmdit):
            monkeypatch.setattr(module, "optimized_attention", chosen)
        found = gradient(new_policy(model, checkpointing=checkpointing))
        assert (found - expected).norm() < ROUNDING * expected.norm()


# memory


def peak(work) -> int:
    """Highest bytes allocated on the GPU while it runs."""
    import comfy.model_management

    comfy.model_management.soft_empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@only_cuda
@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("architecture", ["flux", "sd35_medium"])
def test_memory_is_as_estimated(comfy, architecture, checkpointing, monkeypatch):
    """A peak is at most 1.5 times the estimate, and the estimate at most 3 times the peak: ComfyUI makes room by it.
    Its rules are made for the official widths, so FLUX has those here, with fewer blocks, and SD3.5-medium is whole.
    """
    from core.method.memory import MicroBatch
    from core.method.objective import Objective
    from core.method.update import update

    full_size = benchmark()
    monkeypatch.setitem(full_size.MODELS, "flux", full_size.MODELS["flux"] | {"blocks": 3, "single": 6})
    comfy.model_management.unload_all_models()
    others = torch.cuda.memory_allocated()  # what earlier tests left
    engine = full_size.Comfy(
        SimpleNamespace(
            model=architecture,
            scale=1,
            size=512,
            dtype="bf16",
            memory=0,
            rank=32,
            checkpointing=checkpointing,
            steps=4,
            vae=False,
        )
    )
    shape, batch = (16, 64, 64), 2
    with torch.inference_mode(False), torch.no_grad(), engine.session(batch) as velocity:
        optimizer, found, micro_batch = torch.optim.AdamW(velocity.parameters(), lr=1e-4), [], MicroBatch(batch)
        velocity(torch.zeros(1, *shape), 0.5, [0])  # libraries take their own memory with the first call
        used = {"sampling": peak(lambda: found.extend(tree(velocity, micro_batch, 64, prompts=1)))}
        used["learning"] = peak(lambda: update(velocity, *found, optimizer, Objective(), micro_batch=micro_batch))
        assert micro_batch.size == batch, "memory must not have run out here"
        estimate = engine.policy.memory(shape, batch)
    for phase, highest in used.items():
        guess = estimate["weights"] + estimate["adapters"] + estimate[phase]
        words = f"{phase}: {(highest - others) / 1e9:.2f} GB used, {guess / 1e9:.2f} GB estimated"
        assert highest - others <= 1.5 * guess, words
        assert guess <= 3 * (highest - others), words


def benchmark():
    """benchmarks/full_size.py, which knows the official sizes."""
    from conftest import ROOT

    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    import full_size

    return full_size


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_micro_batches_halve_when_memory_runs_out(comfy, architecture, monkeypatch):
    """The card is made smaller than the update needs; the run goes on with fewer latents, and its result is that of the
    small micro-batch.
    """
    from core.method.memory import MicroBatch
    from core.method.objective import Objective
    from core.method.update import policy_gradient

    policy = new_policy(tiny.load_weights(weights(architecture, big=True), torch.bfloat16))
    with policy.session(tiny.conditioning(2), shape=(16, SIDE, SIDE)) as velocity:
        forest, advantages = tree(velocity, MicroBatch(2), SIDE)

        def learn(micro_batch):
            for parameter in velocity.parameters():
                parameter.grad = None
            policy_gradient(velocity, forest, advantages, Objective(), micro_batch=micro_batch)
            return flat(p.grad for p in velocity.parameters() if p.grad is not None)

        few = learn(MicroBatch(1))  # also makes what is made once
        batch = MicroBatch(0)
        with smaller_device(velocity, learn, monkeypatch):
            halved = learn(batch)
        assert 1 <= batch.size <= 3, "it must have run out of memory at 6 latents"
        again = learn(MicroBatch(batch.size))
    assert few.norm() > 0 and (halved - few).norm() < ROUNDING * few.norm()
    if CUDA:  # the same slices but for those tried first
        assert (halved - again).norm() < ROUNDING * again.norm()


class smaller_device:
    """A GPU with room for two or three latents' graphs at most; on the CPU, calls of more than three fail as a GPU
    does.
    """

    def __init__(self, velocity, learn, monkeypatch):
        self.velocity, self.learn, self.monkeypatch = velocity, learn, monkeypatch

    def __enter__(self):
        if not CUDA:
            whole = type(self.velocity).__call__

            def limited(velocity, x, sigma, rows):
                if len(x) > 3 and torch.is_grad_enabled():
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory (pretended)")
                return whole(velocity, x, sigma, rows)

            self.monkeypatch.setattr(type(self.velocity), "__call__", limited)
            return
        from core.method.memory import MicroBatch

        one, three, six = (peak(lambda: self.learn(MicroBatch(count))) for count in (1, 3, 6))
        assert one < three < six, "else the memory says nothing"
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (three + six) / 2 / total))

    def __exit__(self, *_):
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)
        else:
            self.monkeypatch.undo()


# rewards


@pytest.mark.parametrize("kind", ["clipscore_hf", "pickscore", "hps_v2", "image_reward"])
def test_rewards_in_fp16_are_those_of_the_cpu(kind, tmp_path):
    """Tiny weights of the official form; on a GPU float16 is the default. On the CPU bfloat16 takes its place, which is
    coarser.
    """
    pytest.importorskip("open_clip" if kind == "hps_v2" else "transformers")
    from golden import inputs, models

    from core.rewards import load as load_reward

    name = {"clipscore_hf": "clipscore"}.get(kind, kind)
    file = models.write(kind, tmp_path)
    images = torch.rand(6, 48, 40, 3, generator=torch.Generator().manual_seed(0))
    prompts = (inputs.PROMPTS * 6)[:6]
    exact = load_reward(name, file, "cpu", torch.float32).score(images, prompts)
    half = load_reward(name, file, DEVICE, None if CUDA else torch.bfloat16)
    assert half.dtype == (torch.float16 if CUDA else torch.bfloat16)
    found = half.score(images, prompts)
    assert found.dtype == torch.float32 and found.device.type == "cpu" and exact.std() > 0
    assert (found - exact).abs().max() < (0.05 if CUDA else 0.3) * exact.std()
