"""Teach My Taste: a reward that asks the person about the pictures that tell most, and learns from every answer.

What is asked: of a tree's leaves, the few whose pick is expected to say most about the taste (BALD), over all prompts
of the iteration. Leaves of one tree differ by few decisions, so a pick between them tells which decision was liked.
Before the head knows anything they are drawn at random. Ours, no published recipe.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .combine import neighbours
from .contract import Reward
from .human import HumanReward, Undone
from .taste import FILE, Features, Head, Known, MyTaste, answered, fit, save

SETS = 60  # sets of leaves that are tried for a question, per prompt


class Teaching(Reward):
    """Asks while it trains: scores are the probability that the person prefers a picture (MyTaste), by a head that is
    fitted anew after each answer; all equal until the answers agree with each other by more than luck.

    Every state follows from the book of picks and the iteration, so a run that was stopped goes on with the same
    question.
    """

    name, group_wise, whole = "my taste", True, True

    def __init__(
        self,
        person: HumanReward,
        features: Features,
        also: Reward | None = None,
        *,
        show: int = 4,
        questions: int = 50,
        every: int = 3,
        each: int = 1,
        say: Callable[[str], None] = lambda text: None,
    ):
        """person: with the run's book and its iteration. also: another reward as a feature. show: pictures in a
        question. questions: answers wanted in all. every: iterations from one question to the next, once the taste is
        known. each: questions in such an iteration, at most one per prompt. say: gets a sentence after each answer.
        """
        if show < 2:
            raise ValueError("A question needs at least 2 pictures: raise show.")
        self.person, self.known, self.say = person, Known(features, also), say
        self.show, self.questions, self.every, self.each = show, questions, every, each
        self.head: Head | None = None
        self._fitted: tuple[list, Head | None] = [], None  # the answers of the newest fit, and what it gave
        self._last: tuple | None = None  # what was asked last, while it can be taken back

    # what the book says

    def answers(self, before: int | None = None) -> list[dict]:
        """The newest answer of the person to each group, first answered first; skips and time-outs are none.

        before: only those of earlier iterations.
        """
        return [row for _, row in answered([self.person.picks], before)]

    def left(self) -> int:
        return max(self.questions - len(self.answers()), 0)

    def ends(self, iteration: int, settle: int) -> int:
        """The iteration at which all questions are asked and `settle` more iterations are trained, as far as can be
        foreseen.
        """
        if self.left():
            return iteration + -(-self.left() // self.each) * self.every + settle
        return max((row["iteration"] or 0 for row in self.answers()), default=-1) + 1 + settle

    def due(self) -> bool:
        """Whether the iteration that is being scored asks."""
        now = self.person.iteration()
        before = [row["iteration"] or 0 for row in self.answers(now)]
        if len(before) >= self.questions:
            return False
        return self.head is None or not self.head.sure or now - max(before, default=-self.every) >= self.every

    def fitted(self, before: int | None = None) -> Head | None:
        """The head that the answers give, those before an iteration or all; fitted anew where they are others."""
        told = [(row["id"], row["answer"]) for row in self.answers(before)]
        if told != self._fitted[0]:
            choices = self.known.choices([self.person.picks], before)
            self._fitted = told, fit(choices) if choices else None
        return self._fitted[1]

    # the reward

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1, B prompts -> [B]; neighbouring images of one prompt are a group. NaN for a picture
        that holds NaN.
        """
        groups = [group for group in neighbours(prompts) if group.stop - group.start > 1]
        if groups:
            self.head = self.fitted(self.person.iteration())
        seen = self.known.look(images.nan_to_num(0.0), prompts)
        if groups and self.due():
            self._ask(images, prompts, seen, groups)
        sure = self.head is not None and self.head.sure
        return MyTaste(self.head if sure else None, self.known).judged(images, seen)

    def _ask(self, images: Tensor, prompts: list[str], seen: Tensor, groups: list[slice]) -> None:
        """`each` questions, one after the other: the next one already knows the answer before."""
        generator = torch.Generator().manual_seed(self.person.iteration() + 1)
        for _ in range(min(self.each, len(groups))):
            group, rows = self._question(seen, groups, generator)
            groups = [other for other in groups if other is not group]
            self._answered([images[i] for i in rows], prompts[rows[0]])
            self.head = self.fitted()
            if self.head is not None:
                self.say(self.head.said())

    def _question(self, seen: Tensor, groups: list[slice], generator) -> tuple[slice, list[int]]:
        """The group and the rows of its pictures that tell most."""
        best = None
        for group in groups:
            count = group.stop - group.start
            size = min(self.show, count)
            sets = torch.stack([torch.randperm(count, generator=generator)[:size] for _ in range(SETS)])
            told = self.informative(seen[group], sets, generator)
            if best is None or float(told.max()) > best[0]:
                best = float(told.max()), group, [group.start + int(i) for i in sets[told.argmax()].sort().values]
        return best[1], best[2]

    def informative(self, seen: Tensor, sets: Tensor, generator) -> Tensor:
        """How much a pick among each set of rows tells: [n, D + 1], [s, k] -> [s]."""
        if self.head is None:
            return torch.rand(len(sets), generator=generator)
        return self.head.informative(seen, sets, generator)

    def _answered(self, images: list[Tensor], prompt: str) -> None:
        shown = {"counted": "question", "groups": self.questions}
        while True:
            shown |= {
                "group": min(len(self.answers()) + 1, self.questions),
                "note": self.head.said() if self.head is not None else "",
            }
            try:
                self.person.answer(images, prompt, undo=self._last is not None, **shown)
                self._last = images, prompt
                return
            except Undone:
                earlier, self._last = self._last, None
                self.person.answer(*earlier, again=True, **shown)

    def learned(self) -> MyTaste:
        """What was learned, as a reward that asks nobody."""
        return MyTaste(self.fitted(), self.known)

    def told(self) -> str:
        """How well the taste is known, in a sentence."""
        head = self.fitted()
        return head.said() if head is not None else "No pick yet."

    def keep(self, folder: Path) -> None:
        """The head of all answers, in the run's folder, for the My Taste node."""
        head = self.fitted()
        if head is not None:
            save(head, folder / FILE, self.known.features, [row["id"] for row in self.answers()])
