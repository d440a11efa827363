"""Replay: a run remembers good pictures of its beginning, and imitates them each time their prompt comes up again.

A reward says nothing about what it does not measure, and a policy that is trained on it soon draws that in one way.
The first good pictures come from a policy that has all of the base model's variety still, so that imitating them holds
on to it, and pulls against no wish, as an anchor to the base model does. Ours (docs/benchmarks_demo.md): self-imitation
(Oh et al., arXiv 1806.05635) of pictures that a reward has sifted (as RAFT, arXiv 2304.06767), by flow matching.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import noise
from .tree import Forest, sound

AT_ONE_LEVEL = 8  # pictures that share a noise level, and so a model call
PER_VISIT = 2  # pictures of one prompt that one iteration adds at most: a tree's are much alike


@dataclass
class Replayed:
    """Remembered pictures with fresh noise."""

    x: Tensor  # [M, C, H, W]
    sigmas: Tensor  # [M] noise levels, steps of the sampling schedule
    rows: Tensor  # [M] conditioning rows
    goal: Tensor  # [M, C, H, W] velocities from the state straight to its picture
    weight: float  # of one picture in the loss

    def loss(self, chosen: Tensor, v: Tensor) -> Tensor:
        """Their part of the loss: the weighted sum of the mean square errors of their velocities v [n, C, H, W]."""
        return self.weight * (v - self.goal[chosen].to(v)).square().flatten(1).mean(1).sum()


def remember(
    store: dict[str, Tensor], forest: Forest, keys: list[str], rewards: Tensor, good: float, most: int
) -> None:
    """Add to `store`, pictures [n, C, H, W] by prompt, up to two leaves per prompt that have a reward of `good` or
    more, the best first, until a prompt has `most`. rewards: of all leaves [P * K]; keys: what each of the P prompts is
    called in the store.
    """
    usable = torch.where(sound(forest.leaves) & rewards.isfinite(), rewards.float(), -torch.inf)
    groups = usable.view(len(keys), -1), forest.leaves.unflatten(0, (len(keys), -1))
    for key, own, leaves in zip(keys, *groups):
        known = store.get(key, leaves[:0].to("cpu", torch.float16))
        best = own.argsort(descending=True)[: max(0, min(PER_VISIT, most - len(known)))]
        best = best[own[best] >= good]
        if len(best):
            store[key] = torch.cat([known, leaves[best].detach().to("cpu", torch.float16)])


def states(
    store: dict[str, Tensor], keys: list[str], sigmas: Tensor, strength: float, most: int, seed: int, iteration: int
) -> Replayed | None:
    """What the store has of this iteration's prompts, noised to steps of the schedule `sigmas` [T + 1] that are drawn
    from (seed, iteration); None where that is nothing. keys: the prompts, by conditioning row, as remember calls them.
    strength: of the loss when every prompt has all its `most` pictures.
    """
    kept = [(row, picture) for row, key in enumerate(keys) for picture in store.get(key, ())]
    if not kept:
        return None
    draw = noise.generator(seed, "replay", iteration)
    order = torch.randperm(len(kept), generator=draw).tolist()
    rows = torch.tensor([kept[place][0] for place in order])
    pictures = torch.stack([kept[place][1] for place in order]).float()
    calls = -(-len(kept) // AT_ONE_LEVEL)
    levels = sigmas[:-1].float().cpu()[torch.randint(len(sigmas) - 1, (calls,), generator=draw)]
    levels = levels.repeat_interleave(AT_ONE_LEVEL)[: len(kept)]
    drawn = torch.randn(pictures.shape, generator=draw)
    x = noise.noised(pictures, drawn, levels.view(-1, *[1] * (pictures.dim() - 1)))
    return Replayed(x, levels, rows, drawn - pictures, strength / (most * len(keys)))
