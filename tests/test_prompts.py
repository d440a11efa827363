"""Reading prompts from whatever people have, holding some out, and the order in which iterations take them."""

import csv
import io
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.runs.prompts import LARGEST_FILE, PromptList, order, parse, read, split

# Any text that is one line and not a comment, as it comes out of the reader.
PROMPT = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)
    .map(str.strip)
    .filter(lambda text: text and len(text.splitlines()) == 1 and text != "#" and not text.startswith(("# ", "\ufeff")))
)
PROMPTS = st.lists(PROMPT, min_size=1, max_size=30, unique=True)
COUNTED = st.integers(1, 40).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count)))


def stored(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(PROMPTS)
def test_what_is_written_one_per_line_is_read_back(prompts):
    assert parse("\n".join(prompts)) == PromptList(prompts)
    assert parse("\n\n  ".join(prompts) + "\r\n").train == prompts


def test_comments_blank_lines_and_duplicates():
    assert parse("# my list\n\na cat\n#1 dad mug\n  a cat \n#\n#a tag\n") == PromptList(
        ["a cat", "#1 dad mug", "#a tag"], duplicates=1
    )


@pytest.mark.parametrize("text", ["", " \n\t\n", "# only a comment\n#"])
def test_a_list_without_prompts_is_refused(text):
    with pytest.raises(ValueError, match="has no prompt in it"):
        parse(text)


@settings(max_examples=60)
@given(PROMPTS, st.sampled_from(["prompt", "text", "caption"]), st.booleans())
def test_json_lines_are_read_back(tmp_path_factory, prompts, key, escaped):
    lines = [json.dumps({"id": i, key: p} if i % 2 else p, ensure_ascii=escaped) for i, p in enumerate(prompts)]
    path = stored(tmp_path_factory.mktemp("p"), "a.jsonl", "\n\n".join(lines))
    assert read(path).train == prompts


@settings(max_examples=60)
@given(
    PROMPTS,
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["Prompt", "text", "CAPTION"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_csv_columns_are_read_back(tmp_path_factory, prompts, delimiter, name, line_end):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([["id", name, "seed"], *([i, p, ""] for i, p in enumerate(prompts))])
    path = stored(tmp_path_factory.mktemp("p"), "a.csv", "\ufeff" + buffer.getvalue())
    assert read(path).train == prompts


def test_csv_without_a_header_is_its_first_column(tmp_path):
    assert read(stored(tmp_path, "a.csv", 'a cat,12\n"a dog, running",13\n\n,14\n"two\nlines"\n')).train == [
        "a cat",
        "a dog, running",
        "two lines",
    ]
    assert read(stored(tmp_path, "b.csv", '"logo, text, minimal"\n"a cat"\n')).train == ["logo, text, minimal", "a cat"]


def test_a_byte_order_mark_and_chinese(tmp_path):
    assert read(stored(tmp_path, "a.txt", "\ufeff一只红色的猫\nein Mädchen\n".encode())).train == [
        "一只红色的猫",
        "ein Mädchen",
    ]
    assert read(stored(tmp_path, "A.TXT", "a cat")).train == ["a cat"]
    assert (
        read(stored(tmp_path, "a.jsonl", '\ufeff"a cat"')).train
        == read(stored(tmp_path, "a.csv", "\ufeffprompt\na cat")).train
        == ["a cat"]
    )


def test_line_breaks_inside_a_prompt_become_spaces(tmp_path):
    assert read(
        stored(tmp_path, "a.jsonl", json.dumps({"caption": "a cat,\n\n sitting\u2028there"}, ensure_ascii=False))
    ).train == ["a cat, sitting there"]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.txt", "a cat\nein Mädchen".encode("latin-1"), "Line 2 of a.txt is not UTF-8"),
        ("a.txt", "a cat\na dog".encode("utf-16"), "Line 1 of a.txt is not UTF-8"),
        ("a.txt", "a cat\na dog".encode("utf-16-le"), "Line 1 of a.txt is not UTF-8"),
        ("a.txt", "", "a.txt has no prompt"),
        ("a.csv", "\n\n", "a.csv has no prompt"),
        ("a.jsonl", " ", "a.jsonl has no prompt"),
        ("a.jsonl", '"a cat"\n\n{"prompt": "a dog"', "Line 3 of a.jsonl is not JSON"),
        ("a.jsonl", "a cat", "Line 1 of a.jsonl is not JSON"),
        ("a.jsonl", "[" * 100_000, "Line 1 of a.jsonl is not JSON"),
        ("a.jsonl", '{"title": "a cat"}', 'Line 1 of a.jsonl has no "prompt"'),
        ("a.jsonl", '"a"\n{"prompt": 3}', "line 2 of a.jsonl is not text"),
        ("a.jsonl", "[1]", "line 1 of a.jsonl is not text"),
        ("a.jsonl", '"\\ud800"', "line 1 of a.jsonl has half a character"),
        ("a.csv", "prompt\na cat, running\n", "Line 2 of a.csv has 2 columns instead of 1"),
        ("a.csv", "a cat\na dog, running\n", "Line 2 of a.csv has 2 columns instead of 1"),
        ("a.csv", 'prompt\na cat\n"a dog\na cow\n', "row that begins in line 3 of a.csv is not CSV"),
        ("a.csv", 'prompt\n"a\ncat"\n\n"a dog', "row that begins in line 5 of a.csv is not CSV"),
        ("a.csv", "prompt\n" + "x" * 200_000, "row that begins in line 2 of a.csv is not CSV"),
        ("a.csv", "x" * 200_000, "row that begins in line 1 of a.csv is not CSV"),
        ("a.csv", "prompt,id\n", "a.csv has no prompt"),
        ("a.docx", "a cat", "use .txt, .jsonl, .csv"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, name, content, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        read(stored(tmp_path, name, content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_missing_a_large_and_a_closed_file(tmp_path):
    with pytest.raises(ValueError, match="There is no prompt file"):
        read(tmp_path / "no.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match="There is no prompt file"):
        read(tmp_path / "folder.txt")
    with open(tmp_path / "big.txt", "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(ValueError, match="larger than 50 MB"):
        read(tmp_path / "big.txt")


@given(PROMPTS, PROMPT, st.floats(0, 0.99), st.integers(0, 9))
def test_adding_a_prompt_moves_no_other(prompts, new, share, seed):
    before = split(PromptList(prompts), share, seed)
    after = split(PromptList([new, *prompts[::-1]]), share, seed)
    assert sorted(before.train + before.held_out) == sorted(prompts)
    moved = set(prompts) & (set(before.held_out) ^ set(after.held_out)) - {new}
    # At least one prompt has to stay for training: the only reason to move.
    assert len(moved) == 0 or len(before.train) == 1
    assert [p for p in prompts if p in before.train] == before.train  # in the order of the list


@given(PROMPTS, PROMPT, st.integers(0, 35), st.integers(0, 9))
def test_a_number_of_prompts_is_held_out_exactly(prompts, new, number, seed):
    before = split(PromptList(prompts, duplicates=3), number, seed)
    assert len(before.held_out) == min(number, len(prompts) - 1) and before.train and before.duplicates == 3
    assert (
        split(before, number, seed).held_out == split(PromptList(before.train + before.held_out), number, seed).held_out
    )
    if new not in prompts and number < len(prompts):
        assert len(set(before.held_out) - set(split(PromptList([*prompts, new]), number, seed).held_out)) <= 1


def test_the_share_is_met_and_the_seed_matters():
    prompts = PromptList([f"a photo of thing number {i}" for i in range(2000)])
    first, second = split(prompts, 0.1, 0), split(prompts, 0.1, 1)
    assert 150 < len(first.held_out) < 250 and len(set(first.held_out) & set(second.held_out)) < 50
    assert split(prompts, 0, 0).held_out == []


def test_the_same_prompts_are_held_out_for_ever():
    """A changed hash would train on prompts that a resumed run has been judged by."""
    held_out = split(PromptList([f"a photo of thing number {i}" for i in range(30)] + ["一只猫"]), 4, 7).held_out
    assert held_out == [f"a photo of thing number {i}" for i in (15, 21, 24, 29)]


@pytest.mark.parametrize("held_out", [-1, -0.1, 1.5, float("nan"), float("inf")])
def test_a_senseless_share_is_refused(held_out):
    with pytest.raises(ValueError, match="give a share below 1, or a whole number"):
        split(PromptList(["a", "b"]), held_out, 0)


def test_none_held_out_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert split(PromptList(["a cat"]), 5, 0).train == ["a cat"]
    assert "None of the 1 prompts is held out" in caplog.text


@given(COUNTED, st.integers(0, 3), st.integers(1, 12), st.booleans())
def test_every_epoch_is_a_permutation_and_no_prompt_comes_twice(counted, seed, epochs, shuffle):
    count, per = counted
    iterations = -(-count * epochs // per)
    taken = [order(count, per, i, seed, shuffle) for i in range(iterations)]
    assert all(len(set(chosen)) == per for chosen in taken)
    flat = sum(taken, [])
    for epoch in range(epochs):
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_order_is_shuffled_anew_in_each_epoch_and_for_each_seed():
    epochs = [tuple(order(50, 50, epoch, seed)) for epoch in range(3) for seed in range(3)]
    assert len(set(epochs)) == 9 and tuple(range(50)) not in epochs


def test_resuming_takes_the_prompts_an_uninterrupted_run_takes():
    assert order(7, 5, 123, 4) == order(7, 5, 123, 4) == [3, 4, 6, 5, 1]  # no state, and the same on every machine


def test_plain_turns_are_those_of_tree_prompts():
    assert [order(5, 2, i, 0, shuffle=False) for i in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_more_per_iteration_than_there_are_is_all_of_them():
    assert sorted(order(3, 10, 2, 0)) == sorted(order(3, 0, 2, 0)) == [0, 1, 2]
    assert order(1, 1, 10**12, 0) == [0]


@pytest.mark.parametrize("arguments", [(0, 1, 0), (3, -1, 0), (3, 1, -1)])
def test_a_senseless_order_is_refused(arguments):
    with pytest.raises(ValueError, match="one prompt is needed"):
        order(*arguments, 0)
