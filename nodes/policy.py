"""From a MODEL to a policy: the model with a trainable LoRA and the training run it belongs to."""

from dataclasses import dataclass

import torch
from comfy_api.latest import io

from ..core.hosts.comfy import ComfyPolicy
from ..core.lora.adapters import TARGETS
from ..core.runs.run import Run
from . import tiny
from .runs import BY_NAME, DTYPES, NOTHING, checkpoint_folder, known_checkpoints, known_runs, open_run, run_folder
from .schema import PolicySocket, expert, schema


@dataclass
class LivePolicy:
    """What flows along a POLICY wire: the model with its adapters, and the run they belong to."""

    policy: ComfyPolicy
    run: Run


class TinyModelNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOTinyModel",
            "Tiny Shapes Model",
            description="A FLUX of 2.5 or an SD3 of 4 million parameters that comes with TreeRPO and draws shapes at "
            "64x64. It has the real architecture and needs no download: try every graph with it before you spend "
            "hours on a big model.",
            search_aliases=["treerpo demo", "test model", "toy model"],
            inputs=[
                io.Combo.Input("model", options=["flux", "sd3"], default="flux", tooltip="Which architecture to try.")
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(*tiny.load(model))


# Conditioning by text encoder and text: a prompt is encoded once, not once per iteration.
def begin_from_input(named: str) -> io.Input:
    """An older checkpoint to begin from. named: what a new run is called by, in the user's words."""
    return expert(
        io.Combo.Input(
            "begin_from",
            options=[NOTHING, *known_checkpoints()],
            default=NOTHING,
            optional=True,
            tooltip=f"For a new {named}: begin from an older checkpoint of this or another run, optimizer and history "
            "included. The old run stays as it is.",
        )
    )


class PolicyNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOPolicy",
            "Tree Policy",
            description="Adds a trainable LoRA to a flow-matching MODEL (FLUX, SD3, SD3.5 ...). The LoRA and its "
            "optimizer belong to the run of this name: queue again and training goes on, also after a restart. The "
            "MODEL itself is never changed.",
            search_aliases=["grpo", "rlhf", "train lora", "fine-tune", "rl"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The base model. Connect it before any LoRA you only want for sampling."
                ),
                io.String.Input(
                    "run_name",
                    default="my first run",
                    tooltip="Where the run is kept: output/treerpo/<run name>. A new name begins anew.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=1024,
                    tooltip="Size of the LoRA. Higher = can change more, needs more memory. 8 to 64 is usual.",
                ),
                io.Float.Input(
                    "alpha",
                    default=64.0,
                    min=0.01,
                    max=4096.0,
                    step=0.5,
                    tooltip="Strength of the LoRA is alpha/rank. Higher = each update changes more. Twice the rank is "
                    "usual.",
                ),
                io.Combo.Input(
                    "targets",
                    options=[*TARGETS, "pattern"],
                    default="attention",
                    tooltip="Which layers learn. attention is usual; more layers = can change more, slower.",
                ),
                expert(
                    io.String.Input(
                        "pattern",
                        default="",
                        optional=True,
                        tooltip="For targets = pattern: a regular expression over module names, such as "
                        "double_blocks\\.[0-9]\\.img_attn",
                    )
                ),
                expert(
                    io.Combo.Input(
                        "adapter_dtype",
                        options=list(DTYPES),
                        default="float32",
                        optional=True,
                        tooltip="Precision of the LoRA while it learns. bfloat16 halves its memory; small updates may "
                        "round away.",
                    )
                ),
                expert(
                    io.Boolean.Input(
                        "checkpointing",
                        default=True,
                        optional=True,
                        tooltip="Recompute each block in the backward pass: far less memory, about a third slower "
                        "updates. Exact either way.",
                    )
                ),
                expert(
                    io.Int.Input(
                        "init_seed",
                        default=0,
                        min=0,
                        max=2**31,
                        optional=True,
                        tooltip="Seed of the LoRA's first values.",
                    )
                ),
                expert(
                    io.Combo.Input(
                        "resume",
                        options=[BY_NAME, *known_runs()],
                        default=BY_NAME,
                        optional=True,
                        tooltip="Go on with one of your runs, instead of typing its name above. Reload the page's "
                        "node definitions (R) for new ones.",
                    )
                ),
                begin_from_input("run name"),
                expert(
                    io.Boolean.Input(
                        "recover",
                        default=False,
                        optional=True,
                        tooltip="If the run's newest state is damaged: go back to its newest whole checkpoint. The "
                        "damaged file is kept. Off = stop, and say which checkpoint is whole.",
                    )
                ),
            ],
            outputs=[PolicySocket.Output(display_name="policy")],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        return float("nan")  # a new NaN each time: the run moves on between queue runs

    @classmethod
    def validate_inputs(cls, resume=BY_NAME, begin_from=NOTHING):
        return True  # a run that is gone is explained when the node runs

    @classmethod
    def execute(
        cls,
        model,
        run_name,
        rank,
        alpha,
        targets,
        pattern="",
        adapter_dtype="float32",
        checkpointing=True,
        init_seed=0,
        resume=BY_NAME,
        begin_from=NOTHING,
        recover=False,
    ) -> io.NodeOutput:
        if targets == "pattern" and not pattern.strip():
            raise ValueError(
                "Targets are set to 'pattern', but the pattern is empty: write a regular expression over module names."
            )
        if resume != BY_NAME and not (run_folder(resume) / "state.pt").exists():
            raise ValueError(f"There is no run '{resume}': choose another one under resume, or {BY_NAME}.")
        with torch.inference_mode(False):
            run = open_run(
                run_name if resume == BY_NAME else resume,
                model,
                rank=rank,
                alpha=alpha,
                targets=pattern if targets == "pattern" else targets,
                dtype=adapter_dtype,
                seed=init_seed,
                begin_from=checkpoint_folder(begin_from),
                recover=recover,
            )
            return io.NodeOutput(LivePolicy(ComfyPolicy(model, run.adapters, checkpointing), run))
