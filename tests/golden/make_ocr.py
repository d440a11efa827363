"""What the peers' own OCR scorers say about lines that were read, for test_ocr.py. Run by hand, never by the tests:

    python make_ocr.py flow_grpo/flow_grpo/ocr.py TMPO/tmpo/rewards/paddleocr.py > ocr.json

Needs the package Levenshtein. Replaced in their code: the readers (PaddleOCR, EasyOCR), which give the lines instead.
"""

import importlib.util
import json
import random
import sys
import types

LINES: list[str] = []  # what the replaced readers have read


def scorer(path: str, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases() -> list[tuple[list[str], str]]:
    """Lines and the text in quotes: by hand, and texts with random faults."""
    found = [
        ([], "OPEN"),
        (["OPEN"], "OPEN"),
        (["open"], "OPEN"),
        (["O P E N"], "OPEN"),
        (["NOW", "OPEN", "24h"], "OPEN"),
        (["Hello", "World"], "Hello World"),
        (["World", "Hello"], "Hello World"),
        (["HELO", "wrld"], "Hello World"),
        (["a very long text that was not asked for at all"], "Hi"),
        (["x"], "Hi"),
        (["你好世界"], "你好世界"),
        (["你世界"], "你好世界"),
        (["Grusse aus Koln"], "Grüße aus Köln"),
    ]
    chance = random.Random(0)
    for _ in range(60):
        text = "".join(chance.choices("abcdeABC  12.!", k=chance.randint(2, 16))).strip() or "a"
        wrong = [c if chance.random() < 0.8 else chance.choice(["", "x", c + c]) for c in text]
        found.append(("".join(wrong).split("b"), text))
    return [([line.strip() for line in lines if line.strip()], text) for lines, text in found]


def main(flow_grpo: str, tmpo: str) -> None:
    sys.modules["paddleocr"] = types.SimpleNamespace(
        PaddleOCR=lambda **options: types.SimpleNamespace(
            ocr=lambda image, cls: [[[None, (line, 0.9)] for line in LINES]]
        )
    )
    sys.modules["easyocr"] = types.SimpleNamespace(
        Reader=lambda *args, **options: types.SimpleNamespace(readtext=lambda image, detail: list(LINES))
    )
    flow, tree = scorer(flow_grpo, "flow").OcrScorer(), scorer(tmpo, "tmpo").PaddleOCRRewardModel()
    rows = []
    for lines, text in cases():
        LINES[:] = lines
        prompt = f'a sign that says "{text}", photo'
        rows.append([lines, prompt, flow([[[0]]], [prompt])[0], tree([[[0]]], [prompt])[0]])
    print("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]")


if __name__ == "__main__":
    main(*sys.argv[1:])
