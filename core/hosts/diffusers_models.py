"""diffusers' side of core.runs.trainer: a model from a pipeline folder, a single file or the embedded ones, with its
text features and its VAE.
"""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ..lora.layer_names import network_class
from ..lora.networks import NETWORKS
from ..method.noise import noised
from ..method.rollout import check_sigmas
from ..model import DECODED_AT_ONCE, Host
from .diffusers import LATENT_FORMATS, DiffusersVelocity, TinyVae, clip_l_features
from .diffusers_networks import Kind, kind_of, load_transformer, simple_sigmas

REPO = Path(__file__).resolve().parent.parent.parent
EMBEDDED = {"embedded/flux": "flux", "embedded/sd3": "sd3"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# diffusers' pipelines that can be run, and what each must be told to encode one text alone, without a negative one
PIPELINES = {
    "FluxPipeline": {"prompt_2": None},
    "StableDiffusion3Pipeline": {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False},
    "Flux2Pipeline": {},
    "Flux2KleinPipeline": {},
    "ZImagePipeline": {"do_classifier_free_guidance": False},
    "QwenImagePipeline": {},
}
Feature = tuple[Tensor, Tensor | None]  # of one text: [L, D], pooled [Pd] or None where the network takes none


@dataclass
class Model:
    """A base model's parts."""

    transformer: torch.nn.Module
    vae: object  # decode(latents as the transformer sees them) -> images [B, H, W, 3] in 0..1
    encode: Callable[[list[str]], list[Feature]]
    scheduler: object = None  # of a pipeline folder

    @property
    def network(self) -> str:
        """A key of core.lora.networks."""
        return network_class(self.transformer)

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Of the latents of pictures of this size in pixels: (C, H, W), or (C, 1, H, W) where they have a time."""
        kind: Kind = kind_of(self.transformer)
        return (kind.channels, *[1] * kind.time, height // kind.downscale, width // kind.downscale)


class DiffusersHost(Host):
    """core.model.Host for diffusers."""

    def __init__(
        self,
        model: Model,
        adapters,
        sigmas: Tensor,
        shape: tuple[int, ...],
        texts: list[str],
        *,
        negative: str = "",
        cfg: float = 1.0,
        guidance: float = 3.5,
        start: Tensor | None = None,
    ):
        """adapters: at work in the transformer. shape: of the latents, Model.shape. texts: all that will be asked
        for, encoded now. start: a latent as the transformer sees it [1, *shape], where the sampling does not begin with
        pure noise.
        """
        self.model, self.adapters, self.sigmas, self.shape, self.cfg, self.guidance, self.start = (
            model,
            adapters,
            sigmas,
            shape,
            cfg,
            guidance,
            start,
        )
        check_sigmas(sigmas)
        wanted = list(dict.fromkeys([*texts, *([negative] if cfg != 1 else [])]))
        self.features = dict(zip(wanted, model.encode(wanted)))
        self.negative = tuple(_parts([self.features[negative]])) if cfg != 1 else None

    @contextmanager
    def session(self, prompts: list[str], micro_batch):
        embeds, pooled = _parts([self.features[text] for text in prompts])
        with torch.no_grad():
            yield DiffusersVelocity(
                self.model.transformer,
                self.adapters,
                embeds,
                pooled,
                self.negative,
                self.cfg,
                self.guidance,
                self.shape,
            )

    def roots(self, velocity, noise: Tensor) -> Tensor:
        return noised(0.0 if self.start is None else self.start, noise, float(self.sigmas[0])).to(velocity.device)

    def decode(self, velocity, leaves: Tensor) -> Tensor:
        return torch.cat([self.model.vae.decode(part).float().cpu() for part in leaves.split(DECODED_AT_ONCE)])


def _parts(features: list[Feature]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Texts and pooled ones, None where the network takes none."""
    embeds, pooled = zip(*features)
    return list(embeds), None if pooled[0] is None else list(pooled)


def open_model(
    source: str, *, dtype: str = "float32", conditioning: str = "", vae: str = "", device: torch.device | None = None
) -> Model:
    """source: embedded/flux, embedded/sd3, the folder of a diffusers pipeline, or a .safetensors file as ComfyUI loads
    it.

    conditioning: the file with the prompts' features that the Trainer node writes; needed for a single file. vae: a
    file, or a folder of diffusers; empty = what the source brings. ValueError, in one sentence, for what is missing or
    cannot be read.
    """
    device = device or torch.device("cpu")
    model = (
        _embedded(EMBEDDED[source], dtype)
        if source in EMBEDDED
        else _folder(Path(source), dtype)
        if Path(source).is_dir()
        else _file(Path(source), dtype)
    )
    if conditioning:
        model.encode = Precomputed(Path(conditioning), kind_of(model.transformer))
    if vae:
        model.vae = open_vae(Path(vae), model.network)
    if model.vae is None:
        raise ValueError(
            f"{source} brings no VAE: name one in run.yaml under model.vae, a file or a folder of diffusers."
        )
    model.vae.net.to(device)
    return model


def _embedded(kind: str, dtype: str) -> Model:
    from embedded.clip_l import SHORTEST, as_trained, random_clip_l

    def encode(texts: list[str]) -> list[Feature]:
        return clip_l_features(random_clip_l(), [as_trained(text) for text in texts], SHORTEST)

    return Model(
        load_transformer(load_file(str(REPO / "embedded" / f"{kind}.safetensors")), DTYPES[dtype]),
        embedded_vae(kind),
        encode,
    )


def embedded_vae(kind: str, dtype: torch.dtype = torch.float32) -> TinyVae:
    """The embedded models' VAE, without its blocks that are zero, computing in dtype. In bfloat16 a picture depends on
    how many are decoded with it, and so a run on the number of processes.
    """
    from embedded.shapes import skip_zero_blocks, vae_state_dict

    vae = TinyVae(vae_state_dict(*LATENT_FORMATS[kind]), kind, dtype)
    skip_zero_blocks(vae.net)
    return vae


def _file(path: Path, dtype: str) -> Model:
    state = read(path)
    prefix = "model.diffusion_model."
    if any(key.startswith(prefix) for key in state):  # a checkpoint that holds all parts
        state, rest = {key: tensor for key, tensor in state.items() if key.startswith(prefix)}, state
    else:
        rest = {}
    transformer = load_transformer(state, DTYPES[dtype])
    model = Model(transformer, None, lambda texts: _no_encoder(path))
    if any(key.startswith("first_stage_model.") for key in rest):
        model.vae = KlVae.from_file(rest, model.network)
    return model


def _no_encoder(path: Path):
    raise ValueError(
        f"{path.name} is a single file, whose text encoders do not run here: name a conditioning file in run.yaml "
        "under model.conditioning, which the Trainer node writes, or the folder of a diffusers pipeline under "
        "model.source."
    )


def read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"There is no file or folder {path}: check the path in run.yaml.")
    try:
        return load_file(str(path))
    except Exception as error:  # safetensors' own class, OSError
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): it is damaged, or another kind of file."
        ) from error


class Precomputed:
    """Text features from the file that the Trainer node writes beside run.yaml (nodes/export.py)."""

    def __init__(self, path: Path, kind: Kind):
        self.path, self.tensors, self.kind = path, read(path), kind
        self.start = self.tensors.get("start")  # the latent to begin with, where it is not empty
        with safe_open(str(path), "pt") as file:
            self.texts = json.loads((file.metadata() or {}).get("treerpo.texts", "[]"))

    def __call__(self, texts: list[str]) -> list[Feature]:
        missing = [text for text in texts if text not in self.texts]
        if missing:
            raise ValueError(
                f"{self.path.name} has no features of {len(missing)} prompts, such as '{missing[0]}': queue the "
                "Trainer node with them once, or take them out of run.yaml."
            )
        return [self._feature(number) for number in map(self.texts.index, texts)]

    def _feature(self, number: int) -> Feature:
        embeds = self.tensors[f"{number}.embeds"]
        embeds = F.pad(embeds, (0, 0, max(0, self.kind.least_text - len(embeds)), 0))  # as ComfyUI does for FLUX.2
        return embeds, self.tensors[f"{number}.pooled"] if self.kind.pooled else None


def _folder(path: Path, dtype: str) -> Model:
    """A pipeline in diffusers' layout. Its text encoders run once, when the prompts are known, and are then let go."""
    if not (path / "model_index.json").is_file():
        raise ValueError(
            f"The folder {path} has no model_index.json: give the folder of a whole diffusers pipeline, such as FLUX's "
            "or SD3's."
        )
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(path), torch_dtype=DTYPES[dtype], local_files_only=True)
    name = type(pipeline).__name__
    if name not in PIPELINES:
        raise ValueError(f"The pipeline in {path} is a {name}: this engine runs {', '.join(PIPELINES)}.")
    kind = kind_of(pipeline.transformer)

    @torch.no_grad()
    def encode(texts: list[str]) -> list[Feature]:
        found = [pipeline.encode_prompt(prompt=text, **PIPELINES[name]) for text in texts]
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(pipeline, part, None) is not None:
                setattr(pipeline, part, None)
        # beside the text: nothing or its mask, which has no gaps for one text; the pooled one of SD3 is the third
        place = 2 if name == "StableDiffusion3Pipeline" else 1
        return [(parts[0][0], parts[place][0] if kind.pooled else None) for parts in found]

    return Model(pipeline.transformer.eval().requires_grad_(False), KlVae(pipeline.vae), encode, pipeline.scheduler)


class KlVae:
    """diffusers' AutoencoderKL, and FLUX.2's and Qwen-Image's own."""

    def __init__(self, net):
        self.net = net.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, state: dict[str, Tensor], network: str) -> "KlVae":
        """From the weights of FLUX's or SD3's own VAE file (decoder.up.3.block.0...); all sizes are read from them.

        ValueError for a network whose VAE is another.
        """
        if network not in LATENT_FORMATS:
            raise ValueError(
                f"The VAE inside this file is {NETWORKS[network].title}'s, which is read from a folder of diffusers "
                "only: name the pipeline's vae folder in run.yaml under model.vae."
            )
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        prefix = "first_stage_model."
        inside = any(key.startswith(prefix) for key in state)
        state = {
            key.removeprefix(prefix): tensor.float()
            for key, tensor in state.items()
            if key.startswith(prefix) or not inside
        }
        levels = sorted({int(key.split(".")[2]) for key in state if key.startswith("encoder.down.")})
        widths = [len(state[f"encoder.down.{level}.block.0.conv1.weight"]) for level in levels]
        scale, shift = LATENT_FORMATS[network]
        net = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            block_out_channels=widths,
            layers_per_block=len({key.split(".")[4] for key in state if key.startswith("encoder.down.0.block.")}),
            latent_channels=state["decoder.conv_in.weight"].shape[1],
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=scale,
            shift_factor=shift,
        )
        net.load_state_dict(convert_ldm_vae_checkpoint(state, net.config))
        return cls(net)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, *shape] as the transformer sees them -> images [B, H, W, 3] in 0..1."""
        weight = next(self.net.parameters())
        raw = self.raw(latents.to(weight.device, torch.float32)).to(weight.dtype)
        images = self.net.decode(raw).sample.float()
        images = images[:, :, 0] if images.dim() == 5 else images
        return (images / 2 + 0.5).clamp(0, 1).movedim(1, -1)

    def raw(self, latents: Tensor) -> Tensor:
        """Latents in the VAE's own scale."""
        config = self.net.config
        if hasattr(self.net, "bn"):  # FLUX.2: normalised channel by channel, in patches of 2x2
            norm = self.net.bn
            spread = (norm.running_var.float() + config.batch_norm_eps).sqrt()
            latents = latents * spread.view(1, -1, 1, 1) + norm.running_mean.float().view(1, -1, 1, 1)
            return F.pixel_shuffle(latents, 2)
        if "latents_mean" in config and config.latents_mean is not None:  # Qwen-Image
            mean, spread = (
                torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            return latents * spread + mean
        return latents / config.scaling_factor + (config.shift_factor or 0.0)


def open_vae(path: Path, network: str):
    """A VAE for a network's latents: a diffusers folder, or a file with a TAESD or with FLUX's or SD3's own VAE."""
    if path.is_dir():
        import diffusers

        try:
            name = json.loads((path / "config.json").read_text("utf-8"))["_class_name"]
            net = getattr(diffusers, name)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"The folder {path} is no VAE of diffusers, with a config.json ({error}).") from None
        return KlVae(net.from_pretrained(str(path), local_files_only=True))
    if network not in LATENT_FORMATS:
        raise ValueError(
            f"{path.name} is a file, and {NETWORKS[network].title}'s VAE is read from a folder of diffusers only: name "
            "the pipeline's vae folder in run.yaml under model.vae."
        )
    state = read(path)
    if any(key.startswith("taesd_decoder.") for key in state):
        return TinyVae(state, network)
    if "decoder.conv_in.weight" in state or "first_stage_model.decoder.conv_in.weight" in state:
        return KlVae.from_file(state, network)
    raise ValueError(
        f"{path.name} is no VAE that can be read here: use FLUX's or SD3's own (ae.safetensors), a TAESD, or a folder "
        "of diffusers."
    )


def sampling_sigmas(model: Model, steps: int, scheduler: str, height: int, width: int) -> Tensor:
    """[steps+1] falling to 0.

    scheduler: "simple" as ComfyUI's; "pipeline" as the pipeline's own for pictures of this size in pixels.
    """
    if scheduler == "simple":
        return simple_sigmas(model.network, steps)
    if scheduler != "pipeline" or model.scheduler is None:
        raise ValueError(
            f"The scheduler '{scheduler}' is not known for this model: use simple, or pipeline with the folder of a "
            "diffusers pipeline."
        )
    config, options = model.scheduler.config, {}
    if config.get("use_dynamic_shifting"):
        tokens = height // 16 * (width // 16)
        options["mu"] = flux2_shift(tokens, steps) if model.network == "flux2" else shift(config, tokens)
    if model.network == "sd3":
        model.scheduler.set_timesteps(steps, **options)
    else:
        options["sigmas"] = [1 - i * (1 - 1 / steps) / max(steps - 1, 1) for i in range(steps)]
        model.scheduler.set_timesteps(**options)
    return model.scheduler.sigmas.float().cpu()


def shift(config, tokens: int) -> float:
    """The exponential shift of a picture of so many tokens, as FLUX's pipeline and its like compute it."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


def flux2_shift(tokens: int, steps: int) -> float:
    """FLUX.2's, which depends on the steps too: between two lines, for 10 steps and for 200 (Black Forest Labs)."""
    at_200, at_10 = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    return at_200 if tokens > 4300 else at_200 + (at_10 - at_200) * (200 - steps) / 190
