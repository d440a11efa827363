"""The held-out prompts on fixed noise: what an evaluation sees, and its metrics beside the base model's."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..files import write_picture
from ..pictures import plot
from ..pictures.distance import diversity, drift
from .health import Evaluation

STRIPS = "held_out"  # folder of a run: <iteration>.png, the first held-out pictures in a row
MOST_STRIPS = 4  # in the dashboard


def keep_strip(folder: Path, iteration: int, images: Tensor) -> None:
    """The first pictures of an evaluation in a row; the base model's, iteration 0, are written once."""
    path = folder / STRIPS / f"{iteration:06d}.png"
    if iteration or not path.is_file():
        write_picture(path, plot.strip(images[: plot.STRIP]))


def strips(folder: Path, now: int) -> list[tuple[int, Path]]:
    """At most MOST_STRIPS of a run's strips up to iteration `now`, evenly spread, the base model's first."""
    known = [(iteration, path) for iteration, path in all_strips(folder) if iteration <= now]
    count = min(MOST_STRIPS, len(known))
    return [known[round(i * (len(known) - 1) / max(count - 1, 1))] for i in range(count)]


def all_strips(folder: Path) -> list[tuple[int, Path]]:
    """Iteration and file of each of a run's strips, the base model's first."""
    return sorted((int(path.stem), path) for path in (folder / STRIPS).glob("[0-9]*.png") if path.stem.isdigit())


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
