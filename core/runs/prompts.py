"""The prompts of a run: read from text or a file, split into trained and held-out ones, and taken turn by turn."""

import csv
import io
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..method.noise import generator, seed_for

LARGEST_FILE = 50_000_000  # bytes
COLUMNS = ("prompt", "text", "caption")  # names of a prompt in .jsonl and .csv; the first one that is there counts


@dataclass
class PromptList:
    """Prompts without duplicates, in the order of the list; no prompt is empty or has a line break."""

    train: list[str]  # what the run learns from
    held_out: list[str] = field(default_factory=list)  # what it is only judged by
    duplicates: int = 0  # how many were left out because they came before

    def __len__(self) -> int:
        return len(self.train) + len(self.held_out)


def parse(text: str) -> PromptList:
    """One prompt per line, all of them for training.

    Spaces around a prompt and empty lines are dropped. A line that is '#' or begins with '# ' is a comment; '#1 dad
    mug' is a prompt. Raises ValueError where no prompt is left.
    """
    lines = (line.strip() for line in text.removeprefix("\ufeff").splitlines())
    return _collect((line for line in lines if line != "#" and not line.startswith("# ")), "The prompt list")


def read(path: Path | str) -> PromptList:
    """The prompts of a UTF-8 file of up to 50 MB, all of them for training.

    .txt: as `parse`. .jsonl: per line a text in quotes, or an object with "prompt", "text" or "caption". .csv: the
    column of that name; the first row is a header if one of its cells has that name (in any case; columns between
    commas, semicolons or tabs), otherwise every row is a prompt in its first column. Empty lines and empty prompts are
    skipped; line breaks inside a prompt become spaces. Raises ValueError, with the number of the line, for whatever
    cannot be read.
    """
    path = Path(path)
    readers = {
        ".txt": parse,
        ".jsonl": lambda text: _collect(_json_prompts(text, path.name), path.name),
        ".csv": lambda text: _collect(_csv_prompts(text, path.name), path.name),
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"The prompt file {path.name} is none that can be read: use {', '.join(readers)}.")
    text = _text(path)
    return readers[path.suffix.lower()](text) if text.strip() else _collect([], path.name)


def _text(path: Path) -> str:
    """The text of a UTF-8 file; ValueError in one sentence for whatever else it is."""
    if not path.is_file():
        raise ValueError(f"There is no prompt file {path}: check its folder and name.")
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ValueError(
            f"The prompt file {path} cannot be read ({error.strerror}): check that you may open it."
        ) from error
    if len(raw) > LARGEST_FILE:
        raise ValueError(
            f"The prompt file {path.name} is larger than {LARGEST_FILE // 1_000_000} MB: split it, or keep only the "
            "prompts."
        )
    try:
        text = raw.decode("utf-8-sig")
        wrong = text.find("\0")  # UTF-16 without its mark reads as UTF-8 with zeros
        line = text.count("\n", 0, wrong) + 1 if wrong >= 0 else 0
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
    if line:
        raise ValueError(f"Line {line} of {path.name} is not UTF-8 text: save the file with the encoding UTF-8.")
    return text


def _collect(prompts, name: str) -> PromptList:
    """Prompts on one line each, without empty ones and duplicates."""
    every = [" ".join(filter(None, (part.strip() for part in prompt.splitlines()))) for prompt in prompts]
    every = [prompt for prompt in every if prompt]
    if not every:
        raise ValueError(f"{name} has no prompt in it: write at least one, one per line.")
    unique = list(dict.fromkeys(every))
    if len(unique) < len(every):
        logging.info("%s: %d of %d prompts came before and were left out", name, len(every) - len(unique), len(every))
    return PromptList(unique, duplicates=len(every) - len(unique))


def _json_prompts(text: str, name: str):
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a JSON text may hold other line breaks
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f'Line {number} of {name} is not JSON: each line must be one object such as {{"prompt": "a red '
                f'circle"}}.'
            ) from error
        if isinstance(value, dict):
            key = next((key for key in COLUMNS if key in value), None)
            if key is None:
                raise ValueError(f'Line {number} of {name} has no "prompt", "text" or "caption": name the prompt so.')
            value = value[key]
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
        cells = [cell.strip().lower() for cell in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
        for name in COLUMNS:
            if name in cells:
                return delimiter, cells.index(name), len(cells)
    return None, 0, None


def split(prompts: PromptList, held_out: float, seed: int) -> PromptList:
    """Hold prompts out of training, chosen by a hash of their text and the seed: always the same, in whatever order
    they are listed.

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
    place = {prompt: seed_for(seed, "held out", prompt.encode()) / 2**63 for prompt in every}
    ranked = sorted(every, key=place.get)
    count = int(held_out) if held_out >= 1 else sum(place[prompt] < held_out for prompt in every)
    chosen = set(ranked[: min(count, len(every) - 1)])
    if held_out > 0 and not chosen:
        logging.warning(
            "None of the %d prompts is held out: give a number of prompts instead of a share, and at least 2 prompts",
            len(every),
        )
    return PromptList([p for p in every if p not in chosen], [p for p in every if p in chosen], prompts.duplicates)


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
