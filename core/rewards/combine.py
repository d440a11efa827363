"""Several reward models as one. They stay apart until the advantages: z-scored per group first, then weighted."""
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Combined:
    """Reward models with weights. Scores are kept by name; core.advantage.leaf_advantages weights them (TreeGRPO)."""
    parts: list[tuple[object, float]]  # (reward model, weight)

    @property
    def name(self) -> str:
        return " + ".join(f"{weight:g} {model.name}" for model, weight in self.parts)


def parts(reward) -> list[tuple[object, float]]:
    """The single models of a reward and their weights; one of weight 1 when it is not a combination."""
    return list(reward.parts) if isinstance(reward, Combined) else [(reward, 1.0)]


def combine(first, first_weight: float, second, second_weight: float) -> Combined:
    """Both rewards, each of which may be a combination itself: weights multiply."""
    return Combined([(model, weight * outer) for reward, outer in ((first, first_weight), (second, second_weight)) for model, weight in parts(reward)])


def scores(reward, images: Tensor, prompts: list[str], chunk: int = 64) -> tuple[dict[str, Tensor], dict[str, float]]:
    """({name: scores [B]}, {name: weight}), images [B, H, W, 3] scored `chunk` at a time. Equal names are numbered."""
    values, weights = {}, {}
    for model, weight in parts(reward):
        name, number = model.name, 2
        while name in values:
            name, number = f"{model.name} {number}", number + 1
        found = [model.score(images[i:i + chunk], prompts[i:i + chunk]).float().cpu() for i in range(0, len(images), chunk)]
        for i, part in enumerate(found):
            expected = min(chunk, len(images) - i * chunk)
            if part.shape != (expected,):
                raise ValueError(f"The reward '{name}' gave {tuple(part.shape)} scores for {expected} images: it must give one per image.")
        values[name], weights[name] = torch.cat(found), weight
    return values, weights
