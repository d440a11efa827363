"""The prompts of a run: read from text or a file, split into trained and held-out ones, and taken turn by turn.

What a text is, in every node and file:

- In a list of prompts (Tree Prompts, Prompt List, a .txt file) each line is a prompt: `lines`.
- Anywhere else (Score Images, Pick the Winner, a picture's .txt) a text is one prompt, line breaks and all.
- What Tree Prompts, Prompt List and Image Folder put out knows its prompts, however it is written: `PromptText`.
- Of several texts at once, ComfyUI's lists, each is one prompt: `listed` for a list of prompts, `share` for images.
"""

import csv
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..files import read_text
from ..method.noise import generator, seed_for
from ..references import fingerprint, with_references

LARGEST_FILE = 50_000_000  # bytes
# Names of a prompt in .jsonl and .csv, in any case and with spaces, - or _; the first one that is there counts.
COLUMNS = ("prompt", "prompts", "positive prompt", "positive prompts", "positive", "positives")
COLUMNS += ("text", "texts", "caption", "captions")
NAMED = '"prompt", "text" or "caption"'
# What kohya's trainers and ComfyUI's prompt widgets understand, and no text encoder does.
OPTION = re.compile(r"(n|ss|cn|i|ci|of|am|ctr|cm) .+|(w|h|d|s|l|g|f|fs|t|b) -?[\d.]+")
CHOICE = re.compile(r"\{[^{}|]*\|[^{}]*\}")


class PromptText(str):
    """A text that knows its prompts: one, whatever line breaks are in it, or several."""

    def __new__(cls, text: str, prompts: Iterable[str] = ()):
        made = super().__new__(cls, text)
        made.prompts = tuple(prompts)
        return made


@dataclass
class PromptList:
    """Prompts without duplicates, in the order of the list; no prompt is empty or has a line break."""

    train: list[str]  # what the run learns from
    held_out: list[str] = field(default_factory=list)  # what it is only judged by
    duplicates: int = 0  # how many were left out because they came before
    # what the user should know about them, a sentence each
    notes: list[str] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return len(self.train) + len(self.held_out)


def lines(text: str) -> list[str]:
    """The prompts of a list: one per line.

    Spaces around a prompt and empty lines are dropped. A line that is '#' or begins with '# ' is a comment; '#1 dad
    mug' is a prompt.
    """
    every = (line.strip() for line in text.removeprefix("\ufeff").splitlines())
    return [line for line in every if line and line != "#" and not line.startswith("# ")]


def listed(texts: Sequence[str], name: str = "The prompt list") -> tuple[list[str], list[str]]:
    """The prompts of a list that was given as one text, or as several with a prompt each; and what to say about them.

    Each is on one line, none is empty.
    """
    if len(texts) == 1 and not isinstance(texts[0], PromptText):
        return _cleaned(lines(texts[0]), name)
    return _cleaned([prompt for text in texts for prompt in _own(text)], name)


def share(texts: Sequence[str], batches: Sequence[int]) -> list[str]:
    """The prompt of each image. texts: the prompts as they came; batches: how many images came in each batch.

    One text is for all images; if it knows several prompts, each is for an equal part of them, in order. Several texts
    are shared out so too, or belong to as many batches or images. Raises ValueError where that does not come out even,
    or where a plain text has as many lines as there are images, and so may be one prompt or one per image.
    """
    count = sum(batches)
    if len(texts) == 1 and not isinstance(texts[0], PromptText) and 1 < count == len(lines(texts[0])):
        raise ValueError(
            f"The text has {count} lines for {count} images, so it may be one prompt or one per image: connect the "
            "output prompts of Tree Prompts for one per image, or write the prompt in one line."
        )
    if len(texts) == len(batches):
        return [prompt for text, size in zip(texts, batches) for prompt in _even(_own(text), size)]
    if len(texts) in (1, count) or len(batches) == 1:
        return _even([prompt for text in texts for prompt in _own(text)], count)
    raise ValueError(
        f"There are {len(texts)} prompts for {len(batches)} batches of together {count} images: give one prompt per "
        "batch, one per image, or one for all."
    )


def _own(text: str) -> list[str]:
    return list(text.prompts) if isinstance(text, PromptText) else [text.strip()]


def _even(prompts: list[str], count: int) -> list[str]:
    if not prompts or count % len(prompts):
        raise ValueError(
            f"{count} images cannot be shared out evenly over {len(prompts)} prompts: give each prompt as many images."
        )
    return [prompt for prompt in prompts for _ in range(count // len(prompts))]


def note_on(texts: Sequence[str]) -> str:
    """What to say where a plain text of several lines is taken as one prompt, else an empty text."""
    count = len(lines(texts[0])) if len(texts) == 1 and not isinstance(texts[0], PromptText) else 1
    return (
        f"The {count} lines of prompts are one prompt, for all images. For a prompt per line connect the output "
        "prompts of Tree Prompts."
        if count > 1
        else ""
    )


def parse(text: str) -> PromptList:
    """The prompts of a list, one per line as in `lines`, all of them for training. ValueError where there is none."""
    return collect([text], "The prompt list")


def collect(texts: Sequence[str], name: str = "The prompt list", references: Sequence[torch.Tensor] = ()) -> PromptList:
    """The prompts of a list as in `listed`, without duplicates, all of them for training. ValueError without any.

    references: pictures that they are to change, as in `with_references`; of the same words about other pictures none
    is a duplicate.
    """
    prompts, notes = listed(texts, name)
    return _unique(with_references(prompts, references), notes, name)


def read(path: Path | str, references: Sequence[torch.Tensor] = ()) -> PromptList:
    """The prompts of a UTF-8 file of up to 50 MB, all of them for training. references: as in `collect`.

    .txt: as `parse`. .jsonl: per line a text in quotes, or an object with one of COLUMNS. .csv: the column of such a
    name; the first row is a header if one of its cells has that name (columns between commas, semicolons or tabs).
    Without a header every row is a prompt in its first column, and beside it there may be numbers only: a text there
    may be the rest of a prompt with a comma, and is refused. Empty lines and empty prompts are skipped; line breaks
    inside a prompt become spaces. Raises ValueError, with the number of the line, for whatever cannot be read.
    """
    path = Path(path)
    readers = {".txt": lambda text, name: lines(text), ".jsonl": _json_prompts, ".csv": _csv_prompts}
    if path.suffix.lower() not in readers:
        raise ValueError(f"The prompt file {path.name} is none that can be read: use {', '.join(readers)}.")
    text = read_text(path, "prompt file", LARGEST_FILE)
    prompts = readers[path.suffix.lower()](text, path.name) if text.strip() else []
    cleaned, notes = _cleaned(prompts, path.name)
    return _unique(with_references(cleaned, references), notes, path.name)


def _cleaned(prompts: Iterable[str], name: str) -> tuple[list[str], list[str]]:
    """Prompts on one line each, without empty ones and without the options of other programs; and what to say."""
    every = [" ".join(filter(None, (part.strip() for part in prompt.splitlines()))) for prompt in prompts]
    every = [prompt for prompt in every if prompt]
    told = {"left out": [], "option": [], "choice": []}
    for i, prompt in enumerate(every):
        plain, *options = re.split(r"\s+--(?=[a-z])", prompt)
        if options and all(OPTION.fullmatch(option.strip()) for option in options):
            every[i] = plain
            told["left out"].append(prompt[len(plain) :].strip())
        elif options:
            told["option"].append(prompt[len(plain) :].strip())
        told["choice"] += [found[0] for found in [CHOICE.search(plain)] if found]
    says = {
        "left out": "had options for another program, which are no part of a prompt and were left out",
        "option": "may have options for another program: they are trained on as words; if not meant, remove them",
        "choice": "have a choice in braces, which is not made here but trained on as written: write a line for each",
    }
    notes = [
        f"{len(told[kind])} of {len(every)} prompts {says[kind]}: '{told[kind][0][:60]}'" for kind in says if told[kind]
    ]
    for note in notes:
        logging.warning("%s: %s", name, note)
    return every, notes


def _unique(prompts: list[str], notes: list[str], name: str) -> PromptList:
    if not prompts:
        raise ValueError(f"{name} has no prompt in it: write at least one, one per line.")
    unique = list(dict.fromkeys(prompts))
    if len(unique) < len(prompts):
        logging.info(
            "%s: %d of %d prompts came before and were left out", name, len(prompts) - len(unique), len(prompts)
        )
    return PromptList(unique, duplicates=len(prompts) - len(unique), notes=notes)


def _json_prompts(text: str, name: str):
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a JSON text may hold other line breaks
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f'Line {number} of {name} is not JSON: each line must be one object such as {{"prompt": "a red '
                'circle"}.'
            ) from error
        if isinstance(value, dict):
            key = _named(list(value))
            if key is None:
                raise ValueError(f"Line {number} of {name} has no {NAMED}: name the prompt so.")
            value = list(value.values())[key]
        if not isinstance(value, str):
            raise ValueError(f"The prompt in line {number} of {name} is not text: put it into quotes.")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(
                f"The prompt in line {number} of {name} has half a character (\\ud800 to \\udfff alone): write it as "
                "UTF-8."
            )
        yield value


def _csv_prompts(text: str, name: str):
    number = 1
    try:
        delimiter, column, width = _csv_header(text)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter or ",", strict=True, skipinitialspace=True)
        header = delimiter is not None
        for row in rows:
            while row and not row[-1].strip():
                row.pop()
            if row and not header:
                width = width or len(row)
                if len(row) > width:
                    raise ValueError(
                        f"Line {number} of {name} has {len(row)} columns instead of {width}: put prompts with commas "
                        "into quotes."
                    )
                tabs = row[0].count("\t")
                if delimiter is None and (tabs or not all(map(_number, row[1:]))):
                    raise ValueError(
                        f"Line {number} of {name} has {len(row) + tabs} columns, and no header says which is the "
                        "prompt: put prompts with commas into quotes, or begin the file with a line of names, one of "
                        f"them {NAMED}."
                    )
                if column < len(row):
                    yield row[column]
            header, number = header and not row, rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"The row that begins in line {number} of {name} is not CSV ({error}): check its quotes."
        ) from error


def _csv_header(text: str) -> tuple[str | None, int, int | None]:
    """Delimiter, the prompts' column and the number of columns by the first row; None where that row is no header."""
    line = text.lstrip("\r\n").splitlines()[0]
    for delimiter in ",;\t":
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        column = _named(cells)
        if column is not None:
            return delimiter, column, len(cells)
    return None, 0, None


def _named(names: list[str]) -> int | None:
    """Which of the names says that a prompt is there."""
    plain = [" ".join(re.split(r"[\s_-]+", name.strip().lower())) for name in names]
    return next((plain.index(name) for name in COLUMNS if name in plain), None)


def _number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell or 0))
    except ValueError:
        return False


def split(prompts: PromptList, held_out: float, seed: int) -> PromptList:
    """Hold prompts out of training, chosen by a hash of their text, their reference image and the seed: always the
    same, in whatever order they are listed.

    held_out below 1: the share of prompts, each decided on its own, so a prompt that is added or taken away moves no
    other. 1 and above: that many prompts exactly, those of the lowest hashes, so a prompt that is added moves at most
    one other back to training. 0: none. At least one prompt is left for training. A share of a short list may be none;
    then use a number.
    """
    if not (math.isfinite(held_out) and held_out >= 0) or (held_out >= 1 and held_out != int(held_out)):
        raise ValueError(
            f"Held-out prompts are set to {held_out:g}: give a share below 1, or a whole number of prompts."
        )
    every = [*prompts.train, *prompts.held_out]
    if not every:
        raise ValueError("There are no prompts to split: write at least one.")
    place = {prompt: seed_for(seed, "held out", fingerprint(prompt)) / 2**63 for prompt in every}
    ranked = sorted(every, key=place.get)
    count = int(held_out) if held_out >= 1 else sum(place[prompt] < held_out for prompt in every)
    chosen = set(ranked[: min(count, len(every) - 1)])
    if held_out > 0 and not chosen:
        logging.warning(
            "None of the %d prompts is held out: give a number of prompts instead of a share, and at least 2 prompts",
            len(every),
        )
    return PromptList(
        [p for p in every if p not in chosen], [p for p in every if p in chosen], prompts.duplicates, prompts.notes
    )


def order(count: int, per_iteration: int, iteration: int, seed: int, shuffle: bool = True) -> list[int]:
    """Which of `count` prompts an iteration takes, by their numbers: a function of its arguments alone, so resuming
    needs no state.

    Iterations go through shuffled epochs, each with every prompt once, and on across an epoch's end. No prompt comes
    twice in one iteration.
    per_iteration: 0 = all; never more than all. shuffle False: plain turns, as Tree Prompts takes them.
    """
    if count < 1 or per_iteration < 0 or iteration < 0:
        raise ValueError(
            f"There are {count} prompts, {per_iteration} per iteration, at iteration {iteration}: none may be "
            "negative, and one prompt is needed."
        )
    per = min(per_iteration or count, count)
    positions = range(iteration * per, (iteration + 1) * per)
    if not shuffle:
        return [position % count for position in positions]
    epochs = {epoch: _epoch(count, per, epoch, seed) for epoch in {positions[0] // count, positions[-1] // count}}
    return [epochs[position // count][position % count] for position in positions]


def _epoch(count: int, per: int, epoch: int, seed: int) -> list[int]:
    """The permutation of one epoch.

    Where an iteration runs across the epoch's beginning, prompts it has already taken change places with later ones.
    That depends on how the epoch before ended, and so on back to an epoch that began with an iteration. With twice as
    many prompts as an iteration takes an epoch has a whole iteration inside, there is always room to change places
    with, and no epoch's end is changed.
    """
    first = epoch - epoch % (per // math.gcd(count, per))
    if count >= 2 * per:
        first = max(first, epoch - 1)
    turn = []
    for number in range(first, epoch + 1):
        before, turn = turn, torch.randperm(count, generator=generator(seed, "prompts", number)).tolist()
        taken = set(before[count - number * count % per :]) if before and number * count % per else set()
        head = per - len(taken) if taken else 0
        later = (j for j in range(head, count) if turn[j] not in taken)
        clashes = [i for i in range(head) if turn[i] in taken]
        for i, j in zip(clashes, list(later)):
            turn[i], turn[j] = turn[j], turn[i]
    return turn
