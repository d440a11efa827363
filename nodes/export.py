"""run.yaml beside a run: what the Trainer node does, written down for the trainer without ComfyUI
(standalone/launch.py, docs/scaling.md).
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from ..core.files import write_atomically
from ..core.hosts.architectures import architecture_of, model_file
from ..core.hosts.comfy_host import downscale, encode
from ..core.hosts.diffusers_networks import KINDS
from ..core.references import reference_of
from ..core.rewards.combine import Combined, parts
from ..core.rewards.measure import Measure
from ..core.rewards.server import ServerReward
from ..core.runs.config import (
    FILL_IN,
    AdapterConfig,
    Config,
    ModelConfig,
    PromptConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    dump,
)
from ..embedded.shapes import FOLDER as EMBEDDED

LARGEST = 5e8  # bytes of text features on an artist's disk: about 200 prompts of FLUX
NEGATIVE = "(the Trainer's negative)"
HEAD = """The Trainer node's settings, written anew whenever it starts. Train on without ComfyUI, on one GPU or many:
    python -m standalone.launch train --config run.yaml
    accelerate launch -m standalone.launch train --config run.yaml
from TreeRPO's folder. It goes on with the run in this folder; --folder DIR begins a new one.
Never train one run in two places at once."""


def export(run, host, prompts, shape, schedule, objective, settings, reward, judge, iterations: int) -> None:
    """Write run.yaml and conditioning.safetensors into the run's folder.

    Whatever goes wrong is logged: the run itself must not fail for it.
    """
    try:
        notes: dict[str, str] = {}
        texts = [*prompts.train, *(prompts.held_out if settings.evaluate_every else [])]
        if any(reference_of(text) is not None for text in texts):
            raise ValueError("the trainer without ComfyUI takes no reference images")
        conditioning = write_conditioning(run.folder / "conditioning.safetensors", host, texts)
        if not conditioning:
            notes["model.conditioning"] = (
                "the text features were not written; without them the source must be the folder of a diffusers pipeline"
            )
        raw, start = isinstance(reward, Combined) and reward.raw, host.start
        config = Config(
            model=model_part(host.policy, run.config["base_model"], conditioning, notes),
            adapter=AdapterConfig(**{f.name: run.config[f.name] for f in dataclasses.fields(AdapterConfig)}),
            prompts=PromptConfig(list(prompts.train), list(prompts.held_out)),
            sampling=SamplingConfig(
                start.shape[-1] * downscale(host.policy.model),
                start.shape[-2] * downscale(host.policy.model),
                len(host.sigmas) - 1,
                sigmas=host.sigmas.tolist(),
                cfg=host.cfg,
                negative=NEGATIVE if host.cfg != 1 else "",
            ),
            shape=shape,
            noise=schedule,
            objective=objective,
            settings=settings,
            rewards=reward_part(reward, "rewards", notes),
            judge=reward_part(judge, "judge", notes) if judge is not None else [],
            run=RunConfig(run.folder.name, ".", iterations, raw),
        )
        write_atomically(run.folder / "run.yaml", dump(config, notes, HEAD).encode())
    except Exception as error:
        logging.warning(
            "TreeRPO: run.yaml was not written (%s: %s); the run itself is not touched by that.",
            type(error).__name__,
            error,
        )


def model_part(policy, name: str, conditioning: str, notes: dict[str, str]) -> ModelConfig:
    """The model's file, as far as ComfyUI remembers it."""
    model = policy.model
    origin, file = getattr(model, "cached_patcher_init", None), model_file(model)
    dtype = getattr(model.model, "manual_cast_dtype", None) or model.model.get_dtype()
    known = {torch.float32: "float32", torch.float16: "float16"}.get(dtype, "bfloat16")
    part = ModelConfig(str(file) if file else FILL_IN, name, conditioning, FILL_IN, known, policy.checkpointing)
    if file is None:
        notes["model.source"] = (
            "ComfyUI does not remember this model's file: its path, or the folder of a diffusers pipeline"
        )
    elif file.parent.resolve() == EMBEDDED.resolve():
        part.source = f"embedded/{file.stem}"
    inside = origin is not None and getattr(origin[0], "__name__", "") == "load_checkpoint_guess_config"
    if part.source.startswith("embedded/") or inside:
        part.vae = ""
    else:
        notes["model.vae"] = (
            "the VAE's file, such as ae.safetensors, or a folder of diffusers; ComfyUI does not remember it"
        )
    return part


def reward_part(reward, section: str, notes: dict[str, str]) -> list[RewardConfig]:
    """Every single reward, as core.rewards.load takes it."""
    found = []
    for number, (model, weight) in enumerate(parts(reward)):
        if isinstance(model, Measure):
            options = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name != "kind"}
            entry = RewardConfig("measure", model.kind, weight, options={**options, "target": list(model.target)})
        elif isinstance(model, ServerReward):
            options = {
                f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ("address", "check")
            }
            entry = RewardConfig("server", model.address, weight, options=options)
        elif model.origin is not None:
            kind, path, options = model.origin
            entry = RewardConfig(
                kind,
                str(path),
                weight,
                options={
                    name: str(value) if isinstance(value, Path) else value
                    for name, value in options.items()
                    if value is not None
                },
            )
        else:
            entry = RewardConfig(FILL_IN, FILL_IN, weight)
            notes[f"{section}.{number}.kind"] = (
                f"'{model.name}' has no file that could be named here: choose a kind and its path, or take this entry "
                "out"
            )
        found.append(entry)
    return found


def write_conditioning(path: Path, host, texts: list[str]) -> str:
    """The texts' features as the model gets them, in one file; its name, or "" where they are too large or cannot be
    written as tensors.
    """
    entries = [encode(host.clip, text)[0] for text in texts]
    if host.cfg != 1:
        texts, entries = [*texts, NEGATIVE], [*entries, host.negative[0]]
    kind = KINDS.get(architecture_of(host.policy.model).network)
    if kind is None:  # the engine without ComfyUI does not run this model
        return ""
    tensors = {}
    for number, (context, options) in enumerate(entries):
        others = [key for key, value in options.items() if key != "pooled_output" and value is not None]
        if others or kind.pooled and options.get("pooled_output") is None:  # such as a mask, which would be lost
            return ""
        tensors[f"{number}.embeds"] = context[0]
        if kind.pooled:
            tensors[f"{number}.pooled"] = options["pooled_output"][0]
    if bool(host.start.any()):
        tensors["start"] = host.policy.model.model.latent_format.process_in(host.start)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > LARGEST:
        return ""
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16)
    for tensor in tensors.values():
        digest.update(tensor.view(torch.uint8).numpy())
    metadata = {"treerpo.texts": json.dumps(texts), "treerpo.digest": digest.hexdigest()}
    if not _is_written(path, metadata):
        write_atomically(path, save(tensors, metadata))
    return path.name


def _is_written(path: Path, metadata: dict[str, str]) -> bool:
    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() == metadata
    except Exception:  # not there, or damaged
        return False
