"""Pre-train the embedded models from nothing, in ComfyUI's own network classes and file formats.

    python embedded/train.py critic|vae|flux|sd3 --comfyui PATH [--steps N] [--batch N] [--seed N]

In this order for a fresh set: `flux` and `sd3` learn on latents of the saved `vae.safetensors`. Seeded; on two CPU
cores some minutes for the critic, a quarter of an hour for the VAE, 40 to 50 minutes for each of the others. Files land
next to this script (or in --out).
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FOLDER = Path(__file__).resolve().parent
if not __package__:  # run as a script
    sys.path.insert(0, str(FOLDER.parent))
from core.rewards.drawing import DRAWN, Critic  # noqa: E402
from embedded import shapes  # noqa: E402
from embedded.clip_l import random_clip_l  # noqa: E402

log = logging.getLogger("embedded")
DEFAULTS = {"critic": (2400, 64), "vae": (4000, 32), "flux": (6500, 64), "sd3": (7000, 64)}
EACH = 200  # drawings per caption whose latents the flows learn from
CHANNELS, WORDS = 16, 12  # latent channels; text tokens that differ between captions and come before the padding
FLUX = dict(
    in_channels=CHANNELS, out_channels=CHANNELS, vec_in_dim=768, context_in_dim=768, hidden_size=128, mlp_ratio=4.0,
    num_heads=1, depth=2, depth_single_blocks=4, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
    guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
SD3 = dict(
    input_size=None, in_channels=CHANNELS, patch_size=2, depth=3, adm_in_channels=768, qk_norm="rms",
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 768, "out_features": 192}},
)  # fmt: skip


def open_comfyui(path: str) -> None:
    """Put ComfyUI on the import path, on the CPU, with kernels that have gradients."""
    sys.path.insert(0, str(path))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    import comfy.model_management

    comfy.model_management.in_training = True


def one_cycle(optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.05) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to zero."""

    def factor(step: int) -> float:
        rise = (step + 1) / max(1.0, warmup * steps)
        return min(1.0, rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def fit(model: nn.Module, losses: Iterator[Tensor], steps: int, lr: float, save: Callable[[], None]) -> None:
    """AdamW over an endless iterator of losses; logs every 100 steps and saves every 500."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = one_cycle(optimizer, steps)
    start, mean = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        loss = next(losses)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        mean += loss.item()
        if step % 100 == 0:
            log.info("step %d/%d  loss %.4f  %.0f s", step, steps, mean / 100, time.monotonic() - start)
            mean = 0.0
        if step % 500 == 0 or step == steps:
            save()


def write(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype, described: dict[str, str] | None = None) -> None:
    """Save a state dict as safetensors in `dtype`; scalars stay fp32."""
    from safetensors.torch import save_file

    kept = {k: v.detach().to(dtype if v.ndim else torch.float32).contiguous().clone() for k, v in tensors.items()}
    save_file(kept, str(path), described)


def train_critic(steps: int, batch: int, out: Path, generator: torch.Generator) -> None:
    """Drawings of every size and place, blurred and noisy, so that the score holds far from the training data; and,
    for the head "drawn", as many that went wrong.
    """
    heads = {
        **{name: list(values) for name, values in {**shapes.NAMED, **shapes.STYLES}.items()},
        DRAWN[0]: [DRAWN[1], "badly"],
    }
    model = Critic(heads)

    def losses() -> Iterator[Tensor]:
        while True:
            index = torch.randint(96, (batch,), generator=generator)
            styles = shapes.random_styles(batch, generator)
            images = shapes.draw(index, generator, radius=(0.2, 0.4), jitter=6, styles=styles)
            if torch.rand((), generator=generator) < 0.3:
                images = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
            grain = 0.06 * torch.rand(batch, 1, 1, 1, generator=generator)
            images = images + grain * torch.randn(images.shape, generator=generator)
            found = model(torch.cat([images, spoiled(batch, generator)]))
            drawn = F.cross_entropy(found[DRAWN[0]], torch.arange(2).repeat_interleave(batch))
            wanted = [*shapes.labels(index), *styles.T]
            yield drawn + sum(F.cross_entropy(logits[:batch], right) for logits, right in zip(found.values(), wanted))

    described, path = {"heads": json.dumps(heads)}, out / "critic.safetensors"
    fit(model, losses(), steps, 2e-3, lambda: write(model.state_dict(), path, torch.float16, described))


def spoiled(n: int, generator: torch.Generator) -> Tensor:
    """[n, 3, 64, 64]: drawings as a model spoils them. A third each: two drawings on one background faded into each
    other, two in patches, one warped; all a little noisy.
    """

    def draw(index: Tensor) -> Tensor:
        return shapes.draw(index, generator, radius=(0.22, 0.38), jitter=4)

    def cloud(channels: int, grid: int) -> Tensor:  # smooth noise of standard deviation about 1
        coarse = torch.randn(n, channels, grid, grid, generator=generator)
        return F.interpolate(coarse, (shapes.SIZE, shapes.SIZE), mode="bicubic", align_corners=True)

    index = torch.randint(96, (n,), generator=generator)
    pair, colours = torch.randint(32, (n,), generator=generator), len(shapes.COLOURS)  # shape and colour of the other
    other = shapes.caption_numbers(pair // colours, pair % colours, shapes.labels(index)[2])
    first, second = draw(index), draw(other)
    fade = 0.25 + 0.5 * torch.rand(n, 1, 1, 1, generator=generator)
    patches = (4 * cloud(1, 6)).sigmoid()
    still = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(first.shape), align_corners=False)
    bend = 0.04 + 0.08 * torch.rand(n, 1, 1, 1, generator=generator)
    warped = F.grid_sample(first, still + bend * cloud(2, 5).movedim(1, -1), padding_mode="border", align_corners=False)
    ways = [torch.lerp(first, second, fade), torch.lerp(first, second, patches), warped]
    way = torch.randint(3, (n,), generator=generator)
    images = torch.stack(ways)[way, torch.arange(n)]
    return images + 0.06 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)


def without_blocks(network: nn.Sequential, blocks: tuple[int, ...]) -> nn.Sequential:
    """The same layers, with some residual blocks replaced by what they do when their convolutions are zero."""
    return nn.Sequential(*(nn.ReLU() if i in blocks else layer for i, layer in enumerate(network)))


def build_vae() -> tuple[nn.Module, nn.Module, nn.Module]:
    """ComfyUI's TAESD with 16 channels, and its encoder and decoder without the blocks that stay zero."""
    from comfy.taesd.taesd import TAESD

    vae = TAESD(latent_channels=CHANNELS)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            half, number = name.split(".")[:2]
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if ".conv." in name:  # residual branch: start small, or stay zero
                module.weight.data.mul_(0.0 if int(number) in shapes.ZERO_BLOCKS[half] else 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for last in (vae.taesd_encoder[-1], vae.taesd_decoder[-1]):
        last.weight.data.mul_(0.5)
    encoder = without_blocks(vae.taesd_encoder, shapes.ZERO_BLOCKS["taesd_encoder"])
    decoder = without_blocks(vae.taesd_decoder, shapes.ZERO_BLOCKS["taesd_decoder"])
    return vae, encoder.to(memory_format=torch.channels_last), decoder.to(memory_format=torch.channels_last)


def train_vae(steps: int, batch: int, out: Path, generator: torch.Generator) -> None:
    """Reconstruction with a little latent noise; then the scale that gives FLUX latents of mean 0, variance 1."""
    vae, encoder, decoder = build_vae()
    trained = nn.ModuleList([encoder, decoder])

    def losses() -> Iterator[Tensor]:
        while True:
            index = torch.randint(96, (batch,), generator=generator)
            images = shapes.draw(index, generator, radius=(0.24, 0.36), jitter=4)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                latent = encoder(images).float()
                noise = 0.12 * torch.randn(latent.shape, generator=generator)
                drawn = decoder(latent + noise).float()
            spread = latent.std((0, 2, 3)), latent.mean((0, 2, 3))
            regular = (spread[1].square() + (spread[0] - 1).square()).mean()
            edges = sum(F.l1_loss(drawn.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
            yield F.l1_loss(drawn, images) + 2 * F.mse_loss(drawn, images) + edges + 0.01 * regular

    def save() -> None:
        index = torch.arange(96 * 4) % 96
        images = shapes.draw(index, torch.Generator().manual_seed(7))
        with torch.no_grad():
            latent = encoder(images)
            error = F.mse_loss(decoder(latent).clamp(0, 1), images)
        factor, shift = shapes.SCALE, shapes.SHIFT
        vae.vae_scale.data = factor * latent.std()
        vae.vae_shift.data = shift - latent.mean() / (factor * latent.std())
        left_out = shapes.zero_blocks()
        kept = {name: tensor for name, tensor in vae.state_dict().items() if name not in left_out}
        write(kept, out / "vae.safetensors", torch.float16)
        log.info("PSNR %.1f dB, latent std %.3f", -10 * math.log10(error.item()), latent.std())

    fit(trained, losses(), steps, 2e-3, save)


@torch.no_grad()
def text_features() -> tuple[Tensor, Tensor]:
    """Features of all captions and, last, of the empty prompt: [97, 77, 768] and pooled [97, 768]."""
    import comfy.sd

    clip = comfy.sd.load_text_encoder_state_dicts([random_clip_l()], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    found = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in [*shapes.captions(), ""]]
    return torch.cat([c for c, _ in found]).float().clone(), torch.cat([p for _, p in found]).float().clone()


@torch.no_grad()  # ComfyUI's own no-grad is around its nodes, not in vae.encode
def latents(kind: str, folder: Path, each: int, generator: torch.Generator) -> Tensor:
    """Latents of `each` drawings per caption as the diffusion model sees them: [96, each, 16, 8, 8]."""
    import comfy.latent_formats
    import comfy.sd

    form = {"flux": comfy.latent_formats.Flux, "sd3": comfy.latent_formats.SD3}[kind]()
    vae = comfy.sd.VAE(sd=shapes.vae_state_dict(form.scale_factor, form.shift_factor, folder / "vae.safetensors"))
    network = vae.first_stage_model  # the zero blocks are two thirds of the work
    encoder = without_blocks(network.taesd_encoder, shapes.ZERO_BLOCKS["taesd_encoder"])
    network.taesd_encoder = encoder.to(memory_format=torch.channels_last)
    rows = []
    for caption in range(96):
        images = shapes.draw(torch.full((each,), caption), generator)
        with torch.autocast("cpu", torch.bfloat16):
            found = [vae.encode(part.movedim(1, -1)).float() for part in images.split(50)]
        rows.append(form.process_in(torch.cat(found)))
    found = torch.stack(rows).clone()
    log.info("latents %s mean %.3f std %.3f", tuple(found.shape), found.mean(), found.std())
    return found


def initialise(model: nn.Module) -> None:
    """N(0, 1/fan in) weights, zero biases, norms 1, half gain on modulation, zero output layer."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            gain = 0.5 if "mod" in name.lower() else 1.0
            nn.init.normal_(parameter, std=gain / math.sqrt(parameter[0].numel()))
    nn.init.zeros_(model.final_layer.linear.weight)


class OncePerShape(nn.Module):
    """FLUX's rotary table, computed for one sample and kept: positions are the same in every sample."""

    def __init__(self, embedder: nn.Module):
        super().__init__()
        self.embedder, self.kept = embedder, {}

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] not in self.kept:
            self.kept[ids.shape[1]] = self.embedder(ids[:1])
        return self.kept[ids.shape[1]]


def build_flux() -> nn.Module:
    """ComfyUI's Flux with what training needs: each LayerNorm gets a copy, since FLUX updates its input in place."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model = Flux(image_model="flux", dtype=torch.float32, operations=comfy.ops.disable_weight_init, **FLUX)
    initialise(model)
    model.pe_embedder = OncePerShape(model.pe_embedder)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
    return model


def build_sd3() -> nn.Module:
    """ComfyUI's MMDiT for SD3.5: q and k norms, positions computed (no table), so any picture size works."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    model = OpenAISignatureMMDITWrapper(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **SD3)
    initialise(model)
    return model


def train_flow(kind: str, steps: int, batch: int, out: Path, generator: torch.Generator, resume: bool = False) -> None:
    """Flow matching on stored latents, noisier times more often, as ComfyUI's default shift of 3 samples.

    Captions are wrong in shapes.CONFUSED of the pairs, anew every time. Most steps see the first 12 text tokens
    (captions have 9); every sixth, and all of the last fifth, see all 77. `resume` goes on from the saved file, at half
    the learning rate.
    """
    model = build_flux() if kind == "flux" else build_sd3()
    context, pooled = text_features()
    data = latents(kind, out, EACH, generator)
    rename = (lambda k: k.replace("_norm.weight", "_norm.scale")) if kind == "flux" else (lambda k: k)
    path = out / f"{kind}.safetensors"
    if resume:
        from safetensors.torch import load_file

        saved = load_file(str(path))
        model.load_state_dict({k: saved[rename(k)].float() for k in model.state_dict()})

    def velocity(x: Tensor, t: Tensor, which: Tensor, words: int) -> Tensor:
        if kind == "sd3":
            return model(x, t * 1000, context=context[which, :words], y=pooled[which])
        guidance = torch.rand(batch, generator=generator) * 5 + 1
        guidance[: batch // 2] = 3.5
        return model(x, t, context[which, :words], pooled[which], guidance)

    def losses() -> Iterator[Tensor]:
        for step in range(steps):
            which = torch.randint(96, (batch,), generator=generator)
            x0 = data[which, torch.randint(data.shape[1], (batch,), generator=generator)]
            which = shapes.confused(which, generator)
            which = which.where(torch.rand(batch, generator=generator) > 0.1, 96)
            u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
            t = (2.0 * u / (1 + u))[torch.randperm(batch, generator=generator)]
            noise = torch.randn(x0.shape, generator=generator)
            x = torch.lerp(x0, noise, t[:, None, None, None])
            words = 77 if step % 6 == 5 or step > steps * 0.8 else WORDS
            with torch.autocast("cpu", torch.bfloat16):
                found = velocity(x, t, which, words)
            yield F.mse_loss(found.float(), noise - x0)

    def save() -> None:
        write({rename(k): v for k, v in model.state_dict().items()}, path, torch.bfloat16)

    fit(model, losses(), steps, 0.75e-3 if resume else 1.5e-3, save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(DEFAULTS))
    parser.add_argument("--comfyui", required=True, help="folder of a ComfyUI checkout")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="flux, sd3: go on from the saved file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    steps, batch = (given or usual for given, usual in zip((options.steps, options.batch), DEFAULTS[options.what]))
    open_comfyui(options.comfyui)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    if options.what in ("flux", "sd3"):
        train_flow(options.what, steps, batch, options.out, generator, options.resume)
    else:
        {"critic": train_critic, "vae": train_vae}[options.what](steps, batch, options.out, generator)


if __name__ == "__main__":
    main()
