"""A person's choice as the reward: the grammar of an answer, scores from it (Bradley-Terry), and the reward that asks.

    3                image 3 is the best (images are counted from 1)
    3, 5             both are better than all others
    3 / 7            3 is the best, 7 the worst, the others are between
    3 > 1 = 2 > 7    a ranking; = (or a comma) for a tie
    none             none of them is good: they are not compared with each other, but My Taste learns from it
    - or skip        no opinion: the automatic reward decides if there is one, else the group trains nothing

Images that are not named stand below all named ones, and above those after the /. They are not compared with each
other.
"""

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..method.advantage import group_z, leaf_advantages, total_reward
from .combine import neighbours, scores
from .contract import Reward
from .picks import Picks, described

log = logging.getLogger("treerpo")
HOW = ("best", "best and worst", "ranking")
NO_OPINION = ("-", "skip")
NONE = "none"  # of these
UNDO = "undo"  # the answer before is taken back: it is asked for again
EXAMPLES = (
    "write the best image's number such as 3, best and worst such as 3 / 7, a ranking such as 3 > 1 = 2 > 7, or - for "
    "no opinion"
)
PRIOR = 0.5  # half a win and half a loss against an image of average quality


@dataclass(frozen=True)
class Answer:
    """What a person said of a group: every image stands on one level."""

    levels: tuple[tuple[int, ...], ...]  # image numbers counted from 0, best level first; no comparison within a level

    def wins(self) -> Tensor:
        """[n, n] with 1 where image i was preferred to image j."""
        level = torch.empty(sum(map(len, self.levels)), dtype=torch.long)
        for k, images in enumerate(self.levels):
            level[list(images)] = k
        return (level[:, None] < level).float()


def parse(text: str, count: int) -> Answer | None:
    """The answer for a group of `count` images, None for no opinion.

    Raises ValueError with one sentence for anything else.
    """
    said = text.strip()
    if said.lower() in NO_OPINION:
        return None
    if said.lower() == NONE:
        return Answer((tuple(range(count)),))
    if not said:
        raise ValueError(f"The answer is empty: {EXAMPLES}.")
    better, slash, worse = said.partition("/")
    if "/" in worse:
        raise ValueError(
            f"The answer '{shorter(said)}' has more than one /: write the best before it and the worst after it, such "
            "as 3 / 7."
        )
    if slash and not better.strip() and not worse.strip():
        raise ValueError(f"There is no image number in the answer '{shorter(said)}': {EXAMPLES}.")
    above, below = (
        [_level(part, said, count) for part in side.split(">")] if side.strip() else [] for side in (better, worse)
    )
    named = [i for level in (*above, *below) for i in level]
    for i in named:
        if named.count(i) > 1:
            raise ValueError(f"Image {i + 1} is named twice in the answer '{shorter(said)}': name each image once.")
    rest = tuple(i for i in range(count) if i not in named)
    return Answer(tuple(level for level in (*above, rest, *below) if level))


def _level(text: str, said: str, count: int) -> tuple[int, ...]:
    found = []
    for word in re.split("[,=]", text):
        word = word.strip()
        if not (word.isdecimal() and len(word) < 7):
            raise ValueError(
                f"In the answer '{shorter(said)}' there is {f'{shorter(word)!r} where' if word else 'nothing where'} "
                f"an image number belongs: {EXAMPLES}."
            )
        if not 1 <= int(word) <= count:
            raise ValueError(f"There is no image {int(word)} in this group of {count}: its images are 1 to {count}.")
        found.append(int(word) - 1)
    return tuple(found)


def shorter(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def bradley_terry(
    wins, n: int | None = None, prior: float = PRIOR, tolerance: float = 1e-9, most: int = 100000
) -> Tensor:
    """Scores s [n], mean 0, float64, that explain the comparisons: P(i beats j) = sigmoid(s_i - s_j) (Bradley & Terry
    1952).

    wins: [n, n], how often i beat j, or a list of (winner, loser) pairs for n images. Found by the MM algorithm of
    Hunter (2004, eq. 3) for the maximum of the posterior whose prior is `prior` wins and as many losses of every image
    against one of score 0: so an image that won or lost everything stays finite, and one without comparisons is
    average. The posterior is strictly concave, so its maximum is the only one.
    """
    if not torch.is_tensor(wins):
        pairs, wins = wins, torch.zeros(n, n)
        for winner, loser in pairs:
            wins[winner, loser] += 1
    if prior <= 0:
        raise ValueError("The prior must be above 0, or an image that won everything would have no finite score.")
    wins = wins.double()
    games, won = wins + wins.T, wins.sum(1) + prior
    strength = torch.ones(len(wins), dtype=torch.float64)  # exp(s)
    for _ in range(most):
        before = strength
        strength = won / ((games / (before[:, None] + before)).sum(1) + 2 * prior / (before + 1))
        if (strength / before).log().abs().amax() < tolerance:
            break
    found = strength.log()
    return found - found.mean()


def choice_scores(answers: list[Answer]) -> Tensor:
    """Rewards [n] of one group by all answers to it: Bradley-Terry scores with mean 0 and standard deviation 1; all 0
    if everything is tied.

    A choice says which of these images is better, not how good they are: so it has no height and no scale beyond its
    group.
    """
    return group_z(bradley_terry(sum(answer.wins() for answer in answers))[None])[0][0].float()


@dataclass
class Question:
    """What a person is asked."""

    id: str  # see core.rewards.picks.group_id
    prompt: str
    how: str  # one of HOW: what the person is asked for; every form of answer counts
    images: Tensor | list  # [n, H, W, 3] in 0..1, or a list of [H, W, 3]
    iteration: int | None  # of the run, where there is one
    group: int = 1  # which of
    groups: int = 0  # so many; 0 = unknown
    counted: str = "prompt"  # what group and groups count
    undo: bool = False  # whether the answer before can be taken back
    note: str = ""  # what else the person is told, in our own words
    kept: bool = False  # whether the answer counts, and is in the book if the disk took it
    settled: threading.Event = field(default_factory=threading.Event)  # from here on `kept` is final


class NobodyThere(ValueError):
    """There is no way to ask a person."""


class Undone(Exception):
    """The person takes back the answer before this question."""


class HumanReward(Reward):
    """Asks a person about the images of each prompt. The same group is asked once: after that, the book of picks
    answers.

    Nobody answers, or has no opinion: the fallback's scores, z-scored within the group, for a pick has mean 0 and
    standard deviation 1 there and the two must not differ in scale from group to group; without a fallback no score,
    and the group trains nothing. A group of one image, such as the Trainer's held-out prompts, is never asked about:
    the fallback's raw score, else none.
    """

    group_wise = True

    def __init__(
        self,
        ask: Callable[[Question], str | None],
        how: str = "best",
        *,
        fallback=None,
        picks: Picks | None = None,
        replay: bool = True,
        show: int = 0,
        iteration: Callable[[], int | None] = lambda: None,
        name: str = "person",
    ):
        """ask: the answer's text, None = time-out; may raise NobodyThere, or whatever stops the run. picks: where
        answers are kept. replay: let them answer. show: at most so many images of a group, 0 = all; the others get no
        score. iteration: of the run, now.
        """
        if how not in HOW:
            raise ValueError(f"Unknown way of asking '{how}': choose one of {', '.join(HOW)}.")
        if show == 1:
            raise ValueError("A person who sees one image has no choice: set show to 0 or to at least 2.")
        self.ask, self.how, self.fallback, self.picks, self.replay, self.show = ask, how, fallback, picks, replay, show
        self.iteration, self.name = iteration, name

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1, B prompts -> [B]; neighbouring images of one prompt are a group. NaN = no score."""
        return torch.cat([self.choose(images[group], prompts[group.start])[0] for group in neighbours(prompts)])

    def choose(self, images, prompt: str, group: int = 1, groups: int = 0) -> tuple[Tensor, Answer | None]:
        """Scores [n] of one group, and the person's answer about the images that were shown, if there is one."""
        if len(images) == 1:
            return self.automatic(images, prompt), None
        shown = self._shown(images, prompt)
        answer = self.answer([images[i] for i in shown], prompt, group=group, groups=groups)
        if answer is None:
            return self.automatic(images, prompt), None
        found = torch.full((len(images),), torch.nan)
        found[shown] = choice_scores([answer])
        return found, answer

    def automatic(self, images, prompt: str) -> Tensor:
        """The fallback's scores [n]: of one image as they are, of several z-scored; NaN without a fallback, and where
        it has none.
        """
        if self.fallback is None:
            return torch.full((len(images),), torch.nan)
        found = scores(self.fallback, images, [prompt] * len(images))
        total = total_reward(found.values, found.weights)
        if len(images) == 1 or not total.isfinite().any():
            return total
        together, _ = leaf_advantages(found.values, 1, found.weights, float("inf"), found.raw)
        together = torch.where(total.isfinite(), together, torch.nan)
        return torch.where(total.isfinite(), group_z(together[None])[0][0], torch.nan)

    def _shown(self, images, prompt: str) -> list[int]:
        """Which images the person sees, in their order: the fallback's best and worst ones, or evenly spread ones
        without it.
        """
        count = len(images)
        if not self.show or self.show >= count:
            return list(range(count))
        automatic = self.automatic(images, prompt)
        if not automatic.isfinite().any():
            return [i * (count - 1) // (self.show - 1) for i in range(self.show)]
        order = automatic.nan_to_num(float("-inf")).argsort(descending=True, stable=True).tolist()
        return sorted(order[: -(-self.show // 2)] + order[count - self.show // 2 :])

    def answer(self, images: list[Tensor], prompt: str, again: bool = False, **shown) -> Answer | None:
        """From the book, else from the person; None = no opinion or no answer.

        again: ask even if the book knows. shown: further fields of Question. Raises Undone, see there.
        """
        about = described(prompt, images, self.iteration())
        known = self.picks.find(about) if self.picks is not None and self.replay and not again else None
        if known is not None:
            return self._read(known["answer"], about)[1]
        question = Question(about["id"], prompt, self.how, images, about["iteration"], **shown)
        try:
            return self._asked(question, about)
        except NobodyThere as error:
            if self.fallback is None:
                raise
            log.warning("%s The fallback reward decides.", error)
            return None
        finally:
            question.settled.set()

    def _asked(self, question: Question, about: dict) -> Answer | None:
        """The person's answer, once it is in the book. Raises Undone."""
        began = time.monotonic()
        text = self.ask(question)
        if text == UNDO and question.undo:
            question.kept = True
            raise Undone
        text, answer = self._read(text, about)
        if self.picks is not None:
            self.picks.add(
                about,
                question.images,
                how=self.how,
                answer=text,
                levels=answer.levels if answer else (),
                seconds=time.monotonic() - began,
                by="time-out" if text is None else "skip" if answer is None else "person",
            )
        question.kept = True
        return answer

    def _read(self, text: str | None, about: dict) -> tuple[str | None, Answer | None]:
        """The text and what it says; one that cannot be read counts as none."""
        try:
            return text, parse(text, about["count"]) if text is not None else None
        except ValueError as error:
            log.warning("The answer about group %s counts as none: %s", about["id"], error)
            return None, None


def lines_of(text: str) -> list[tuple[str | None, str]]:
    """The lines of Pick the Winner's widget: (the id of a group or None, the answer)."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        named = re.fullmatch(r"([0-9a-fA-F]{10})\s*:(.*)", line)
        found.append((named[1].lower(), named[2].strip()) if named else (None, line))
    return found


def picks_for(text: str, ids: list[str], counts: list[int], unnamed: bool) -> list[tuple[str, Answer | None] | None]:
    """Per group (the answer's text, the answer), or None where there is no line for it.

    Lines that begin with a group's id are for that group; those with the id of another group are passed over. unnamed:
    lines without an id count too, for the other groups in their order. Raises ValueError for too many lines and for
    answers that cannot be read.
    """
    lines = lines_of(text)
    named = {name: answer for name, answer in lines if name in ids}
    plain = [answer for name, answer in lines if name is None] if unnamed else []
    open_groups = [name for name in ids if name not in named]
    if len(plain) > len(open_groups):
        raise ValueError(
            f"There are {len(plain)} lines of picks without an id for {len(open_groups)} groups: write one line per "
            "group."
        )
    named |= dict(zip(open_groups, plain))
    found = []
    for group, (name, count) in enumerate(zip(ids, counts), 1):
        try:
            found.append((named[name], parse(named[name], count)) if name in named else None)
        except ValueError as error:
            raise ValueError(f"The pick for group {group} ({name}): {error}") from None
    return found
