"""Models of the official sizes with random weights, in ComfyUI and in diffusers, for the benchmark full_size."""

import contextlib
import math
import re
import sys
import tempfile
from pathlib import Path

import host
from iteration import LEAVES

GB = 1e9
DECODED_AT_ONCE = 8  # as the Trainer's
ALPHA = 64.0
CONTEXT = 4096  # width of T5's features
# Official sizes: width, numbers of blocks (FLUX: double and single), text tokens, pooled width.
MODELS = {
    "flux": dict(width=3072, blocks=19, single=38, tokens=512, pooled=768),
    "sd35_medium": dict(width=1536, blocks=24, dual=13, positions=384, tokens=333, pooled=2048),
    "sd35_large": dict(width=2432, blocks=38, dual=0, positions=192, tokens=333, pooled=2048),
}


def sizes(options) -> dict:
    """The model's sizes, divided by --scale as far as the architecture allows."""
    found, scale = dict(MODELS[options.model]), options.scale
    head = 128 if options.model == "flux" else 64
    found["width"] = max(1, found["width"] // head // scale) * head
    found["blocks"] = max(1, found["blocks"] // scale)
    if options.model == "flux":
        found["single"] = max(1, found["single"] // scale)
    else:  # ComfyUI reads the number of blocks off the width
        found["dual"] = found["dual"] * (found["width"] // 64) // MODELS[options.model]["blocks"]
        found["blocks"] = found["width"] // 64
        found["positions"] = max(32, found["positions"] // scale)
    return found


def spread(name: str, shape) -> tuple[float, float]:
    """(mean, standard deviation) of random weights: N(0, 1/fan_in), modulations half of that, norms 1, biases 0."""
    if len(shape) < 2:
        norm = ("norm" in name or ".ln_" in name) and not name.endswith("bias")
        return (1.0 if norm else 0.0), 0.0
    if "pos_embed" in name and "proj" not in name:
        return 0.0, 0.1
    modulates = re.search(r"_mod\.|modulation|norm", name)
    return 0.0, (0.5 if modulates else 1.0) / math.sqrt(math.prod(shape[1:]))


def fill(name: str, tensor) -> None:
    """Random weights in place."""
    mean, std = spread(name, tensor.shape)
    tensor.normal_(mean, std) if std else tensor.fill_(mean)


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
    return torch.randn(1, size["tokens"], CONTEXT, generator=draw).to(device), torch.randn(
        1, size["pooled"], generator=draw
    ).to(device)


def network_config(model: str, size: dict | None = None) -> dict:
    """Arguments of ComfyUI's class for this network, of published size or another one."""
    size = size or MODELS[model]
    if model == "flux":
        return dict(
            image_model="flux",
            in_channels=16,
            out_channels=16,
            vec_in_dim=size["pooled"],
            context_in_dim=CONTEXT,
            hidden_size=size["width"],
            mlp_ratio=4.0,
            num_heads=size["width"] // 128,
            depth=size["blocks"],
            depth_single_blocks=size["single"],
            axes_dim=[16, 56, 56],
            theta=10000,
            patch_size=2,
            qkv_bias=True,
            guidance_embed=True,
            txt_ids_dims=[],
        )
    text = {"target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": size["width"]}}
    return dict(
        input_size=None,
        in_channels=16,
        patch_size=2,
        depth=size["blocks"],
        adm_in_channels=size["pooled"],
        qk_norm="rms",
        num_patches=size["positions"] ** 2,
        pos_embed_max_size=size["positions"],
        x_block_self_attn_layers=list(range(size["dual"])),
        context_embedder_config=text,
    )


def build(model: str, config: dict, **how):
    """ComfyUI's network. how: dtype and operations."""
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    return (Flux if model == "flux" else OpenAISignatureMMDITWrapper)(**config, **how)


def network_file(model: str, size: dict) -> dict:
    """What a file of this network holds, by ComfyUI's own class: tensors on "meta", under the published names."""
    import comfy.ops
    import torch

    with torch.device("meta"):
        network = build(
            model, network_config(model, size), dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init
        )
    return {key.replace("_norm.weight", "_norm.scale"): tensor for key, tensor in network.state_dict().items()}


def vae_file() -> dict:
    """What a file of FLUX's or SD3's VAE holds, on "meta"."""
    import torch
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    config = dict(
        double_z=True,
        z_channels=16,
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=128,
        ch_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_resolutions=[],
        dropout=0.0,
    )
    parts = "comfy.ldm.modules.diffusionmodules.model"
    with torch.device("meta"):
        net = AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": f"{parts}.Encoder", "params": config},
            decoder_config={"target": f"{parts}.Decoder", "params": config},
        )
    return net.state_dict()


class Comfy:
    """The model through ComfyUI's own loader, VAE and KSampler."""

    name = "ComfyUI"

    def __init__(self, options):
        import comfy.model_management
        import comfy.samplers
        import comfy.sd
        import torch

        from core.hosts.comfy import ComfyPolicy

        self.options, self.size, self.device = options, sizes(options), comfy.model_management.get_torch_device()
        if options.memory:  # what ComfyUI must leave free of this card, to have as much as the small one
            comfy.model_management.EXTRA_RESERVED_VRAM += (
                comfy.model_management.get_total_memory(self.device) - options.memory * GB
            )
        dtype = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}[options.dtype]
        with torch.inference_mode():  # as a loader node
            self.model = comfy.sd.load_diffusion_model_state_dict(self.state_dict(), model_options={"dtype": dtype})
        self.policy = ComfyPolicy.create(
            self.model, options.rank, ALPHA, "attention", checkpointing=options.checkpointing == "on"
        )
        fill_adapters(self.policy.adapters)
        self.network, self.optimized = self.model.model.diffusion_model, self.policy.adapters.parameters()
        self.sigmas = (
            comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", options.steps)
            .clone()
            .float()
        )
        embeds, pooled = text_features(self.size, "cpu")
        self.positive = [[embeds, {"pooled_output": pooled}]]
        self.vae = self.random_vae() if options.vae else None

    def state_dict(self) -> dict:
        """The weights in the form of a FLUX or SD3.5 file, in main memory; made on the GPU, where a random number costs
        little.
        """
        import torch

        return {
            key: made(key, tensor.shape, self.device, torch.bfloat16).cpu()
            for key, tensor in network_file(self.options.model, self.size).items()
        }

    def random_vae(self):
        import comfy.sd
        import torch

        with torch.inference_mode():
            return comfy.sd.VAE(
                sd={key: made(key, tensor.shape, "cpu", torch.float32) for key, tensor in vae_file().items()}
            )

    def session(self, micro_batch: int):
        return self.policy.session(self.positive, shape=latent_shape(self.options), memory_batch=micro_batch or LEAVES)

    def decode(self, velocity, leaves):
        import torch

        with torch.inference_mode():
            return torch.cat(
                [
                    self.vae.decode(part).float().cpu()
                    for part in velocity.process_out(leaves).cpu().split(DECODED_AT_ONCE)
                ]
            )

    def estimate(self, count: int) -> dict | None:
        """ComfyPolicy's own, for `count` latents at once."""
        return self.policy.memory(latent_shape(self.options), count)

    def preflight(self) -> str:
        """What VRAM Preflight tells the user of this model."""
        import comfy.model_management

        from core.method.tree import TreeShape

        try:
            preflight = host.load_pack().nodes.preflight
        except ImportError as error:
            return f"VRAM Preflight's report needs all of ComfyUI's requirements: {error}."
        finally:
            sys.path.append(str(host.ROOT))
        room = self.options.memory * GB or comfy.model_management.get_total_memory(self.device)
        plan = preflight.Plan(self.options.micro_batch, self.policy.checkpointing)
        shape = TreeShape(tail=0.4)
        run = preflight.Foreseen(self.policy, latent_shape(self.options), shape, 1, 1.0, self.vae, None, False, plan)
        return preflight.report(run, room, str(self.device))

    def baseline(self):
        """(name, work): KSampler's own loop, euler."""
        import comfy.sample
        import comfy.utils
        import torch

        comfy.utils.PROGRESS_BAR_ENABLED = False

        def run():
            with torch.inference_mode():
                latent = torch.zeros(1, *latent_shape(self.options))
                return comfy.sample.sample(
                    self.model,
                    comfy.sample.prepare_noise(latent, 0),
                    self.options.steps,
                    1.0,
                    "euler",
                    "simple",
                    self.positive,
                    self.positive,
                    latent,
                    seed=0,
                    disable_pbar=True,
                )

        return "ComfyUI's KSampler", run


class Diffusers:
    """The model in diffusers, with PEFT's layers; for machines without ComfyUI."""

    name = "diffusers"

    def __init__(self, options):
        import torch

        from core.hosts import peft
        from core.hosts.diffusers import simple_sigmas

        if options.dtype == "fp8":
            sys.exit("fp8 weights run in ComfyUI only: use --engine comfy, or --dtype bf16.")
        self.options, self.size, self.device = (
            options,
            sizes(options),
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        self.kind = "flux" if options.model == "flux" else "sd3"
        self.network = random_module(
            self.empty(), self.device, {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
        )
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
                return FluxTransformer2DModel(
                    in_channels=64,
                    num_layers=size["blocks"],
                    num_single_layers=size["single"],
                    num_attention_heads=size["width"] // 128,
                    joint_attention_dim=CONTEXT,
                    pooled_projection_dim=size["pooled"],
                    guidance_embeds=True,
                )
            return SD3Transformer2DModel(
                num_layers=size["blocks"],
                num_attention_heads=size["width"] // 64,
                joint_attention_dim=CONTEXT,
                caption_projection_dim=size["width"],
                pooled_projection_dim=size["pooled"],
                out_channels=16,
                pos_embed_max_size=size["positions"],
                dual_attention_layers=tuple(range(size["dual"])),
                qk_norm="rms_norm",
            )

    def random_vae(self):
        import torch
        from diffusers import AutoencoderKL

        from core.hosts.diffusers import LATENT_FORMATS
        from core.hosts.diffusers_models import KlVae

        scale, shift = LATENT_FORMATS[self.kind]
        with torch.device("meta"):
            net = AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                block_out_channels=[128, 256, 512, 512],
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
                scaling_factor=scale,
                shift_factor=shift,
            )
        return KlVae(random_module(net, self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32))

    @contextlib.contextmanager
    def session(self, micro_batch: int):
        import torch

        from core.hosts.diffusers import DiffusersVelocity

        with torch.no_grad():
            yield DiffusersVelocity(
                self.network, self.attached, *text_features(self.size, self.device), shape=latent_shape(self.options)
            )

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
        given = dict(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            num_inference_steps=self.options.steps,
            height=self.options.size,
            width=self.options.size,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
        if self.kind == "flux":
            pipeline = FluxPipeline(
                FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, None, None, self.network
            )
        else:
            pipeline = StableDiffusion3Pipeline(
                self.network, FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, None, None, None, None
            )
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
    """PickScore (ViT-H/14) or CLIPScore (ViT-L/14) in full size from a file of random weights; small: the tests' tiny
    one.
    """
    import torch

    from core.rewards import load

    sys.path.append(str(host.ROOT / "tests"))
    import rewards
    from golden import models

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tiny"  # its vocabulary serves both
        file = models.write({"clipscore": "clipscore_hf"}.get(kind, kind), tokenizer)
        if not small:
            file = rewards.hf_clip(Path(folder), kind == "clipscore", torch.float16)
        return load(kind, file, device, tokenizer=tokenizer)


def latent_shape(options) -> tuple[int, int, int]:
    return 16, options.size // 8, options.size // 8
