"""Vision language models as judges behind an OpenAI-compatible address, asked as their papers do.

yes or no            P(yes) / (P(yes) + P(no)) of the answer's first token, from the server's logprobs. VQAScore
                     (arXiv 2404.01291) is P("Yes") of `Does this figure show "..."? Please answer yes or no.`; the
                     share of yes among yes and no is the same where the model says nothing else, and does not fall
                     with what it spends on other spellings. Several questions per picture, as GenEval's parts.
UnifiedReward-2.0    mean of alignment, coherence and style, 1..5, or one of them. Prompt and format:
                     inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py
... in pairs         shares of two pictures of one prompt for the same three, which add up to 1; a score per picture
                     from all comparisons by Bradley-Terry, mean 0 in each group. Prompt and format:
                     .../pair_score_image_generation.py in CodeGoat24/UnifiedReward (ff6f520). Pref-GRPO (arXiv
                     2508.20751) trains on such comparisons.
"""

import functools
import hashlib
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .combine import neighbours
from .contract import Reward, Trial, refuse_unpaired
from .human import bradley_terry
from .keys import key_for
from .measure import encoded
from .self_test import scenes
from .server import Fault, answer_text, ask, chat, checked_address, in_parallel, tell, trimmed

PRESETS = ("yes or no", "UnifiedReward-2.0", "UnifiedReward-2.0 in pairs")
EACH = ("mean", "all")
DIMENSIONS = ("alignment", "coherence", "style")
VQA = 'Does this figure show "{prompt}"? Please answer yes or no.'
REMEMBERED = 4096  # answers that are kept
ALTERNATIVES = 20  # tokens whose probabilities are asked for; OpenAI and vLLM give no more
LEAST_SAID = 0.01  # of the probability on yes and no together; below, the question was not answered

POINT = """You are presented with a generated image and its associated text caption. Your task is to analyze the image \
across multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""
PAIR = """You are presented with two generated images (Image 1 and Image 2) along with a shared text caption. Your \
task is to comparatively evaluate the two images across three specific dimensions:

- Alignment Score: How well each image matches the caption in terms of content.
- Coherence Score: How logically consistent and visually coherent each image is (absence of visual glitches, distorted \
objects, etc.).
- Style Score: How aesthetically appealing each image is, regardless of caption accuracy.

For each dimension, you must assign a relative score to Image 1 and Image 2, such that:
- Each score is a float between 0 and 1 (inclusive).
- The scores for Image 1 and Image 2 must sum to exactly 1.0 for each dimension.
- The higher the score, the better that image is in the corresponding dimension *relative to the other*.

This format emphasizes comparative quality rather than absolute evaluation.

Please provide your evaluation in the format below:

Alignment Score:
 Image 1: X
 Image 2: Y

Coherence Score:
 Image 1: X
 Image 2: Y

Style Score:
 Image 1: X
 Image 2: Y

Your task is provided as follows:
Text Caption: [{prompt}]"""
NUMBER = r"\**\s*:\s*\**\s*(\d+(?:\.\d+)?)"  # also where the judge writes in bold


@dataclass(frozen=True)
class Question:
    """What is asked about one picture, or about two of one prompt."""

    rows: tuple[int, ...]  # numbers of the pictures
    text: str
    read: Callable[[dict], float]  # the server's answer -> a number; raises Fault
    good: str = ""  # the good answer, "yes" or "no"; "" = the answer is a text with numbers


def questions_for(prompt: str, text: str) -> list[tuple[str, str]]:
    """(question, the good answer) for a prompt, from a text with a question per line.

    Lines before the first [prompt] are asked about every picture, those below a [prompt] about pictures of that prompt.
    {prompt} stands for it. A line that ends in "-> no" is good when it is answered with no. Without any line for this
    prompt it is VQAScore's question.
    """
    found, asked = [], True
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("[") and line.endswith("]"):
            asked = " ".join(line[1:-1].split()) == " ".join(prompt.split())
        elif asked:
            question, arrow, good = line.rpartition("->")
            if arrow and good.strip().lower() in ("yes", "no"):
                found.append((question.strip(), good.strip().lower()))
            else:
                found.append((line, "yes"))
    return [(question.replace("{prompt}", prompt), good) for question, good in found or [(VQA, "yes")]]


def yes_or_no(answer: dict, good: str = "yes") -> float:
    """The share of the good answer among yes and no, from the first token that says either; spellings count together.

    The format is OpenAI's, which vLLM and llama.cpp give: choices[0].logprobs.content, a list of {token, logprob,
    top_logprobs: [{token, logprob}]}.
    """
    answer_text(answer)  # a Fault that says what else it is
    try:
        steps = answer["choices"][0]["logprobs"]["content"] or []
        chances = [[(one["token"], float(one["logprob"])) for one in step["top_logprobs"] or [step]] for step in steps]
    except (KeyError, IndexError, TypeError, ValueError):
        chances = []
    if not chances:
        raise Fault(
            "The server gave no probabilities of its answer (logprobs): use one that does, such as vLLM or llama.cpp, "
            "or ask for a score in your own words.",
            for_all=True,
        )
    for tokens in chances:
        said = dict.fromkeys(("yes", "no"), 0.0)
        for token, chance in tokens:
            word = str(token).strip(" \n\t*\"'.,▁Ġ").lower()
            if word in said and chance <= 0:
                said[word] += math.exp(chance)
        if sum(said.values()) >= LEAST_SAID:
            return said[good] / sum(said.values())
    first = ", ".join(str(token) for token, _ in chances[0][:3])
    raise Fault(f"The judge did not begin with yes or no, but with {trimmed(first, 60)}: switch its thinking off.")


def dimension(text: str, name: str, after: str) -> float:
    """The number behind `after`, in the part of an answer that begins with this dimension's name."""
    part = re.search(rf"{name} Score(.*?)(?=(?:Alignment|Coherence|Style) Score|\Z)", text, re.IGNORECASE | re.DOTALL)
    found = part and re.search(after, part[1], re.IGNORECASE)
    if not found:
        raise Fault(f"The judge's answer has no {name} score: …{trimmed(text[-160:])}")
    return float(found[1])


def points(answer: dict, names: tuple[str, ...]) -> float:
    """Mean of these dimensions, 1..5."""
    text = answer_text(answer)
    return sum(dimension(text, name, r"(?:\(1-5\))?" + NUMBER) for name in names) / len(names)


def share(answer: dict, names: tuple[str, ...]) -> float:
    """How much the first image is the better one, 0..1: its part of the two numbers, mean over these dimensions."""
    text, found = answer_text(answer), []
    for name in names:
        first, second = (dimension(text, name, f"Image {number}" + NUMBER) for number in (1, 2))
        if first + second <= 0:
            raise Fault(f"The judge gave both images a {name} score of 0.")
        found.append(first / (first + second))
    return sum(found) / len(found)


def opponents(count: int, comparisons: int) -> list[tuple[int, int]]:
    """Pairs of `count` images so that each is compared about `comparisons` times, as often shown first as second.

    Image i meets i + 1, i + 2 and so on, around the circle; all pairs where there are no more than that.
    """
    if count - 1 <= comparisons:
        return [(i, j) if (i + j) % 2 else (j, i) for i in range(count) for j in range(i + 1, count)]
    return [(i, (i + step) % count) for step in range(1, max(comparisons // 2, 1) + 1) for i in range(count)]


class Judge(Reward):
    """Scores of a vision language model. Images that get none are NaN; one line of the log says how many and why."""

    def __init__(
        self,
        address: str,
        preset: str,
        *,
        model: str = "",
        questions: str = "",
        each: str = "mean",
        field: str = "",
        comparisons: int = 4,
        key_variable: str = "",
        timeout: float = 60.0,
        retries: int = 3,
        workers: int = 4,
        image_format: str = "jpeg",
        name: str | None = None,
        check: Callable[[], object] | None = None,
    ):
        """preset: one of PRESETS. model: its name on the server. questions, each: for "yes or no", see questions_for;
        "mean" of the answers, or "all" must be good (their product). field: one of DIMENSIONS for UnifiedReward, "" =
        their mean. comparisons: per image, in pairs. The others as in ServerReward; jpeg (quality 95) is what
        UnifiedReward's own code sends.
        """
        for value, choices, what in ((preset, PRESETS, "preset"), (each, EACH, "'each'")):
            if value not in choices:
                raise ValueError(f"Unknown {what} '{value}' of a judge: choose one of {', '.join(choices)}.")
        if field and field.lower() not in DIMENSIONS:
            raise ValueError(
                f"UnifiedReward has no '{field[:40]}': leave field empty, or write {', '.join(DIMENSIONS)}."
            )
        if not (math.isfinite(timeout) and timeout > 0) or retries < 0 or workers < 1 or comparisons < 1:
            raise ValueError(
                "A judge needs a timeout above 0, retries of 0 or more, and workers and comparisons of 1 or more."
            )
        self.address, self.preset, self.model, self.key_variable = (
            checked_address(address.strip(), True),
            preset,
            model,
            key_variable,
        )
        self.questions, self.each, self.comparisons, self.image_format = questions, each, comparisons, image_format
        self.names = (field.lower(),) if field else DIMENSIONS
        self.timeout, self.retries, self.workers, self.check = timeout, retries, workers, check
        self.name = name or model.rsplit("/", 1)[-1] or preset
        self.group_wise = preset == PRESETS[2]
        self.origin = ("server", address, {
            "preset": preset, "model": model, "questions": questions, "each": each, "field": field,
            "comparisons": comparisons, "key_variable": key_variable, "timeout": timeout, "retries": retries,
            "workers": workers, "image_format": image_format, "name": self.name,
        })  # fmt: skip
        self._answers: dict[bytes, float] = {}
        self._key()

    def trial(self) -> Trial:
        """Two pictures, for every request costs: a clean one damaged, or under another's prompt."""
        known = scenes()
        other = 4 if self.preset == PRESETS[0] and not self.questions.strip() else 2
        rows = [0, other]
        return Trial(known.images[rows], [known.prompts[i] for i in rows], [(0, 1)])

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1, B prompts -> [B] on the CPU, NaN where there is no score; an image that has no other
        of its prompt beside it has none in pairs.

        Raises RuntimeError when no image got a score because of faults; ValueError for bad settings.
        """
        refuse_unpaired(images, prompts)
        asked = self._asked(prompts)
        numbers = self._numbers(asked, images)
        faults: dict[int, Fault] = {}
        for question, number in zip(asked, numbers):
            if isinstance(number, Fault):
                faults.update((row, number) for row in question.rows if row not in faults)
        scores = (
            self._compared(asked, numbers, prompts) if self.group_wise else self._combined(asked, numbers, len(images))
        )
        tell(self.name, {row: fault for row, fault in faults.items() if scores[row].isnan()}, len(images))
        return scores

    def _asked(self, prompts: list[str]) -> list[Question]:
        """All questions about all images."""
        if self.group_wise:
            read = functools.partial(share, names=self.names)
            return [
                Question((group.start + i, group.start + j), PAIR.replace("{prompt}", prompts[group.start]), read)
                for group in neighbours(prompts)
                for i, j in opponents(group.stop - group.start, self.comparisons)
            ]
        if self.preset == PRESETS[1]:
            read = functools.partial(points, names=self.names)
            return [Question((row,), POINT.replace("{prompt}", prompt), read) for row, prompt in enumerate(prompts)]
        return [
            Question((row,), question, functools.partial(yes_or_no, good=good), good)
            for row, prompt in enumerate(prompts)
            for question, good in questions_for(prompt, self.questions)
        ]

    def _numbers(self, asked: list[Question], images: Tensor) -> list[float | Fault]:
        """The answer to each; what was asked before about the same pictures is not asked again."""
        files = [hashlib.blake2b(encoded(image, "PNG"), digest_size=16).digest() for image in images]
        keys = [
            hashlib.blake2b(
                b"".join(files[row] for row in one.rows) + f"{one.good} {one.text}".encode(), digest_size=16
            ).digest()
            for one in asked
        ]
        if len(self._answers) > REMEMBERED:
            self._answers.clear()
        new = {key: one for key, one in zip(keys, asked) if key not in self._answers}
        secret = self._key()
        tasks = [functools.partial(self._ask, one, images, secret) for one in new.values()]
        found = dict(zip(new, in_parallel(tasks, self.workers, self.check)))
        self._answers.update((key, number) for key, number in found.items() if not isinstance(number, Fault))
        return [found[key] if key in found else self._answers[key] for key in keys]

    def _ask(self, one: Question, images: Tensor, key: str, stop: threading.Event) -> float | Fault:
        question = chat(self.model, images[list(one.rows)], one.text, self.image_format)
        if one.good:
            question |= {"max_tokens": 4, "logprobs": True, "top_logprobs": ALTERNATIVES}
        return ask(self.address, question, one.read, key, self.timeout, self.retries, stop)

    def _combined(self, asked: list[Question], numbers: list[float | Fault], count: int) -> Tensor:
        """[count]; an image one of whose questions has no answer has no score."""
        found: list[list[float]] = [[] for _ in range(count)]
        for question, number in zip(asked, numbers):
            found[question.rows[0]].append(math.nan if isinstance(number, Fault) else number)
        rows = [torch.tensor(values, dtype=torch.float64) for values in found]
        return (
            torch.stack([row.prod() if self.each == "all" else row.mean() for row in rows]).float()
            if rows
            else torch.zeros(0)
        )

    def _compared(self, asked: list[Question], numbers: list[float | Fault], prompts: list[str]) -> Tensor:
        """[B]: Bradley-Terry scores within each group, from shares as parts of a win."""
        wins, met = torch.zeros(len(prompts), len(prompts)), torch.zeros(len(prompts), dtype=torch.bool)
        for question, number in zip(asked, numbers):
            if not isinstance(number, Fault):
                i, j = question.rows
                wins[i, j] += number
                wins[j, i] += 1 - number
                met[[i, j]] = True
        scores = torch.full((len(prompts),), torch.nan)
        for group in neighbours(prompts):
            if met[group].any():
                scores[group] = bradley_terry(wins[group, group]).float()
        return torch.where(met, scores, torch.nan)

    def _key(self) -> str:
        """The API key. It is read when it is needed and never kept."""
        return key_for(self.address, self.key_variable)
