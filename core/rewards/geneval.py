"""GenEval's rules: whether a picture shows the things its prompt asks for, as many, in the colours and places it says.

What is in the picture comes from a detector that the caller has; there is none here. Two scores, as two sources say:

geneval     1 where everything is right, else 0
            evaluation/evaluate_images.py in djghosh13/geneval (92ac29f)
flow_grpo   the mean of one score per thing, colour and place; for a count 1 - |wanted - found| / wanted, which is below
            0 where far too many are found
            reward_server/gen_eval.py in yifan123/reward-server (af4902f), which flow_grpo trains on

Both as they are, oddities included: in flow_grpo's a thing in a wrong place scores 0 and then 1, half of it.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import Reward, Trial, refuse_unpaired

FORMULAS = ("geneval", "flow_grpo")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
CONFIDENCE = 0.3  # a detection counts above this
COUNTING = 0.9  # and for a prompt with a number (tag "counting") above this
MOST = 16  # things of a kind that are looked at
APART = 0.1  # of both things' sizes: so much of a distance is no direction
BEHIND = 0x99 / 255  # the grey around a thing whose outline is known
COCO = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter
bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis
snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork
knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed
dining_table toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator book clock vase
scissors teddy_bear hair_drier toothbrush"""
COCO = tuple(name.replace("_", " ") for name in COCO.split())  # what most detectors know, by its own names
GENEVAL = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}  # and GenEval's for it
IRREGULAR = {"people": "person", "mice": "mouse", "knives": "knife", "children": "child", "men": "man",
             "women": "woman", "feet": "foot", "teeth": "tooth", "geese": "goose", "leaves": "leaf"}  # fmt: skip
# no part of a thing's name: what stands there says more than the rules can check
MORE = set(
    """on in at with of under over near beside behind by from to for into onto between inside outside around next
front who that which wearing holding and or left right above below""".split()
)
ITEM = re.compile(r"(?:(?P<many>a|an|one|the|\d+|" + "|".join(NUMBERS) + r")\s+)?(?P<what>\S.*)")
LEAD = re.compile(r"^(?:an?\s+|the\s+)?(?:photo|picture|image|photograph)\s+of\s+")
PLACE = re.compile(r"\s+(?:(?:is\s+)?(?:to|on)\s+the\s+)?(left of|right of|above|below)\s+")


@dataclass
class Detection:
    """One thing in a picture."""

    label: str
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    score: float  # how sure the detector is, 0..1
    mask: Tensor | None = None  # [H, W], above .5 where the thing is; None = all of its box


# pictures [B, H, W, 3] in 0..1 and the kinds of things asked for -> what is in each; one that knows a fixed list may
# tell more than was asked
Detector = Callable[[Tensor, list[str]], list[list[Detection]]]
# crops [B, H, W, 3] in 0..1, and the texts that describe each class -> [B], numbers of the class each shows
Classifier = Callable[[Tensor, list[list[str]]], Tensor]


def wanted(prompt: str, names: tuple[str, ...] | None = None) -> dict:
    """What a prompt asks for, in the form of GenEval's metadata: {"include": [{"class", "count", "color", "position":
    [where, number of the thing it refers to]}], "exclude": [{"class", "count"}], "tag": "counting" or none}.

    Read are GenEval's own prompts, and more things than two: "a photo of a red car and two dogs", "a cat left of a
    bench". names: all kinds that the detector knows; None = any. ValueError in one sentence for other prompts.
    """
    text = LEAD.sub("", " ".join(prompt.lower().split()).rstrip(" ."))
    sides = PLACE.split(text)
    if len(sides) > 3:
        raise ValueError(f"{_unread(prompt)}: it has more than one place.")
    if len(sides) == 3:
        # GenEval's order: what a thing is compared with comes first
        include = [_item(sides[2], prompt, names), _item(sides[0], prompt, names)]
        include[1]["position"] = [sides[1], 0]
    else:
        include = [_item(part, prompt, names) for part in re.split(r"\s*,\s*and\s+|\s+and\s+|\s*,\s*", text)]
    kinds = [_same(one["class"]) for one in include]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise ValueError(f"{_unread(prompt)}: it names '{twice}' twice, and the rules cannot tell one from the other.")
    many = [{"class": one["class"], "count": one["count"] + 1} for one in include if one["count"] > 1]
    return {"include": include, **({"exclude": many, "tag": "counting"} if many else {})}


def _unread(prompt: str) -> str:
    return f"GenEval's rules cannot read the prompt '{' '.join(prompt.split())[:60]}'"


def _item(text: str, prompt: str, names) -> dict:
    found = ITEM.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{_unread(prompt)}: write such as 'a photo of two red cars and a dog', or give its rules.")
    many = found["many"] or "one"
    number = int(many) if many.isdigit() else NUMBERS.index(many) if many in NUMBERS else 1
    colour, _, rest = found["what"].partition(" ")
    colour, what = (colour, rest) if colour in COLOURS and rest else ("", found["what"])
    strange = [word for word in what.split() if word in MORE]
    if number < 1 or strange or len(what.split()) > 3:
        raise ValueError(
            f"{_unread(prompt)}: '{text.strip()[:40]}' is not a number, a colour and a thing. Write such as 'a photo "
            "of two red cars and a dog', or give its rules."
        )
    kind = _kind(what, number > 1, names)
    if kind is None:
        raise ValueError(f"{_unread(prompt)}: the detector knows {len(names)} kinds of things, and '{what}' is none.")
    return {"class": kind, "count": number, **({"color": colour} if colour else {})}


def _kind(what: str, several: bool, names) -> str | None:
    """The singular of a thing's name, of these names; None = it is none of them."""
    known = {*names, *(mine for mine, theirs in GENEVAL.items() if theirs in names)} if names else {*COCO, *GENEVAL}
    if what in known or not several:
        return what if what in known or names is None else None
    before, _, last = what.rpartition(" ")
    endings = [("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", "")]
    found = [last[: -len(old)] + new for old, new in endings if last.endswith(old)]
    found = [f"{before} {word}".strip() for word in [IRREGULAR.get(last, last), *found]]
    if (one := next((word for word in found if word in known), None)) or names:
        return one
    if last in IRREGULAR:
        return found[0]
    return re.sub(r"(?<=s|x|z)es$|(?<=ch|sh)es$|(?<!s)s$", "", re.sub(r"ies$", "y", what))


def rules(text: str, names: tuple[str, ...] | None = None) -> dict[str, dict]:
    """Lines of JSON as in GenEval's evaluation_metadata.jsonl -> what each of their prompts asks for. ValueError in one
    sentence for a line that is none.
    """
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            include = [dict(one) for one in row["include"]]
            for i, one in enumerate(include):
                where, other = one.get("position", ("above", -1))
                if (
                    type(one["count"]) is not int
                    or one["count"] < 1
                    or one.get("color", "red") not in COLOURS
                    or where not in POSITIONS
                    or not -1 <= other < i
                ):
                    raise ValueError
            kinds = [*include, *row.get("exclude", [])]
            if not include or not all(isinstance(one["class"], str) and one["count"] >= 1 for one in kinds):
                raise ValueError
            prompt = " ".join(row["prompt"].split())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"Line {number} of the rules is not a line of GenEval's evaluation_metadata.jsonl: it needs a prompt "
                'and include, such as {"prompt": "two dogs", "include": [{"class": "dog", "count": 2}]}; colours are '
                f"{', '.join(COLOURS)}, places {', '.join(POSITIONS)}, each with the number of an earlier thing."
            ) from None
        strange = [one["class"] for one in kinds if names and GENEVAL.get(one["class"], one["class"]) not in names]
        if strange:
            raise ValueError(f"Line {number} of the rules asks for '{strange[0]}', which the detector does not know.")
        found[prompt] = {"include": include, "exclude": row.get("exclude", []), "tag": row.get("tag")}
    return found


def kept(found: list[Detection], least: float) -> dict[str, list[Detection]]:
    """By kind, those of which the detector is surer than `least`, the surest first, MOST at most."""
    kinds: dict[str, list[Detection]] = {}
    for one in sorted(found, key=lambda one: -one.score):
        if one.score > least:
            kinds.setdefault(_same(one.label), []).append(one)
    return {kind: ones[:MOST] for kind, ones in kinds.items()}


def _same(kind: str) -> str:
    kind = kind.strip().lower()
    return GENEVAL.get(kind, kind)


def relations(a: tuple, b: tuple) -> set[str]:
    """Where box a is, seen from box b: some of POSITIONS."""
    a, b = (torch.tensor(box, dtype=torch.float64).view(2, 2) for box in (a, b))
    offset = a.mean(0) - b.mean(0)
    sizes = (a[1] - a[0]).abs() + (b[1] - b[0]).abs()
    clear = (offset.abs() - APART * sizes).clamp(min=0) * offset.sign()
    if (clear.abs() < 1e-3).all():
        return set()
    x, y = (clear / offset.norm()).tolist()
    places = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {place for place, there in places.items() if there}


def judged(asked: dict, found: dict[str, list[Detection]], colours: Callable, formula: str = "geneval") -> float:
    """The score of one picture. asked: see wanted(); found: see kept(); colours(detections, kind) -> their colours."""
    graded = formula == "flow_grpo"
    right, scores, matched = True, [], []
    for one in asked["include"]:
        count, here, ok = one["count"], found.get(_same(one["class"]), []), True
        if graded:
            scores.append(1 - abs(count - len(here)) / count)
            ok = len(here) == count
            if not ok and ("color" in one or "position" in one):
                scores.append(0.0)
        else:
            here = here[:count]
            ok = len(here) == count
        if ok and "color" in one:
            so_many = colours(here, one["class"]).count(one["color"])
            scores.append(1 - abs(count - so_many) / count)
            ok = so_many == count
        if ok and "position" in one:
            where, other = one["position"]
            ok = matched[other] is not None and all(
                where in relations(a.box, b.box) for a in here for b in matched[other]
            )
            scores += [] if ok else [0.0]
            scores += [1.0] if matched[other] is not None else []  # theirs adds it whether it was right or not
        right &= ok
        matched.append(here if ok else None)
    if graded:
        return sum(scores) / len(scores)
    too_many = any(len(found.get(_same(one["class"]), [])) >= one["count"] for one in asked.get("exclude", []))
    return float(right and not too_many)


def crop(image: Tensor, one: Detection) -> Tensor:
    """A thing cut out of [H, W, 3]: its box, grey where its mask is not. Outside of the picture it is black, as
    Pillow's crop is.
    """
    if one.mask is not None:
        image = torch.where((one.mask > 0.5).to(image.device)[..., None], image, torch.full_like(image, BEHIND))
    left, top, right, bottom = (round(edge) for edge in one.box)
    cut = image.new_zeros(max(bottom - top, 1), max(right - left, 1), 3)
    high, wide = image.shape[:2]
    y, x = slice(max(top, 0), min(bottom, high)), slice(max(left, 0), min(right, wide))
    if y.start < y.stop and x.start < x.stop:
        cut[y.start - top : y.stop - top, x.start - left : x.stop - left] = image[y, x]
    return cut


class GenEval(Reward):
    """What the prompt asks for, by GenEval's rules on what a detector finds."""

    def __init__(
        self,
        detect: Detector,
        classify: Classifier | None = None,
        formula: str = "geneval",
        given: dict[str, dict] | None = None,
        names: tuple[str, ...] | None = None,
        confidence: float = CONFIDENCE,
        counting: float = COUNTING,
        name: str = "GenEval",
    ):
        """classify: for colours, such as ClipScorer.classify; None = prompts that ask for one are refused. given: see
        rules(), for prompts that wanted() cannot read. names: the kinds that the detector knows; None = any.
        """
        if formula not in FORMULAS:
            raise ValueError(f"Unknown GenEval formula '{formula}': choose one of {', '.join(FORMULAS)}.")
        self.detect, self.classify, self.formula, self.names = detect, classify, formula, names
        self.given, self.confidence, self.counting, self.name = given or {}, confidence, counting, name

    def asked(self, prompt: str) -> dict:
        return self.given.get(" ".join(prompt.split())) or wanted(prompt, self.names)

    def refuse(self, prompts: list[str]) -> None:
        """ValueError for a prompt that cannot be read, with a thing the detector does not know, or with a colour where
        nothing tells colours.
        """
        for prompt in dict.fromkeys(prompts):
            colours = [one["color"] for one in self.asked(prompt)["include"] if "color" in one]
            if colours and self.classify is None:
                raise ValueError(
                    f"The prompt '{' '.join(prompt.split())[:60]}' asks for {colours[0]}, and GenEval's rules tell "
                    "colours by CLIP: connect CLIPScore to colours."
                )

    def trial(self) -> Trial | None:
        """None: what a detector finds in drawings is not known."""
        return None

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1, B prompts -> [B] on the CPU. ValueError as refuse()."""
        refuse_unpaired(images, prompts)
        self.refuse(prompts)
        images, scores = images[..., :3].detach().float().nan_to_num(0).clamp(0, 1), torch.zeros(len(images))
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(i)
        for prompt, members in groups.items():
            asked = self.asked(prompt)
            kinds = list(dict.fromkeys(one["class"] for one in [*asked["include"], *asked.get("exclude", [])]))
            for i, found in zip(members, self.detect(images[members], kinds)):
                scores[i] = judged(
                    asked,
                    kept(found, self.counting if asked.get("tag") == "counting" else self.confidence),
                    lambda things, kind, image=images[i]: self._colours(image, things, kind),
                    self.formula,
                )
        return scores

    def _colours(self, image: Tensor, things: list[Detection], kind: str) -> list[str]:
        """By CLIP's zero-shot classification, with GenEval's texts."""
        texts = [
            [f"a photo of a {colour} {kind}", f"a photo of a {colour}-colored {kind}", f"a photo of a {colour} object"]
            for colour in COLOURS
        ]
        return [COLOURS[int(self.classify(crop(image, one)[None], texts)[0])] for one in things]
