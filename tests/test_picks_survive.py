"""A pick is never lost: Teach My Taste killed at any file operation, answered from two tabs, and stopped while an
answer is on its way.
"""

import asyncio
import os
import random
import threading
from contextlib import suppress

import pytest
import torch
from test_checkpoint import CONFIG, Disk, Killed, new_adapters
from test_pick import Messages, wait_for
from test_taste import Colours

from core.rewards.human import HumanReward
from core.rewards.picks import Picks
from core.rewards.taste import FILE, load
from core.rewards.teaching import Teaching
from core.runs.run import Run

PICKS = 6  # one more than the head's cross-validation needs
KILLS = 12


def teach(folder, promised: dict[str, str]) -> Teaching:
    """What Teach My Taste does with a run's folder until all questions are answered, on pictures of one colour each.

    promised: gets the answers that the person was told are taken, by the group's id.
    """
    run, asked = Run.open(folder, new_adapters(), CONFIG), []

    def answer(question):
        assert question.id not in promised, "asked again after the answer was taken"
        asked.append((question, str(1 + int(torch.stack(question.images)[..., 0].mean((1, 2)).argmax()))))
        return asked[-1][1]

    person = HumanReward(answer, picks=Picks(folder), iteration=lambda: run.iteration)
    teaching = Teaching(person, Colours(), questions=PICKS, show=3, every=1, say=lambda text: teaching.keep(folder))
    try:
        while teaching.left():
            draw = torch.Generator().manual_seed(run.iteration)
            images = torch.rand(8, 1, 1, 3, generator=draw).expand(-1, 16, 16, -1)
            run.record({"reward": float(teaching.score(images, ["a prompt"] * 8).mean()), "reward_std": 0.5})
            run.save()
        teaching.keep(folder)
    finally:
        promised |= {question.id: text for question, text in asked if question.kept}
    return teaching


def book(folder) -> list[tuple[str, str]]:
    return [(row["id"], row["answer"]) for row in Picks(folder).rows()]


def same_head(one, other) -> bool:
    return all(
        torch.equal(getattr(one, part), getattr(other, part))
        for part in ("centre", "axes", "weights", "covariance", "references")
    ) and (one.agreement, one.width, one.choices) == (other.agreement, other.width, other.choices)


def test_a_kill_at_any_file_operation_loses_no_pick_and_asks_nothing_twice(tmp_path, monkeypatch):
    """Killed at an operation, and nothing happens after it, no clean-up either; then killed once more while it goes on.
    Every answer that was taken is in the book, once; the head is that of a session that was never stopped.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what a power failure does is not tested here
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        through = teach(tmp_path / "through", {})
    assert disk.count > 100 and len(book(tmp_path / "through")) == PICKS
    chance, taken = random.Random(0), set()
    for number in range(KILLS):
        folder, promised = tmp_path / str(number), {}
        first = disk.count * number // KILLS + chance.randrange(disk.count // KILLS)
        for limit in (first, chance.randrange(disk.count - first)):
            with monkeypatch.context() as patch:
                killing = Disk(patch, Killed())
                killing.limit = limit
                with suppress(Killed):  # the second session may have fewer operations to go
                    teach(folder, promised)
            assert promised.items() <= set(book(folder)), f"lost at operation {limit} of {first}"
            taken.add(len(promised))
        again = teach(folder, promised)
        assert book(folder) == book(tmp_path / "through"), f"killed at operations {first} and {limit}"
        assert same_head(again.fitted(), through.fitted())
        assert same_head(load(folder / FILE, Colours()), through.fitted())
    assert taken >= set(range(1, PICKS + 1)), "kills between and after all answers"


@pytest.fixture
def served(pack, monkeypatch):
    """(client's coroutine -> its result): the pick's routes in a server of their own."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    sent = Messages()
    monkeypatch.setattr(pack.nodes.browser, "server", lambda: sent)

    class Instance:
        routes = web.RouteTableDef()

    pack.nodes.pick.add_routes(Instance)

    def serve(work):
        async def within():
            app = web.Application()
            app.add_routes(Instance.routes)
            async with TestClient(TestServer(app)) as client:
                return await work(client)

        return asyncio.run(within())

    return serve


def asking(pack, folder) -> tuple[threading.Thread, dict]:
    """A question on its way to the browser, in a thread, and its id."""
    reward = pack.nodes.pick.human("1", "best", 0, None, None, True)
    reward.picks = Picks(folder)
    found = {}

    def ask():
        try:
            found["answer"] = reward.answer(list(torch.rand(3, 8, 8, 3)), "a prompt")
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    found["id"] = wait_for(pack.nodes.pick.BROKER.questions)[0]["id"]
    return thread, found


def test_an_answer_is_said_to_be_taken_when_it_is_in_the_book_and_by_one_tab_only(pack, served, tmp_path, monkeypatch):
    writing, original = threading.Event(), Picks.add

    def slow(self, *args, **more):
        writing.wait(10)
        original(self, *args, **more)

    monkeypatch.setattr(Picks, "add", slow)
    thread, found = asking(pack, tmp_path)

    async def two_tabs(client):
        tabs = [
            asyncio.create_task(client.post("/treerpo/pick", json={"id": found["id"], "answer": text})) for text in "12"
        ]
        done, waiting = await asyncio.wait(tabs, timeout=0.3)
        early = [reply.result().status for reply in done]
        writing.set()
        return early, [(await tab).status for tab in tabs], len(waiting)

    early, replies, waiting = served(two_tabs)
    thread.join(10)
    assert early == [404] and waiting == 1, "the second tab is told at once; the first waits for the book"
    assert sorted(replies) == [200, 404]
    assert book(tmp_path) == [(found["id"], str(1 + replies.index(200)))]


def test_an_answer_that_meets_an_interrupt_is_not_said_to_be_taken(pack, served, tmp_path, monkeypatch):
    broker, management = pack.nodes.pick.BROKER, pack.nodes.pick.comfy.model_management
    reached, go = threading.Event(), threading.Event()

    def interrupted():
        reached.set()
        go.wait(10)
        raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", interrupted)
    thread, found = asking(pack, tmp_path)
    assert reached.wait(10)

    async def too_late(client):
        reply = asyncio.create_task(client.post("/treerpo/pick", json={"id": found["id"], "answer": "2"}))
        await asyncio.sleep(0.1)
        go.set()
        return (await reply).status, await (await reply).json()

    status, said = served(too_late)
    thread.join(10)
    assert status == 404 and "the run was stopped" in said["error"]
    assert book(tmp_path) == [] and broker.questions() == []
