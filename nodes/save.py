"""The trained LoRA: to other nodes, and to a file."""

import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io
from safetensors import safe_open
from safetensors.torch import save

from ..core.files import write_atomically
from ..core.lora.interchange import write
from .schema import LoraSocket, PolicySocket, plain_name, schema

FORMATS = ["ComfyUI", "diffusers (PEFT)"]


class PolicyToLoraNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOToLora",
            "Policy to LoRA",
            description="The policy's LoRA as it is now, or its moving average where the run has one, for core's Load "
            "LoRA Model and Save LoRA nodes.",
            search_aliases=["export lora"],
            inputs=[PolicySocket.Input("policy")],
            outputs=[LoraSocket.Output(display_name="lora")],
        )

    @classmethod
    def execute(cls, policy) -> io.NodeOutput:
        return io.NodeOutput(policy.run.lora(averaged=True))


class SaveTreeLoraNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOSaveLora",
            "Save Tree LoRA",
            description="Saves the policy's LoRA into models/loras, where every LoRA loader finds it. Saving again "
            "replaces the file of the same run.",
            search_aliases=["export lora"],
            is_output_node=True,
            inputs=[
                PolicySocket.Input("policy"),
                io.String.Input(
                    "lora_name", default="treerpo", tooltip="File name without folder or ending; .safetensors is added."
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip="Connect the prompts: a fingerprint of them is written into the file, not the prompts "
                    "themselves.",
                ),
                io.Combo.Input(
                    "format",
                    options=FORMATS,
                    default=FORMATS[0],
                    optional=True,
                    tooltip="ComfyUI = the exact values as trained, for every LoRA loader of ComfyUI; any model. "
                    "diffusers (PEFT) = for diffusers' "
                    "load_lora_weights in Python; ComfyUI's Load LoRA reads it too, its bypass loaders do not. FLUX "
                    "and SD3 only.",
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
        )

    @classmethod
    def execute(cls, policy, lora_name, prompts="", format=FORMATS[0]) -> io.NodeOutput:
        path = target(lora_name)
        refuse_foreign(path, policy.run.folder.name)
        metadata = {
            **policy.run.metadata(),
            "treerpo.prompts_blake2b": hashlib.blake2b(prompts.encode(), digest_size=16).hexdigest(),
        }
        lora = policy.run.lora(averaged=True)
        if format == FORMATS[0]:  # as it is: the policy may be of a model that interchange does not know
            write_atomically(path, save(lora, metadata=metadata))
        else:
            write(path, lora, "diffusers", metadata)
        text = f"{path.name}: {policy.run.iteration} iterations of run '{policy.run.folder.name}'"
        return io.NodeOutput(str(path), ui={"text": (text,)})


def target(lora_name: str) -> Path:
    name = plain_name(lora_name.strip().removesuffix(".safetensors"), "LoRA")
    return Path(folder_paths.get_folder_paths("loras")[0]) / f"{name}.safetensors"


def refuse_foreign(path: Path, run: str) -> None:
    """Only a file this run saved before may be replaced."""
    if not path.exists():
        return
    try:
        with safe_open(path, "pt") as file:
            owner = (file.metadata() or {}).get("treerpo.run")
    except Exception:  # not a safetensors file: certainly not ours
        owner = None
    if owner != run:
        raise ValueError(
            f"models/loras/{path.name} exists and was not saved by run '{run}': choose another name, so that nothing "
            "is lost."
        )
