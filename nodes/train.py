"""From rewards to advantages to an updated policy."""
import time
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..core import plot
from ..core.advantage import ESTIMATORS, WEIGHTS, edge_advantages, leaf_advantages
from ..core.memory import MicroBatch
from ..core.objective import Objective
from ..core.update import update
from .schema import ADVANCED, EdgeAdvantages, Policy, Rewards, Tree, schema
from .policy import LivePolicy


@dataclass
class Credit:
    """What flows along an ADVANTAGES wire: advantages of every window edge, and the rewards they come from."""
    layers: list[torch.Tensor]        # per layer [P * trees * branching^(layer+1)]
    rewards: dict[str, torch.Tensor]  # [P * K] by reward name
    zero_spread: torch.Tensor         # [P] groups that train nothing
    tree_picture: object              # PIL image


class Advantages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOAdvantages", "Tree Advantages",
            description="Compares the images of each prompt with each other and hands the credit back up the tree: which branches were worth taking. "
                        "The picture shows the tree with scores and advantages.",
            search_aliases=["grpo advantage", "credit assignment"],
            is_output_node=True,
            inputs=[
                Tree.Input("tree"),
                Rewards.Input("rewards"),
                io.Combo.Input("estimator", options=list(ESTIMATORS), default="treegrpo", optional=True, extra_dict=ADVANCED,
                               tooltip="treegrpo: average of the children, weighted by their probability. branchgrpo: compared within each layer. "
                                       "trajectory: as plain GRPO."),
                io.Combo.Input("weights", options=list(WEIGHTS), default="mean-logprob", optional=True, extra_dict=ADVANCED,
                               tooltip="treegrpo only: how children are weighted. mean-logprob is almost uniform, sum-logprob picks one child."),
                io.Float.Input("clip", default=5.0, min=0.1, max=100.0, step=0.1, optional=True, extra_dict=ADVANCED,
                               tooltip="Largest advantage of a single image. Lower = outliers count less."),
            ],
            outputs=[EdgeAdvantages.Output(display_name="advantages"), io.Image.Output(display_name="picture")])

    @classmethod
    def execute(cls, tree, rewards, estimator="treegrpo", weights="mean-logprob", clip=5.0) -> io.NodeOutput:
        forest = tree.forest
        with torch.inference_mode(False), torch.no_grad():
            for name, values in rewards.values.items():
                if len(values) != len(forest.leaves):
                    raise ValueError(f"Reward '{name}' scored {len(values)} images, but the tree has {len(forest.leaves)} leaves: decode and score all "
                                     "leaves of this tree, and nothing else.")
            prompts = len(forest.prompts)
            leaf, flat = leaf_advantages(rewards.values, prompts, clip=clip)
            layers = edge_advantages(estimator, [p.cpu() for p in forest.log_probs], leaf, forest.branching, prompts, weights, forest.leaves[0].numel())
            picture = plot.tree_picture(forest, layers, next(iter(rewards.values.values())), rewards.images, rewards.prompts)
        image = plot.to_tensor(picture)
        return io.NodeOutput(Credit(layers, rewards.values, flat, picture), image, ui=ui.PreviewImage(image, cls=cls))


class GRPOUpdate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOUpdate", "GRPO Update",
            description="One step of learning: makes the better branches of the tree more likely. Queue the graph again for the next iteration; "
                        "Run (Instant) trains on and on. After every update the run is saved in output/treerpo/<run name>/.",
            search_aliases=["grpo", "rlhf", "train", "optimizer"],
            is_output_node=True,
            inputs=[
                Policy.Input("policy"),
                Tree.Input("tree"),
                EdgeAdvantages.Input("advantages"),
                io.Float.Input("learning_rate", default=3e-4, min=0.0, max=1.0, step=1e-6, round=False,
                               tooltip="Higher = learns faster, then falls apart. 1e-4 to 3e-4 for FLUX and SD3 LoRAs, 1e-3 for the tiny models."),
                io.Float.Input("clip_low", default=1e-4, min=1e-7, max=1.0, step=1e-6, round=False, optional=True, extra_dict=ADVANCED,
                               tooltip="How far one update may make a worse branch less likely, per latent element. Lower = more careful."),
                io.Float.Input("clip_high", default=1e-4, min=1e-7, max=1.0, step=1e-6, round=False, optional=True, extra_dict=ADVANCED,
                               tooltip="How far one update may make a better branch more likely, per latent element. Lower = more careful."),
                io.Float.Input("max_grad_norm", default=1.0, min=0.0, max=1000.0, step=0.1, optional=True, extra_dict=ADVANCED,
                               tooltip="Gradients longer than this are shortened to it. Lower = more careful. 0 = off."),
                io.Float.Input("weight_decay", default=0.0, min=0.0, max=1.0, step=0.001, optional=True, extra_dict=ADVANCED,
                               tooltip="Pulls the LoRA towards zero. Higher = stays closer to the base model. TreeGRPO uses 0.01."),
                io.Int.Input("inner_updates", default=1, min=1, max=32, optional=True, extra_dict=ADVANCED,
                             tooltip="Optimizer steps on the same trees. More = learns more from each tree, but clips more and can over-fit it."),
                io.Int.Input("micro_batch", default=0, min=0, max=4096, optional=True, extra_dict=ADVANCED,
                             tooltip="Latents per forward and backward pass. Lower = less memory. 0 = as Tree Sampler."),
            ],
            outputs=[Policy.Output(display_name="policy"), io.String.Output(display_name="metrics"), io.Image.Output(display_name="curve")])

    @classmethod
    def execute(cls, policy, tree, advantages, learning_rate, clip_low=1e-4, clip_high=1e-4, max_grad_norm=1.0, weight_decay=0.0, inner_updates=1,
                micro_batch=0) -> io.NodeOutput:
        began = time.perf_counter()
        forest, run = tree.forest, policy.run
        batch = MicroBatch(micro_batch) if micro_batch else tree.micro_batch
        with policy.policy.session(tree.positive, tree.negative, tree.cfg, shape=forest.leaves.shape[1:], memory_batch=batch.size or None) as velocity:
            optimizer = run.adamw(learning_rate, weight_decay=weight_decay)
            metrics = update(velocity, forest, advantages.layers, optimizer, Objective(clip_low, clip_high), inner_updates=inner_updates,
                             micro_batch=batch, max_grad_norm=max_grad_norm,
                             check=comfy.model_management.throw_exception_if_processing_interrupted)
            now = time.perf_counter()
            row = {**reward_metrics(advantages), **metrics, "window_start": forest.start, "rollout_forwards": tree.rollout_forwards,
                   "forwards": tree.rollout_forwards + metrics["update_forwards"], "learning_rate": learning_rate, "seconds": now - tree.began,
                   "seconds/rollout": tree.seconds, "seconds/update": now - began}
            with torch.inference_mode(False):
                curve = plot.reward_curve([*run.metrics, row])
                run.commit(row, pictures={"reward_curve.png": curve, "tree.png": advantages.tree_picture})
        text = f"iteration {run.iteration}: " + ", ".join(f"{key} {row[key]:.4g}" for key in
                                                          ("reward", "reward_std", "ratio_mean", "clip_frac", "grad_norm", "forwards", "seconds"))
        image = plot.to_tensor(curve)
        return io.NodeOutput(LivePolicy(policy.policy, run), text, image,
                             ui={**ui.PreviewImage(image, cls=cls).as_dict(), "text": (text,)})


def reward_metrics(credit: Credit) -> dict[str, float]:
    """Mean and within-group spread of the rewards of an iteration."""
    prompts = len(credit.zero_spread)
    row = {"reward": sum(float(v.mean()) for v in credit.rewards.values()) / len(credit.rewards),
           "reward_std": sum(float(v.view(prompts, -1).std(1, correction=0).mean()) for v in credit.rewards.values()) / len(credit.rewards),
           "frac_reward_zero_std": float(credit.zero_spread.float().mean())}
    for name, values in credit.rewards.items():
        row[f"rewards/{name}/mean"] = float(values.mean())
    return row
