"""The trained LoRA: to other nodes, and to a file."""

import hashlib
import itertools
import json
from pathlib import Path

import folder_paths
from comfy_api.latest import io
from safetensors import safe_open
from safetensors.torch import save

from ..core.files import tidy, write_atomically
from ..core.hosts.architectures import architecture_of
from ..core.lora.interchange import NETWORK, write
from ..core.lora.networks import NETWORKS
from ..core.runs.run import Run
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
            "replaces the file of the same run; a file of anyone else stays, and a free name is taken.",
            search_aliases=["export lora"],
            is_output_node=True,
            is_input_list=True,
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
                    "diffusers (PEFT) = for diffusers' load_lora_weights in Python; ComfyUI's Load LoRA reads it too, "
                    "its bypass loaders do not. Only for models that diffusers has too: FLUX, SD3, FLUX.2, Chroma, "
                    "Z-Image, Lumina 2, Qwen-Image, HiDream, AuraFlow, Krea 2 and ERNIE-Image.",
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
        )

    @classmethod
    def validate_inputs(cls, lora_name):
        try:
            return all(name is None or target(name) for name in lora_name)  # None: connected, known when it runs
        except ValueError as error:
            return str(error)

    @classmethod
    def execute(cls, policy, lora_name, prompts=("",), format=FORMATS[:1]) -> io.NodeOutput:
        policy, lora_name, format = policy[0], lora_name[0], format[0]
        wanted = target(lora_name)
        path = free(wanted, policy.run)
        tidy(path.parent)
        metadata = {
            **policy.run.metadata(),
            "treerpo.prompts_blake2b": hashlib.blake2b("\n".join(prompts).encode(), digest_size=16).hexdigest(),
        }
        lora, family = policy.run.lora(averaged=True), architecture_of(policy.policy.model)
        if family.network:  # names and sizes do not always tell it
            metadata[NETWORK] = family.network
        if format == FORMATS[0]:  # as it is: the policy may be of a model that interchange does not know
            write_atomically(path, save(lora, metadata=metadata))
        elif not family.network:
            known = ", ".join(network.title for network in NETWORKS.values())
            raise ValueError(
                f"A LoRA of {family.name} cannot be saved in diffusers' form, which is known of {known}: choose "
                f"'{FORMATS[0]}' as the format."
            )
        else:
            write(path, lora, "diffusers", metadata, family.network)
        text = f"{path.name}: {policy.run.iteration} iterations of run '{policy.run.folder.name}'"
        if path != wanted:
            text += f". {wanted.name} is another run's or somebody else's, and stays as it is."
        return io.NodeOutput(str(path), ui={"text": ("\n".join(filter(None, (text, merging(policy.policy.model)))),)})


def merging(model) -> str:
    """What to know about loading the LoRA onto this base: ComfyUI's Load LoRA merges, in the weights' own precision."""
    if any(weight.dtype.itemsize == 1 for weight in model.model.diffusion_model.parameters()):
        return (
            "The base model's weights are fp8: Load LoRA merges into them and rounds most of a light LoRA away. Load "
            "it with Load LoRA (Bypass), which is exact, or onto the bf16 base."
        )
    return ""


def target(lora_name: str) -> Path:
    name = plain_name(lora_name.strip().removesuffix(".safetensors"), "LoRA")
    return Path(folder_paths.get_folder_paths("loras")[0]) / f"{name}.safetensors"


def free(wanted: Path, run: Run) -> Path:
    """The file to save to: the wanted one, or name_2, name_3 ... where that is not this run's own.

    A training that has ended must not be lost over a name.
    """
    numbers = itertools.chain([wanted], (wanted.with_stem(f"{wanted.stem}_{n}") for n in itertools.count(2)))
    return next(path for path in numbers if not path.exists() or is_own(path, run))


def is_own(path: Path, run: Run) -> bool:
    """Whether the run has saved this file. A name is not enough: a run of the same name may have begun anew."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except Exception:  # not a safetensors file: certainly not ours
        return False
    if "treerpo.id" in metadata:
        return metadata["treerpo.id"] == run.id
    last = json.loads(metadata.get("treerpo.last", "null"))  # before there were ids: a row of this run's history
    return metadata.get("treerpo.run") == run.folder.name and bool(last) and last in run.metrics
