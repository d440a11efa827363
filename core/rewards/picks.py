"""What a person picked, on the disk: never lost, never asked twice, and enough to train a reward model from later.

picks.jsonl      one JSON object per line and answer, only ever added to (fields: see Picks)
picks/<id>.jpg   the images of that group, numbered, as one contact sheet
waiting.json     what Pick the Winner shows and waits for, by node
"""

import base64
import hashlib
import io
import json
import logging
import math
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F

from ..files import append, write_atomically

log = logging.getLogger("treerpo")
FORMAT = 1
SIDE = 8  # pixels of a thumbnail's side
# of 255: mean difference of two thumbnails up to which a picture is the same one, computed on another device. Measured
# with the
ALIKE = 0.5
# tiny models: 8.5 and more for other noise, 4.7 for siblings, 0.2 for a latent that is off by 3 %, 0 for another
# micro-batch
ANSWERED = ("person", "skip")  # only these are repeated; who was away may be asked again


def group_id(prompt: str, images) -> str:
    """10 hex digits of a prompt and its images ([n, H, W, 3] or a list of [H, W, 3], in 0..1) as they are saved, in 8
    bits.
    """
    digest = hashlib.blake2b(repr((prompt, [tuple(image.shape) for image in images])).encode(), digest_size=5)
    for image in images:
        digest.update(_eight_bits(image).contiguous().numpy().tobytes())
    return digest.hexdigest()


def thumbnails(images) -> str:
    """The images at 8 x 8 in 8 bits, as base64: 192 bytes each."""
    small = [
        F.adaptive_avg_pool2d(image[..., :3].detach().float().cpu().movedim(-1, 0).clamp(0, 1), SIDE)
        for image in images
    ]
    return base64.b64encode(_eight_bits(torch.stack(small)).numpy().tobytes()).decode()


def difference(first: str, second: str) -> float:
    """How far two groups' `thumbnails` are apart: the largest mean difference of any image, of 255; inf for other
    numbers of images.
    """
    a, b = (
        torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(-1, 3 * SIDE * SIDE).float()
        for text in (first, second)
    )
    return float((a - b).abs().mean(1).amax()) if a.shape == b.shape else math.inf


def described(prompt: str, images, iteration: int | None) -> dict:
    """All that is written down of a group of images, to know it again."""
    return {
        "id": group_id(prompt, images),
        "prompt": prompt,
        "iteration": iteration,
        "count": len(images),
        "thumbs": thumbnails(images),
    }


def same_group(known: dict, group: dict, near: bool = True) -> bool:
    """Whether two `described` groups are one: the very same images, or, if `near`, those of the same iteration as
    another device computes them. Other noise gives images that are many times as far apart.
    """
    if known["id"] == group["id"]:
        return True
    same = all(known[key] == group[key] for key in ("prompt", "iteration", "count"))
    return near and same and difference(known["thumbs"], group["thumbs"]) <= ALIKE


def _eight_bits(image: torch.Tensor) -> torch.Tensor:
    return (image.detach().float().cpu().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)


class Picks:
    """The book of all answers in a folder. A line has: format 1 · id of the group · prompt · iteration or null · count
    of images · how they were asked for · answer as it was given, or null · levels: image numbers counted from 1, best
    level first, every image once, no comparison within a level · by: person, skip (no opinion) or time-out · seconds it
    took · when (UTC) · thumbs (see thumbnails) · sheet: the contact sheet's file, its columns, the size of an image in
    it, the step from one image to the next and the margin before the first, in pixels.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._rows: list[dict] = []
        self._read = 0  # bytes of the file that _rows has

    def rows(self) -> list[dict]:
        """All answers so far. Lines that are not whole, as a kill leaves them, are passed over."""
        path = self.folder / "picks.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if size < self._read:  # someone has removed or shortened it
            self._rows, self._read = [], 0
        if size > self._read:
            with open(path, "rb") as file:
                file.seek(self._read)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read += len(whole)
            self._rows += filter(None, map(_row, whole.splitlines()))
        return self._rows

    def find(self, group: dict) -> dict | None:
        """The newest answer to a `described` group; a time-out is none."""
        known = [row for row in self.rows() if row["by"] in ANSWERED]
        found = [row for row in known if row["id"] == group["id"]] or [row for row in known if same_group(row, group)]
        return found[-1] if found else None

    def add(self, group: dict, images, *, how: str, answer: str | None, levels, by: str, seconds: float) -> None:
        """Write an answer to a `described` group down.

        What cannot be written is said in the log: the answer itself still counts.
        """
        from ..pictures.plot import numbered_sheet  # Pillow, which only this needs

        picture, layout = numbered_sheet(images)
        row = {
            "format": FORMAT,
            **{key: group[key] for key in ("id", "prompt", "iteration", "count")},
            "how": how,
            "answer": answer,
            "levels": [[i + 1 for i in level] for level in levels],
            "by": by,
            "seconds": round(seconds, 1),
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "thumbs": group["thumbs"],
            "sheet": {"file": f"picks/{group['id']}.jpg", **layout},
        }
        path, buffer = self.folder / "picks.jsonl", io.BytesIO()
        try:
            picture.save(buffer, "JPEG", quality=92, subsampling=0)  # small pictures keep their colours at the edges
            write_atomically(self.folder / row["sheet"]["file"], buffer.getvalue())
            size = path.stat().st_size if path.is_file() else 0
            append(path, b"\n" * _torn(path, size) + json.dumps(row).encode() + b"\n", size)
        except OSError as error:
            log.warning("The pick for group %s could not be kept: %s", group["id"], error)

    def images(self, row: dict) -> torch.Tensor:
        """The images of an answer, cut out of its contact sheet: [count, H, W, 3] in 0..1, as large as they are there.

        Raises OSError or ValueError where the sheet is gone or damaged.
        """
        from ..pictures.reading import read_picture  # Pillow, which only this needs

        sheet, count = row["sheet"], row["count"]
        (wide, high), (right, down), margin = sheet["image"], sheet["step"], sheet["margin"]
        pixels = read_picture(self.folder / "picks" / Path(sheet["file"]).name)[0]
        places = [(margin + i % sheet["columns"] * right, margin + i // sheet["columns"] * down) for i in range(count)]
        return torch.stack([pixels[y : y + high, x : x + wide] for x, y in places])


def _row(line: bytes) -> dict | None:
    """The answer in a line; None where it is not a whole one of ours."""
    try:
        row = json.loads(line)
        whole = row["format"] == FORMAT and {"id", "prompt", "iteration", "answer", "by"} <= row.keys()
        return row if whole and len(base64.b64decode(row["thumbs"])) == 3 * SIDE * SIDE * row["count"] else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _torn(path: Path, size: int) -> bool:
    """Whether the last line has no end: what comes next must not become part of it."""
    if not size:
        return False
    with open(path, "rb") as file:
        file.seek(size - 1)
        return file.read() != b"\n"


def load_waiting(folder: Path, node: str) -> dict | None:
    """What this node waits for: {plain: its widget's lines without an id when the images were first shown, when,
    answered, groups: [described]}.
    """
    try:
        record = json.loads((Path(folder) / "waiting.json").read_text("utf-8"))[node]
        return record if {"plain", "when", "answered", "groups"} <= record.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def save_waiting(folder: Path, node: str, record: dict) -> None:
    path = Path(folder) / "waiting.json"
    try:
        others = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        others = {}
    write_atomically(path, json.dumps({**others, node: record}).encode())
