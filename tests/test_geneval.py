"""GenEval's rules: prompts, the official code's verdicts, and detectors of ComfyUI and Impact Pack as their source."""

import json
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import COMFYUI
from golden import make_geneval, models
from graph import UPDATE, Graph

import run
from core.rewards import load
from core.rewards.geneval import COCO, Detection, GenEval, crop, judged, kept, rules, wanted

GOLDEN = json.loads((Path(__file__).parent / "golden" / "geneval.json").read_text("utf-8"))


def detected(found):
    """The golden's things as a detector would tell them."""
    return [
        Detection(kind, tuple(box), sure, torch.from_numpy(make_geneval.outline(box)).float() if outlined else None)
        for kind, box, sure, outlined in found
    ]


@pytest.mark.parametrize("names", [None, COCO], ids=["any", "coco"])
def test_prompts_of_genevals_say_what_its_metadata_says(names):
    for metadata, *_ in GOLDEN:
        found = wanted(metadata["prompt"], names)
        assert found["include"] == metadata["include"], metadata["prompt"]
        assert found.get("exclude", []) == metadata.get("exclude", [])
        assert (found.get("tag") == "counting") == (metadata["tag"] == "counting")


@pytest.mark.parametrize(
    "prompt, include",
    [
        ("A photo of a cat.", [("cat", 1)]),
        ("an orange", [("orange", 1)]),
        ("two orange oranges", [("orange", 2, "orange")]),
        ("3 wine glasses, four people and a red dog", [("wine glass", 3), ("person", 4), ("dog", 1, "red")]),
        ("a picture of two knives and two benches", [("knife", 2), ("bench", 2)]),
        ("a tv remote and a mouse", [("tv remote", 1), ("mouse", 1)]),
    ],
)
def test_other_prompts_of_that_kind(prompt, include):
    wants = [
        {"class": kind, "count": count, **({"color": colour[0]} if colour else {})} for kind, count, *colour in include
    ]
    assert wanted(prompt, COCO)["include"] == wants == wanted(prompt)["include"]


def test_a_place_names_its_thing_first():
    for words in ("left of", "is to the left of", "on the left of"):
        found = wanted(f"two white foxes {words} a ponies")["include"]
        assert found == [
            {"class": "ponies", "count": 1},
            {"class": "fox", "count": 2, "color": "white", "position": ["left of", 0]},
        ]


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("a cat on a bench", "'a cat on a bench' is not a number, a colour and a thing"),
        ("a cat left of a dog above a bird", "more than one place"),
        ("a cat and a dog left of a bird", "is not a number"),
        ("zero cats", "is not a number"),
        ("a red mouse and a computer mouse", "it names 'mouse' twice"),
        ("a unicorn", "the detector knows 80 kinds of things, and 'unicorn' is none"),
        ("", "write such as 'a photo of two red cars and a dog'"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_a_sentence(prompt, words):
    with pytest.raises(ValueError, match="GenEval's rules cannot read the prompt") as caught:
        GenEval(lambda images, kinds: [], names=COCO).refuse(["a cat", prompt])
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("formula, column", [("geneval", 3), ("flow_grpo", 4)])
def test_the_rules_are_the_official_ones(formula, column):
    """tests/golden/make_geneval.py ran GenEval's and flow_grpo's code on these things, with the colours they saw."""
    assert len({row[column] for row in GOLDEN}) > 1
    ours = []
    for metadata, found, told, *_ in GOLDEN:
        things = kept(detected(found), 0.9 if metadata["tag"] == "counting" else 0.3)
        ours.append(judged(metadata, things, lambda things, kind, told=told: told[kind], formula))
    assert ours == pytest.approx([float(row[column]) for row in GOLDEN], abs=1e-12)


def test_the_colours_are_the_official_ones_too(tmp_path):
    """The same from pictures and prompts, with the tiny CLIP that their code had."""
    pytest.importorskip("open_clip")
    clip = load("clipscore", models.write("clipscore_open_clip", tmp_path))
    seen = [row[2] for row in GOLDEN]
    assert len({colour for told in seen for colours in told.values() for colour in colours}) >= 5
    for formula, column in (("geneval", 3), ("flow_grpo", 4)):
        for number in [i for i, told in enumerate(seen) if told][:: 1 if formula == "geneval" else 8]:
            metadata, found = GOLDEN[number][:2]
            reward = GenEval(lambda images, kinds, found=found: [detected(found)], clip.classify, formula)
            picture = torch.from_numpy(make_geneval.picture(number)).float()[None] / 255
            assert float(reward.score(picture, [metadata["prompt"]])) == float(GOLDEN[number][column])


def test_a_thing_is_cut_out_as_pillow_does():
    from PIL import Image

    picture = make_geneval.picture(0)
    for box in ((-3.5, 2.5, 20.5, 60.0), (80.0, 90.0, 99.0, 98.0), (5.0, 5.0, 6.5, 7.5)):
        mask = make_geneval.outline(box)
        grey = Image.new("RGB", (96, 96), "#999")
        theirs = np.asarray(Image.composite(Image.fromarray(picture), grey, Image.fromarray(mask)).crop(box))
        image = torch.from_numpy(picture).float() / 255
        ours = crop(image, Detection("", box, 1.0, torch.from_numpy(mask).float()))
        assert np.array_equal((ours * 255).round().byte().numpy(), theirs)


def test_rules_by_hand():
    line = '{"prompt": "my  dogs", "include": [{"class": "dog", "count": 2}], "tag": "counting"}\n\n'
    given = rules(line, COCO)
    found = [[Detection("dog", (0, 0, 9, 9), sure) for sure in (0.95, sure)] for sure in (0.95, 0.5)]
    reward = GenEval(lambda images, kinds: found, given=given)
    reward.refuse(["my dogs"])
    assert reward.score(torch.zeros(2, 9, 9, 3), ["my dogs", "my dogs"]).tolist() == [1, 0], "two, and one too unsure"
    wrong = ["[]", "{", '{"prompt": "a", "include": []}', '{"prompt": "a", "include": [{"class": "dog", "count": 0}]}',
             '{"prompt": "a", "include": [{"class": "dog", "count": 1, "color": "mauve"}]}',
             '{"prompt": "a", "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}']  # fmt: skip
    for text in wrong:
        with pytest.raises(ValueError, match="Line 3 of the rules is not a line of GenEval's") as caught:
            rules(line + text, COCO)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="Line 1 of the rules asks for 'unicorn', which the detector does not know"):
        rules('{"prompt": "a", "include": [{"class": "unicorn", "count": 1}]}', COCO)


def test_a_colour_needs_clip_before_anything_is_sampled():
    with pytest.raises(ValueError, match="asks for red, and GenEval's rules tell colours by CLIP: connect CLIPScore"):
        GenEval(lambda images, kinds: []).refuse(["a dog", "a red dog"])


# In ComfyUI


@pytest.fixture
def graph(pack, tmp_path):
    return Graph(pack, tmp_path, "sd3")


def shapes(images):
    """Boxes [left, top, right, bottom] of what differs from the upper left corner, one per picture [B, H, W, 3]."""
    found = []
    for there in ((images - images[:, :1, :1]).abs().amax(-1) > 0.2).cpu():
        y, x = there.any(1).nonzero().flatten(), there.any(0).nonzero().flatten()
        found.append([int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1] if len(x) else [0, 0, 1, 1])
    return found


class Finder(torch.nn.Module):
    """In the place of RT-DETR's network: takes and gives what ComfyUI's does, and finds an apple in every picture."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, orig_size):
        scale = torch.tensor([*orig_size, *orig_size]) / x.shape[-1]
        return [
            {
                "labels": torch.tensor([COCO.index("apple"), COCO.index("cat")]),
                "boxes": torch.tensor([box, box]) * scale,
                "scores": torch.tensor([0.95, 0.2]),
            }
            for box in shapes(x.movedim(1, -1).float())
        ]


def model_of(kind, network):
    """A MODEL as ComfyUI's loader makes it, around another network."""
    base = pytest.importorskip("comfy.model_base")
    if not hasattr(base, kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    import comfy.model_management
    import comfy.model_patcher

    made = getattr(base, kind).__new__(getattr(base, kind))
    torch.nn.Module.__init__(made)
    made.diffusion_model, made.manual_cast_dtype, made.device = network, None, torch.device("cpu")
    made.get_dtype = lambda: torch.float32
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(made, device, torch.device("cpu"))


def drawing(*boxes):
    picture = torch.ones(64, 64, 3)
    for left, top, right, bottom in boxes:
        picture[top:bottom, left:right] = torch.tensor([1.0, 0.0, 0.0])
    return picture


def test_rt_detr_is_asked_through_comfyuis_own_node(graph):
    reward = graph.call("GenEval", detector=model_of("RT_DETR_v4", Finder()), formula="geneval")[0]
    assert reward.patcher is not None and reward.name == "GenEval"
    pictures = torch.stack([drawing((10, 20, 30, 50)), drawing()])
    [[apple, cat], _] = reward.detect(pictures, ["apple"])
    assert apple.label == "apple" and apple.box == pytest.approx((10, 20, 30, 50), abs=1) and cat.score < 0.3
    scores, _, _, _, order = graph.call("Score", reward_model=reward, images=pictures, prompts="a photo of an apple")
    assert scores.values["GenEval"].tolist() == [1, 1]
    assert reward.score(pictures, ["a cat", "two apples"]).tolist() == [0, 0]
    with pytest.raises(ValueError, match="knows 80 kinds of things, and 'unicorn' is none"):
        graph.call("Score", reward_model=reward, images=pictures, prompts="a unicorn")


def test_the_trainer_learns_from_it_and_refuses_before_it_samples(graph):
    reward = graph.call("GenEval", detector=model_of("RT_DETR_v4", Finder()), formula="flow_grpo")[0]
    policy = graph.policy()
    with pytest.raises(ValueError, match="asks for red"):
        graph.train(policy, 1, reward=reward, text="a red apple")
    assert policy.run.iteration == 0 and not policy.run.metrics
    graph.train(policy, 1, reward=reward, text="an apple\ntwo apples", shape=graph.shape(branching=2, depth=1))
    [row] = policy.run.metrics
    assert row["reward"] == pytest.approx(0.75), "one apple is all of one, and half of two"
    assert policy.run.iteration == 1


def network_of_rt_detr():
    return pytest.importorskip("comfy.ldm.rt_detr.rtdetr_v4", reason="this ComfyUI has no RT-DETR")


def test_the_list_of_names_is_comfyuis(graph):
    found = network_of_rt_detr()
    assert tuple(found.COCO_CLASSES) == COCO


@pytest.fixture(scope="module")
def rt_detr(pack):
    """Random weights of the real architecture."""
    network = network_of_rt_detr()
    import comfy.ops

    weights = network.RTv4(dtype=torch.float32, operations=comfy.ops.disable_weight_init).state_dict()
    chance = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if value.is_floating_point() and "anchors" not in name and "running" not in name:
            value.copy_(0.02 * torch.randn(value.shape, generator=chance) if value.dim() > 1 else torch.ones(()))
    return weights


def test_what_rt_detrs_own_network_finds_is_what_the_rules_get(graph, rt_detr):
    import comfy.sd
    from comfy_extras.nodes_rtdetr import RTDETR_detect

    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(dict(rt_detr))
        picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
        [boxes] = RTDETR_detect.execute(model, picture, 0.05, "all", 300).result[0]
    reward = graph.call("GenEval", detector=model, formula="geneval")[0]
    [found] = reward.detect(picture, [])
    assert len(found) == len(boxes) > 0 and {one.label for one in found} == {box["label"] for box in boxes}
    assert reward.score(picture, [f"a {found[0].label}"]).isfinite().all()


def test_in_the_queue_its_file_and_its_boxes_score_alike(rt_detr, tmp_path):
    """A real server: Load Diffusion Model, ComfyUI's own detection node, GenEval by the model and by the boxes."""
    from safetensors.torch import save_file

    models = tmp_path / "models/diffusion_models"
    models.mkdir(parents=True)
    save_file({name: value.clone() for name, value in rt_detr.items()}, models / "rt_detr.safetensors")
    here = {"confidence": 0.05, "formula": "flow_grpo"}
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "rt_detr.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0xFF0000}},
        "3": {"class_type": "RTDETR_detect", "inputs": {"model": ["1", 0], "image": ["2", 0], "threshold": 0.05,
                                                        "class_name": "all", "max_detections": 300}},
        "4": {"class_type": "TreeRPOGenEval", "inputs": {"detector": ["1", 0], **here}},
        "5": {"class_type": "TreeRPOGenEval", "inputs": {"detector": ["3", 0], "images": ["2", 0], **here}},
    }  # fmt: skip
    for score, reward in (("6", "4"), ("7", "5")):
        given = {"reward_model": [reward, 0], "images": ["2", 0], "prompts": "a photo of a toilet", "best_n": 1}
        graph[score] = {"class_type": "TreeRPOScore", "inputs": given}
    with run.Server(COMFYUI, sys.executable, base=tmp_path) as server:
        outputs = run.Client(server.url).run(graph)
    by_model, by_boxes = ("".join(outputs[number]["text"]) for number in ("6", "7"))

    assert by_model == by_boxes and "GenEval: mean" in by_model
    assert "mean 0.0000" not in by_model, "something was found"


class Segmenter(torch.nn.Module):
    """In the place of SAM3's network: finds every shape when it is asked for an apple, none otherwise."""

    def forward(self, frame, text_embeddings, text_mask, boxes, threshold, orig_size):
        [[left, top, right, bottom]] = shapes(frame.movedim(1, -1))
        there = torch.full((1, 1, 252, 252), -9.0)
        there[..., top // 4 : bottom // 4, left // 4 : right // 4] = 9.0
        sure = torch.where(text_embeddings.flatten()[0] == 1, 4.0, -9.0)
        box = torch.tensor([[[left, top, right, bottom]]]) * orig_size[0] / 1008
        return {"boxes": box, "scores": sure.view(1, 1), "masks": there}


class Words:
    """In the place of SAM3's CLIP: its own way of asking for several, and one number for apples."""

    def tokenize(self, text):
        from comfy.text_encoders.sam3_clip import _parse_prompts

        return _parse_prompts(text)

    def encode_from_tokens_scheduled(self, tokens):
        [(kind, most)] = tokens
        each = {"cond": torch.full((1, 1, 1), float(kind == "apple")), "attention_mask": None, "max_detections": most}
        assert most == 16, "not only the best one"
        return [[each["cond"], {"sam3_multi_cond": [each]}]]


def test_sam3_is_asked_for_each_thing_and_gives_outlines(graph):
    model = model_of("SAM3", Segmenter())
    reward = graph.call("GenEval", detector=model, clip=Words(), formula="geneval")[0]
    pictures = torch.stack([drawing((8, 16, 32, 48)), drawing((0, 0, 4, 4), (32, 32, 64, 64))])
    first, second = reward.detect(pictures, ["apple", "flying saucer"])
    assert [(one.label, one.box) for one in first] == [("apple", pytest.approx((8, 16, 32, 48), abs=1))]
    assert first[0].mask.shape == (64, 64) and first[0].mask.mean() == pytest.approx(24 * 32 / 64**2, abs=0.02)
    assert len(second) == 1
    assert reward.score(pictures, ["an apple", "a flying saucer"]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="connect the CLIP of its checkpoint"):
        graph.call("GenEval", detector=model, formula="geneval")


SEG = namedtuple("SEG", "cropped_image cropped_mask confidence crop_region bbox label control_net_wrapper")


class Ultralytics:
    """Impact Pack's detector as its Subpack has it: pictures one by one, sizes and numbers of numpy."""

    def detect(self, image, threshold, dilation, crop_factor, drop_size=1, detailer_hook=None):
        assert image.shape[0] == 1 and crop_factor == 1.0 and dilation == 0
        [[left, top, right, bottom]] = shapes(image)
        box = np.array([left, top, right, bottom], np.float32)
        mask = np.ones((bottom - top, right - left), np.float32)
        seg = SEG(None, mask, np.array([0.97], np.float32), [left, top, right, bottom], box, "apple", None)
        return image.shape[1:3], [seg]


def test_impact_packs_detectors_are_taken_as_they_are(graph):
    reward = graph.call("GenEval", detector=Ultralytics(), formula="geneval")[0]
    picture = drawing((8, 16, 32, 48))[None]
    [[apple]] = reward.detect(picture, ["apple"])
    assert apple.box == (8, 16, 32, 48) and apple.score == pytest.approx(0.97)
    assert apple.mask.sum() == 24 * 32 and apple.mask[16:48, 8:32].min() == 1
    assert float(reward.score(picture, ["an apple"])) == 1
    known = Ultralytics()
    known.bbox_model = SimpleNamespace(names={0: "Apple", 1: "mouse"})
    reward = graph.call("GenEval", detector=known, formula="geneval")[0]
    reward.refuse(["two apples", "a computer mouse"])
    with pytest.raises(ValueError, match="the detector knows 2 kinds of things, and 'pear' is none"):
        reward.refuse(["a pear"])


def test_by_hand_the_boxes_of_a_trees_leaves_give_advantages(graph):
    policy = graph.policy()
    positive, prompts = graph.prompts("a photo of an apple\na photo of two apples", policy=policy)
    tree, leaves = graph.sample(policy, positive, shape=graph.shape(branching=2, depth=1))
    pictures = graph.decode(leaves)
    apple = {"x": 8, "y": 16, "width": 24, "height": 32, "label": "apple"}
    boxes = [[apple] * (i % 2) for i in range(len(pictures))]
    reward = graph.call("GenEval", detector=boxes, images=pictures, formula="flow_grpo")[0]
    scored = graph.score(pictures, prompts, reward)
    assert scored.values["GenEval"].tolist() == [0, 1, 0, 0.5]
    credit = graph.call("Advantages", tree=tree, rewards=scored)[0]
    before = {key: value.clone() for key, value in policy.run.adapters.state_dict().items()}
    graph.call("Update", policy=policy, tree=tree, advantages=credit, **UPDATE)
    after = policy.run.adapters.state_dict()
    assert any(not torch.equal(after[key], before[key]) for key in before)


def test_boxes_of_any_node_score_the_pictures_they_were_found_in(graph):
    pictures = torch.stack([drawing((8, 16, 32, 48)), drawing((40, 0, 64, 20))])
    apple, pear = ({"x": 8, "y": 16, "width": 24, "height": 32, "label": kind} for kind in ("apple", "Pear"))
    boxes = [[apple, pear, {**apple, "score": 0.1}], []]
    reward = graph.call("GenEval", detector=boxes, images=pictures, formula="geneval")[0]
    assert reward.score(pictures.flip(0), ["a pear", "a pear"]).tolist() == [0, 1], "known again in any order"
    assert reward.score(pictures[:1], ["two apples"]) == 0
    for one in (apple, [apple]):
        alone = graph.call("GenEval", detector=one, images=pictures[:1], formula="geneval")[0]
        assert alone.score(pictures[:1], ["an apple"]) == 1
    with pytest.raises(ValueError, match="of other images than those to be scored"):
        reward.score(pictures + 0.25 * (pictures == 0), ["a pear", "a pear"])


@pytest.mark.parametrize(
    "boxes, images, words",
    [
        ([[]], None, "The bboxes have no images"),
        ([[], []], torch.zeros(1, 8, 8, 3), "There are bboxes of 2 images, and 1 images"),
        ([[{"x": 0, "y": 0, "width": 2, "height": 2}]], torch.zeros(1, 8, 8, 3), "do not say what they hold"),
    ],
)
def test_boxes_that_cannot_be_used_are_refused(graph, boxes, images, words):
    with pytest.raises(ValueError, match=words):
        graph.call("GenEval", detector=boxes, images=images, formula="geneval")


def test_what_finds_nothing_in_pictures_is_refused(graph):
    with pytest.raises(ValueError, match="The detector is of the kind SD3, which finds nothing in pictures"):
        graph.call("GenEval", detector=graph.model, formula="geneval")
    measure = graph.call("Measure", measure="brightness", direction="more")[0]
    with pytest.raises(ValueError, match="by CLIP, not by brightness: connect CLIPScore to colours"):
        graph.call("GenEval", detector=Ultralytics(), colours=measure, formula="geneval")


def test_clipscore_as_comfyui_holds_it_tells_colours(graph, monkeypatch, tmp_path):
    pytest.importorskip("open_clip")
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    file = models.write("clipscore_open_clip", tmp_path / "models/rewards/tiny")
    clip = graph.call("CLIPScore", file=f"rewards/tiny/{file.name}")[0]
    reward = graph.call("GenEval", detector=Ultralytics(), colours=clip, formula="geneval")[0]
    picture = drawing((8, 16, 32, 48))[None]
    from core.rewards.geneval import COLOURS

    scores = [float(reward.score(picture, [f"a {colour} apple"])) for colour in COLOURS]
    assert sum(scores) == 1, "of one colour and no other"
