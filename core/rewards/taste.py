"""My taste: a small head on frozen features of pictures, fitted to a person's picks in well under a second.

A pick says which of the pictures shown together is the best. The head's utility is linear in the features, and the
probability of a pick is that of Plackett (1975) and Luce (1959), which is Bradley & Terry's for two pictures. Its
weights have a Gaussian prior whose width is chosen by cross-validation, and a Gaussian posterior (Laplace), so the head
knows what it does not know yet. Everything here but that model is ours, no published recipe.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..files import write_atomically
from ..method.advantage import total_reward
from .combine import scores
from .contract import Reward
from .files import open_weights
from .human import NONE, parse
from .picks import ANSWERED, Picks

log = logging.getLogger("treerpo")
FILE = "taste.safetensors"
WIDTHS = (1.0, 4.0, 16.0, 64.0)  # prior variances of the weights that are tried
MOST_AXES = 128  # principal axes of the features that are kept
REFERENCES = 64  # pictures that a new one is compared with
CEILING = 0.9  # quantile of the favourites' utilities that no picture counts for more than
FOLDS = 5
ALSO_WIDTH, ALSO_PRIOR = (
    0.5,
    2.0,
)  # of the extra reward's z-score: its scale as a feature, and its weight before any pick
EVEN = 0.5  # the score of every picture as long as the taste is not known: nothing is learned from it
SURE = 1.64  # standard errors above chance from which on picks are said to agree: 1 in 20 by luck
ENOUGH = 20  # picks after which disagreement is said to be the user's, not the head's youth


class Features(Protocol):
    """What a picture is to the head."""

    name: str  # kept with the head: another name does not fit it

    def embed(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] in 0..1 -> [B, D], without gradient, on the CPU."""


@dataclass
class Choice:
    """One comparison: the first row of x was preferred to all others."""

    x: Tensor  # [n, D + 1] features and, last, the extra reward


@dataclass
class Head:
    """A fitted taste. Features are centred, scaled to a mean length of 1 and turned onto r - 1 axes; the r-th is the
    extra reward.
    """

    centre: Tensor  # [D]
    scale: float
    axes: Tensor  # [D, r - 1]
    extra: tuple[float, float]  # mean and standard deviation of the extra reward
    weights: Tensor  # [r] mean of the posterior
    covariance: Tensor  # [r, r]
    references: Tensor  # [m, r] pictures that were shown
    ceiling: float  # utility of the better favourites
    width: float  # the prior's variance
    choices: int
    agreement: float  # share of picks that heads fitted without them would have made, NaN below FOLDS picks
    chance: float  # that of one who guesses

    @property
    def sure(self) -> bool:
        """Whether the picks agree with each other by more than luck."""
        error = math.sqrt(self.chance * (1 - self.chance) / max(self.choices, 1))
        return self.choices >= FOLDS and self.agreement > self.chance + SURE * error

    def place(self, x: Tensor) -> Tensor:
        """[B, D + 1] features and extra reward -> [B, r] where the head works. A missing extra reward is an average
        one.
        """
        mean, spread = self.extra
        extra = ((x[:, -1:].double() - mean) / spread).nan_to_num(0.0) * ALSO_WIDTH
        return torch.cat([(x[:, :-1].double() - self.centre) / self.scale @ self.axes, extra], 1)

    def wins(self, x: Tensor) -> Tensor:
        """[B, D + 1] -> [B] in 0..1: how likely it is preferred to the pictures shown so far, on average.

        Averaged over the posterior (MacKay's probit approximation), so what is unknown counts as even. No picture
        counts for more than the favourites did (`ceiling`): beyond what was shown a linear head knows nothing.
        """
        placed = self.place(x)
        differ = placed[:, None] - self.references[None]
        variance = ((differ @ self.covariance) * differ).sum(-1)
        better = (placed @ self.weights).clamp(max=self.ceiling)[:, None] - (self.references @ self.weights)[None]
        return torch.sigmoid(better / (1 + math.pi * variance / 8).sqrt()).mean(1).float()

    def informative(self, x: Tensor, sets: Tensor, generator: torch.Generator, draws: int = 64) -> Tensor:
        """Bits that the pick among each set of pictures is expected to tell about the weights (BALD, Houlsby et al.
        2011): x [n, D + 1], sets [s, k] of row numbers -> [s].
        """
        factor = torch.linalg.cholesky(self.covariance + 1e-9 * torch.eye(len(self.weights), dtype=torch.float64))
        noise = torch.randn(len(self.weights), draws, generator=generator, dtype=torch.float64)
        chosen = (self.place(x) @ (self.weights[:, None] + factor @ noise))[sets].softmax(1)  # [s, k, draws]
        entropy = lambda p: -torch.xlogy(p, p).sum(1) / math.log(2)  # noqa: E731
        return entropy(chosen.mean(2)) - entropy(chosen).mean(1)

    def said(self) -> str:
        """How well the head knows the taste, in a sentence."""
        if self.choices < FOLDS:
            return f"{self.choices} of at least {FOLDS} picks that a taste needs."
        known = f"{self.choices} picks; it would have made {self.agreement:.0%} of those it has not seen"
        if self.sure:
            return f"{known} (by chance {self.chance:.0%})."
        if self.choices < ENOUGH:
            return f"{known}, hardly more than by chance ({self.chance:.0%}): more picks are needed."
        return (
            f"{known}, no more than by chance ({self.chance:.0%}): your picks do not agree with each other, so nothing "
            "is learned from them."
        )


def fit(choices: list[Choice], width: float | None = None) -> Head:
    """The head for at least one choice; width: the prior's variance, None = by cross-validation."""
    everything = torch.cat([choice.x for choice in choices]).double()
    features, extra = everything[:, :-1], everything[:, -1]
    known = extra[extra.isfinite()]
    mean, spread = (float(known.mean()), float(known.std()) + 1e-3) if len(known) > 1 else (0.0, 1.0)
    centre = features.mean(0)
    scale = float((features - centre).square().sum(1).mean().sqrt()) or 1.0
    _, sizes, axes = torch.linalg.svd((features - centre) / scale, full_matrices=False)
    axes = axes[sizes > 1e-6 * sizes[0]][:MOST_AXES].T
    rank = axes.shape[1] + 1
    head = Head(
        centre, scale, axes, (mean, spread), torch.zeros(rank), torch.eye(rank), torch.zeros(0, rank), math.inf, 0.0,
        len(choices), math.nan, sum(1 / len(choice.x) for choice in choices) / len(choices),
    )  # fmt: skip
    placed, there = padded([head.place(choice.x) for choice in choices])
    if len(choices) >= FOLDS:
        found = {tried: cross_validated(placed, there, tried) for tried in ((width,) if width else WIDTHS)}
        head.width = max(found, key=lambda tried: found[tried][1])
        head.agreement = found[head.width][0]
    else:
        head.width = width or WIDTHS[1]
    head.weights, head.covariance = posterior(placed, there, head.width)
    head.ceiling = float((placed[:, 0] @ head.weights).quantile(CEILING))
    shown = placed[there]
    head.references = shown[torch.linspace(0, len(shown) - 1, min(REFERENCES, len(shown))).round().long()]
    return head


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[n_i, r] each -> ([N, n, r], [N, n] what is real)."""
    placed = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    counts = torch.tensor([len(row) for row in rows])
    return placed, torch.arange(placed.shape[1]) < counts[:, None]


def posterior(placed: Tensor, there: Tensor, width: float, steps: int = 50) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the weights (Laplace) by Newton's method; the log posterior is strictly concave.

    placed: [N, n, r], the chosen picture first; there: [N, n].
    """
    rank = placed.shape[-1]
    prior = torch.zeros(rank, dtype=torch.float64)
    prior[-1] = ALSO_PRIOR
    weights = prior.clone()
    for _ in range(steps):
        p = (placed @ weights).masked_fill(~there, -math.inf).softmax(1)
        mean = torch.einsum("cn,cnr->cr", p, placed)
        slope = (placed[:, 0] - mean).sum(0) - (weights - prior) / width
        bend = torch.einsum("cn,cnr,cns->rs", p, placed, placed) - mean.T @ mean
        bend += torch.eye(rank, dtype=torch.float64) / width
        step = torch.linalg.solve(bend, slope)
        weights = weights + step
        if float(step.abs().amax()) < 1e-8:
            break
    return weights, torch.linalg.inv(bend)


def cross_validated(placed: Tensor, there: Tensor, width: float) -> tuple[float, float]:
    """(share of left-out picks that are predicted, their mean log probability) over FOLDS folds."""
    number, hits, sure = torch.arange(len(placed)), 0.0, 0.0
    for fold in range(FOLDS):
        out = number % FOLDS == fold
        weights, _ = posterior(placed[~out], there[~out], width)
        utility = (placed[out] @ weights).masked_fill(~there[out], -math.inf)
        hits += float((utility.argmax(1) == 0).sum())
        sure += float(utility.log_softmax(1)[:, 0].sum())
    return hits / len(placed), sure / len(placed)


class Known:
    """Pictures that were asked about, as features: read once from the book's sheets."""

    def __init__(self, features: Features, also: Reward | None = None):
        """also: another reward, or several, whose score is one more feature, such as one that reads the prompt."""
        self.features, self.also = features, also
        self._rows: dict[str, Tensor | None] = {}

    def look(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] -> [B, D + 1]; NaN in the last column without an extra reward."""
        found = self.features.embed(images).float().cpu()
        extra = torch.full((len(images),), math.nan)
        if self.also is not None:
            scored = scores(self.also, images, prompts)
            extra = total_reward(scored.values, scored.weights).float().cpu()
        return torch.cat([found, extra[:, None]], 1)

    def choices(self, books: list[Picks], before: int | None = None) -> list[Choice]:
        """All that the answers in these books say, the newest answer to each group. before: only those of earlier
        iterations.
        """
        rows = [(self._seen(book, row), row) for book, row in answered(books, before)]
        return said_by([(seen, row) for seen, row in rows if seen is not None])

    def _seen(self, book: Picks, row: dict) -> Tensor | None:
        key = str(book.folder) + row["id"]
        if key not in self._rows:
            try:
                images = book.images(row)
                self._rows[key] = self.look(images, [row["prompt"]] * len(images))
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("A pick is passed over, its pictures cannot be read: %s", error)
                self._rows[key] = None
        return self._rows[key]


def answered(books: list[Picks], before: int | None = None) -> list[tuple[Picks, dict]]:
    """The person's newest answer to each group of these books, in the order in which they were first asked about; none
    where it is a skip. before: only those of earlier iterations.
    """
    newest = {}
    for book in books:
        newest |= {(book.folder, row["id"]): (book, row) for row in book.rows() if row["by"] in ANSWERED}
    earlier = math.inf if before is None else before
    return [(book, row) for book, row in newest.values() if row["by"] == "person" and (row["iteration"] or 0) < earlier]


def said_by(rows: list[tuple[Tensor, dict]]) -> list[Choice]:
    """Answers as choices. A ranking is several (Plackett's): each picture of a level against all those below it. "None
    of these" is one of the mean favourite against all that were shown.
    """
    found, favourites, refused = [], [], []
    for x, row in rows:
        answer = parse(row["answer"], row["count"]) if row["answer"] else None
        if answer is None:
            continue
        if row["answer"] == NONE:
            refused.append(x)
        levels = answer.levels
        for i in range(len(levels) - 1):
            below = [number for level in levels[i + 1 :] for number in level]
            found += [Choice(x[[number, *below]]) for number in levels[i]]
        if len(levels) > 1:
            favourites.append(x[list(levels[0])].nanmean(0))
    if favourites:
        best = torch.stack(favourites).nanmean(0)
        found += [Choice(torch.cat([best[None], x])) for x in refused]
    return found


class MyTaste(Reward):
    """How likely the person prefers a picture to those that were shown, in 0..1."""

    name = "my taste"

    def __init__(self, head: Head | None, known: Known):
        """head: None = nothing is known yet, so all pictures are even."""
        self.head, self.known = head, known

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1 -> [B]; NaN for a picture that holds NaN."""
        return self.judged(images, self.known.look(images.nan_to_num(0.0), prompts))

    def judged(self, images: Tensor, seen: Tensor) -> Tensor:
        """The same of pictures whose features [B, D + 1] are known."""
        found = torch.full((len(images),), EVEN) if self.head is None else self.head.wins(seen)
        return torch.where(images.flatten(1).isfinite().all(1).cpu(), found, torch.nan)


def save(head: Head, path: Path, features: Features, ids: list[str]) -> None:
    """A head as a safetensors file; ids: of the groups that it was fitted to."""
    from safetensors.torch import save as packed

    tensors = {"centre": head.centre, "axes": head.axes, "weights": head.weights, "covariance": head.covariance,
               "references": head.references}  # fmt: skip
    numbers = {
        key: getattr(head, key) for key in ("scale", "extra", "ceiling", "width", "choices", "agreement", "chance")
    }
    metadata = {"format": "treerpo taste 1", "features": features.name, "head": json.dumps(numbers),
                "picks": json.dumps(ids)}  # fmt: skip
    write_atomically(path, packed({key: value.contiguous() for key, value in tensors.items()}, metadata=metadata))


def saved_picks(path: Path) -> list[str]:
    """The ids of the groups that a saved head was fitted to; none where the file is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as opened:
            return json.loads((opened.metadata() or {}).get("picks", "[]"))
    except (SafetensorError, OSError, ValueError):
        return []


def load(path: Path, features: Features) -> Head:
    """What `save` wrote. Raises ValueError with a sentence for another file, or a head on other features."""
    from safetensors import safe_open

    tensors = open_weights(path)
    with safe_open(str(path), "pt") as opened:
        metadata = opened.metadata() or {}
    if metadata.get("format") != "treerpo taste 1":
        raise ValueError(f"{path.name} is not a taste that was saved here.")
    if metadata["features"] != features.name:
        raise ValueError(
            f"{path.name} was learned on features of {metadata['features']}, but {features.name} is connected: connect "
            "the CLIP_VISION that it was learned with."
        )
    numbers = json.loads(metadata["head"])
    return Head(
        **{**{key: value.double() for key, value in tensors.items()}, **numbers, "extra": tuple(numbers["extra"])}
    )
