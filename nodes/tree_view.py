"""Look at a tree: its picture, and one leaf of it to go on with."""

import math
import secrets

import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..core.method.advantage import group_z, total_reward
from ..core.pictures import plot
from ..core.pictures.theme import DARK
from .browser import temporary
from .schema import AdvantagesSocket, ScoresSocket, TreeSocket, schema

SUBFOLDER = "treerpo_tree"  # of ComfyUI's temp folder
KEPT = 512  # images of earlier runs that stay there
NO_LATENT = "Tree View has no latent to give: connect Tree Sampler's output 'leaves' to its input 'leaves'."


class TreeViewNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOTreeView",
            "Tree View",
            description="Shows the tree: which branches were better or worse, and every leaf with its score. Click a "
            "leaf to see it in full size. The best leaf, or the one you choose, goes on to the outputs: for img2img, "
            "an upscaler, or anything else.",
            search_aliases=["tree explorer", "grpo tree", "choose leaf", "best image"],
            is_output_node=True,
            inputs=[
                TreeSocket.Input("tree", tooltip="From Tree Sampler."),
                ScoresSocket.Input(
                    "rewards", tooltip="From Score Images, which scored the decoded leaves of this tree."
                ),
                io.Int.Input(
                    "leaf",
                    default=0,
                    min=0,
                    max=2**20,
                    control_after_generate=False,
                    tooltip="Which leaf goes to the outputs: its number, counted from 1 over all prompts. Higher = "
                    "further to the right and down in the tree. 0 = the one with the highest score of all.",
                ),
                AdvantagesSocket.Input(
                    "advantages",
                    optional=True,
                    tooltip="From Tree Advantages: colours the branches. Without it they stay grey.",
                ),
                io.Latent.Input(
                    "leaves", optional=True, tooltip="Tree Sampler's leaves: only needed for the output 'latent'."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The tree as one picture."),
                io.Image.Output(display_name="image", tooltip="The chosen leaf in full size."),
                io.Latent.Output(display_name="latent", tooltip="The chosen leaf, as VAE Decode and samplers take it."),
                io.Float.Output(display_name="score", tooltip="The chosen leaf's total score; nan when it has none."),
                io.String.Output(
                    display_name="path",
                    tooltip="How the chosen leaf came about: the child at each step, noise levels and scores.",
                ),
            ],
        )

    @classmethod
    def execute(cls, tree, rewards, leaf=0, advantages=None, leaves=None) -> io.NodeOutput:
        forest = tree.forest
        refuse_another_tree(forest, rewards, advantages, leaves)
        with torch.inference_mode(False), torch.no_grad():
            total = total_reward(rewards.values, rewards.weights)
            chosen = choose(leaf, total)
            layers = advantages.layers if advantages is not None else scores_only(forest, total)
            picture = plot.tree_picture(forest, layers, total, rewards.images, rewards.prompts, DARK)
            picture = plot.to_tensor(picture)
            image = rewards.images[chosen][None].clone()
            shown = described(forest, rewards, total, layers, advantages is not None, chosen, save(rewards.images))
        latent = (
            {"samples": leaves["samples"][chosen : chosen + 1]} if leaves is not None else ExecutionBlocker(NO_LATENT)
        )
        text = path_text(forest, rewards, total, advantages, chosen)
        return io.NodeOutput(
            picture,
            image,
            latent,
            float(total[chosen]),
            text,
            ui={**ui.PreviewImage(picture, cls=cls).as_dict(), "treerpo_tree": [shown]},
        )


def refuse_another_tree(forest, rewards, advantages, leaves) -> None:
    """Whatever belongs to another tree, as far as counts tell."""
    count = len(forest.leaves)
    if len(rewards.images) != count:
        raise ValueError(
            f"The rewards are for {len(rewards.images)} images, but the tree has {count} leaves: decode and score all "
            "leaves of this tree, and nothing else."
        )
    if advantages is not None and [len(layer) for layer in advantages.layers] != [
        len(edges) for edges in forest.log_probs
    ]:
        raise ValueError(
            "The advantages are of another tree: connect Tree Advantages to the same Tree Sampler as this node."
        )
    if leaves is not None and len(leaves["samples"]) != count:
        raise ValueError(
            f"The latents at 'leaves' are {len(leaves['samples'])}, but the tree has {count} leaves: connect the "
            "'leaves' of the same Tree Sampler."
        )


def choose(leaf: int, total: torch.Tensor) -> int:
    """Row of the chosen leaf: `leaf` counts from 1, 0 = the highest score."""
    if leaf > len(total):
        raise ValueError(f"There is no leaf {leaf}: this tree has the leaves 1 to {len(total)}; 0 is the best one.")
    return leaf - 1 if leaf else int(total.nan_to_num(-math.inf).argmax())


def scores_only(forest, total: torch.Tensor) -> list[torch.Tensor]:
    """In place of edge advantages: each leaf's standing within its prompt's leaves, nothing above."""
    standing = group_z(total.view(len(forest.prompts), -1))[0].flatten()
    return [torch.zeros(len(edges)) for edges in forest.log_probs[:-1]] + [standing]


def save(images) -> list[dict]:
    """Every leaf as a file of its own, under a name no earlier run had: what ComfyUI's /view needs to find each."""
    run = secrets.token_hex(6)
    names = [f"{run}_{number:04d}.png" for number in range(1, len(images) + 1)]
    folder, files = temporary(SUBFOLDER, names, KEPT)
    for name, image in zip(names, images):
        plot.to_picture(image).save(folder / name, compress_level=1)
    return files


def number(value) -> float | None:
    """For JSON, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


def described(
    forest, rewards, total: torch.Tensor, layers: list[torch.Tensor], known: bool, chosen: int, files: list[dict]
) -> dict:
    """The tree as web/treerpo.js draws it.

    known: `layers` are advantages, not only the leaves' standing by their scores.
    """
    count, edges = forest.leaves_per_prompt, [layer.view(len(forest.prompts), -1) for layer in layers]
    prompts = []
    for p in range(len(forest.prompts)):
        rows = range(p * count, (p + 1) * count)
        leaves = [
            {
                "image": files[i],
                "total": number(total[i]),
                "scores": {name: number(values[i]) for name, values in rewards.values.items()},
                "advantage": number(layers[-1][i]) if known else None,
                "standing": number(layers[-1][i]),
            }
            for i in rows
        ]
        prompts.append(
            {
                "text": rewards.prompts[rows[0]],
                "edges": [[number(value) if known else None for value in layer[p]] for layer in edges],
                "leaves": leaves,
            }
        )
    height, width = rewards.images[0].shape[:2]
    return {
        "start": forest.start,
        "steps": len(forest.sigmas) - 1,
        "levels": [float(level) for level in forest.levels],
        "sigmas": forest.sigmas.tolist(),
        "branching": forest.branching,
        "depth": forest.depth,
        "trees": forest.trees,
        "kind": forest.kind,
        "iteration": forest.iteration,
        "chosen": chosen + 1,
        "size": [width, height],
        "prompts": prompts,
    }


def path_text(forest, rewards, total: torch.Tensor, advantages, chosen: int) -> str:
    """The chosen leaf in words: its place, its scores, and one line per step of the window."""
    count, b = forest.leaves_per_prompt, forest.branching
    prompt, place = divmod(chosen, count)
    group = total[prompt * count : (prompt + 1) * count]
    rank = 1 + int((group > total[chosen]).sum())
    scored = (
        f"score {plot.score_text(float(total[chosen]))}, number {rank} of {count}"
        if math.isfinite(total[chosen])
        else "no score"
    )
    lines = [
        f"leaf {chosen + 1} of {len(total)}: prompt {prompt + 1} of {len(forest.prompts)}, "
        f'"{" ".join(rewards.prompts[chosen].split())}"',
        scored,
    ]
    if len(rewards.values) > 1:
        lines += [f"{name}: {plot.score_text(float(values[chosen]))}" for name, values in rewards.values.items()]
    if forest.trees > 1:
        lines.append(f"tree {place // b**forest.depth + 1} of {forest.trees}")
    for layer in range(forest.depth):
        edge = chosen // b ** (forest.depth - 1 - layer)
        sigma, after = forest.sigma(layer)
        credit = f", advantage {float(advantages.layers[layer][edge]):+.2f}" if advantages is not None else ""
        lines.append(
            f"step {forest.start + layer + 1}: child {edge % b + 1} of {b}, noise level {forest.levels[layer]:.3g}, "
            f"sigma {sigma:.3f} to {after:.3f}{credit}"
        )
    return "\n".join(lines)
