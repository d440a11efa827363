"""Grow the trees."""

import time
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..core.hosts.comfy_host import roots, start_latent
from ..core.hosts.comfy_weights import thaw
from ..core.method.iteration import Sampled, sample
from ..core.method.memory import MicroBatch
from ..core.method.rollout import check_sigmas
from ..core.method.tree import Forest
from .schema import NoiseSocket, PolicySocket, ShapeSocket, TreeSocket, expert, micro_batch_input, schema

RETAIN_SHARE = 0.6  # of the free memory: decoding and scoring come between sampling and the update


@dataclass
class SampledTree:
    """What flows along a TREE wire: the trees, and what they were sampled with, since the update must use the very
    same.
    """

    sampled: Sampled
    positive: list
    negative: list | None
    cfg: float
    micro_batch: MicroBatch
    began: float  # time.perf_counter() when sampling began
    seconds: float  # how long sampling took

    @property
    def forest(self) -> Forest:
        return self.sampled.forest


class TreeSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOSampler",
            "Tree Sampler",
            description="Samples a tree of images per prompt with the policy: inside the window every latent branches "
            "into several children that share one model call. Gives the tree, and all leaves as one LATENT batch: "
            "prompt by prompt.",
            search_aliases=["grpo rollout", "sde sampler", "tree sampling"],
            inputs=[
                PolicySocket.Input("policy"),
                io.Conditioning.Input("positive", tooltip="One prompt, or a batch of prompts from Tree Prompts."),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent of the size to train at. Train at the size you sample at."
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="From BasicScheduler with the base model, denoise 1. 10 steps are enough for training.",
                ),
                ShapeSocket.Input("shape"),
                NoiseSocket.Input("noise"),
                io.Conditioning.Input("negative", optional=True, tooltip="Only used when cfg is not 1."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Classifier-free guidance while training. 1 = off, half the cost and the safest; FLUX "
                    "uses its own guidance instead.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Same seed = same tree. Leave it alone while training: each iteration draws new noise "
                    "from it.",
                ),
                expert(
                    io.Boolean.Input(
                        "new_noise",
                        default=True,
                        optional=True,
                        tooltip="Each iteration draws new noise. Off = the same noise every time: learns faster by "
                        "heart, generalises worse.",
                    )
                ),
                expert(
                    micro_batch_input(
                        "Latents per model call. Lower = less memory. 0 = all at once; halves by itself when "
                        "memory runs out.",
                    )
                ),
                expert(
                    io.Boolean.Input(
                        "retain_graphs",
                        default=False,
                        optional=True,
                        tooltip="Keep what the update needs while sampling, so that it skips its own forward passes: "
                        "the same result, faster. Needs memory: least with checkpointing on in Tree Policy; where "
                        "it does not fit, the update recomputes.",
                    )
                ),
            ],
            outputs=[TreeSocket.Output(display_name="tree"), io.Latent.Output(display_name="leaves")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        policy,
        positive,
        latent_image,
        sigmas,
        shape,
        noise,
        cfg,
        seed,
        negative=None,
        new_noise=True,
        micro_batch=0,
        retain_graphs=False,
    ) -> io.NodeOutput:
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            sigmas = sigmas.detach().clone().float().cpu()
            check_sigmas(sigmas)
            samples = start_latent(policy.policy.model, latent_image)
            batch = MicroBatch(micro_batch)
            retain = RETAIN_SHARE if retain_graphs else 0.0
            with policy.policy.session(
                positive, negative, cfg, shape=samples.shape[1:], sigmas=sigmas, memory_batch=micro_batch or None
            ) as velocity:
                sampled = sample(
                    velocity,
                    lambda drawn: roots(velocity, samples, drawn, sigmas),
                    sigmas,
                    shape,
                    noise,
                    iteration=policy.run.iteration,
                    seed=seed,
                    prompts=list(range(velocity.prompts)),
                    new_noise=new_noise,
                    micro_batch=batch,
                    retain_share=retain,
                    progress=progress(policy.policy.model, cls.hidden.unique_id),
                )
                leaves = velocity.process_out(sampled.forest.leaves).cpu()
        seconds = time.perf_counter() - began
        return io.NodeOutput(
            SampledTree(sampled, thaw(positive), thaw(negative), cfg, batch, began, seconds), {"samples": leaves}
        )


def progress(model, node_id):
    """Progress bar with a small preview of the newest denoised prediction; notices an interrupt before every model
    call.
    """
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    bar = None

    def report(done: int, total: int, denoised: torch.Tensor) -> None:
        nonlocal bar
        bar = bar or comfy.utils.ProgressBar(total, node_id=node_id)
        preview = previewer.decode_latent_to_preview_image("JPEG", denoised[:1]) if previewer is not None else None
        bar.update_absolute(done, total, preview)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return report
