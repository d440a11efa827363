"""From rewards to advantages to an updated policy."""
import time
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..core import plot
from ..core.advantage import ESTIMATORS, WEIGHTS, edge_advantages, leaf_advantages, total_reward
from ..core.memory import MicroBatch
from ..core.objective import RATIOS, STEP_WEIGHTS, TARGETS, Objective
from ..core.training import best_rewards, reward_metrics, running_best
from ..core.update import update
from .schema import EdgeAdvantages, Policy, Rewards, Tree, expert, schema
from .policy import LivePolicy


@dataclass
class Credit:
    """What flows along an ADVANTAGES wire: advantages of every window edge, and the rewards they come from."""
    layers: list[torch.Tensor]        # per layer [P * trees * branching^(layer+1)]
    rewards: dict[str, torch.Tensor]  # [P * K] by reward name
    total: torch.Tensor               # [P * K] their weighted sum, NaN where one is missing
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
                expert(io.Combo.Input("estimator", options=list(ESTIMATORS), default="treegrpo", optional=True,
                                      tooltip="treegrpo: average of the children, weighted by their probability. branchgrpo: compared within each layer. "
                                              "trajectory: as plain GRPO.")),
                expert(io.Combo.Input("weights", options=list(WEIGHTS), default="mean-logprob", optional=True,
                                      tooltip="treegrpo only: how children are weighted. mean-logprob is almost uniform, sum-logprob picks one child.")),
                expert(io.Float.Input("clip", default=5.0, min=0.1, max=100.0, step=0.1, optional=True,
                                      tooltip="Largest advantage of a single image. Lower = outliers count less.")),
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
            leaf, flat = leaf_advantages(rewards.values, prompts, rewards.weights, clip, rewards.raw)
            layers = edge_advantages(estimator, [p.cpu() for p in forest.log_probs], leaf, forest.branching, prompts, weights, forest.leaves[0].numel())
            total = total_reward(rewards.values, rewards.weights)
            picture = plot.tree_picture(forest, layers, total, rewards.images, rewards.prompts)
        image = plot.to_tensor(picture)
        return io.NodeOutput(Credit(layers, rewards.values, total, flat, picture), image, ui=ui.PreviewImage(image, cls=cls))


# Inputs that both update nodes share.
_WIRES = [Policy.Input("policy"), Tree.Input("tree"), EdgeAdvantages.Input("advantages")]
_RATE = io.Float.Input("learning_rate", default=3e-4, min=0.0, max=1.0, step=1e-6, round=False,
                       tooltip="Higher = learns faster, then falls apart. 1e-4 to 3e-4 for FLUX and SD3 LoRAs, 1e-3 for the tiny models.")
CLIPPING = [  # also Training Objective's
    expert(io.Float.Input("clip_low", default=1e-4, min=1e-7, max=1.0, step=1e-6, round=False, optional=True,
                          tooltip="How far one update may make a worse branch less likely, per latent element. Lower = more careful. Only matters with "
                                  "several inner updates. The usual 1e-4 is for 512x512; smaller latents need more (1e-2 for the tiny models).")),
    expert(io.Float.Input("clip_high", default=1e-4, min=1e-7, max=1.0, step=1e-6, round=False, optional=True,
                          tooltip="How far one update may make a better branch more likely, per latent element. Lower = more careful.")),
    expert(io.Float.Input("sensitivity", default=0.0, min=0.0, max=100.0, step=0.1, optional=True,
                          tooltip="Dynamic clip: widens the clip range of a branch with its reward. Higher = the best branches may change more. 0 = off. "
                                  "Dynamic-TreeRPO has it; the exact formula is not published, this one is our reading.")),
    expert(io.Combo.Input("ratio", options=list(RATIOS), default="plain", optional=True,
                          tooltip="guard = GRPO-Guard's normalised ratio: the same meaning of the clip range at every step. Needs a larger clip range.")),
    expert(io.Combo.Input("step_weight", options=list(STEP_WEIGHTS), default="none", optional=True,
                          tooltip="How much each step of the window counts. tau = more for noisier steps (TempFlow-GRPO); guard = more for small steps.")),
]
STEP = [      # also the Trainer's
    expert(io.Float.Input("max_grad_norm", default=1.0, min=0.0, max=1000.0, step=0.1, optional=True,
                          tooltip="Gradients longer than this are shortened to it. Lower = more careful. 0 = off.")),
    expert(io.Float.Input("weight_decay", default=0.0, min=0.0, max=1.0, step=0.001, optional=True,
                          tooltip="Pulls the LoRA towards zero. Higher = stays closer to the base model. TreeGRPO uses 0.01.")),
    expert(io.Int.Input("inner_updates", default=1, min=1, max=32, optional=True,
                        tooltip="Optimizer steps on the same trees. More = learns more from each tree, but clips more and can over-fit it.")),
]
_EXPERT = [
    *CLIPPING,
    expert(io.Float.Input("kl", default=0.0, min=0.0, max=1000.0, step=0.001, optional=True,
                          tooltip="Pulls the policy back towards the base model. Higher = stays closer. Above 0 costs one more forward per node.")),
    *STEP,
    expert(io.Int.Input("micro_batch", default=0, min=0, max=4096, optional=True,
                        tooltip="Latents per forward and backward pass. Lower = less memory. 0 = as Tree Sampler.")),
]
_OUTPUTS = [Policy.Output(display_name="policy"), io.String.Output(display_name="metrics"), io.Image.Output(display_name="curve")]
_SAVED = "After every update the run is saved in output/treerpo/<run name>/."


class GRPOUpdate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOUpdate", "GRPO Update",
            description="One step of learning: makes the better branches of the tree more likely. Queue the graph again for the next iteration; "
                        f"Run (Instant) trains on and on. {_SAVED}",
            search_aliases=["grpo", "rlhf", "train", "optimizer"],
            is_output_node=True, inputs=[*_WIRES, _RATE, *_EXPERT], outputs=_OUTPUTS)

    @classmethod
    def execute(cls, policy, tree, advantages, learning_rate, clip_low=1e-4, clip_high=1e-4, sensitivity=0.0, ratio="plain", step_weight="none", kl=0.0,
                max_grad_norm=1.0, weight_decay=0.0, inner_updates=1, micro_batch=0) -> io.NodeOutput:
        objective = Objective(clip_low, clip_high, sensitivity, ratio, step_weight, kl)
        return learn(cls, policy, tree, advantages, objective, learning_rate, max_grad_norm, weight_decay, inner_updates, micro_batch)


class LayerTuningUpdate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOLayerTuning", "LayerTuning-RL Update",
            description="GRPO Update with Dynamic-TreeRPO's supervised term: every node of the window also learns to go where the best image of its "
                        "prompt came from, the more the worse it did. Published are the term itself, its coefficient lambda, the best-path target and "
                        f"that the weights are dynamic; the weights' exact formula and the other targets are ours. {_SAVED}",
            search_aliases=["dynamic-treerpo", "sft", "progress reward", "grpo"],
            is_output_node=True,
            inputs=[
                *_WIRES, _RATE,
                io.Float.Input("lambda", default=0.001, min=0.0, max=100.0, step=0.0001, round=False,
                               tooltip="Weight of the supervised term. Higher = imitates the best image more, explores less; 0.1 already stops the tiny "
                                       "models from improving. 0 = plain GRPO Update."),
                io.Combo.Input("target", options=list(TARGETS), default="best-path",
                               tooltip="best-path (published): the velocity on the way to the best image. best-leaf (ours): the velocity from each node's own "
                                       "state straight to the best image. images (ours): to your own images."),
                io.Latent.Input("images", optional=True, tooltip="For target = images: encoded images of the same size, one per prompt or one for all."),
                expert(io.Boolean.Input("only_good", default=True, optional=True,
                                        tooltip="Imitate a prompt's best image only if it is at least as good as the best images were on average so far. Off = "
                                                "always: a bad group then imitates the best of the worst.")),
                *_EXPERT,
            ],
            outputs=_OUTPUTS)

    @classmethod
    def execute(cls, policy, tree, advantages, learning_rate, target, images=None, only_good=True, clip_low=1e-4, clip_high=1e-4, sensitivity=0.0,
                ratio="plain", step_weight="none", kl=0.0, max_grad_norm=1.0, weight_decay=0.0, inner_updates=1, micro_batch=0, **named) -> io.NodeOutput:
        objective = Objective(clip_low, clip_high, sensitivity, ratio, step_weight, kl, sft=named["lambda"], target=target)
        return learn(cls, policy, tree, advantages, objective, learning_rate, max_grad_norm, weight_decay, inner_updates, micro_batch,
                     images=images, only_good=only_good)


def learn(cls, policy, tree, advantages, objective, learning_rate, max_grad_norm, weight_decay, inner_updates, micro_batch, images=None,
          only_good=False) -> io.NodeOutput:
    """What both update nodes do: one update of the policy, one row of metrics, the run on disk."""
    began = time.perf_counter()
    forest, run = tree.forest, policy.run
    batch = MicroBatch(micro_batch) if micro_batch else tree.micro_batch
    with policy.policy.session(tree.positive, tree.negative, tree.cfg, shape=forest.leaves.shape[1:], memory_batch=batch.size or None) as velocity:
        if forest.graphs and velocity.fingerprint() != tree.fingerprint:  # the weights have moved or learned since: recompute
            forest.graphs.clear()
        goals = own_images(velocity, images, forest)
        best = best_rewards(advantages.total, len(forest.prompts))
        allowed = best >= running_best(run.metrics) if only_good else None
        metrics = update(velocity, forest, advantages.layers, run.adamw(learning_rate, weight_decay=weight_decay), objective, micro_batch=batch,
                         max_grad_norm=max_grad_norm, inner_updates=inner_updates, images=goals, allowed=allowed,
                         check=comfy.model_management.throw_exception_if_processing_interrupted)
        row = {**reward_metrics(advantages.rewards, advantages.total, len(forest.prompts)),
               "frac_reward_zero_std": float(advantages.zero_spread.float().mean()), **metrics,
               "reward_best": float(best[best.isfinite()].mean()), "window_start": forest.start, "rollout_forwards": tree.rollout_forwards, "forwards": tree.rollout_forwards + metrics["update_forwards"],
               "learning_rate": learning_rate, "seconds": time.perf_counter() - tree.began, "seconds/rollout": tree.seconds,
               "seconds/update": time.perf_counter() - began}
        curve = plot.reward_curve([*run.metrics, row])
        run.commit(row, pictures={"reward_curve.png": curve, "tree.png": advantages.tree_picture})
    text = f"iteration {run.iteration}: " + ", ".join(f"{key} {row[key]:.4g}" for key in
                                                      ("reward", "reward_std", "ratio_mean", "clip_frac", "grad_norm", "forwards", "seconds"))
    image = plot.to_tensor(curve)
    return io.NodeOutput(LivePolicy(policy.policy, run), text, image, ui={**ui.PreviewImage(image, cls=cls).as_dict(), "text": (text,)})


def own_images(velocity, images: dict | None, forest) -> torch.Tensor | None:
    """The user's latents as the model sees them, one per prompt: [P, C, H, W]."""
    if images is None:
        return None
    samples, prompts = images["samples"], len(forest.prompts)
    if samples.shape[1:] != forest.leaves.shape[1:] or len(samples) not in (1, prompts):
        raise ValueError(f"The images are {list(samples.shape)} as latents, but the leaves are {list(forest.leaves.shape[1:])} for {prompts} prompts: encode "
                         "images of the training size, one per prompt or one for all.")
    return velocity.process_in(samples).to(velocity.device).expand(prompts, -1, -1, -1)
