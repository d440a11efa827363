"""Training runs by the peers' own public code, in the world of peer_world.py: what benchmarks/peers.py needs to load it
and where it puts the embedded model, the reward and the meter in.

Each `train_*` runs the peer's own training loop, from the first line to the meter's stop. What is replaced are names in
the loaded modules; their files are not touched. benchmarks/peers.py lists every change.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from peer_world import SIDE, STEPS, Done, EmbeddedPipeline, Meter, add_lora, embeddings, lora_config
from torch import nn
from torch.utils.data import DataLoader

SCRIPTS = {"treegrpo": "train", "flow_grpo": "scripts.train_sd3", "nft": "scripts.train_nft_sd3"}
GROUP = 8  # images per prompt of the flat methods, so that an update costs about as much as one of ours


class Stub(types.ModuleType):
    """Any package that has nothing to do with a method: whatever is asked of it exists and does nothing."""

    __path__: list = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


class Settings(SimpleNamespace):
    """What ml_collections.ConfigDict is to the peers' configurations."""

    def to_dict(self) -> dict:
        return vars(self)


def stubs() -> dict[str, types.ModuleType]:
    """Packages of theirs for flags, logs and their own reward."""
    found = {
        name: Stub(name)
        for name in ("absl", "absl.app", "absl.flags", "wandb", "hydra", "hpsv2", "hpsv2.src", "hpsv2.src.open_clip")
    }
    found["absl"].app, found["absl"].flags = found["absl.app"], found["absl.flags"]
    found["absl.flags"].FLAGS = SimpleNamespace()
    found["hydra"].main = lambda **_: lambda function: function
    found["ml_collections"] = Stub("ml_collections")
    found["ml_collections"].ConfigDict = Settings
    found["ml_collections"].config_flags = Stub("ml_collections.config_flags")
    found["imp"] = Stub("imp")  # gone from Python 3.12
    found["imp"].load_source = load_source
    return found


def load_source(name: str, path: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def loaded(peer: str, folder: Path) -> Iterator[types.ModuleType]:
    """The peer's training script as a module; its packages are importable inside only, for two peers call theirs alike.

    ValueError, in one sentence, where the folder has no such script.
    """
    script = SCRIPTS[peer]
    if not (folder / f"{script.replace('.', '/')}.py").is_file():
        raise ValueError(f"There is no {script.replace('.', '/')}.py in {folder}: give the folder of the peer's code.")
    before = dict(sys.modules)
    with mock.patch.dict(sys.modules, stubs()), mock.patch.object(sys, "path", [str(folder), *sys.path]):
        for name in ("dataset", "config", "scripts"):  # names that others may have, too
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        try:
            yield importlib.import_module(script)
        finally:
            others = {name: module for name, module in sys.modules.items() if name not in before}
    # what they brought of other packages stays: importing torch's or diffusers' parts twice breaks them
    sys.modules.update(
        {
            name: module
            for name, module in others.items()
            if not str(getattr(module, "__file__", None) or "").startswith(str(folder)) and not isinstance(module, Stub)
        }
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what they print, and without gathering files where the user stands."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    here = os.getcwd()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        logging.disable(logging.INFO)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            os.chdir(here)


def bar(iterable=None, total=None, **_):
    """tqdm without its output."""
    from tqdm import tqdm

    return tqdm(iterable, total=total, disable=True)


def in_this_process(*arguments, **options) -> DataLoader:
    return DataLoader(*arguments, **{**options, "num_workers": 0, "pin_memory": False})


def write_prompts(meter: Meter, times: int = 1) -> Path:
    """Their prompt files, in the folder where we are: train.txt and test.txt."""
    world = meter.world
    for name, texts in (("train", world.training * times), ("test", world.held_out)):
        Path(f"{name}.txt").write_text("\n".join(texts) + "\n", "utf-8")
    return Path.cwd()


def put_in(script: types.ModuleType, meter: Meter, pipeline: EmbeddedPipeline, **others) -> contextlib.ExitStack:
    """Their names for the pipeline, the bars and the data loader, and `others`, replaced while the context lasts."""
    stack = contextlib.ExitStack()
    names = {
        "StableDiffusion3Pipeline": SimpleNamespace(from_pretrained=lambda *_, **__: pipeline),
        "tqdm": bar,
        "DataLoader": in_this_process,
        **others,
    }
    for name, value in names.items():
        stack.enter_context(mock.patch.object(script, name, value))
    return stack


def many_scores(meter: Meter):
    """flow_grpo.rewards.multi_score: images [B, 3, H, W] -> the demo's reward."""

    def score(images, prompts, metadata, only_strict=True):
        return {"avg": meter.score(images.movedim(1, -1).float(), list(prompts)).numpy().astype(np.float64)}, {}

    return lambda device, wanted: score


def encode_prompt(meter: Meter):
    return lambda encoders, tokenizers, prompts, length: embeddings({**meter.world.features, **blank(meter)}, prompts)


def blank(meter: Meter) -> dict:
    """The negative prompt, which they encode and which no guidance of 1 uses."""
    embeds, pooled = next(iter(meter.world.features.values()))
    return {"": (torch.zeros_like(embeds), torch.zeros_like(pooled))}


def flow_grpo_settings(script: types.ModuleType, folder: Path, seed: int, rate: float) -> Settings:
    """Theirs for PickScore, and what this world needs otherwise: one batch is one prompt's group, two make an epoch."""
    config = load_source("peer_config", str(folder / "config" / "grpo.py")).pickscore_sd3()
    config.seed, config.resolution, config.mixed_precision, config.allow_tf32 = seed, SIDE, "no", False
    config.sample.num_steps, config.sample.guidance_scale, config.train.cfg = STEPS, 1.0, False
    config.sample.train_batch_size = config.sample.num_image_per_prompt = config.train.batch_size = GROUP
    config.sample.num_batches_per_epoch, config.train.gradient_accumulation_steps = 2, 1
    config.train.learning_rate, config.train.clip_range, config.train.beta = rate, 1e-2, 0.0
    config.eval_freq, config.save_freq = 1, 10**9
    return config


def put_together(config: Settings, meter: Meter) -> tuple:
    """The pipeline, and what takes the place of a training script's own names: what Flow-GRPO's and DiffusionNFT's
    share. The prompts are written, and named in the script's settings.
    """
    config.dataset = str(write_prompts(meter))
    names = {
        "FLAGS": SimpleNamespace(config=config),
        "LoraConfig": lambda **_: lora_config(meter.transformer),
        "encode_prompt": encode_prompt(meter),
    }
    return EmbeddedPipeline.of(meter.world, meter.transformer), names


def train_flow_grpo(folder: Path, meter: Meter, seed: int, rate: float) -> None:
    """scripts/train_sd3.py's main, whole."""
    with loaded("flow_grpo", folder) as script, quiet():
        config = flow_grpo_settings(script, folder, seed, rate)
        pipeline, names = put_together(config, meter)
        names |= {"eval": meter.check}
        with put_in(script, meter, pipeline, **names), meter, contextlib.suppress(Done):
            with mock.patch.object(script.flow_grpo.rewards, "multi_score", many_scores(meter)):
                script.main(None)


class TorchOnCpu:
    """torch for a script that asks for cuda:0 by name."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def device(self, name: str) -> torch.device:
        return torch.device("cpu")


class Alone(nn.Module):
    """DistributedDataParallel of one process."""

    def __init__(self, module: nn.Module, **_):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def nft_settings(folder: Path, seed: int, rate: float) -> Settings:
    """Theirs for PickScore, and what this world needs otherwise: one prompt's group is an epoch, and an update."""
    config = load_source("peer_config", str(folder / "config" / "nft.py")).sd3_pickscore()
    config.seed, config.resolution, config.mixed_precision, config.allow_tf32 = seed, SIDE, "no", False
    config.logdir, config.sample.num_steps = "logs", STEPS
    config.sample.train_batch_size = config.sample.num_image_per_prompt = config.train.batch_size = GROUP
    config.sample.num_batches_per_epoch = config.train.gradient_accumulation_steps = 1
    config.train.learning_rate, config.eval_freq, config.save_freq = rate, 1, 10**9
    return config


def train_nft(folder: Path, meter: Meter, seed: int, rate: float) -> None:
    """scripts/train_nft_sd3.py's main, whole."""
    with loaded("nft", folder) as script, quiet():
        config = nft_settings(folder, seed, rate)
        pipeline, names = put_together(config, meter)
        names |= {
            "eval_fn": meter.check,
            "save_ckpt": lambda *_: None,
            "torch": TorchOnCpu(),
            "torch_autocast": lambda **_: contextlib.nullcontext(),
            "GradScaler": lambda **_: None,
            "DDP": Alone,
            "dist": SimpleNamespace(all_reduce=lambda *_, **__: None, ReduceOp=SimpleNamespace(AVG=None)),
            "setup_distributed": lambda *_: None,
            "gather_tensor_to_all": lambda tensor, world_size: tensor.cpu(),
        }
        ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        with put_in(script, meter, pipeline, **names), mock.patch.dict(os.environ, ranks):
            with mock.patch.object(script.flow_grpo.rewards, "multi_score", many_scores(meter)):
                with meter, contextlib.suppress(Done):
                    script.main(None)


def treegrpo_settings(folder: Path, rate: float):
    """Theirs, with two prompts per epoch as in their README, and what this world needs otherwise."""
    from omegaconf import OmegaConf

    config = OmegaConf.load(folder / "configs" / "base.yaml")
    ours = {
        "training": {
            "epochs": 10**9,
            "lr": rate,
            "mixed_precision": "no",
            "enable_cfg": False,
            "clip_range": 1e-2,
            "save_ckpt_every_epoch": 1,
        },
        "sample": {"num_prompts": 2, "guidance_scale": 1.0},
        "env": {"reward_model": "none"},
        "data": {"prompt_path": "train.txt", "height": SIDE, "width": SIDE},
    }
    return OmegaConf.merge(config, ours)


def treegrpo_trainer(script: types.ModuleType, folder: Path, meter: Meter, seed: int, rate: float):
    """Their RLTrainer with the embedded model and the demo's reward in it."""
    from accelerate import Accelerator

    write_prompts(meter, times=200)  # their loop ends with the list
    pipeline = EmbeddedPipeline.of(meter.world, meter.transformer)
    pipeline.transformer = add_lora(meter.transformer)
    meter.transformer.enable_gradient_checkpointing = lambda *_: None
    trained = {name for name, parameter in meter.transformer.named_parameters() if parameter.requires_grad}
    with put_in(script, meter, pipeline):
        trainer = script.RLTrainer(treegrpo_settings(folder, rate), Accelerator(mixed_precision="no"), seed=seed)
    for name, parameter in meter.transformer.named_parameters():
        parameter.requires_grad_(name in trained)
    trainer.reward_model = lambda image, prompt: meter.score(
        torch.from_numpy(np.asarray(image, dtype=np.float32))[None] / 255, [prompt]
    )
    trainer.save_model = meter.check
    return trainer


def train_treegrpo(folder: Path, meter: Meter, seed: int, rate: float) -> None:
    """train.py's RLTrainer.run, whole."""
    with loaded("treegrpo", folder) as script, quiet():
        trainer = treegrpo_trainer(script, folder, meter, seed, rate)
        with mock.patch.object(script, "tqdm", bar), meter, contextlib.suppress(Done):
            meter.check()
            trainer.run()


PEERS = {"treegrpo": train_treegrpo, "flow_grpo": train_flow_grpo, "nft": train_nft}
