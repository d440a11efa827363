"""One training iteration at full size: FLUX.1-dev's, SD3.5-medium's and -large's real architecture with random weights, on a GPU.

    python3 run.py bench full_size [--model flux] [--dtype fp8] [--vae] [--reward pickscore] [--memory 24]
    python3 run.py bench full_size --part overhead [--engine diffusers]
    python3 run.py bench full_size --scale 24 --size 64 --dtype fp32      (the same code, small, without a GPU)

Shapes are what costs, so nothing is downloaded: weights, text features, VAE and reward model are random numbers of the official
sizes. The rows are those of the benchmark `iteration`; they run in turn in one process, so that only their ratios count. Every phase
of a row is timed with the GPU's queue, its highest memory stands beside what ComfyPolicy estimated, and passes are counted at the
network itself. Targets are printed beside what was measured. `--part overhead` compares one straight line through our sampler
with ComfyUI's KSampler and with diffusers' own pipeline. Engines: ComfyUI (COMFYUI_PATH), or diffusers and peft alone.
"""
import argparse
import contextlib
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import host
from iteration import LEAVES, predicted, rows

GB = 1e9
RETAIN_SHARE = 0.6    # as Tree Sampler's
DECODED_AT_ONCE = 8   # as the Trainer's
ALPHA = 64.0
CONTEXT = 4096        # width of T5's features
# Official sizes: width, numbers of blocks (FLUX: double and single), text tokens, pooled width.
MODELS = {
    "flux": dict(width=3072, blocks=19, single=38, tokens=512, pooled=768),
    "sd35_medium": dict(width=1536, blocks=24, dual=13, positions=384, tokens=333, pooled=2048),
    "sd35_large": dict(width=2432, blocks=38, dual=0, positions=192, tokens=333, pooled=2048),
}
FITS = {("flux", "fp8"): 24, ("sd35_medium", "bf16"): 12}  # GB in all
FASTER = {("window", False): 3.5, ("independent", False): 5.0, ("window", True): 2.4}  # than this row; True: decoding and scoring included


def sizes(options) -> dict:
    """The model's sizes, divided by --scale as far as the architecture allows."""
    found, scale = dict(MODELS[options.model]), options.scale
    head = 128 if options.model == "flux" else 64
    found["width"] = max(1, found["width"] // head // scale) * head
    found["blocks"] = max(1, found["blocks"] // scale)
    if options.model == "flux":
        found["single"] = max(1, found["single"] // scale)
    else:  # ComfyUI reads the number of blocks off the width
        found["blocks"] = found["width"] // 64
        found["dual"] = min(found["dual"], found["blocks"] // 2)
        found["positions"] = max(32, found["positions"] // scale)
    return found


def fill(name: str, tensor) -> None:
    """Random weights in place: N(0, 1/fan_in), modulations half of that, norms 1, biases 0."""
    if tensor.dim() < 2:
        tensor.fill_(1.0 if ("norm" in name or ".ln_" in name) and not name.endswith("bias") else 0.0)
    elif "pos_embed" in name and "proj" not in name:
        tensor.normal_(0, 0.1)
    else:
        tensor.normal_(0, (0.5 if "mod" in name or "norm" in name else 1.0) / math.sqrt(tensor[0].numel()))


def fill_adapters(adapters) -> None:
    """Adapters that do something."""
    import torch
    draw = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.01)


def text_features(size: dict, device):
    """(embeddings [1, tokens, 4096], pooled [1, pooled])"""
    import torch
    draw = torch.Generator().manual_seed(1)
    return torch.randn(1, size["tokens"], CONTEXT, generator=draw).to(device), torch.randn(1, size["pooled"], generator=draw).to(device)


class Comfy:
    """The model through ComfyUI's own loader, VAE and KSampler."""
    name = "ComfyUI"

    def __init__(self, options):
        import comfy.model_management
        import comfy.samplers
        import comfy.sd
        import torch
        from core.backends.comfy import ComfyPolicy
        self.options, self.size, self.device = options, sizes(options), comfy.model_management.get_torch_device()
        if options.memory:  # what ComfyUI must leave free of this card, to have as much as the small one
            comfy.model_management.EXTRA_RESERVED_VRAM += comfy.model_management.get_total_memory(self.device) - options.memory * GB
        dtype = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}[options.dtype]
        with torch.inference_mode():  # as a loader node
            self.model = comfy.sd.load_diffusion_model_state_dict(self.state_dict(), model_options={"dtype": dtype})
        self.policy = ComfyPolicy.create(self.model, options.rank, ALPHA, "attention", checkpointing=options.checkpointing == "on")
        fill_adapters(self.policy.adapters)
        self.network, self.optimized = self.model.model.diffusion_model, self.policy.adapters.parameters()
        self.sigmas = comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", options.steps).clone().float()
        embeds, pooled = text_features(self.size, "cpu")
        self.positive = [[embeds, {"pooled_output": pooled}]]
        self.vae = self.random_vae() if options.vae else None

    def state_dict(self) -> dict:
        """The weights in the form of a FLUX or SD3.5 file, in main memory; made on the GPU, where a random number costs little."""
        import comfy.ops
        import torch
        from comfy.ldm.flux.model import Flux
        from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
        size, common = self.size, dict(dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
        with torch.device("meta"):
            if self.options.model == "flux":
                network = Flux(image_model="flux", in_channels=16, out_channels=16, vec_in_dim=size["pooled"], context_in_dim=CONTEXT, hidden_size=size["width"],
                               mlp_ratio=4.0, num_heads=size["width"] // 128, depth=size["blocks"], depth_single_blocks=size["single"], axes_dim=[16, 56, 56],
                               theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[], **common)
            else:
                text = {"target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": size["width"]}}
                network = OpenAISignatureMMDITWrapper(input_size=None, in_channels=16, patch_size=2, depth=size["blocks"], adm_in_channels=size["pooled"],
                                                      qk_norm="rms", num_patches=size["positions"] ** 2, pos_embed_max_size=size["positions"],
                                                      x_block_self_attn_layers=list(range(size["dual"])), context_embedder_config=text, **common)
        return {key.replace("_norm.weight", "_norm.scale"): made(key, tensor.shape, self.device, torch.bfloat16).cpu()
                for key, tensor in network.state_dict().items()}

    def random_vae(self):
        import comfy.sd
        import torch
        from comfy.ldm.models.autoencoder import AutoencodingEngine
        config = dict(double_z=True, z_channels=16, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, attn_resolutions=[],
                      dropout=0.0)
        parts = "comfy.ldm.modules.diffusionmodules.model"
        with torch.device("meta"):
            net = AutoencodingEngine(regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
                                     encoder_config={"target": f"{parts}.Encoder", "params": config}, decoder_config={"target": f"{parts}.Decoder", "params": config})
        with torch.inference_mode():
            return comfy.sd.VAE(sd={key: made(key, tensor.shape, "cpu", torch.float32) for key, tensor in net.state_dict().items()})

    def session(self, micro_batch: int):
        return self.policy.session(self.positive, shape=latent_shape(self.options), memory_batch=micro_batch or LEAVES)

    def decode(self, velocity, leaves):
        import torch
        with torch.inference_mode():
            return torch.cat([self.vae.decode(part).float().cpu() for part in velocity.process_out(leaves).cpu().split(DECODED_AT_ONCE)])

    def estimate(self, count: int) -> dict | None:
        """ComfyPolicy's own, for `count` latents at once."""
        return self.policy.memory(latent_shape(self.options), count)

    def preflight(self) -> str:
        """What VRAM Preflight tells the user of this model."""
        import comfy.model_management
        from core.tree import TreeShape
        try:
            report = host.load_pack().nodes.look.report
        except ImportError as error:
            return f"VRAM Preflight's report needs all of ComfyUI's requirements: {error}."
        finally:
            sys.path.append(str(host.ROOT))
        room = self.options.memory * GB or comfy.model_management.get_total_memory(self.device)
        return report(self.policy, latent_shape(self.options), TreeShape(tail=0.4), 1, self.options.micro_batch, 1.0, self.vae, None, False, room, str(self.device))

    def baseline(self):
        """(name, work): KSampler's own loop, euler."""
        import comfy.sample
        import comfy.utils
        import torch
        comfy.utils.PROGRESS_BAR_ENABLED = False

        def run():
            with torch.inference_mode():
                latent = torch.zeros(1, *latent_shape(self.options))
                return comfy.sample.sample(self.model, comfy.sample.prepare_noise(latent, 0), self.options.steps, 1.0, "euler", "simple", self.positive, self.positive,
                                           latent, seed=0, disable_pbar=True)
        return "ComfyUI's KSampler", run


class Diffusers:
    """The model in diffusers, with PEFT's layers; for machines without ComfyUI."""
    name = "diffusers"

    def __init__(self, options):
        import torch
        from core.backends import peft
        from core.backends.diffusers import simple_sigmas
        if options.dtype == "fp8":
            sys.exit("fp8 weights run in ComfyUI only: use --engine comfy, or --dtype bf16.")
        self.options, self.size, self.device = options, sizes(options), torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.kind = "flux" if options.model == "flux" else "sd3"
        self.network = random_module(self.empty(), self.device, {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype])
        if options.checkpointing == "on":
            self.network.enable_gradient_checkpointing()
        adapters = peft.new_adapters(self.network, options.rank, ALPHA, "attention").to(self.device)
        fill_adapters(adapters)
        self.attached, self.optimized = peft.Attached(adapters, self.network), adapters.parameters()
        self.sigmas = simple_sigmas(self.kind, options.steps)
        self.vae = self.random_vae() if options.vae else None

    def empty(self):
        import torch
        from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
        size = self.size
        with torch.device("meta"):
            if self.kind == "flux":
                return FluxTransformer2DModel(in_channels=64, num_layers=size["blocks"], num_single_layers=size["single"], num_attention_heads=size["width"] // 128,
                                              joint_attention_dim=CONTEXT, pooled_projection_dim=size["pooled"], guidance_embeds=True)
            return SD3Transformer2DModel(num_layers=size["blocks"], num_attention_heads=size["width"] // 64, joint_attention_dim=CONTEXT,
                                         caption_projection_dim=size["width"], pooled_projection_dim=size["pooled"], out_channels=16,
                                         pos_embed_max_size=size["positions"], dual_attention_layers=tuple(range(size["dual"])), qk_norm="rms_norm")

    def random_vae(self):
        import torch
        from core.backends.diffusers import LATENT_FORMATS
        from core.backends.host import KlVae
        from diffusers import AutoencoderKL
        scale, shift = LATENT_FORMATS[self.kind]
        with torch.device("meta"):
            net = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[128, 256, 512, 512],
                                layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=scale, shift_factor=shift)
        return KlVae(random_module(net, self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32))

    @contextlib.contextmanager
    def session(self, micro_batch: int):
        import torch
        from core.backends.diffusers import DiffusersVelocity
        with torch.no_grad():
            yield DiffusersVelocity(self.network, self.attached, *text_features(self.size, self.device), shape=latent_shape(self.options))

    def decode(self, velocity, leaves):
        import torch
        return torch.cat([self.vae.decode(part).float().cpu() for part in leaves.split(DECODED_AT_ONCE)])

    def estimate(self, count: int) -> dict | None:
        return None

    def preflight(self) -> str:
        return "Memory is estimated in ComfyUI only."

    def baseline(self):
        """(name, work): diffusers' own pipeline on the very same transformer, the adapters off."""
        import torch
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
        embeds, pooled = (part.to(self.network.dtype) for part in text_features(self.size, self.device))
        given = dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_inference_steps=self.options.steps, height=self.options.size, width=self.options.size,
                     output_type="latent", generator=torch.Generator().manual_seed(0))
        if self.kind == "flux":
            pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, None, None, self.network)
        else:
            pipeline = StableDiffusion3Pipeline(self.network, FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, None, None, None, None)
        pipeline.set_progress_bar_config(disable=True)

        def run():
            with self.attached.disabled(), torch.no_grad():
                return pipeline(guidance_scale=3.5 if self.kind == "flux" else 1.0, **given).images
        return f"diffusers' {type(pipeline).__name__}", run


def made(name: str, shape, device, dtype):
    import torch
    tensor = torch.empty(shape, device=device, dtype=dtype)
    fill(name, tensor)
    return tensor


def random_module(module, device, dtype):
    """A module made on "meta", with random weights on the device."""
    module = module.to(dtype).to_empty(device=device)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        fill(name, tensor.data)
    return module.eval().requires_grad_(False)


def random_reward(kind: str, small: bool, device):
    """PickScore (ViT-H/14) or CLIPScore (ViT-L/14) in full size from a file of random weights; small: the tests' tiny one."""
    import torch
    from core.rewards import load
    sys.path.append(str(host.ROOT / "tests"))
    from golden import models
    import rewards
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tiny"  # its vocabulary serves both
        file = models.write({"clipscore": "clipscore_hf"}.get(kind, kind), tokenizer)
        if not small:
            file = rewards.hf_clip(Path(folder), kind == "clipscore", torch.float16)
        return load(kind, file, device, tokenizer=tokenizer)


def latent_shape(options) -> tuple[int, int, int]:
    return 16, options.size // 8, options.size // 8


@contextlib.contextmanager
def network_passes(network):
    """Latents that go through the network forwards and backwards, counted at the network itself."""
    count = SimpleNamespace(forwards=0, backwards=0)

    def back(gradient):
        count.backwards += len(gradient)

    def after(_, inputs, named, output):
        count.forwards += len(inputs[0] if inputs else named["hidden_states"])
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(back)

    handle = network.register_forward_hook(after, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


def phase(work):
    """(what work() gives, {seconds, highest memory allocated and reserved}); without a GPU the process's resident set."""
    import torch
    results = []
    with host.Peak() as peak:
        seconds = host.timed(lambda: results.append(work()))
    reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
    return results[0], {"seconds": seconds, "allocated": peak.highest, "reserved": reserved}


class Bench:
    """One open session; `iteration(name)` does the phases of an iteration as that row does them."""

    def __init__(self, engine, velocity, options, reward):
        import torch
        from core.memory import MicroBatch
        from core.noise import NoiseSchedule
        self.engine, self.velocity, self.options, self.reward = engine, velocity, options, reward
        self.batch, self.noise, self.rows = MicroBatch(options.micro_batch), NoiseSchedule(), rows(options.steps)
        self.optimizer = torch.optim.AdamW(engine.optimized, lr=1e-6)

    def iteration(self, name: str) -> dict:
        import torch
        from core.advantage import edge_advantages, leaf_advantages
        from core.objective import Objective
        from core.update import update
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the row before had reserved is not this row's
        forest, found = phase(lambda: self.rollout(name))
        found = {"rollout": found}
        if not bool(forest.leaves.isfinite().all()):
            raise RuntimeError("the leaves are not finite")
        if self.engine.vae is not None:
            images, found["decode"] = phase(lambda: self.engine.decode(self.velocity, forest.leaves))
            if self.reward is not None:
                _, found["reward"] = phase(lambda: self.reward.score(images, ["a photo of a cat"] * LEAVES))
        # Random numbers, so that every edge has something to learn whatever a random reward model says.
        draws = {"random": torch.rand(LEAVES, generator=torch.Generator().manual_seed(0))}
        layers = edge_advantages("treegrpo", [p.cpu() for p in forest.log_probs], leaf_advantages(draws, 1)[0], forest.branching, 1)
        shared = self.rows[name][1].get("shared", True)
        metrics, found["update"] = phase(lambda: update(self.velocity, forest, layers, self.optimizer, Objective(1e-2, 1e-2), micro_batch=self.batch, shared=shared))
        return found | {"ratio": metrics["ratio_first"], "skipped": metrics["skipped"]}

    def rollout(self, name: str):
        from core import noise
        from core.rollout import grow
        from core.tree import TreeShape
        settings, extra = self.rows[name]
        first = 0 if name == "independent" else self.options.start
        shape = TreeShape(**settings, window="fixed", fixed=first)
        roots = noise.roots(latent_shape(self.options), 0, 1, [0], shape.trees).to(self.velocity.device)
        return grow(self.velocity, roots, self.engine.sigmas, shape, self.noise, start=first, prompts=[0], micro_batch=self.batch,
                    retain=self.budget() if extra.get("retain") else 0)

    def budget(self) -> float | bool:
        """For the graphs that the rollout keeps. Like the nodes, none with checkpointing, whose needs cannot be measured beforehand."""
        if self.options.retain == "all":
            return True
        import torch
        free = self.velocity.free_memory()
        if self.options.memory:
            free = min(free, max(0, self.options.memory * GB - torch.cuda.memory_allocated()))
        return 0 if self.options.checkpointing == "on" else RETAIN_SHARE * free

    def unit(self) -> dict[str, float]:
        """Seconds per latent of a forward and of a forward with backward, at the micro-batch; also the warm-up."""
        import torch
        seconds, x, count = {}, None, 0

        def forward(first, last):
            self.velocity(x[first:last], 0.9, [0] * (last - first))

        def both(first, last):
            with self.velocity.grad():
                loss = self.velocity(x[first:last], 0.9, [0] * (last - first)).square().sum()
                torch.autograd.grad(loss, list(self.velocity.parameters()), allow_unused=True)

        for name, work in (("forward", forward), ("unit", both)):
            for _ in range(2):  # the first loads and warms; it also halves the micro-batch where it does not fit
                count = self.batch.size or LEAVES
                x = torch.ones(count, *latent_shape(self.options), device=self.velocity.device)
                seconds[name] = host.timed(lambda: self.batch.run(count, work)) / count
        return seconds


def measure(engine, options) -> tuple[dict, dict]:
    """({row: its runs' medians}, unit)."""
    import torch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reward = random_reward(options.reward, options.scale > 1, device) if options.reward != "none" else None
    wanted = list(rows(options.steps)) if options.rows == "all" else options.rows.split(",")
    result: dict[str, dict] = {}
    with torch.inference_mode(False), torch.no_grad(), engine.session(options.micro_batch) as velocity:
        bench = Bench(engine, velocity, options, reward)
        unit = bench.unit()
        for repeat in range(options.repeats):
            for name in wanted:
                if name == "independent" and repeat or "error" in result.get(name, {}):
                    continue  # the dearest row once
                try:
                    with network_passes(engine.network) as count:
                        run = bench.iteration(name)
                except RuntimeError as error:
                    result[name] = {"error": str(error)}
                else:
                    row = result.setdefault(name, {"forwards": count.forwards, "backwards": count.backwards, "runs": []})
                    row |= {"micro_batch": bench.batch.size, "ratio": run.pop("ratio"), "skipped": run.pop("skipped")}
                    row["runs"].append(run)
                host.save({"rows": result, "unit": unit, **about(engine, options)}, options.json)
    return result, unit


def about(engine, options) -> dict:
    import torch
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    return {"device": host.device(), "torch": torch.__version__, "engine": engine.name, "options": settings, "sizes": engine.size,
            "parameters": sum(parameter.numel() for parameter in engine.network.parameters())}


def seconds(row: dict, *phases: str) -> float:
    """Median over the runs of the sum of these phases."""
    return statistics.median(sum(run[name]["seconds"] for name in phases if name in run) for run in row["runs"])


def highest(row: dict, phase: str, what: str) -> float:
    return max(run[phase][what] or math.nan for run in row["runs"])


def table(engine, result: dict, unit: dict, options) -> None:
    print(f"\na forward {1e3 * unit['forward']:.2f} ms per latent, forward and backward {unit['unit'] / unit['forward']:.2f} forwards")
    print(f"{'':16}{'passes':>12}{'rollout':>9}{'decode':>8}{'reward':>8}{'update':>8}{'s in all':>9} | memory in GB per phase: allocated / reserved (estimated)")
    for name, row in result.items():
        if "error" in row:
            print(f"{name:16}{row['error']}")
            continue
        phases = [phase for phase in ("rollout", "decode", "reward", "update") if phase in row["runs"][0]]
        times = "".join(f"{seconds(row, phase):8.2f}" if phase in phases else " " * 8 for phase in ("rollout", "decode", "reward", "update"))
        guesses = {phase: estimated(engine, phase, name, row) for phase in phases}
        memory = ", ".join(f"{phase} {highest(row, phase, 'allocated') / GB:.2f} / {highest(row, phase, 'reserved') / GB:.2f}"
                           + (f" ({guesses[phase] / GB:.2f})" if guesses[phase] else "") for phase in phases)
        print(f"{name:16}{row['forwards']:6}+{row['backwards']:<5} {times}{seconds(row, *phases):9.2f} | {memory}"
              + (f"; micro-batch {row['micro_batch']}" if row["micro_batch"] else "") + (f"; ratio {row['ratio']:.6f}" if abs(row["ratio"] - 1) > 1e-6 else ""))


def estimated(engine, phase: str, name: str, row: dict) -> float | None:
    """What ComfyPolicy estimated for this phase of this row, bytes with the weights."""
    settings, extra = rows(engine.options.steps)[name]
    learning = LEAVES if not extra.get("shared", True) or settings["branching"] == 1 else LEAVES // settings["branching"]
    widest = {"rollout": LEAVES, "update": learning}.get(phase)
    found = engine.estimate(min(row["micro_batch"] or widest, widest)) if widest else None
    return found and found["weights"] + found["adapters"] + found[{"rollout": "sampling", "update": "learning"}[phase]]


def verdict(result: dict, unit: dict, options) -> dict[str, float]:
    """The targets beside what was measured; returns what was measured."""
    found, best = {}, result.get("tree_short_tail", {})
    print()
    for (name, whole), target in FASTER.items():
        other, label = result.get(name, {}), f"{name}{', VAE and reward included' if whole else ''}"
        if "runs" not in best or whole and not {"decode", "reward"} <= set(best["runs"][0]):
            print(f"at least {target}x faster than {label}: not measured")
        elif "runs" in other:
            phases = ("rollout", "update", "decode", "reward") if whole else ("rollout", "update")
            ratio = found[label] = seconds(other, *phases) / seconds(best, *phases)
            by_passes = "" if whole else f" (by passes {predicted(other, unit) / predicted(best, unit):.2f}x)"
            print(f"at least {target}x faster than {label}: {ratio:.2f}x{by_passes}, {'met' if ratio >= target else 'not met'}")
        else:
            print(f"at least {target}x faster than {label}: that row was not measured")
    limit = FITS.get((options.model, options.dtype))
    used = [run[phase]["reserved"] or run[phase]["allocated"] for name, row in result.items() if name not in ("independent", "window")
            for run in row.get("runs", []) for phase in ("rollout", "decode", "reward", "update") if phase in run]
    if limit and used:
        found["highest_gb"] = max(used) / GB
        met = "met" if max(used) <= limit * GB else "not met"
        print(f"tree rows within {limit} GB: {max(used) / GB:.2f} GB at most, {met if options.scale == 1 and torch_cuda() else 'says nothing at this scale or without a GPU'}")
    return found


def torch_cuda() -> bool:
    import torch
    return torch.cuda.is_available()


def overhead(engine, others: list, options) -> dict:
    """One straight line through our sampler against the hosts' own, in turn in one process."""
    import torch
    from core import noise
    from core.noise import NoiseSchedule
    from core.rollout import grow
    from core.tree import TreeShape

    def ours(adapters_on: bool):
        with engine.session(1) as velocity, contextlib.nullcontext() if adapters_on else velocity.reference():
            roots = noise.roots(latent_shape(options), 0, 0, [0], 1).to(velocity.device)
            return grow(velocity, roots, engine.sigmas, TreeShape(1, 1, window="fixed"), NoiseSchedule(level=0.0), start=0, prompts=[0]).leaves

    runs = {"ours, LoRA off": lambda: ours(False), "ours, live LoRA": lambda: ours(True)} | dict(other.baseline() for other in [engine, *others])
    found: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode(False), torch.no_grad():
        for work in runs.values():
            work()  # warm
        for _ in range(options.repeats):
            for name, work in runs.items():
                found[name].append(host.timed(work))
    reference = next(iter(runs))
    for name in runs:
        ratio = statistics.median(a / b for a, b in zip(found[reference], found[name]))
        print(f"{name}: {statistics.median(found[name]):.3f} s" + ("" if name.startswith("ours") else f"; ours takes {ratio:.3f} times as long (target: at most 1.05)"))
    return found


def choose_engines(wanted: str) -> list:
    """Engine classes that run here, the one to measure first. Exits with one sentence where none does."""
    import torch
    problems, found = {}, []
    folder = os.environ.get("COMFYUI_PATH")
    sys.path[:] = [*([folder] if folder else []), *[p for p in sys.path if Path(p or ".").resolve() != host.ROOT], str(host.ROOT)]
    for name, engine in (("comfy", Comfy), ("diffusers", Diffusers)):
        try:
            if name == "comfy":
                from comfy.cli_args import args
                args.cpu = args.cpu or not torch.cuda.is_available()
                import comfy.sd  # noqa: F401
            else:
                import diffusers  # noqa: F401
                import peft  # noqa: F401
        except ImportError as error:
            problems[name] = str(error)
        else:
            found.insert(0 if name == wanted else len(found), engine)
    if not found or wanted in problems:
        reasons = "; ".join(f"{name}: {problems[name]}" for name in problems if wanted in ("auto", name))
        sys.exit(f"Full-size models run through ComfyUI (set COMFYUI_PATH) or through diffusers and peft (pip install diffusers peft), and that is missing here ({reasons}).")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, choices in (("part", "iteration", ("iteration", "overhead")), ("engine", "auto", ("auto", "comfy", "diffusers")), ("model", "flux", tuple(MODELS)),
                                   ("dtype", "bf16", ("bf16", "fp8", "fp32")), ("checkpointing", "on", ("on", "off")), ("reward", "none", ("none", "pickscore", "clipscore")),
                                   ("retain", "auto", ("auto", "all"))):
        parser.add_argument(f"--{name}", default=default, choices=choices, help=f"default {default}")
    for name, default, text in (("size", 512, "pixels"), ("steps", 10, "sampling steps"), ("start", 0, "first step of the window"), ("rank", 32, "LoRA rank"),
                                ("micro-batch", 0, "latents per model call, 0 = all; halves by itself"), ("repeats", 2, "runs of each row but `independent`"),
                                ("scale", 1, "divides depth and width, to try it on a small machine")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--memory", type=float, default=0.0, help="GB that the GPU may pretend to have, 0 = all it has")
    parser.add_argument("--rows", default="all", help=f"all, or some of {','.join(rows(10))}")
    parser.add_argument("--vae", action="store_true", help="decode the leaves with a VAE of FLUX's size")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    unknown = [name for name in options.rows.split(",") if name != "all" and name not in rows(options.steps)]
    if unknown or options.size % 16 or min(options.size, options.steps - 4, options.repeats, options.scale) < 1:
        parser.error(f"no such row: {', '.join(unknown)}" if unknown else "the size must be a multiple of 16, steps at least 5, repeats and scale at least 1")
    if options.reward != "none" and not options.vae:
        parser.error("a reward needs images: add --vae")
    return options


def main():
    import torch
    options = arguments()
    engine_class, *others = choose_engines(options.engine)
    if options.memory:
        if not torch.cuda.is_available():
            sys.exit("--memory pretends that a GPU is smaller, and there is none here: leave it out.")
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory * GB / torch.cuda.get_device_properties(0).total_memory))
    engine = engine_class(options)
    print(f"{options.model} through {engine.name} on {host.device()}, torch {torch.__version__}: {about(engine, options)['parameters'] / 1e9:.3f} billion parameters, "
          f"{options.dtype}, {options.size} px, {options.steps} steps, LoRA rank {options.rank}, checkpointing {options.checkpointing}")
    if options.part == "overhead":
        result = overhead(engine, [other(options) for other in others if other is not Comfy and options.dtype != "fp8"], options)
        return host.save({"seconds": result, **about(engine, options)}, options.json)
    print(engine.preflight())
    result, unit = measure(engine, options)
    table(engine, result, unit, options)
    found = verdict(result, unit, options)
    host.save({"rows": result, "unit": unit, "verdict": found, **about(engine, options)}, options.json)


if __name__ == "__main__":
    main()
