"""Looking ahead: what a training run will need of the GPU's memory."""

import comfy.model_management
from comfy_api.latest import io

from ..core.hosts.comfy_host import start_latent
from ..core.method.tree import TreeShape as Shape
from ..core.model import DECODED_AT_ONCE
from .reward_models import ACTIVATIONS, MOST_ACTIVATIONS
from .schema import PolicySocket, RewardSocket, ShapeSocket, expert, micro_batch_input, schema

GB = 1e9


class PreflightNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOPreflight",
            "VRAM Preflight",
            description="What training will need of the GPU's memory, phase by phase, before anything is loaded "
            "there, and what to turn if it does not fit. Estimated from shapes by ComfyUI's own rules; the real need "
            "can differ.",
            search_aliases=["memory", "vram", "out of memory", "estimate"],
            is_output_node=True,
            inputs=[
                PolicySocket.Input("policy"),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size you want to train at."),
                ShapeSocket.Input("shape", optional=True, tooltip="From Tree Shape. Without it: branching 3, depth 3."),
                io.Int.Input(
                    "per_iteration",
                    default=1,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="Prompts per iteration, as in the Trainer.",
                ),
                micro_batch_input(
                    "Latents per model call, as in the Trainer. Lower = less memory. 0 = all.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip="As in the Trainer; other than 1 doubles the batch.",
                ),
                io.Vae.Input("vae", optional=True),
                RewardSocket.Input("reward_model", optional=True),
                expert(io.Boolean.Input("retain_graphs", default=False, optional=True, tooltip="As in the Trainer.")),
            ],
            outputs=[io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(
        cls,
        policy,
        latent_image,
        shape=None,
        per_iteration=1,
        micro_batch=0,
        cfg=1.0,
        vae=None,
        reward_model=None,
        retain_graphs=False,
    ) -> io.NodeOutput:
        latent = start_latent(policy.policy.model, latent_image).shape[1:]
        device = comfy.model_management.get_torch_device()
        room = comfy.model_management.get_total_memory(device)
        text = report(
            policy.policy,
            latent,
            shape or Shape(tail=0.4),
            per_iteration,
            micro_batch,
            cfg,
            vae,
            reward_model,
            retain_graphs,
            room,
            str(device),
        )
        return io.NodeOutput(text, ui={"text": (text,)})


def report(
    policy,
    latent,
    shape,
    prompts: int,
    micro_batch: int,
    cfg: float,
    vae,
    reward,
    retain: bool,
    room: float,
    device: str,
) -> str:
    """The node's text. room: bytes the device has in all."""
    passes = 1 if cfg == 1 else 2
    widest = {"sampling": prompts * shape.leaves, "learning": prompts * shape.leaves // shape.branching}

    def phase(name: str, batch: int) -> float:
        count = min(batch or widest[name], widest[name])
        found = policy.memory(latent, count * passes)
        graphs = (
            found["graph"] * prompts * shape.trees * sum(shape.branching**k for k in range(shape.depth))
            if retain and not policy.checkpointing
            else 0
        )
        return found["weights"] + found["adapters"] + found[name] + (graphs if name == "sampling" else 0)

    base = policy.memory(latent, 1)
    needs = {"sampling": phase("sampling", micro_batch), "learning": phase("learning", micro_batch)}
    if vae is not None:
        frames = latent[1:-2] if getattr(vae, "latent_dim", 2) == 3 else ()  # as VAE.decode drops the time
        decoded = (DECODED_AT_ONCE, latent[0], *frames, *latent[-2:])
        needs["decoding"] = vae.patcher.model_size() + vae.memory_used_decode(decoded, vae.vae_dtype)
    scorers = models(reward)
    if scorers:
        needs["scoring"] = max(
            model.model_size() + min(ACTIVATIONS * model.model_size(), MOST_ACTIVATIONS) for model in scorers
        )
    lines = [
        f"Model {base['weights'] / GB:.1f} GB, LoRA with optimizer {base['adapters'] / GB:.2f} GB; {device} has "
        f"{room / GB:.1f} GB.",
        *(f"{name}: about {need / GB:.1f} GB" for name, need in needs.items()),
    ]
    peak = max(needs.values())
    if peak <= room:
        lines.append(f"It should fit, with {(room - peak) / GB:.1f} GB to spare.")
    else:
        fitting = next(
            (
                batch
                for batch in range(max(widest.values()), 0, -1)
                if max(phase("sampling", batch), phase("learning", batch)) <= room
            ),
            None,
        )
        lines.append(
            "It does not fit at once. "
            + (
                f"Set micro_batch to {fitting}."
                if fitting
                else "Even one latent at a time does not fit beside the model: use an fp8 or smaller model, a smaller "
                "size, turn checkpointing on, or let ComfyUI keep part of the model in main memory (slower)."
            )
        )
    return "\n".join(
        [*lines, "Phases follow one another: ComfyUI moves what is not needed off the GPU. Estimated, not measured."]
    )


def models(reward) -> list:
    """The model patchers behind a reward, if it has weights."""
    from ..core.rewards.combine import parts

    return [model.patcher for model, _ in parts(reward) if model.patcher is not None] if reward is not None else []
