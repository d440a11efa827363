"""The held-out prompts on fixed noise: what an evaluation sees, and its metrics beside the base model's."""

from dataclasses import dataclass

from torch import Tensor

from ..pictures.distance import diversity, drift
from .health import Evaluation


@dataclass
class HeldOut:
    """One image per held-out prompt, always from the same noise."""

    images: Tensor  # [H, height, width, 3]
    reward: Tensor  # [H] the reward that is trained
    judge: Tensor | None  # [H] the one that is not

    def evaluation(self, iteration: int, row: dict[str, float]) -> Evaluation:
        """As the health watch takes it; row: what `row` gave."""
        return Evaluation(
            iteration,
            self.reward.tolist(),
            self.judge.tolist() if self.judge is not None else [],
            row["eval/diversity"],
            row["eval/base_diversity"],
        )

    def row(self, base: "HeldOut") -> dict[str, float]:
        """Metrics, beside the base model's on the same prompts and noise."""
        row = {
            "eval/reward": float(self.reward.nanmean()),
            "eval/base_reward": float(base.reward.nanmean()),
            "eval/drift": drift(self.images, base.images),
            "eval/diversity": diversity(self.images, 1),
            "eval/base_diversity": diversity(base.images, 1),
        }
        if self.judge is not None:
            row |= {"eval/judge": float(self.judge.nanmean()), "eval/base_judge": float(base.judge.nanmean())}
        return row
