"""A person's choice as the reward: what an answer means, the book of picks, both nodes, and the way over HTTP."""

import asyncio
import gzip
import json
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from conftest import COMFYUI, MISSING, ROOT
from graph import TRAIN, Graph, timeless
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import run
from core.rewards.combine import combine, scores
from core.rewards.human import HumanReward, NobodyThere, bradley_terry, choice_scores, parse, picks_for
from core.rewards.measure import Measure
from core.rewards.picks import ALIKE, Picks, described, difference, group_id, same_group, thumbnails

PATIENCE = 180  # seconds until a test gives up on something that must happen
BRIGHT = Measure("brightness")


def images(count=4, seed=0):
    return torch.rand(count, 16, 16, 3, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- what an answer means


@pytest.mark.parametrize(
    "text, levels",
    [
        ("3", ((2,), (0, 1, 3, 4, 5, 6, 7, 8))),
        (" 3, 5 / 7", ((2, 4), (0, 1, 3, 5, 7, 8), (6,))),
        ("/7", ((0, 1, 2, 3, 4, 5, 7, 8), (6,))),
        ("3 > 1 = 2 > 7", ((2,), (0, 1), (6,), (3, 4, 5, 7, 8))),
        ("1>2>3>4>5>6>7>8>9", tuple((i,) for i in range(9))),
        ("1=2=3=4=5=6=7=8=9", (tuple(range(9)),)),
    ],
)
def test_an_answer_puts_every_image_on_a_level(text, levels):
    assert parse(text, 9).levels == levels


@pytest.mark.parametrize("text", ["-", " skip ", "SKIP"])
def test_no_opinion(text):
    assert parse(text, 9) is None


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "The answer is empty"),
        ("0", "no image 0 in this group of 9: its images are 1 to 9"),
        ("3 / 10", "no image 10"),
        ("3 = 3", "Image 3 is named twice"),
        ("3 / 3", "Image 3 is named twice"),
        ("best", "'best' where an image number belongs"),
        ("3 > > 1", "nothing where an image number belongs"),
        ("1 2", "'1 2' where an image number"),
        ("1 / 2 / 3", "more than one /"),
        ("/", "no image number"),
        ("-1", "'-1' where"),
        ("9" * 9999, "99..."),
    ],
)
def test_a_bad_answer_is_one_sentence(text, sentence):
    with pytest.raises(ValueError) as caught:
        parse(text, 9)
    said = str(caught.value)
    assert sentence in said and said.endswith(".") and "\n" not in said and len(said) < 300


def all_wins(count):
    return st.lists(st.lists(st.integers(0, 3), min_size=count, max_size=count), min_size=count, max_size=count).map(
        lambda rows: torch.tensor(rows, dtype=torch.float64).fill_diagonal_(0)
    )


@settings(max_examples=30)
@given(st.integers(2, 6).flatmap(all_wins), st.sampled_from([0.1, 0.5, 2.0]))
def test_bradley_terry_is_the_maximum_of_the_posterior(wins, prior):
    """Found again by Newton's method, which ends where the gradient of the log posterior is 0."""
    found = bradley_terry(wins, prior=prior)
    assert abs(float(found.mean())) < 1e-9 and found.isfinite().all()

    games, s = wins + wins.T, torch.zeros(len(wins), dtype=torch.float64)
    for _ in range(50):
        p, q = torch.sigmoid(s[:, None] - s), torch.sigmoid(s)
        gradient = wins.sum(1) - (games * p).sum(1) + prior * (1 - 2 * q)
        curvature = games * p * (1 - p)
        s = s + torch.linalg.solve(torch.diag(curvature.sum(1) + 2 * prior * q * (1 - q)) - curvature, gradient)
    assert gradient.abs().max() < 1e-9
    torch.testing.assert_close(found, s - s.mean(), atol=1e-5, rtol=0)


@settings(max_examples=30)
@given(st.integers(2, 6).flatmap(lambda n: st.tuples(all_wins(n), st.permutations(range(n)))))
def test_bradley_terry_does_not_care_about_the_order_of_the_images(drawn):
    wins, order = drawn
    torch.testing.assert_close(
        bradley_terry(wins[order][:, order]), bradley_terry(wins)[list(order)], atol=1e-6, rtol=0
    )


@settings(max_examples=30)
@given(st.integers(2, 6).flatmap(lambda n: st.tuples(all_wins(n), st.integers(0, n - 1), st.integers(1, n - 1))))
def test_one_more_win_raises_the_winner_above_the_loser(drawn):
    wins, winner, step = drawn
    loser = (winner + step) % len(wins)
    more = wins.clone()
    more[winner, loser] += 1
    before, after = bradley_terry(wins), bradley_terry(more)
    assert after[winner] - after[loser] > before[winner] - before[loser]


@settings(max_examples=30)
@given(st.permutations(range(7)))
def test_a_ranking_is_kept(order):
    text = " > ".join(str(i + 1) for i in order)
    found = choice_scores([parse(text, 7)])
    assert found.argsort(descending=True).tolist() == list(order)
    assert abs(float(found.mean())) < 1e-6 and float(found.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_images_of_one_level_are_equal_and_answers_add_up():
    found = choice_scores([parse("3 / 7", 9)])
    assert (
        float(found[2]) == float(found.amax())
        and float(found[6]) == float(found.amin())
        and len(set(found[[0, 1, 3, 4, 5, 7, 8]].round(decimals=5).tolist())) == 1
    )
    assert choice_scores([parse("1 = 2 = 3", 3)]).tolist() == [0, 0, 0]
    both = choice_scores([parse("1", 3), parse("1", 3), parse("2", 3)])
    assert both[0] > both[1] > both[2]
    torch.testing.assert_close(
        bradley_terry([(0, 1), (0, 1), (2, 1)], 3), bradley_terry(torch.tensor([[0.0, 2, 0], [0, 0, 0], [0, 1, 0]]))
    )


def test_lines_go_to_their_groups():
    ids, text = ["a" * 10, "b" * 10], f"{'c' * 10}: 1\n\n {'B' * 10} : 2 / 1\n3"
    assert [pick and pick[0] for pick in picks_for(text, ids, [4, 4], True)] == ["3", "2 / 1"]
    assert [pick and pick[0] for pick in picks_for(text, ids, [4, 4], False)] == [None, "2 / 1"]
    with pytest.raises(ValueError, match="2 lines of picks without an id for 1 groups"):
        picks_for("1\n2", ids[:1], [4], True)
    with pytest.raises(ValueError, match="The pick for group 2 .bbbbbbbbbb.: There is no image 5"):
        picks_for("1\n5", ids, [4, 4], True)


# ---------------------------------------------------------------- the reward


class Person:
    """Answers in turn, and remembers what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, question):
        self.asked.append(question)
        return self.answers.pop(0)


def test_each_prompt_is_one_question_and_its_scores_are_the_answers(tmp_path):
    person = Person("2", "3 > 1")
    found = scores(HumanReward(person, picks=Picks(tmp_path)), images(7), ["a"] * 4 + ["b"] * 3).values["person"]
    assert [(question.prompt, len(question.images)) for question in person.asked] == [("a", 4), ("b", 3)]
    torch.testing.assert_close(found, torch.cat([choice_scores([parse("2", 4)]), choice_scores([parse("3 > 1", 3)])]))


def test_nobody_or_no_opinion_is_the_fallback_on_the_scale_of_a_pick_else_no_score():
    for text in (None, "-", "nonsense", "77"):
        assert HumanReward(Person(text)).score(images(), ["a"] * 4).isnan().all()
        found = HumanReward(Person(text), fallback=BRIGHT).score(images(), ["a"] * 4)
        torch.testing.assert_close(
            found,
            torch.nn.functional.normalize((raw := BRIGHT.score(images(), [])) - raw.mean(), dim=0) * 2,
            atol=1e-4,
            rtol=0,
        )
    two = HumanReward(Person(None), fallback=combine([BRIGHT, Measure("contrast")], [1.0, -3.0])).score(
        images(), ["a"] * 4
    )
    assert float(two.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_a_person_is_never_asked_about_one_image():
    assert HumanReward(Person()).score(images(2), ["a", "b"]).isnan().all()
    torch.testing.assert_close(
        HumanReward(Person(), fallback=BRIGHT).score(images(2), ["a", "b"]), BRIGHT.score(images(2), [])
    )


def test_without_a_way_to_ask_the_fallback_decides_or_one_sentence_says_so(tmp_path):
    def nobody(question):
        raise NobodyThere("No.")

    with pytest.raises(NobodyThere):
        HumanReward(nobody).score(images(), ["a"] * 4)
    assert HumanReward(nobody, fallback=BRIGHT, picks=Picks(tmp_path)).score(images(), ["a"] * 4).isfinite().all()
    assert not Picks(tmp_path).rows(), "nobody was asked"


def test_of_many_images_only_some_are_shown():
    person = Person("1 / 4", "1")
    found = HumanReward(person, fallback=BRIGHT, show=4).score(images(9), ["a"] * 9)
    bright = BRIGHT.score(images(9), [])
    expected = sorted({*bright.topk(2).indices.tolist(), *bright.topk(2, largest=False).indices.tolist()})
    assert found.isfinite().nonzero().flatten().tolist() == expected and len(person.asked[0].images) == 4
    assert int(found.nan_to_num(-9).argmax()) == expected[0] and int(found.nan_to_num(9).argmin()) == expected[3]
    assert HumanReward(person, show=3).score(images(9), ["a"] * 9).isfinite().nonzero().flatten().tolist() == [0, 4, 8]
    with pytest.raises(ValueError, match="one image has no choice"):
        HumanReward(person, show=1)


# ---------------------------------------------------------------- the book


def test_the_same_group_is_asked_about_once_also_by_a_new_object(tmp_path):
    person = Person("2", "-", None, "1", "3")
    first = HumanReward(person, picks=Picks(tmp_path)).score(images(), ["a"] * 4)
    torch.testing.assert_close(HumanReward(person, picks=Picks(tmp_path)).score(images(), ["a"] * 4), first)
    assert len(person.asked) == 1
    for _ in range(2):
        assert HumanReward(person, picks=Picks(tmp_path)).score(images(), ["b"] * 4).isnan().all()
    assert len(person.asked) == 2, "no opinion is an answer"
    for _ in range(2):
        HumanReward(person, picks=Picks(tmp_path)).score(images(), ["c"] * 4)
    assert len(person.asked) == 4, "a time-out is none"
    HumanReward(person, picks=Picks(tmp_path), replay=False).score(images(), ["a"] * 4)
    assert len(person.asked) == 5
    assert [row["by"] for row in Picks(tmp_path).rows()] == ["person", "skip", "time-out", "person", "person"]


def test_a_line_of_the_book_says_everything(tmp_path):
    from PIL import Image

    HumanReward(Person("2 / 3"), "best and worst", picks=Picks(tmp_path), iteration=lambda: 7).score(
        images(5), ["a"] * 5
    )
    row = json.loads((tmp_path / "picks.jsonl").read_text())
    assert {
        key: row[key] for key in ("format", "id", "prompt", "iteration", "count", "how", "answer", "levels", "by")
    } == {
        "format": 1,
        "id": group_id("a", images(5)),
        "prompt": "a",
        "iteration": 7,
        "count": 5,
        "how": "best and worst",
        "answer": "2 / 3",
        "levels": [[2], [1, 4, 5], [3]],
        "by": "person",
    }
    sheet, layout = Image.open(tmp_path / row["sheet"]["file"]).convert("RGB"), row["sheet"]
    for i, image in enumerate(images(5)):
        x, y = (
            layout["margin"] + place * step
            for place, step in zip((i % layout["columns"], i // layout["columns"]), layout["step"])
        )
        cut = (
            torch.tensor(list(sheet.crop((x, y, x + layout["image"][0], y + layout["image"][1])).tobytes())).view(
                16, 16, 3
            )
            / 255
        )
        assert (cut.mean((0, 1)) - image.mean((0, 1))).abs().max() < 0.03


def test_a_torn_line_harms_no_other(tmp_path):
    person = Person("1", "2")
    HumanReward(person, picks=Picks(tmp_path)).score(images(), ["a"] * 4)
    file = tmp_path / "picks.jsonl"
    file.write_bytes(file.read_bytes() + b'{"format": 1, "id": "half')
    HumanReward(person, picks=Picks(tmp_path)).score(images(), ["b"] * 4)
    for prompt in "ab":
        HumanReward(person, picks=Picks(tmp_path)).score(images(), [prompt] * 4)
    assert len(person.asked) == 2 and len(Picks(tmp_path).rows()) == 2
    damaged = {**Picks(tmp_path).rows()[0], "thumbs": "no base64"}
    with open(file, "a") as more:
        more.write(f"{json.dumps(damaged)}\n[1]\nnull\n")
    assert len(Picks(tmp_path).rows()) == 2
    book = Picks(tmp_path)
    book.rows()
    file.unlink()
    assert book.rows() == []


def test_a_full_disk_loses_no_answer(tmp_path):
    (tmp_path / "file").write_text("")
    found = HumanReward(Person("1"), picks=Picks(tmp_path / "file")).score(images(), ["a"] * 4)
    assert int(found.argmax()) == 0


def test_the_same_images_of_another_device_are_known_and_others_are_not(graph):
    """Measured on both tiny models' trees: what a slightly different computation changes is far below ALIKE, another
    noise far above.
    """
    policy = graph.policy()

    def leaves(seed, error=0.0):
        positive, _ = graph.prompts("a red circle on a white background", policy=policy)
        latent = graph.sample(policy, positive, seed=seed)[1]["samples"]
        return graph.decode(
            {"samples": latent + error * torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))}
        )

    one, near, other = leaves(1), leaves(1, 0.02), leaves(2)
    assert difference(thumbnails(one), thumbnails(near)) < ALIKE < difference(thumbnails(one), thumbnails(other)) / 8
    known = described("a", one, 3)
    assert same_group(known, described("a", near, 3)) and known["id"] != group_id("a", near)
    for what in (
        described("a", other, 3),
        described("b", near, 3),
        described("a", near, 4),
        described("a", near[:3], 3),
    ):
        assert not same_group(known, what)
    assert not same_group(known, described("a", near, 3), near=False)
    assert same_group(known, described("a", one, 4)), "the very same images are the same group in any iteration"


# ---------------------------------------------------------------- the nodes, in this process


class Messages:
    """Stands in for ComfyUI's server: what would go to the browser."""

    def __init__(self):
        self.sent = []

    def send_sync(self, event, data):
        self.sent.append((event, data))

    def send_progress_text(self, text, node_id):
        self.sent.append(("progress text", text))

    def of(self, event):
        return [data for name, data in self.sent if name == event]


@pytest.fixture
def messages(pack, monkeypatch):
    sent = Messages()
    monkeypatch.setattr(pack.nodes.browser, "server", lambda: sent)
    return sent


@pytest.fixture
def graph(pack, tmp_path):
    made = Graph(pack, tmp_path)
    made.forget()
    return made


class Answering:
    """A person at the browser: answers every question that waits, by its text, in a thread of its own."""

    def __init__(self, waiting, answer, choose=lambda question: "1"):
        self.waiting, self.answer, self.choose, self.asked, self.stop = waiting, answer, choose, [], threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self.go, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(PATIENCE)

    def go(self):
        done = set()
        while not self.stop.wait(0.02):
            for question in self.waiting():
                if question["id"] not in done and (text := self.choose(question)) is not None:
                    done.add(question["id"])
                    self.asked.append(question)
                    self.answer(question["id"], text)


def by_hand(graph, policy, picks, mode="two runs", text=TRAIN, train=True, sampling=None, **more):
    """One queue run of the by-hand graph with Pick the Winner: (its table, whether it went on)."""
    positive, prompts = graph.prompts(text, policy=policy)
    tree, leaves = graph.sample(policy, positive, **(sampling or {}))
    rewards, best, sheet, table = graph.call(
        "Pick", images=graph.decode(leaves), prompts=prompts, mode=mode, how="best", picks=picks, policy=policy, **more
    )
    if not hasattr(rewards, "values"):
        assert type(rewards).__name__ == type(best).__name__ == "ExecutionBlocker" and rewards.message is None
        return table, None
    if train:
        credit = graph.call("Advantages", tree=tree, rewards=rewards)[0]
        graph.call(
            "Update", policy=policy, tree=tree, advantages=credit, learning_rate=1e-3, clip_low=1e-2, clip_high=1e-2
        )
    return table, rewards


def test_two_runs_train_once_with_the_persons_order(graph, messages):
    policy = graph.policy()
    table, rewards = by_hand(graph, policy, "")
    assert rewards is None and table.startswith("Waiting for your pick.") and policy.run.iteration == 0
    shown = messages.of("treerpo.pick")
    assert [(q["group"], q["groups"], q["count"], q["live"], q["iteration"]) for q in shown] == [
        (1, 2, 4, False, 0),
        (2, 2, 4, False, 0),
    ]
    assert all(question["id"] in table for question in shown)
    picks = "2\n4 / 1"
    table, rewards = by_hand(graph, policy, picks)
    torch.testing.assert_close(
        rewards.values["person"], torch.cat([choice_scores([parse(line, 4)]) for line in picks.splitlines()])
    )
    assert policy.run.iteration == 1 and "group 1, image 2" in table
    table, rewards = by_hand(graph, policy, picks)
    assert rewards is None and policy.run.iteration == 1 and "was there before these images" in table
    new = [question["id"] for question in messages.of("treerpo.pick")[2:]]
    assert not {question["id"] for question in shown} & set(new)
    table, rewards = by_hand(graph, policy, f"{picks}\n{new[1]}: 3")
    assert rewards is None and "1 of 2 prompts" in table, "the old lines were not meant for these images"
    table, rewards = by_hand(graph, policy, f"{new[0]}: 2\n{new[1]}: 4 / 1")
    assert policy.run.iteration == 2 and [row["answer"] for row in Picks(policy.run.folder).rows()][-2:] == [
        "2",
        "4 / 1",
    ]


def test_missing_picks_are_named_and_no_opinion_trains_nothing_of_that_prompt(graph, messages):
    policy = graph.policy()
    by_hand(graph, policy, "")
    first, second = (question["id"] for question in messages.of("treerpo.pick"))
    table, rewards = by_hand(graph, policy, "1")
    assert (
        rewards is None
        and "1 of 2 prompts still have no pick" in table
        and second in table
        and f"id {first}" not in table
    )
    table, rewards = by_hand(graph, policy, "-\n-")
    assert rewards is None and "Nothing was picked and there is no fallback" in table
    with pytest.raises(ValueError, match="The pick for group 2 .*There is no image 9"):
        by_hand(graph, policy, "-\n9")
    table, rewards = by_hand(graph, policy, "-\n3")
    assert rewards.values["person"].isfinite().tolist() == [False] * 4 + [True] * 4
    assert policy.run.iteration == 1 and policy.run.metrics[0]["skipped_groups"] == 1
    fallback = graph.call("Measure", measure="brightness", direction="more")[0]
    by_hand(graph, policy, "", fallback=fallback)
    table, rewards = by_hand(graph, policy, "-\n-", fallback=fallback)
    assert rewards.values["person"].isfinite().all() and policy.run.iteration == 2


def test_a_pick_is_not_used_for_other_images(graph, messages):
    policy = graph.policy()
    by_hand(graph, policy, "")
    table, rewards = by_hand(graph, policy, "1\n1", sampling=dict(seed=2))
    assert rewards is None and "not the images that were shown" in table
    table, rewards = by_hand(graph, policy, "1\n1", sampling=dict(seed=2))
    assert rewards is None, "the same text again"
    table, rewards = by_hand(graph, policy, "2\n1", sampling=dict(seed=2))
    assert rewards is not None


def test_an_update_that_failed_can_be_repeated_with_the_same_picks(graph, messages):
    policy = graph.policy()
    by_hand(graph, policy, "")
    for _ in range(2):
        assert by_hand(graph, policy, "1\n2", train=False)[1] is not None
    assert by_hand(graph, policy, "1\n2")[1] is not None and len(Picks(policy.run.folder).rows()) == 2


def test_two_runs_survive_a_restart_in_between(graph, messages):
    by_hand(graph, graph.policy(), "")
    graph.forget()
    policy = graph.policy()
    assert by_hand(graph, policy, "1\n2")[1] is not None and policy.run.iteration == 1


def test_images_without_training(graph, messages):
    many = [images(3), torch.rand(1, 24, 16, 3)]
    rewards, best, sheet, table = graph.call("Pick", images=many, prompts="a", mode="two runs", how="best", picks="")
    assert "id " in table and messages.of("treerpo.pick")[0]["count"] == 4
    rewards, best, sheet, table = graph.call("Pick", images=many, prompts="a", mode="two runs", how="best", picks="4")
    assert len(best) == 1 and torch.equal(best[0], many[1]) and sheet.shape[0] == 1 and sheet.shape[3] == 3
    assert (graph.folder / "output/treerpo/picks/picks.jsonl").is_file()


def test_live_waits_and_goes_on(graph, messages, pack):
    broker = pack.nodes.pick.BROKER
    policy = graph.policy()
    with Answering(broker.questions, broker.answer, lambda question: str(question["group"] + 1)) as person:
        table, rewards = by_hand(graph, policy, "", mode="live")
    assert [question["group"] for question in person.asked] == [1, 2] and broker.questions() == []
    torch.testing.assert_close(
        rewards.values["person"], torch.cat([choice_scores([parse(text, 4)]) for text in ("2", "3")])
    )
    assert [done["by"] for done in messages.of("treerpo.pick_done")] == ["person", "person"]


def test_nothing_from_outside_is_in_the_text_under_a_node(pack, messages):
    """ComfyUI 0.3.64 shows that text as HTML: a prompt in it would be a script in the browser."""
    prompt = "a fox<img src=x onerror=alert(1)>"
    broker = pack.nodes.pick.BROKER
    reward = pack.nodes.pick.human("7", "best", 0, None, None, replay=False)
    with Answering(broker.questions, broker.answer) as person:
        reward.choose(images(), prompt)
    assert person.asked[0]["prompt"] == prompt, "the page itself asks with the prompt"
    assert messages.of("progress text") == ["Waiting for your pick among 4 images.", ""]


def test_what_could_be_markup_does_not_get_under_a_node(pack, messages):
    pack.nodes.browser.send_text('1 < 2 & "x" <a href="http://e"onclick=x>, the model\'s', "7")
    assert messages.of("progress text") == ["1  2  x a href=http://eonclick=x, the model's"]


def test_nobody_answers_in_time(graph, messages):
    policy = graph.policy()
    assert by_hand(graph, policy, "", mode="live", seconds=1, text="a red circle on a white background")[1] is None
    fallback = graph.call("Measure", measure="brightness", direction="more")[0]
    table, rewards = by_hand(
        graph, policy, "", mode="live", seconds=1, fallback=fallback, text="a red circle on a white background"
    )
    assert rewards.values["person"].isfinite().all() and policy.run.iteration == 1
    assert [done["by"] for done in messages.of("treerpo.pick_done")] == ["time-out", "time-out"]


def test_without_a_server_live_says_so_or_takes_the_fallback(graph):
    reward = graph.call("Human", how="best", seconds=0)[0]
    with pytest.raises(ValueError, match="only be asked while ComfyUI's server runs"):
        reward.score(images(), ["a"] * 4)
    reward = graph.call("Human", how="best", seconds=0, fallback=BRIGHT)[0]
    assert reward.score(images(), ["a"] * 4).isfinite().all()


def test_an_interrupt_ends_the_waiting_and_leaves_the_model_as_it_was(graph, messages, pack):
    import comfy.model_management as management

    policy = graph.policy()
    before = graph.ksampler(graph.model, graph.prompts()[0][:1])
    reward = graph.call("Human", how="best", seconds=0, policy=policy)[0]
    timer = threading.Thread(
        target=lambda: (wait_for(pack.nodes.pick.BROKER.questions), management.interrupt_current_processing(True))
    )
    timer.start()
    with pytest.raises(management.InterruptProcessingException):
        graph.train(policy, 1, reward=reward)
    timer.join(PATIENCE)
    assert policy.run.iteration == 0 and pack.nodes.pick.BROKER.questions() == []
    assert messages.of("treerpo.pick_done")[0]["by"] == "interrupt"
    assert torch.equal(graph.ksampler(graph.model, graph.prompts()[0][:1]), before)


def test_a_trainer_that_was_stopped_asks_only_what_is_new_and_ends_the_same(graph, messages, pack):
    """Killed after the person has answered and before the update counted: the answers are in the book."""
    import comfy.model_management as management

    broker = pack.nodes.pick.BROKER

    def train(name, iterations, choose):
        policy = graph.policy(run_name=name)
        reward = graph.call("Human", how="ranking", seconds=0, policy=policy)[0]
        with Answering(broker.questions, broker.answer, choose) as person:
            try:
                graph.train(policy, iterations, reward=reward, held_out=0.0)
            finally:
                asked.extend(question["id"] for question in person.asked)
        return policy

    def choice(question):
        return f"{1 + int(question['id'], 16) % 4} > {1 + (1 + int(question['id'], 16)) % 4}"

    def killed_in_the_second(question):
        if len(answered) == 3:
            if not killed.is_set():
                killed.set()
                management.interrupt_current_processing(True)
            return None
        answered.append(question["id"])
        return choice(question)

    asked, answered, killed = [], [], threading.Event()
    through = train("through", 3, choice)
    assert len(asked) == 6
    asked.clear()
    with pytest.raises(management.InterruptProcessingException):
        train("stopped", 3, killed_in_the_second)
    assert len(asked) == 3, "two in the first iteration, one in the second"
    graph.forget()
    again = train("stopped", 3, choice)
    assert len(asked) == len(set(asked)) == 6, "the third answer was not asked for again"
    assert timeless(again.run.metrics) == timeless(through.run.metrics)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.run.adapters.state_dict().values(), through.run.adapters.state_dict().values())
    )
    kept = Picks(again.run.folder).rows()
    assert {row["iteration"] for row in kept} == {0, 1, 2} and all(
        (again.run.folder / row["sheet"]["file"]).is_file() for row in kept
    )
    replayed = graph.folder / "output/treerpo/replayed"
    replayed.mkdir()
    shutil.copy(again.run.folder / "picks.jsonl", replayed)
    asked.clear()
    replayed = train("replayed", 3, choice)
    assert asked == [] and timeless(replayed.run.metrics) == timeless(through.run.metrics)


def test_held_out_prompts_are_not_asked_about(graph, messages, pack):
    broker, policy = pack.nodes.pick.BROKER, graph.policy()
    reward = graph.call("Human", how="best", seconds=0, policy=policy, fallback=BRIGHT)[0]
    with Answering(broker.questions, broker.answer) as person:
        graph.train(policy, 1, reward=reward, held_out=1, evaluate_every=1)
    assert [question["count"] for question in person.asked] == [4] and 0 < policy.run.metrics[0]["eval/reward"] < 1


def wait_for(test):
    deadline = time.monotonic() + PATIENCE
    while not (found := test()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    return found


# ---------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def comfyui_server(tmp_path_factory):
    if COMFYUI is None:
        pytest.skip(MISSING)
    with run.Server(COMFYUI, sys.executable, base=tmp_path_factory.mktemp("base")) as running:
        yield running


@pytest.fixture
def client(comfyui_server):
    return run.Client(comfyui_server.url)


def pick_graph(name, picks="", mode="two runs", seconds=0):
    """The shipped by-hand graph with Pick the Winner in the place of Score Images."""
    graph = run.load_graph(ROOT / "workflows/api/first_steps.json")
    score = run.find_node(graph, "Score")
    old = graph[score]["inputs"]
    graph[score] = {
        "class_type": "TreeRPOPick",
        "_meta": {"title": "Pick"},
        "inputs": {
            "images": old["images"],
            "prompts": old["prompts"],
            "mode": mode,
            "how": "best",
            "picks": picks,
            "seconds": seconds,
            "policy": [run.find_node(graph, "Policy"), 0],
        },
    }
    del graph[run.find_node(graph, "Reward")]
    for (node, field), value in {
        ("Policy", "run_name"): name,
        ("Policy", "targets"): "attention+mlp",
        ("Save", "lora_name"): name,
        ("Prompts", "text"): TRAIN,
        ("Shape", "branching"): 2,
        ("Shape", "depth"): 2,
        ("Shape", "tail"): 1.0,
        ("Sigmas", "steps"): 6,
        ("Update", "learning_rate"): 1e-3,
        ("Update", "anchor"): 0.0,
    }.items():
        run.set_input(graph, node, field, value)
    return graph


def questions(client):
    return client.get("/treerpo/pick")["questions"]


def post(client, name, text):
    return json.loads(client.request("/treerpo/pick", {"id": name, "answer": text}))


def refused(call):
    with pytest.raises(urllib.error.HTTPError) as caught:
        call()
    return caught.value.code, json.loads(caught.value.read())["error"]


def rows(server, name):
    path = server.base / "output/treerpo" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


AWKWARD = {
    "no JSON": (b"{", {}),
    "not text": (b"\xff\xfe\x00", {}),
    "nested": (b"[" * 16000, {}),
    "nested inside": (b'{"id": ' + b"[" * 16000, {}),
    "numbers": (b'{"id": 1e999, "answer": 1}', {}),
    "a number of many digits": (b'{"id": ' + b"9" * 9000 + b', "answer": "1"}', {}),
    "half a letter": (b'{"id": "\\ud800", "answer": "\\ud800"}', {}),
    "a list": (b"[]", {}),
    "null": (b"null", {}),
    "empty": (b"", {}),
    "an encoding that is none": (b"{}", {"Content-Type": "application/json; charset=bogus"}),
    "an encoding of bytes": (b"{}", {"Content-Type": "application/json; charset=hex"}),
    "not packed": (b"{}", {"Content-Encoding": "gzip"}),
    "packed, too large": (gzip.compress(b" " * 5_000_000), {"Content-Encoding": "gzip"}),
    "an id nobody asks": (b'{"id": "\\u0000", "answer": "1"}', {}),
}


@pytest.mark.parametrize("what", AWKWARD)
def test_no_post_makes_the_server_stumble(pack, what):
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    class Instance:
        routes = web.RouteTableDef()

    async def status():
        pack.nodes.pick.add_routes(Instance)
        app = web.Application()
        app.add_routes(Instance.routes)
        body, headers = AWKWARD[what]
        async with TestClient(TestServer(app)) as client:
            answer = await client.post(
                "/treerpo/pick", data=body, headers={"Content-Type": "application/json", **headers}
            )
            return answer.status

    assert 400 <= asyncio.run(status()) < 500


def test_http_two_runs_train_as_the_same_scores_given_by_hand(comfyui_server, client, pack, tmp_path):
    first = client.run(graph := pick_graph("two"))
    status = first[run.find_node(graph, "Pick")]
    assert (
        status["text"][0].startswith("Waiting for your pick.")
        and len(status["images"]) == 1
        and rows(comfyui_server, "two") == []
    )
    assert run.find_node(graph, "Update") not in first
    client.run(pick_graph("two", "2\n4 / 1"))
    assert len(rows(comfyui_server, "two")) == 1
    outputs = client.run(pick_graph("two", "2\n4 / 1"))
    assert (
        len(rows(comfyui_server, "two")) == 1 and "was there before" in outputs[run.find_node(graph, "Pick")]["text"][0]
    )
    here = Graph(pack, tmp_path)
    here.forget()
    policy = here.policy(rank=8, alpha=16.0)
    positive, prompts = here.prompts(policy=policy)
    tree, leaves = here.sample(policy, positive)
    by_measure = here.score(here.decode(leaves), prompts)
    values = torch.cat([choice_scores([parse(text, 4)]) for text in ("2", "4 / 1")])
    given = type(by_measure)({"person": values}, {"person": 1.0}, None, by_measure.prompts, by_measure.images)
    advantages = here.call("Advantages", tree=tree, rewards=given)[0]
    settings = dict(learning_rate=1e-3, anchor=0.0, step_weight="layer")
    here.call("Regression", policy=policy, tree=tree, advantages=advantages, **settings)
    mine = policy.run.lora()
    theirs = load_file(comfyui_server.base / "output/treerpo/two/adapter.safetensors")
    moved = [key for key in theirs if key.endswith("lora_up.weight") and theirs[key].abs().sum() > 0]
    assert moved and all(torch.allclose(theirs[key], mine[key], atol=2e-4) for key in theirs)


def test_http_live_is_answered_by_a_post_and_a_reloaded_page_sees_the_question(comfyui_server, client):
    elsewhere = run.Client(comfyui_server.url)
    prompt = client.queue(pick_graph("live", mode="live"))
    question = wait_for(lambda: questions(elsewhere))[0]
    assert {
        "id",
        "node_id",
        "prompt",
        "how",
        "group",
        "groups",
        "count",
        "images",
        "seconds_left",
        "live",
        "iteration",
        "counted",
        "undo",
        "note",
    } == question.keys()
    assert (
        question["group"],
        question["groups"],
        question["count"],
        question["seconds_left"],
        question["live"],
        question["iteration"],
    ) == (1, 2, 4, None, True, 0)
    assert question["prompt"] == TRAIN.splitlines()[0] and questions(elsewhere)[0] == question
    for image in question["images"]:
        assert (
            elsewhere.request(
                f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
            )[:2]
            == b"\xff\xd8"
        )
    assert refused(lambda: post(elsewhere, question["id"], "7")) == (
        400,
        "There is no image 7 in this group of 4: its images are 1 to 4.",
    )
    assert refused(lambda: post(elsewhere, "0000000000", "1"))[0] == 404
    for body in (
        [],
        "3",
        {"id": question["id"]},
        {"id": question["id"], "answer": 3},
        {"id": None, "answer": "3"},
        {"id": question["id"], "answer": "1" * 20000},
    ):
        assert refused(lambda: elsewhere.request("/treerpo/pick", body))[0] == 400
    right = json.dumps({"id": question["id"], "answer": "3"}).encode()
    for headers, status in (
        ({"Content-Type": "text/plain"}, 400),
        ({"Content-Type": "application/json", "Origin": "http://elsewhere.example"}, 403),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            elsewhere.opener.open(
                urllib.request.Request(f"{elsewhere.url}/treerpo/pick", right, headers), timeout=PATIENCE
            )
        assert caught.value.code == status
    assert questions(elsewhere)[0]["id"] == question["id"], "wrong answers change nothing"
    assert post(elsewhere, question["id"], "3") == {"ok": True}
    second = wait_for(lambda: [other for other in questions(elsewhere) if other["id"] != question["id"]])[0]
    assert refused(lambda: post(elsewhere, question["id"], "3"))[0] == 404
    post(elsewhere, second["id"], "1")
    client.wait(prompt)
    assert len(rows(comfyui_server, "live")) == 1
    kept = [
        json.loads(line) for line in (comfyui_server.base / "output/treerpo/live/picks.jsonl").read_text().splitlines()
    ]
    assert [(row["answer"], row["by"]) for row in kept] == [("3", "person"), ("1", "person")]


def test_http_interrupt_while_waiting(comfyui_server, client):
    prompt = client.queue(pick_graph("interrupted", mode="live"))
    name = wait_for(lambda: questions(client))[0]["id"]
    client.interrupt(prompt)
    with pytest.raises(run.Problem, match="interrupted at node 'Pick'"):
        client.wait(prompt)
    assert (
        questions(client) == []
        and rows(comfyui_server, "interrupted") == []
        and refused(lambda: post(client, name, "1"))[0] == 404
    )
    with Answering(lambda: questions(client), lambda *answer: post(client, *answer)):
        run.Client(comfyui_server.url).run(pick_graph("interrupted", mode="live"))
    assert len(rows(comfyui_server, "interrupted")) == 1


def test_http_trainer_with_a_person(comfyui_server, client):
    graph = run.load_graph(ROOT / "workflows/api/trainer.json")
    reward = run.find_node(graph, "Reward")
    graph[reward] = {
        "class_type": "TreeRPOHuman",
        "_meta": {"title": "Reward"},
        "inputs": {"how": "best", "seconds": 0, "policy": [run.find_node(graph, "Policy"), 0]},
    }
    trainer = graph[run.find_node(graph, "Trainer")]["inputs"]
    trainer |= {"iterations": 3, "per_iteration": 1, "evaluate_every": 0, "reward_model": [reward, 0]}
    trainer.pop("judge", None)
    for (node, field), value in {
        ("Policy", "run_name"): "person",
        ("Shape", "branching"): 2,
        ("Shape", "window"): "random",
        ("Shape", "depth"): 2,
        ("Sigmas", "steps"): 6,
    }.items():
        run.set_input(graph, node, field, value)
    with Answering(lambda: questions(client), lambda *answer: post(client, *answer)) as person:
        run.Client(comfyui_server.url).run(graph)
    assert [question["iteration"] for question in person.asked] == [0, 1, 2] and len(
        rows(comfyui_server, "person")
    ) == 3
    assert all(
        row["rewards/person/mean"] == pytest.approx(0, abs=1e-5) and row["grad_norm"] > 0
        for row in rows(comfyui_server, "person")
    )


def test_http_teach_my_taste(comfyui_server, client):
    graph = run.load_graph(ROOT / "workflows/api/teach_my_taste.json")
    settings = {"lora_name": "taught", "questions": 3, "settle": 0, "prompts": TRAIN.splitlines()[0]}
    for field, value in settings.items():
        run.set_input(graph, "Teach", field, value)
    with Answering(lambda: questions(client), lambda *answer: post(client, *answer)) as person:
        outputs = run.Client(comfyui_server.url).run(graph)
    assert [(question["counted"], question["group"], question["undo"]) for question in person.asked] == [
        ("question", 1, False),
        ("question", 2, True),
        ("question", 3, True),
    ]
    assert "3 of at least 5 picks" in "".join(outputs[run.find_node(graph, "Teach")]["text"])
    assert len(rows(comfyui_server, "taught")) == 3, "as long as the taste is not known, every iteration asks"
    assert (comfyui_server.base / "models/loras/taught.safetensors").is_file()
