"""From a MODEL to a policy: the model with a trainable LoRA and the training run it belongs to."""
import hashlib
import weakref
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..core.backends.comfy import ComfyPolicy, refuse_other_than_flow
from ..core.checkpoint import Run, describe, list_checkpoints, refuse_other_settings
from ..core.lora import TARGETS, choose_layers
from . import tiny
from .schema import Policy, expert, plain_name, schema

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class LivePolicy:
    """What flows along a POLICY wire: the model with its adapters, and the run they belong to."""
    policy: ComfyPolicy
    run: Run


# Training state by run folder. It lives here and on disk, never in ComfyUI's output cache alone, which may drop any
# object between two queue runs.
_RUNS: dict[Path, Run] = {}


def open_run(name: str, model, *, rank: int, alpha: float, targets: str, dtype: str, seed: int, begin_from: Path | None = None) -> Run:
    """The run of this name: from memory, else from disk, else new. Other settings than the run's own are refused.

    begin_from: a checkpoint's folder, of this run or another, that a new run takes over as its own beginning.
    """
    refuse_other_than_flow(model)
    folder = run_folder(name)
    layers = list(choose_layers(model.model.diffusion_model, targets))
    config = {"rank": rank, "alpha": alpha, "targets": targets, "dtype": dtype, "seed": seed, "base_model": base_model(model),
              "adapted": hashlib.blake2b("\n".join(layers).encode(), digest_size=8).hexdigest()}
    run = _RUNS.get(folder)
    if run is not None and run.iteration > 0 and not run.was_deleted():
        refuse_other_settings(name, run.config, config)
        return run
    run = _RUNS[folder] = Run.open(folder, ComfyPolicy.new_adapters(model, rank, alpha, targets, DTYPES[dtype], seed), config)
    if begin_from is not None and run.iteration == 0:
        run.restore(begin_from)
    return run


BY_NAME, NOTHING = "(run_name)", "(nothing)"


def known_runs() -> list[str]:
    """Names of the runs on the disk, the newest first."""
    folder = Path(folder_paths.get_output_directory()) / "treerpo"
    states = sorted(folder.glob("*/state.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent.name for path in states]


def known_checkpoints() -> list[str]:
    """What a new run can begin from: 'run @ 80', 'run @ best', 'run @ newest'."""
    found = []
    for name in known_runs():
        folder = run_folder(name)
        best = [f"{name} @ best"] if describe(folder / "best") else []
        found += [f"{name} @ newest", *best, *(f"{name} @ {checkpoint.iteration}" for checkpoint in list_checkpoints(folder))]
    return found


def checkpoint_folder(choice: str) -> Path | None:
    """The folder of a choice of `known_checkpoints`."""
    if choice == NOTHING:
        return None
    name, _, which = choice.rpartition(" @ ")
    folder = run_folder(name)
    place = {"newest": folder, "best": folder / "best"}.get(which) or folder / "checkpoints" / f"{int(which) if which.isdecimal() else -1:06d}"
    if not (place / "state.pt").is_file():
        raise ValueError(f"There is no checkpoint '{choice}' any more: choose another one under begin_from.")
    return place


def run_folder(name: str) -> Path:
    return Path(folder_paths.get_output_directory()) / "treerpo" / plain_name(name, "run")


def base_model(model) -> str:
    """The base model's architecture, and its file name where ComfyUI remembers it."""
    origin = getattr(model, "cached_patcher_init", None)
    files = [Path(part).name for part in origin[1] if isinstance(part, str)] if origin else []
    return " ".join([type(model.model).__name__, *files[:1]])


class TinyModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOTinyModel", "Tiny Shapes Model",
            description="A 2-million-parameter FLUX or SD3 that comes with TreeRPO and draws coloured shapes at 64x64. It has the real "
                        "architecture and needs no download: try every graph with it before you spend hours on a big model.",
            search_aliases=["treerpo demo", "test model", "toy model"],
            inputs=[io.Combo.Input("model", options=["flux", "sd3"], default="flux", tooltip="Which architecture to try.")],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()])

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(*tiny.load(model))


class Prompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOPrompts", "Tree Prompts",
            description="Several prompts as one batch of conditioning, one row per prompt. With a policy connected, each iteration takes the "
                        "next prompts of the list.",
            search_aliases=["prompt list", "batch prompts"],
            inputs=[
                io.Clip.Input("clip"),
                io.String.Input("text", multiline=True, default="a red circle on a white background",
                                tooltip="One prompt per line. Empty lines are skipped."),
                io.Int.Input("per_iteration", default=0, min=0, max=1024,
                             tooltip="Prompts per iteration, taken in turn. Higher = steadier updates, slower iterations. 0 = all."),
                Policy.Input("policy", optional=True, tooltip="Connect the policy to move on through the list with each iteration."),
            ],
            outputs=[io.Conditioning.Output(), io.String.Output(display_name="prompts", tooltip="The chosen prompts, one per line: for Score Images.")])

    @classmethod
    def execute(cls, clip, text, per_iteration, policy=None) -> io.NodeOutput:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError("The prompt list is empty: write at least one prompt, one per line.")
        count = min(per_iteration or len(lines), len(lines))
        first = policy.run.iteration * count if policy is not None else 0
        chosen = [lines[(first + j) % len(lines)] for j in range(count)]
        return io.NodeOutput(batch([encode(clip, line) for line in chosen]), "\n".join(chosen))


# Conditioning by text encoder and text: a prompt is encoded once, not once per iteration.
_ENCODED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
REMEMBERED = 4e9  # bytes of main memory per text encoder: about 500 prompts of T5-XXL


def encode(clip, text: str):
    """The CONDITIONING of a text, remembered as long as the text encoder lives."""
    known = _ENCODED.setdefault(clip.cond_stage_model, {})
    key = (text, clip.patcher.patches_uuid, clip.layer_idx)
    if key not in known or clip.use_clip_schedule:  # scheduled hooks may change from run to run
        made = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        if sum(map(size, known.values())) + size(made) > REMEMBERED:
            known.clear()
        known[key] = made
    return known[key]


def size(conditioning: list) -> int:
    """Bytes of a CONDITIONING's texts."""
    return sum(context.numel() * context.element_size() for context, _ in conditioning)


def batch(conditionings: list) -> list:
    """Single-prompt conditionings as one entry with a row per prompt; shorter texts are padded with zeros."""
    entries = [conditioning[0] for conditioning in conditionings]
    length = max(context.shape[1] for context, _ in entries)
    contexts = [torch.nn.functional.pad(context, (0, 0, 0, length - context.shape[1])) for context, _ in entries]
    options = dict(entries[0][1])
    if options.get("pooled_output") is not None:
        options["pooled_output"] = torch.cat([entry["pooled_output"] for _, entry in entries])
    return [[torch.cat(contexts), options]]


class PolicyNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOPolicy", "Tree Policy",
            description="Adds a trainable LoRA to a flow-matching MODEL (FLUX, SD3, SD3.5 ...). The LoRA and its optimizer belong to the run "
                        "of this name: queue again and training goes on, also after a restart. The MODEL itself is never changed.",
            search_aliases=["grpo", "rlhf", "train lora", "fine-tune", "rl"],
            inputs=[
                io.Model.Input("model", tooltip="The base model. Connect it before any LoRA you only want for sampling."),
                io.String.Input("run_name", default="my first run", tooltip="Where the run is kept: output/treerpo/<run name>. A new name begins anew."),
                io.Int.Input("rank", default=32, min=1, max=1024, tooltip="Size of the LoRA. Higher = can change more, needs more memory. 8 to 64 is usual."),
                io.Float.Input("alpha", default=64.0, min=0.01, max=4096.0, step=0.5,
                               tooltip="Strength of the LoRA is alpha/rank. Higher = each update changes more. Twice the rank is usual."),
                io.Combo.Input("targets", options=[*TARGETS, "pattern"], default="attention",
                               tooltip="Which layers learn. attention is usual; more layers = can change more, slower."),
                expert(io.String.Input("pattern", default="", optional=True,
                                       tooltip="For targets = pattern: a regular expression over module names, such as double_blocks\\.[0-9]\\.img_attn")),
                expert(io.Combo.Input("adapter_dtype", options=list(DTYPES), default="float32", optional=True,
                                      tooltip="Precision of the LoRA while it learns. bfloat16 halves its memory; small updates may round away.")),
                expert(io.Boolean.Input("checkpointing", default=True, optional=True,
                                        tooltip="Recompute each block in the backward pass: far less memory, about a third slower updates. Exact either way.")),
                expert(io.Int.Input("init_seed", default=0, min=0, max=2 ** 31, optional=True, tooltip="Seed of the LoRA's first values.")),
                expert(io.Combo.Input("resume", options=[BY_NAME, *known_runs()], default=BY_NAME, optional=True,
                                      tooltip="Go on with one of your runs, instead of typing its name above. Reload the page's node definitions (R) for new ones.")),
                expert(io.Combo.Input("begin_from", options=[NOTHING, *known_checkpoints()], default=NOTHING, optional=True,
                                      tooltip="For a new run name: begin from an older checkpoint of this or another run, optimizer and history included. The old run "
                                              "stays as it is.")),
            ],
            outputs=[Policy.Output(display_name="policy")])

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        return float("nan")  # a new NaN each time: the run moves on between queue runs

    @classmethod
    def validate_inputs(cls, resume=BY_NAME, begin_from=NOTHING):
        return True  # a run that is gone is explained when the node runs

    @classmethod
    def execute(cls, model, run_name, rank, alpha, targets, pattern="", adapter_dtype="float32", checkpointing=True, init_seed=0, resume=BY_NAME,
                begin_from=NOTHING) -> io.NodeOutput:
        if targets == "pattern" and not pattern.strip():
            raise ValueError("Targets are set to 'pattern', but the pattern is empty: write a regular expression over module names.")
        if resume != BY_NAME and not (run_folder(resume) / "state.pt").exists():
            raise ValueError(f"There is no run '{resume}' any more: choose another one under resume, or {BY_NAME}.")
        with torch.inference_mode(False):
            run = open_run(run_name if resume == BY_NAME else resume, model, rank=rank, alpha=alpha, targets=pattern if targets == "pattern" else targets,
                           dtype=adapter_dtype, seed=init_seed, begin_from=checkpoint_folder(begin_from))
            return io.NodeOutput(LivePolicy(ComfyPolicy(model, run.adapters, checkpointing), run))
