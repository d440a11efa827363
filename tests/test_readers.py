"""What a text and a picture is, the same in every node: a prompt or a list of them, and the picture that was meant.

The files in data/cases are small inputs that people have, each of which was once read as something else.
"""

import shutil
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import COMFYUI, MISSING
from graph import Graph
from PIL import Image, ImageFile

import headless
import run
from core.files import read_text
from core.pictures.reading import pictures_in, read_picture
from core.runs.config import Config
from core.runs.prompts import PromptText, collect, listed, parse, read, share

CASES = Path(__file__).parent / "data" / "cases"
PROMPTS, PICTURES = CASES / "prompts", CASES / "pictures"
TWO_LINES = "a red circle\non a white background"


@pytest.fixture
def graph(pack, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    (tmp_path / "input").mkdir()
    return Graph(pack, tmp_path, "sd3")


def put(graph, *names):
    for name in names:
        shutil.copy(PICTURES / name, graph.folder / "input" / name)


# What a text is.


@pytest.mark.parametrize(
    "texts, batches, per_image",
    [
        ([TWO_LINES], [4], [TWO_LINES] * 4),
        (["  a cat \n"], [2, 1], ["a cat"] * 3),
        ([""], [2], ["", ""]),
        ([PromptText("a\nb", "ab")], [4], ["a", "a", "b", "b"]),
        ([PromptText("a\nb", "ab")], [2], ["a", "b"]),
        ([PromptText(TWO_LINES, [TWO_LINES])], [2], [TWO_LINES] * 2),
        ([TWO_LINES], [1], [TWO_LINES]),
        ([TWO_LINES, "b"], [1, 1], [TWO_LINES, "b"]),
        ([TWO_LINES, "b"], [2], [TWO_LINES, "b"]),
        ([TWO_LINES, "b"], [4], [TWO_LINES, TWO_LINES, "b", "b"]),
        (["a", "b"], [3, 1], ["a", "a", "a", "b"]),
        ([PromptText("a\nb", "ab"), "c"], [2, 3], ["a", "b", "c", "c", "c"]),
        (list("abcd"), [2, 2], list("abcd")),
    ],
)
def test_every_image_has_its_prompt(texts, batches, per_image):
    assert share(texts, batches) == per_image


@pytest.mark.parametrize(
    "texts, batches, sentence",
    [
        ([TWO_LINES], [2], "2 lines for 2 images, so it may be one prompt or one per image"),
        ([TWO_LINES], [1, 1], "it may be one prompt or one per image"),
        ([PromptText("a\nb", "ab")], [3], "3 images cannot be shared out evenly over 2 prompts"),
        (["a", "b"], [5], "5 images cannot be shared out evenly over 2 prompts"),
        (["a", "b"], [1, 1, 2], "2 prompts for 3 batches of together 4 images"),
    ],
)
def test_what_may_be_two_things_is_refused(texts, batches, sentence):
    with pytest.raises(ValueError, match=sentence):
        share(texts, batches)


def test_a_list_is_lines_where_it_is_one_text_and_whole_texts_where_it_is_several():
    assert listed(["# mine\na\n\n b "])[0] == ["a", "b"]
    assert listed([TWO_LINES, "# b", " "])[0] == ["a red circle on a white background", "# b"]
    assert listed([PromptText(TWO_LINES, [TWO_LINES])])[0] == ["a red circle on a white background"]
    assert collect(["a", "a", "b"]).train == ["a", "b"]


def test_a_copy_of_a_text_still_knows_its_prompts():
    copy = deepcopy(PromptText("a\nb", ["a\nb"]))
    assert copy == "a\nb" and copy.prompts == ("a\nb",)


class Heard:
    """A reward that keeps what it was asked."""

    name, group_wise = "heard", False

    def score(self, images, prompts):
        self.prompts = list(prompts)
        return torch.arange(len(images)).float()


def heard(graph, **inputs):
    from core.rewards.contract import Reward

    reward = type("Asked", (Heard, Reward), {})()
    return reward, graph.call("Score", reward_model=reward, **inputs)


def test_a_prompt_with_a_line_break_is_one_prompt_for_all_images(graph):
    reward, (_, table, *_) = heard(graph, images=torch.rand(4, 8, 8, 3), prompts=TWO_LINES, best_n=4)
    assert reward.prompts == [TWO_LINES] * 4
    assert len(table.splitlines()) == 5 and "a red circle on a white background" in table


def test_the_user_is_told_that_lines_were_taken_as_one_prompt(pack, graph):
    node = graph.nodes["TreeRPOScore"]
    shown = []
    for text in (TWO_LINES, graph.prompts("a\nb")[1], "a"):
        reward = type("Asked", (Heard, pack.core.rewards.contract.Reward), {})()
        made = type("Score", (node,), {"hidden": None})
        with torch.inference_mode():
            shown.append(made.execute([reward], [torch.rand(4, 8, 8, 3)], [text]).ui["text"][0])
    assert [text.startswith("The 2 lines of prompts are one prompt") for text in shown] == [True, False, False]


def test_what_tree_prompts_gives_is_a_prompt_per_line(graph):
    positive, text = graph.prompts("# mine\na\nb")
    assert text == "a\nb" and positive[0][0].shape[0] == 2
    assert heard(graph, images=torch.rand(4, 8, 8, 3), prompts=text)[0].prompts == ["a", "a", "b", "b"]


def test_the_same_prompt_twice_has_trees_twice(graph):
    positive, text = graph.prompts("a\na")
    assert text.prompts == ("a", "a") and positive[0][0].shape[0] == 2


def test_captions_of_a_folder_are_one_list_in_every_node(graph):
    for name, words in (("a", TWO_LINES), ("b", "a blue square")):
        Image.new("RGB", (8, 8)).save(graph.folder / "input" / f"{name}.png")
        (graph.folder / "input" / f"{name}.txt").write_text(words)
    images, _, captions = graph.call("Folder", folder="", prompt="", limit=9)
    assert captions == [TWO_LINES, "a blue square"]
    assert heard(graph, images=images, prompts=captions)[0].prompts == captions
    on_a_line = ["a red circle on a white background", "a blue square"]
    assert graph.call("PromptList", text=captions)[0].train == on_a_line
    assert graph.call("PromptList", text=captions[:1])[0].train == on_a_line[:1]
    assert graph.prompts(captions)[1].prompts == tuple(on_a_line)
    assert heard(graph, images=images[:1], prompts=captions[:1])[0].prompts == captions[:1]


@pytest.mark.parametrize("node", ["Prompts", "PromptList", "SaveLora", "Score", "Pick"])
def test_a_node_that_takes_prompts_takes_a_list_of_them_in_one_run(graph, node):
    assert graph.nodes[f"TreeRPO{node}"].define_schema().is_input_list


def test_a_saved_lora_has_one_fingerprint_of_all_its_prompts(graph):
    from safetensors import safe_open

    policy, found = graph.policy(), []
    for prompts in ("a\nb", ["a", "b"], ["a", "c"]):
        path = graph.call("SaveLora", policy=policy, lora_name="x", prompts=prompts)[0]
        with safe_open(path, "pt") as file:
            found.append(file.metadata()["treerpo.prompts_blake2b"])
    assert found[0] == found[1] != found[2]


def test_pick_the_winner_asks_about_the_whole_prompt(graph, pack, monkeypatch):
    class Messages:
        def send_sync(self, event, data):
            sent.append((event, data))

    sent = []
    monkeypatch.setattr(pack.nodes.browser, "server", lambda: Messages())
    inputs = dict(mode="two runs", how="best", picks="")
    graph.call("Pick", images=torch.rand(4, 8, 8, 3), prompts=TWO_LINES, **inputs)
    graph.call("Pick", images=torch.rand(4, 8, 8, 3), prompts=graph.prompts("a\nb")[1], **inputs)
    asked = [(data["prompt"], data["count"]) for event, data in sent if event == "treerpo.pick"]
    assert asked == [(TWO_LINES, 4), ("a", 2), ("b", 2)]


@pytest.mark.parametrize("text", ["a red circle\na blue square", list("aaaabbbc"), ["x", "y"] * 4])
def test_scores_for_other_prompts_than_the_trees_train_nothing(graph, text):
    positive, prompts = graph.prompts("a red circle\na blue square")
    tree, latent = graph.sample(graph.policy(), positive, shape=graph.shape(depth=1, trees=2))
    images = graph.decode(latent)
    graph.call("Advantages", tree=tree, rewards=graph.score(images, prompts))
    with pytest.raises(ValueError, match="scored for other prompts than those of the tree, which has 2"):
        graph.call("Advantages", tree=tree, rewards=graph.score(images, text))


@pytest.mark.skipif(COMFYUI is None, reason=MISSING or "")
def test_http_prompts_stay_what_they_are_between_the_nodes_of_comfyui(tmp_path):
    """Captions of a folder make one list; of Tree Prompts' text each line is a prompt, of a written one it is not."""
    (tmp_path / "input").mkdir()
    for name, words in (("a", TWO_LINES), ("b", "a blue square")):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "input" / f"{name}.png")
        (tmp_path / "input" / f"{name}.txt").write_text(words)

    def scored(images, prompts):
        return {
            "class_type": "TreeRPOScore",
            "inputs": {"reward_model": ["m", 0], "images": images, "prompts": prompts},
        }

    graph = {
        "f": {"class_type": "TreeRPOFolder", "inputs": {"folder": "", "prompt": "", "limit": 9}},
        "l": {"class_type": "TreeRPOPromptList", "inputs": {"text": ["f", 2]}},
        "s": {"class_type": "PreviewAny", "inputs": {"source": ["l", 1]}},
        "m": {"class_type": "TreeRPOMeasure", "inputs": {"measure": "brightness", "direction": "more"}},
        "t": {"class_type": "TreeRPOTinyModel", "inputs": {"model": "sd3"}},
        "p": {"class_type": "TreeRPOPrompts", "inputs": {"clip": ["t", 1], "text": "x\ny", "per_iteration": 0}},
        "e": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 4, "color": 0}},
        "folder": scored(["f", 0], ["f", 2]),
        "listed": scored(["e", 0], ["p", 1]),
        "written": scored(["e", 0], TWO_LINES),
    }
    with run.Server(COMFYUI, sys.executable, base=tmp_path) as server:
        found = run.Client(server.url).run(graph)
    assert found["s"]["text"] == ["2 prompts to train on, 0 held out"]
    shown = {node: found[node]["text"][0] for node in ("folder", "listed", "written")}
    assert "red circle on a white background" in shown["folder"] and "a blue square" in shown["folder"]
    assert [line.split()[-1] for line in shown["listed"].splitlines()[1:]] == ["x", "x", "y", "y"]
    assert "are one prompt" in shown["written"] and shown["written"].count("on a white background") == 4


# Pictures.


@pytest.mark.parametrize("name", ["ramp_rgb8.png", "ramp_gray16.png", "ramp_gray16.tif", "ramp_float.tif"])
def test_a_ramp_is_as_bright_in_every_kind_of_file(name):
    picture = read_picture(PICTURES / name)
    assert picture.shape == (1, 64, 64, 3) and float(picture.mean()) == pytest.approx(0.498, abs=0.001)
    torch.testing.assert_close(picture, read_picture(PICTURES / "ramp_rgb8.png"), atol=1 / 255, rtol=0)


def test_what_is_transparent_is_white(tmp_path):
    assert float(read_picture(PICTURES / "all_clear_rgb_trns.png").min()) == 1
    deep = Image.new("I;16", (2, 1), 0)
    deep.putpixel((1, 0), 257 * 100)
    deep.save(tmp_path / "deep.png", transparency=0)
    Image.new("RGBA", (2, 1), (0, 0, 0, 0)).save(tmp_path / "alpha.png")
    Image.new("L", (2, 1), 7).save(tmp_path / "grey.png", transparency=7)
    assert read_picture(tmp_path / "deep.png")[0, 0, :, 0].tolist() == pytest.approx([1, 100 / 255])
    assert float(read_picture(tmp_path / "alpha.png").min()) == float(read_picture(tmp_path / "grey.png").min()) == 1


def test_a_tiff_that_counts_down_to_white(tmp_path):
    picture = Image.new("I;16", (2, 1), 0)
    picture.putpixel((1, 0), 65535)
    picture.save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert read_picture(tmp_path / "a.tif")[0, 0, :, 0].tolist() == [1, 0]


def test_a_picture_cut_short_is_refused_whatever_others_asked_of_pillow(monkeypatch):
    for lax in (True, False):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lax)
        with pytest.raises(ValueError, match="cut_at_a_third.png is damaged, cut short"):
            read_picture(PICTURES / "cut_at_a_third.png")
        assert ImageFile.LOAD_TRUNCATED_IMAGES is lax


@pytest.mark.parametrize("values", [[0.0, 2.0], [-1.0, 0.5], [0.5, float("nan")]])
def test_numbers_of_which_none_is_known_to_be_white_are_refused(tmp_path, values):
    picture = Image.new("F", (2, 1))
    for x, value in enumerate(values):
        picture.putpixel((x, 0), value)
    picture.save(tmp_path / "a.tif")
    Image.new("I", (2, 1), 70000).save(tmp_path / "b.tif")
    for name in ("a.tif", "b.tif"):
        with pytest.raises(ValueError, match=f"{name} has numbers of which none is known to be white"):
            read_picture(tmp_path / name)


def test_a_folder_passes_over_hidden_files_and_names_what_it_leaves_out(graph, tmp_path):
    put(graph, "._mac_sidecar.png", "ramp_rgb8.png", "ramp_gray16.png")
    (graph.folder / "input" / "phone.HEIC").write_bytes(b"")
    (graph.folder / "input" / "folder.png").mkdir()
    shutil.copy(PICTURES / "ramp_rgb8.png", graph.folder / "input" / "z.jfif")
    found, not_read = pictures_in(graph.folder / "input")
    assert [file.name for file in found] == ["ramp_gray16.png", "ramp_rgb8.png", "z.jfif"]
    assert [file.name for file in not_read] == ["phone.HEIC"]
    shown = graph.nodes["TreeRPOFolder"].execute("", "", 2).ui["text"][0]
    assert "2 pictures, 1 more left out" in shown and "phone.HEIC" in shown


def test_captions_are_read_as_strictly_as_prompts(graph):
    put(graph, "caption_bom.png", "caption_bom.txt")
    assert graph.call("Folder", folder="", prompt="", limit=9)[2] == ["a cat"]
    put(graph, "caption_cp1252.png", "caption_cp1252.txt")
    with pytest.raises(ValueError, match="Line 1 of caption_cp1252.txt is not UTF-8"):
        graph.call("Folder", folder="", prompt="", limit=9)
    with pytest.raises(ValueError, match="There is no caption"):
        read_text(PICTURES / "absent.txt", "caption")


def test_a_picture_that_cannot_be_read_is_named_by_the_node(graph):
    put(graph, "cut_at_a_third.png")
    with pytest.raises(ValueError, match="cut_at_a_third.png"):
        graph.call("Folder", folder="", prompt="", limit=9)


# Prompt files.


def test_a_header_is_no_prompt(tmp_path):
    assert read(PROMPTS / "header_prompts.csv").train == ["A red coloured car.", "A black car, parked."]
    for name in ("positive", "Positive_Prompt", "CAPTIONS", "positive-prompts"):
        (tmp_path / "a.csv").write_text(f"id,{name}\n1,a cat\n")
        assert read(tmp_path / "a.csv").train == ["a cat"]
        (tmp_path / "a.jsonl").write_text(f'{{"id": 1, "{name}": "a cat"}}')
        assert read(tmp_path / "a.jsonl").train == ["a cat"]


def test_a_prompt_is_not_cut_at_its_comma(tmp_path):
    with pytest.raises(ValueError, match="Line 1 of no_header_one_comma_each.csv has 2 columns, and no header"):
        read(PROMPTS / "no_header_one_comma_each.csv")
    (tmp_path / "b.csv").write_text("a cat\t12\n")
    with pytest.raises(ValueError, match="Line 1 of b.csv has 2 columns, and no header"):
        read(tmp_path / "b.csv")
    (tmp_path / "a.csv").write_text('a cat,12\n"a dog, running",1.5\n')
    assert read(tmp_path / "a.csv").train == ["a cat", "a dog, running"]


def test_options_of_kohya_are_no_part_of_the_prompt(graph):
    found = read(PROMPTS / "kohya_options.txt")
    assert found.train == ["a red circle"] and "1 of 1 prompts had options for another program" in found.notes[0]
    shutil.copy(PROMPTS / "kohya_options.txt", graph.folder / "input" / "k.txt")
    assert "'--n low quality" in graph.call("PromptList", text="", file="k.txt")[1]
    assert graph.prompts("a cat --w 768 --h 768\na dog")[1].prompts == ("a cat", "a dog")


@pytest.mark.parametrize("text", ["a cat --ar 16:9", "a {red|blue} cat", "a {|very} big cat"])
def test_what_is_kept_as_written_is_said(text, caplog):
    found = parse(f"{text}\na dog")
    assert found.train == [text, "a dog"] and len(found.notes) == 1 and found.notes[0] in caplog.text


@pytest.mark.parametrize("text", ["a cat -- and a dog", "a well-known cat", "a {red} cat | dog", "--n a cat"])
def test_plain_words_are_left_alone(text):
    found = parse(text)
    assert found.train == [text] and found.notes == []


def test_prompts_of_a_run_file_are_read_by_the_same_rule():
    config = Config()
    config.prompts.train, config.prompts.held_out = [TWO_LINES, "# b", "a cat --w 512"], ["a dog\n"]
    found = config.prompt_list()
    assert found.train == ["a red circle on a white background", "# b", "a cat"] and found.held_out == ["a dog"]


def test_a_workflow_with_a_byte_order_mark_loads():
    assert headless.load_graph(CASES / "workflow_bom.json")
