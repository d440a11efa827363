"""What GenEval's own code and flow_grpo's reward server say about things that were detected, for test_geneval.py. Run
by hand, never by the tests:

    python make_geneval.py geneval/evaluation/evaluate_images.py reward-server/reward_server/gen_eval.py \
        geneval/prompts/evaluation_metadata.jsonl > geneval.json

Needs clip_benchmark 1.6 (--no-deps) and open_clip_torch. Replaced in their code: the detector (mmdet), which gives
these things instead; CLIP's weights, tiny random ones; the GPU and its half precision; worker processes; packages that
only tables need.
"""

import json
import os
import random
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

CASES, SIDE = 240, 96


def picture(seed: int) -> np.ndarray:
    """[SIDE, SIDE, 3] of 0..255: rectangles of all kinds of colours."""
    chance = random.Random(seed)
    pixels = np.full((SIDE, SIDE, 3), [chance.randrange(256) for _ in range(3)], np.uint8)
    for _ in range(12):
        x, y = chance.randrange(SIDE), chance.randrange(SIDE)
        pixels[y : y + chance.randrange(8, 60), x : x + chance.randrange(8, 60)] = [
            chance.choice((0, 128, 255)) for _ in range(3)
        ]
    return pixels


def outline(box: list[float]) -> np.ndarray:
    """[SIDE, SIDE] of truth: a lozenge in the box."""
    left, top, right, bottom = box
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    across, down = abs(2 * x - left - right) / max(right - left, 1), abs(2 * y - top - bottom) / max(bottom - top, 1)
    return across + down < 1


def things(metadata: dict, chance: random.Random) -> list[list]:
    """[kind, box, how sure, whether it has an outline] of what a detector might find: about what is asked."""
    found, outlined = [], chance.random() < 0.5
    for one in metadata["include"]:
        count = chance.choice([one["count"]] * 5 + [0, one["count"] + 1, one["count"] + chance.choice([2, 18])])
        for _ in range(count):
            wide, high = chance.uniform(8, 50), chance.uniform(8, 50)
            left, top = chance.uniform(-4, SIDE - wide + 4), chance.uniform(-4, SIDE - high + 4)
            box = [round(4 * edge) / 4 for edge in (left, top, left + wide, top + high)]
            sure = chance.choice([0.2, 0.31, 0.6, 0.91, 0.95, 0.97, 0.98]) + chance.uniform(0, 0.01)
            found.append([one["class"], box, round(sure, 5), outlined])
    chance.shuffle(found)
    return found


def clip(folder: Path):
    from make import load_open_clip

    return load_open_clip(folder)


def module(path: str, names: dict) -> types.ModuleType:
    source = Path(path).read_text("utf-8").replace('assert DEVICE == "cuda"', "").replace('"cuda"', '"cpu"')
    source = source.replace("image.crop(box[:4])", "image.crop(tuple(box[:4]))")  # for Pillow of today
    made = types.ModuleType(Path(path).stem)
    vars(made).update(names)
    exec(compile(source, path, "exec"), vars(made))
    return made


def main(geneval: str, server: str, prompts: str) -> None:
    rows = [json.loads(line) for line in Path(prompts).read_text("utf-8").splitlines()]
    chance, folder = random.Random(0), Path(tempfile.mkdtemp())
    kinds = Path(prompts).with_name("object_names.txt").read_text("utf-8").split("\n")
    kinds = [kind for kind in kinds if kind]
    (folder / "reward_server").mkdir()
    (folder / "reward_server/object_names.txt").write_text("\n".join(kinds) + "\n")
    current: list[list] = []

    def detect(model, given):
        boxes = [np.array([[*box, sure] for kind, box, sure, _ in current if kind == name], np.float32).reshape(-1, 5)
                 for name in kinds]  # fmt: skip
        masks = [[outline(box) for kind, box, _, _ in current if kind == name] for name in kinds]
        found = (boxes, masks) if current and current[0][3] else boxes
        return [found for _ in given] if isinstance(given, list) else found

    mmdet = types.ModuleType("mmdet")
    mmdet.__file__ = "/mmdet/__init__.py"
    apis = types.SimpleNamespace(inference_detector=detect, init_detector=lambda *args, **more: None)
    model, transform, tokenizer = clip(folder)
    stubs = {"mmdet": mmdet, "mmdet.apis": apis, "pandas": types.ModuleType("pandas")}
    for name in ("sklearn", "sklearn.metrics"):
        stubs[name] = types.SimpleNamespace(classification_report=None, balanced_accuracy_score=None)
    loader = torch.utils.data.DataLoader
    torch.utils.data.DataLoader = lambda data, **more: loader(data, batch_size=more["batch_size"])
    os.chdir(folder)
    with mock.patch.dict(sys.modules, stubs):
        import open_clip
        from clip_benchmark.metrics import zeroshot_classification

        for function in (zeroshot_classification.zero_shot_classifier, zeroshot_classification.run_classification):
            function.__defaults__ = (False,)  # amp

        open_clip.create_model_and_transforms = lambda *args, **more: (model, None, transform)
        open_clip.get_tokenizer = lambda *args: tokenizer
        first = module(geneval, {"__name__": "geneval"})
        second = module(server, {"__name__": "server"}).load_geneval()
    vars(first).update(
        clip_model=model, transform=transform, tokenizer=tokenizer, classnames=kinds, object_detector=None
    )
    vars(first).update(args=types.SimpleNamespace(options={}), THRESHOLD=0.3, COUNTING_THRESHOLD=0.9, MAX_OBJECTS=16)
    vars(first).update(NMS_THRESHOLD=1.0, POSITION_THRESHOLD=0.1)
    told: dict[str, list[str]] = {}
    theirs = first.color_classification
    first.color_classification = lambda image, boxes, kind: told.setdefault(kind, theirs(image, boxes, kind))
    from PIL import Image

    made = []
    for number in range(CASES):
        metadata = json.loads(json.dumps(chance.choice(rows)))
        current[:] = things(metadata, chance)
        image = Image.fromarray(picture(number))
        image.save(folder / "picture.png")
        for one in metadata["include"]:  # ask for the colour that is there, mostly
            if "color" in one and chance.random() < 0.8:
                told.clear()
                first.evaluate_image(str(folder / "picture.png"), metadata)
                before, one["color"] = one["color"], next(iter(told.get(one["class"], [])), one["color"])
                metadata["prompt"] = metadata["prompt"].replace(
                    f"{before} {one['class']}", f"{one['color']} {one['class']}"
                )
        told.clear()
        correct = first.evaluate_image(str(folder / "picture.png"), metadata)["correct"]
        scores, again, *_ = second([image], [metadata])
        assert again == [float(correct)]
        made.append([metadata, [list(one) for one in current], dict(told), correct, scores[0]])
    print("[\n" + ",\n".join(json.dumps(row) for row in made) + "\n]")


if __name__ == "__main__":
    main(*sys.argv[1:])
