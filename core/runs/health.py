"""What tells that training goes wrong: a judge that falls while the reward rises, images that become alike, rewards
that say nothing.

The statistics are plain paired comparisons on fixed held-out prompts and seeds. Choosing them, and every threshold, is
ours.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from statistics import NormalDist, fmean, stdev

from ..pictures.curve import LARGEST

FEWEST_IMAGES = 4  # below, a mean difference says nothing
OPPOSED = -0.5  # correlation of two rewards below which no picture can please both
FALLEN = 4.0  # standard errors between two windows; the best of many windows is always a little lucky


@dataclass
class Evaluation:
    """Scores of the held-out images at one moment of training; always the same prompts and seeds, in the same order."""

    iteration: int  # iterations trained before it; 0 = the base model
    reward: list[float]  # what is trained, per image; NaN = no score
    judge: list[float] = field(default_factory=list)  # a model that is not trained on, per image; empty = there is none
    diversity: float = math.nan  # NaN = not measured
    base_diversity: float = math.nan  # of the base model's images; NaN = that of the first evaluation


@dataclass
class Watch:
    """Looks at every iteration's metrics and at every evaluation, and says in a sentence what goes wrong.

    The sentence has no names from outside in it, since a browser may show it as HTML.

    The fall of the judge is tested on the images themselves: mean difference of each image to the same image at the
    judge's best evaluation, in standard errors. The limit is `errors`, widened for few images (Student's t) and for the
    number of earlier evaluations the best one was chosen from (Bonferroni), as the best of many is always a little
    lucky. Simulated runs of 30 evaluations that neither rise nor fall are warned of in 1 to 7 of 100 cases (8 to 32
    images). Images of one prompt count as independent, so one image of many prompts is better than many of one. All of
    this is ours, no published rule.
    """

    errors: float = (
        2.0  # standard errors that a mean has to fall or rise to be believed. Lower = warns earlier, also for nothing
    )
    patience: int = 2  # evaluations in a row that have to agree
    least_diversity: float = 0.5  # of the base model's; below it the images have become alike. 0 = off
    settled: int = 10  # evaluations in a row without a new best reward before it is said that nothing is left. 0 = off
    flat: int = 20  # iterations in a row without any difference within any group before it is said. 0 = off
    kl_limit: float | None = None  # largest mean KL to the base model over `kl_window` iterations; None = no limit
    kl_window: int = 5  # iterations
    evaluations: list[Evaluation] = field(default_factory=list)
    flat_rows: int = 0  # iterations without any difference, up to now in a row
    kl: list[float] = field(default_factory=list)  # of the newest `kl_window` iterations
    opposed: float = 0.0  # running mean of the lowest correlation of two rewards within a prompt; 0 = one reward only

    def __post_init__(self):
        if not 0 < self.errors <= 20:
            raise ValueError(
                f"The watch is set to {self.errors:g} standard errors: use a number above 0 and up to 20, usually 2."
            )
        if self.patience < 1 or self.kl_window < 1:
            raise ValueError(
                f"The watch is set to a patience of {self.patience} and a KL window of {self.kl_window}: both must be "
                "at least 1."
            )

    def see(self, row: dict) -> None:
        """Take in the metrics of one iteration."""
        self.flat_rows = self.flat_rows + 1 if row.get("frac_reward_zero_std") == 1 else 0
        if "kl" in row and math.isfinite(row["kl"]):
            self.kl = [*self.kl, float(row["kl"])][-self.kl_window :]
        if math.isfinite(now := row.get("rewards/opposed", math.nan)):
            self.opposed = 0.9 * self.opposed + 0.1 * now

    def evaluate(self, evaluation: Evaluation) -> bool:
        """Take in an evaluation; those of the same or later iterations are forgotten, as the run has been rolled back
        behind them.

        False where its numbers of scores are not those of before: then other prompts were judged, and the comparison
        begins anew with it.
        """
        new = Evaluation(
            **{**asdict(evaluation), "reward": _finite(evaluation.reward), "judge": _finite(evaluation.judge)}
        )
        if new.judge and len(new.judge) != len(new.reward):
            raise ValueError(
                f"There are {len(new.judge)} scores of the judge for {len(new.reward)} images: the judge must score "
                "every held-out image once."
            )
        kept = [old for old in self.evaluations if old.iteration < new.iteration]
        same = not kept or (len(kept[-1].reward), len(kept[-1].judge)) == (len(new.reward), len(new.judge))
        self.evaluations = [*(kept if same else []), new]
        return same

    def verdict(self) -> str | None:
        """What goes wrong and what to do, in one or two sentences, the worst first; None while all is well."""
        return self._judged() or self._unlearned() or self._alike() or self._flat() or self._far() or self._settled()

    @property
    def rollback(self) -> int | None:
        """The iteration to go back to, among the evaluations whose images were still different: the highest reward
        where the judge had not fallen by more than chance; once that fall lasts, where it was within one standard error
        of its best, since that best is in part luck (the one-standard-error rule of Breiman et al., Classification and
        Regression Trees, 1984). Its best after training began, unless it had fallen by then already: the base model has
        learned nothing. Without a judge, the highest reward.
        """
        usable = [self.evaluations[i] for i in range(len(self.evaluations)) if not self._is_alike(i)]
        if not usable:
            return None
        best = _best(usable, "judge")
        if best.judge:
            trained = [one for one in usable if one.iteration and self._holds(best, one)]
            best = _best(trained or [best], "judge")
            most = 1.0 if self._falls("judge") else None
            usable = [one for one in usable if one is best or self._holds(best, one, most)]
        return _best(usable, "reward").iteration

    @property
    def finished(self) -> bool:
        """Whether the verdict is that the policy has learned, and nothing is left to learn."""
        best = self._unbeaten()
        return best is not None and best is not self.evaluations[0] and self.verdict() == self._settled()

    def to_dict(self) -> dict:
        """All of it for JSON: NaN becomes None."""
        return _replaced(asdict(self), lambda value: None if isinstance(value, float) and math.isnan(value) else value)

    @classmethod
    def from_dict(cls, saved: dict) -> "Watch":
        """What `to_dict` saved. Fields that are not known are left out, so a newer version's state can be read."""
        known = {f.name: saved[f.name] for f in fields(cls) if f.name in saved}
        evaluations = [
            Evaluation(
                **{
                    f.name: _replaced(old[f.name], lambda value: math.nan if value is None else value)
                    for f in fields(Evaluation)
                    if f.name in old
                }
            )
            for old in known.pop("evaluations", [])
        ]
        return cls(**known, evaluations=evaluations)

    def _lasting(self, test) -> bool:
        """Whether a test of an evaluation's number holds for the newest `patience` evaluations."""
        newest = range(len(self.evaluations))[-self.patience :]
        return len(newest) == self.patience and all(test(i) for i in newest)

    def _falls(self, name: str) -> bool:
        """Whether a score has fallen, and the fall lasts."""
        return self._lasting(lambda i: self._fallen(i, name))

    def _fallen(self, i: int, name: str) -> bool:
        """Whether evaluation i is below the best one before it by more than chance."""
        if i < 1:
            return False
        fall, chance = self._fall(_best(self.evaluations[:i], name), self.evaluations[i], name, i)
        return fall > chance

    def _holds(self, best: Evaluation, one: Evaluation, most: float | None = None) -> bool:
        """Whether an evaluation's judge is below the best of all by no more than `most` standard errors, or chance."""
        fall, chance = self._fall(best, one, "judge", max(1, len(self.evaluations) - 1))
        return fall <= (chance if most is None else most)

    def _fall(self, best: Evaluation, one: Evaluation, name: str, candidates: int) -> tuple[float, float]:
        """How many standard errors an evaluation is below the best of so many others, and how many chance explains: NaN
        where there are too few images, which are neither more nor less than anything.
        """
        errors, images = compare(getattr(best, name), getattr(one, name))
        return (-errors, limit(self.errors, images, candidates)) if images >= FEWEST_IMAGES else (math.nan, math.nan)

    def _judged(self) -> str | None:
        if not self._falls("judge"):
            return None
        now, best = self.evaluations[-1], _best(self.evaluations, "judge")
        errors, images = compare(best.judge, now.judge)
        fall = (
            f"the judge fell from {_mean(best.judge):.3g} to {_mean(now.judge):.3g} ({_times(errors)} its standard "
            f"error over {images} images)"
        )
        rise, images = compare(best.reward, now.reward)
        if images >= FEWEST_IMAGES and rise > limit(self.errors, images, 1):
            return (
                f"The trained reward rose from {_mean(best.reward):.3g} to {_mean(now.reward):.3g} since iteration "
                f"{best.iteration} while {fall}: the policy is likely exploiting the reward. Roll back to iteration "
                f"{self.rollback}?"
            )
        return (
            f"Since iteration {best.iteration} {fall} and the trained reward did not rise on the held-out prompts: "
            f"training does harm, usually by too high a learning rate. Roll back to iteration {self.rollback}?"
        )

    def _unlearned(self) -> str | None:
        if not self._falls("reward"):
            return None
        best, now = _best(self.evaluations, "reward"), self.evaluations[-1]
        errors, images = compare(best.reward, now.reward)
        return (
            f"The trained reward on the held-out prompts fell from {_mean(best.reward):.3g} at iteration "
            f"{best.iteration} to {_mean(now.reward):.3g} ({_times(errors)} its standard error over {images} images): "
            f"training has become unstable or learns the prompts by heart. Roll back to iteration {self.rollback} and "
            "lower the learning rate?"
        )

    def _is_alike(self, i: int) -> bool:
        base = self.evaluations[i].base_diversity
        base = self.evaluations[0].diversity if math.isnan(base) else base
        return self.evaluations[i].diversity < self.least_diversity * base

    def _alike(self) -> str | None:
        if not self._lasting(self._is_alike):
            return None
        now = self.evaluations[-1]
        base = self.evaluations[0].diversity if math.isnan(now.base_diversity) else now.base_diversity
        back = "Begin again" if self.rollback is None else f"Roll back to iteration {self.rollback}"
        return (
            f"The images of a prompt have become alike: their diversity is {now.diversity:.3g}, the base model's was "
            f"{base:.3g}. {back} and use more noise, more prompts or a KL above 0?"
        )

    def _unbeaten(self) -> Evaluation | None:
        """The best of the earlier evaluations where none of the newest `settled` ones is better."""
        earlier = len(self.evaluations) - self.settled
        if not self.settled or earlier < 1:
            return None
        best = _best(self.evaluations[:earlier], "reward")
        newest = max(_mean(one.reward) for one in self.evaluations[earlier:])
        return None if newest > _mean(best.reward) else best

    def _settled(self) -> str | None:
        best = self._unbeaten()
        if best is None:
            return None
        why = (
            f"The trained reward on the held-out prompts has not risen above the {_mean(best.reward):.3g} of iteration "
            f"{best.iteration} in {self.settled} evaluations"
        )
        against = (
            f" Two of the rewards pull against each other (correlation {self.opposed:.2f} among the images of a "
            "prompt): what is good for one is bad for the other."
            if self.opposed < OPPOSED
            else ""
        )
        if best is self.evaluations[0]:
            to = "Raise the learning rate, or use a reward that tells images apart?"
            return f"{why}: nothing has been learned.{against} {'Drop one of the two?' if against else to}"
        return f"{why}: nothing is left to learn.{against} Take the LoRA of iteration {self.rollback}?"

    def _flat(self) -> str | None:
        if not self.flat or self.flat_rows < self.flat:
            return None
        return (
            f"All images of each prompt had the same reward in {self.flat_rows} iterations in a row, so nothing was "
            "learned: use a reward that tells them apart, more noise or more leaves."
        )

    def _far(self) -> str | None:
        if self.kl_limit is None or len(self.kl) < self.kl_window or fmean(self.kl) <= self.kl_limit:
            return None
        return (
            f"The policy is far from the base model: its KL was {fmean(self.kl):.3g} over the last {self.kl_window} "
            f"iterations, the limit is {self.kl_limit:.3g}. Raise kl, lower the learning rate, or stop here?"
        )


def course(rewards: list[float], window: int = 20, patience: int = 40) -> tuple[bool, str | None]:
    """What the mean rewards of all iterations so far tell where nobody evaluates, as in a graph of single steps.

    Returns whether the newest `window` iterations are the best ones in a row, and a sentence if the reward has clearly
    fallen since the best, or has not risen for `patience` iterations. The reward of an iteration depends on its prompts
    and seeds, so only means of windows are compared (Welch's standard error). Ours, no published rule.
    """
    known = [reward for reward in rewards if not math.isnan(reward)]
    means = [fmean(known[end - window : end]) for end in range(window, len(known) + 1)]
    if not means:
        return False, None
    best = max(range(len(means)), key=lambda i: means[i])  # the earliest of equals
    newest = best == len(means) - 1
    ago = len(means) - 1 - best
    fallen = _risen(known[best : best + window], known[-window:])
    if ago >= window and fallen < -FALLEN:
        return newest, (
            f"The reward has fallen from {means[best]:.3g} to {means[-1]:.3g} in the last {ago} iterations: the best "
            "state is kept as 'best'; a new run can begin from it, with a lower learning rate."
        )
    if len(known) >= 2 * patience and _risen(known[-2 * patience : -patience], known[-patience:]) < 1.5:
        return newest, (
            f"The reward has not risen in the last {patience} iterations: nothing is left to learn, or the learning "
            "rate is too low. The best state is kept as 'best'."
        )
    return newest, None


def _risen(before: list[float], now: list[float]) -> float:
    """Difference of two windows' means in standard errors."""
    error = math.sqrt((stdev(before) ** 2 + stdev(now) ** 2) / len(now))
    change = fmean(now) - fmean(before)
    return change / error if error > 1e-9 * abs(change) else math.copysign(math.inf, change) if change else 0.0


def compare(before: list[float], now: list[float]) -> tuple[float, int]:
    """(mean of now - before over its standard error, number of images), paired image by image; pairs with a NaN are
    left out.

    0 where fewer than two pairs are left or nothing changed; infinite where every image changed by the same amount.
    """
    changes = [b - a for a, b in zip(before, now) if not math.isnan(b - a)]
    if len(changes) < 2 or not any(changes):
        return 0.0, len(changes)
    mean, error = fmean(changes), stdev(changes) / math.sqrt(len(changes))
    if error <= 1e-9 * abs(mean):
        return math.copysign(math.inf, mean), len(changes)
    return mean / error, len(changes)


def limit(errors: float, images: int, candidates: int) -> float:
    """Standard errors that are as unlikely by chance as `errors` are for one comparison over very many images.

    images: pairs compared; fewer widen it (Student's t with images - 1 degrees of freedom).
    candidates: earlier evaluations the compared one was chosen from; the chance is shared out among them (Bonferroni).
    """
    from scipy.stats import t  # ComfyUI brings it; half a second to import

    return float(-t.ppf(NormalDist().cdf(-errors) / candidates, images - 1))


def _best(among: list[Evaluation], name: str) -> Evaluation:
    """The evaluation with the highest mean of a score, the earliest of equals."""
    return max(among, key=lambda one: _mean(getattr(one, name)))


def _mean(scores: list[float]) -> float:
    """Mean of what is not NaN; -inf where nothing is."""
    known = [score for score in scores if not math.isnan(score)]
    return fmean(known) if known else -math.inf


def _finite(scores) -> list[float]:
    """Any sequence of numbers as a list of floats; NaN for what is not finite, or too large to be a score."""
    return [float(score) if abs(score) < LARGEST else math.nan for score in scores]


def _times(errors: float) -> str:
    return "more than 100 times" if abs(errors) > 100 else f"{abs(errors):.1f} times"


def _replaced(value, change):
    """A nest of dicts and lists with every value in it changed."""
    if isinstance(value, dict):
        return {key: _replaced(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, change) for inner in value]
    return change(value)


@dataclass
class Skips:
    """Counts the iterations in which nothing could be learned: latents, rewards or gradients that are not finite."""

    in_a_row: int = 0
    total: int = 0
    iterations: int = 0

    def note(self, bad: bool) -> None:
        self.iterations += 1
        self.total += bool(bad)
        self.in_a_row = self.in_a_row + 1 if bad else 0

    def too_many(self, limit: int) -> bool:
        """Whether the newest `limit` iterations were all bad; 0 = never."""
        return 0 < limit <= self.in_a_row

    def sentence(self) -> str:
        row = "the last iteration" if self.in_a_row == 1 else f"{self.in_a_row} iterations in a row"
        return (
            f"Nothing could be learned in {row} ({self.total} of {self.iterations} in all): images, rewards or "
            "gradients were not finite numbers. Look at the newest images and check the reward model; if the images "
            "are black or noise, roll back and lower the learning rate."
        )

    def to_dict(self) -> dict:
        return asdict(self)
