"""The OCR reward: the text a prompt asks for, the peers' formulas, and reading with the real weights that rapidocr
brings. All of the 240 strings: python3 run.py bench ocr.
"""

import functools
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from graph import Graph
from hypothesis import given, settings
from hypothesis import strategies as st

from core.rewards import load
from core.rewards.ocr import Ocr, edit_distance, quoted, text_score

with pytest.MonkeyPatch.context() as keep:
    # a benchmark puts the pack first on the path, where its nodes/ would hide ComfyUI's nodes.py
    keep.setattr(sys, "path", list(sys.path))
    from benchmarks import ocr

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ocr.json").read_text("utf-8"))


@pytest.mark.parametrize("lines, prompt, flow_grpo, tmpo", GOLDEN)
def test_scores_are_the_peers_own(lines, prompt, flow_grpo, tmpo):
    """tests/golden/make_ocr.py ran their code on these lines."""
    assert text_score(lines, quoted(prompt)) == pytest.approx(flow_grpo, abs=1e-12)
    assert text_score(lines, quoted(prompt), "tmpo", case=True) == pytest.approx(tmpo, abs=1e-12)


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ('a sign that says "OPEN"', ["OPEN"]),
        ("a sign that says “OPEN” at night", ["OPEN"]),
        ("ein Schild „Geöffnet“ und „Geschlossen”", ["Geöffnet", "Geschlossen"]),
        ("une affiche « Café »", ["Café"]),
        ("写着「你好」的牌子", ["你好"]),
        ('写着"你好"的牌子和『再见』', ["你好", "再见"]),
        ("a sign 'OPEN', big", ["OPEN"]),
        ("a sign ‘don’t stop’", ["don’t stop"]),
        ("it's a cat's 'milk bar'", ["milk bar"]),
        ('a 12" pizza beside the sign "PIZZA"', ["PIZZA"]),
        ("'a' beside \"b\"", ["b"]),  # single marks only where there are no others
        ("the dogs' bowl and the cats' toys", []),
        ("rock 'n' roll", []),
        ("the '90s 'til now", []),
        ('an empty "" or " " one', []),
        ("no text", []),
    ],
)
def test_texts_in_quotes(prompt, texts):
    assert quoted(prompt) == texts


@given(st.text("abAB é", max_size=7), st.text("abAB é", max_size=7), st.text("abAB é", max_size=7))
@settings(max_examples=60, deadline=None)
def test_the_edit_distance_is_the_shortest_way(a, b, c):
    @functools.cache
    def ways(i, j):
        if not i or not j:
            return i + j
        return min(ways(i - 1, j) + 1, ways(i, j - 1) + 1, ways(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == ways(len(a), len(b)) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_several_texts_count_in_the_order_that_fits_best():
    assert text_score(["World", "Hello"], ["Hello", "World"]) == 1
    assert text_score(["Wrld", "Hello"], ["Hello", "World"]) == pytest.approx(0.9)
    assert text_score(["Hello"], ["Hello", "World"]) == pytest.approx(0.5)
    assert text_score(["OPEN"], ["open"], case=True) == 0 and text_score(["ＯＰＥＮ！"], ["open!"]) == 1
    assert text_score(list("edcba"), list("abcde")) == 1, "each of more than four is looked for by itself"


def test_prompts_are_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="no text in quotes in the prompt 'a cat'"):
        Ocr().refuse(["a cat", '"fine"'])
    with pytest.raises(ValueError, match="formula 'x': choose one of flow_grpo, tmpo"):
        Ocr("x")


def test_a_missing_package_names_the_pip_line(monkeypatch, graph):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match="pip install rapidocr onnxruntime") as caught:
        load("ocr").score(torch.ones(1, 64, 64, 3), ['"a"'])
    assert "\n" not in str(caught.value)
    found = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rapidocr" else found(name))
    assert "pip install rapidocr onnxruntime" in graph.nodes["TreeRPOOCR"].validate_inputs(formula="tmpo")


def test_the_trainer_refuses_a_prompt_before_it_samples(reward, graph):
    made = graph.call("OCR", formula="flow_grpo", capitals=False)[0]
    policy = graph.policy()
    with pytest.raises(ValueError, match="no text in quotes in the prompt 'a red circle on a white background'"):
        graph.train(policy, 1, reward=made)
    assert policy.run.iteration == 0 and not policy.run.metrics


@pytest.mark.parametrize("letters, branching, moved", [("0+", 6, True), ("QQ", 2, False)])
def test_what_is_read_in_pictures_moves_the_lora(reward, graph, letters, branching, moved):
    """The tiny SD3 draws circles and crosses. Some are read as 0 and as +, and the LoRA learns from it; none as Q, and
    then there is nothing to learn.
    """
    made = graph.call("OCR", formula="flow_grpo", capitals=False)[0]
    made._engine, made._known, made.tried = reward._engine, reward._known, ""
    policy = graph.policy()
    before = {key: value.clone() for key, value in policy.run.adapters.state_dict().items()}
    graph.train(
        policy,
        1,
        text=f'a red circle on a white background "{letters[0]}"\na blue cross on a white background "{letters[1]}"',
        reward=made,
        shape=graph.shape(branching=branching, depth=1),
    )
    [row] = policy.run.metrics
    assert policy.run.iteration == 1 and (0 < row["reward"] < 1 if moved else row["reward"] == 0)
    assert (row["reward_std"] > 0) == moved
    after = policy.run.adapters.state_dict()
    assert any(not torch.equal(after[key], before[key]) for key in before) == moved


@pytest.fixture
def graph(pack, tmp_path):
    return Graph(pack, tmp_path, "sd3")


@pytest.fixture(scope="module")
def reward():
    """The real weights, which rapidocr's wheel holds: no network."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")

    def deny(*args):
        raise AssertionError("the OCR models were to be downloaded")

    connect, socket.socket.connect = socket.socket.connect, deny
    try:
        made = load("ocr")
        made.refuse(['"a"'])
    finally:
        socket.socket.connect = connect
    return made


def test_clean_text_is_read_exactly_and_damaged_text_scores_less(reward):
    texts = ocr.strings(8)
    prompts = [f'a sign that says "{text}"' for text in texts]
    clean, wrong = (
        torch.stack([ocr.drawn(text, i, damage) for i, text in enumerate(texts)]) for damage in ("", "wrong letter")
    )
    scores, lower = reward.score(clean, prompts), reward.score(wrong, prompts)
    assert (scores == 1).float().mean() >= 0.95
    assert (lower < scores).float().mean() >= 0.85 and lower.mean() > 0.5, "one letter costs one letter"
    strict = Ocr(case=True)
    strict._engine, strict._known = reward._engine, reward._known
    assert strict.score(clean[:4], [prompt.swapcase() for prompt in prompts[:4]]).max() < 1


def test_a_picture_without_text_scores_nothing_and_the_batch_does_not_matter(reward):
    pictures = torch.cat([ocr.wordless(3), ocr.drawn("Two words", 0)[None], ocr.drawn("EXIT", 1)[None]])
    prompts = ['"OPEN"'] * 3 + ['"Two words"', '"EXIT"']
    together = reward.score(pictures, prompts)
    assert together[:3].max() == 0 and together[3:].min() == 1
    alone = [reward.score(picture[None], [prompt]) for picture, prompt in zip(pictures, prompts)]
    assert torch.equal(together, torch.cat(alone))
    assert reward.score(torch.full((1, 64, 64, 3), torch.nan), ['"OPEN"']) == 0


def test_letters_that_no_model_of_it_knows_are_refused(reward):
    reward.refuse(['"Grüße, señor: ½ €"', "「こんにちは」", "“你好，世界！”", '"ＷＩＤＥ"', '"αβγ"'])
    with pytest.raises(ValueError, match="cannot read П р и в е т in the prompt"):
        reward.refuse(['"Привет"'])


def test_a_file_that_is_no_recognition_model_is_refused(reward, tmp_path):
    file = tmp_path / "some.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(ValueError, match="some.onnx is not a PP-OCR recognition model") as caught:
        load("ocr", file).refuse(['"a"'])
    assert "\n" not in str(caught.value)


def test_a_stop_is_answered_before_every_picture(reward):
    count = []
    reward.check = lambda: count.append(1)
    try:
        reward.read(torch.ones(3, 64, 64, 3))
    finally:
        reward.check = lambda: None
    assert len(count) == 3


def test_the_nodes_score_and_rank_with_it(reward, graph):
    made = graph.call("OCR", formula="flow_grpo", capitals=False)[0]
    made._engine, made._known = reward._engine, reward._known
    pictures = torch.stack([ocr.drawn("coffee", 0, "covered"), ocr.drawn("coffee", 0), ocr.wordless(1)[0]])
    scores, _, _, _, order = graph.call("Score", reward_model=made, images=pictures, prompts='a cup, "Coffee"')
    assert order == [1, 0, 2] and scores.values["OCR"][1] == 1
    with pytest.raises(ValueError, match="no text in quotes"):
        graph.call("Score", reward_model=made, images=pictures, prompts="a cup")
    kind, path, options = made.origin
    assert load(kind, path, **options).origin == made.origin
