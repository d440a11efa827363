"""OCR: how exactly a picture shows the text that its prompt puts in quotes.

Read by rapidocr (PP-OCR detection and recognition in onnxruntime), whose package holds its models' files; nothing is
downloaded. Scored by edit distance as two peers do it:

flow_grpo   1 - min(d, n) / n   n letters of the wanted text, without spaces, capitals like small letters; d = 0 where
                                the text occurs in what was read     flow_grpo/ocr.py in yifan123/flow_grpo (ac4c86e)
tmpo        1 - d / max(n, m)   m letters of what was read; spaces and capitals count, and so does all other text in
                                the picture              tmpo/rewards/paddleocr.py in MAIR-Lab-HUST/TMPO (af2fa6c)

Theirs read by PaddleOCR and EasyOCR: the formulas are the same, what is read may differ. flow_grpo takes the first text
in quotes only; several are scored here as one text, in the order that fits best.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .contract import Reward, Trial, refuse_unpaired

FORMULAS = ("flow_grpo", "tmpo")
PIP = "pip install rapidocr onnxruntime"
MOST_ORDERS = 4  # texts whose orders are all tried; above, only the prompt's own
DOUBLE = re.compile(
    r'(?<!\d)"([^"]*)"'  # an inch mark begins nothing
    r"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」|『([^』]+)』"
)
# at the edge of a word: an apostrophe inside of one is no quotation mark
SINGLE = re.compile(
    r"(?P<opening>(?<!\w)['‘](?=[^\s'‘’]))|(?P<closing>(?<=[^\s'‘’])['’](?!\w))|(?<!\w)['‘’]|['‘’](?!\w)"
)


def quoted(prompt: str) -> list[str]:
    """The texts in quotes, in their order: "…", “…”, „…“, «…», 「…」, 『…』; '…' and ‘…’ only where there are none of
    these and every single mark opens or closes a text.
    """
    found = [next(filter(None, match.groups()), "") for match in DOUBLE.finditer(prompt)]
    return [text.strip() for text in found or _single(prompt) if _letters(text)]


def _single(prompt: str) -> list[str]:
    marks = list(SINGLE.finditer(prompt))
    if len(marks) % 2 or any(mark.lastgroup != ("opening", "closing")[i % 2] for i, mark in enumerate(marks)):
        return []  # the dogs' bowl
    found = [prompt[first.end() : last.start()] for first, last in zip(marks[::2], marks[1::2])]
    return [text for text in found if text not in ("n", "N")]  # rock 'n' roll


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements of single letters that make b of a (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def text_score(read: list[str], wanted: list[str], formula: str = "flow_grpo", case: bool = False) -> float:
    """How well the lines that were read are the wanted texts, 0..1.

    case: whether capitals count: for flow_grpo's authors they do not, for TMPO's they do. Signs of full and half width
    are the same (Unicode's NFKC).
    """
    read, wanted = ([unicodedata.normalize("NFKC", text) for text in texts] for texts in (read, wanted))
    if not case:
        read, wanted = ([text.lower() for text in texts] for texts in (read, wanted))
    if formula == "tmpo":
        found, goal = " ".join(read).strip(), " ".join(wanted).strip()
        return 1 - edit_distance(goal, found) / max(len(goal), len(found))
    found, goals = _letters("".join(read)), list(map(_letters, wanted))
    if all(goal in found for goal in goals):
        return 1.0
    orders = itertools.permutations(goals) if len(goals) <= MOST_ORDERS else [goals]
    letters = sum(map(len, goals))
    return 1 - min(letters, *(edit_distance(found, "".join(order)) for order in orders)) / letters


def _letters(text: str) -> str:
    return "".join(text.split())


def reader(recognition: Path | None = None, cuda: bool = False, side: int | None = None):
    """rapidocr's engine. recognition: another recognition model's .onnx file, for a script the package's cannot read.
    side: text is looked for in pictures enlarged to so many pixels at least; None = the package's choice.

    The package is imported here. ValueError in one sentence where it is missing or the file does not fit.
    """
    try:
        import onnxruntime
        import rapidocr
    except Exception as error:  # packages that do not fit each other fail in many ways
        raise ValueError(
            f"The OCR reward reads pictures with the packages rapidocr and onnxruntime, which cannot be imported here "
            f"({' '.join(str(error).split())}): {PIP}, and start again."
        ) from error
    settings = {"Global.log_level": "error", "Global.use_cls": False, "Global.text_score": 0.0, "Rec.rec_batch_num": 1}
    if side:
        settings["Det.limit_side_len"] = side
    if cuda and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        settings["EngineConfig.onnxruntime.use_cuda"] = True
    try:
        if recognition is not None:
            settings["Rec.model_path"] = str(recognition)
            known = onnxruntime.InferenceSession(str(recognition), providers=["CPUExecutionProvider"]).get_modelmeta()
            if "character" not in known.custom_metadata_map:  # rapidocr would download a list of letters
                raise ValueError("it does not hold its letters")
        elif not list((Path(rapidocr.__file__).parent / "models").glob("*_rec_*.onnx")):  # it would download a model
            raise ValueError("this rapidocr comes without its recognition model, an old version")
        engine = rapidocr.RapidOCR(params=settings)
        engine(np.full((64, 64, 3), 255, np.uint8))  # loads the detection model
        engine.recognize_txt([np.full((48, 96, 3), 255, np.uint8)])
        return engine
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{recognition.name} is not a PP-OCR recognition model in ONNX ({cause}): choose another file, or none."
            if recognition
            else f"The OCR models cannot be loaded ({cause}): {PIP.replace('install', 'install --upgrade')}."
        ) from error


class Ocr(Reward):
    """The text in quotes as the picture shows it, 0..1."""

    def __init__(
        self,
        formula: str = "flow_grpo",
        case: bool = False,
        recognition: Path | str = "",
        name: str = "OCR",
        device="cpu",
        check: Callable[[], object] = lambda: None,
        side: int | None = None,
    ):
        """formula: one of FORMULAS. case: see text_score. recognition: see reader; "" = the package's own, which reads
        Latin, Greek, Chinese and Japanese. check: called before every picture, may raise to stop.
        side: see reader; smaller = faster, and misses more.
        """
        if formula not in FORMULAS:
            raise ValueError(f"Unknown OCR formula '{formula}': choose one of {', '.join(FORMULAS)}.")
        self.formula, self.case, self.name, self.check, self.side = formula, case, name, check, side
        self.recognition = Path(recognition) if str(recognition) else None
        self.cuda = torch.device(device).type == "cuda"
        self.origin = ("ocr", str(recognition), {"formula": formula, "case": case, "name": name})
        self._engine = self._known = None

    @property
    def engine(self):
        """Loaded when it is first used."""
        if self._engine is None:
            self._engine = reader(self.recognition, self.cuda, self.side)
            self._known = frozenset("".join(self._engine.text_rec.postprocess_op.character))
        return self._engine

    def trial(self) -> Trial | None:
        """A word, half of it covered, and the word under another prompt. None for another recognition model, which may
        read no Latin.
        """
        if self.recognition is not None:
            return None
        from ..pictures import plot  # Pillow

        word = torch.cat([plot.to_tensor(plot.word(text, 256)) for text in ("HELLO 25", "HEL")])
        return Trial(word[[0, 1, 0]], ['"HELLO 25"', '"HELLO 25"', '"GOODBYE"'], [(0, 1), (0, 2)])

    def refuse(self, prompts: list[str]) -> None:
        """ValueError for a prompt without a text in quotes, or with letters the recognition model does not have."""
        for prompt in dict.fromkeys(prompts):
            wanted = quoted(prompt)
            shown = " ".join(prompt.split())[:60]
            if not wanted:
                raise ValueError(
                    f"OCR found no text in quotes in the prompt '{shown}': write what the picture should say in double "
                    'quotes, such as a sign that says "OPEN".'
                )
            self.engine  # knows its letters
            strange = [c for c in dict.fromkeys(_letters("".join(wanted))) if not self._reads(c)]
            if strange:
                raise ValueError(
                    f"OCR cannot read {' '.join(strange[:8])} in the prompt '{shown}': its recognition model does not "
                    "know these letters; ask for others, or choose a recognition model for that script."
                )

    def _reads(self, letter: str) -> bool:
        return all(part in self._known for part in unicodedata.normalize("NFKC", letter)) or letter in self._known

    def read(self, images: Tensor) -> list[list[str]]:
        """[B, H, W, 3] in 0..1 -> the lines in each, from top to bottom.

        One line at a time: lines read together are padded to the widest, so that what is read would depend on the other
        pictures; it is also the faster way on a CPU.
        """
        pictures = (images[..., :3].detach().float().nan_to_num(0).clamp(0, 1) * 255).round().byte().cpu().numpy()
        lines = []
        for picture in pictures:
            self.check()
            found = self.engine(np.ascontiguousarray(picture[..., ::-1]))  # takes BGR
            lines.append(list(found.txts or ()))
        return lines

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1, B prompts -> [B] in 0..1 on the CPU. ValueError as refuse()."""
        refuse_unpaired(images, prompts)
        self.refuse(prompts)
        lines = self.read(images)
        return torch.tensor([text_score(a, quoted(b), self.formula, self.case) for a, b in zip(lines, prompts)])
