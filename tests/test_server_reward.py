"""Server Reward against real HTTP servers on this machine, which answer as scripted; and the programs in its
documentation.
"""

import base64
import io
import json
import logging
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from core import patterns
from core.rewards import combine, server
from core.rewards.server import DEFAULT_INSTRUCTION, GROUP_INSTRUCTION, ServerReward

DOCS = Path(__file__).resolve().parent.parent / "docs" / "server_examples.md"


class Scripted(ThreadingHTTPServer):
    """Answers the n-th request with the n-th of `script`, and then with the last one; keeps what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.lock = [scores_by_light], [], threading.Lock()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}/score"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            act = self.server.script[min(len(self.server.seen), len(self.server.script) - 1)]
            self.server.seen.append((self.path, dict(self.headers), json.loads(body)))
        act(self, json.loads(body))

    def do_GET(self):
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), None))
        self.send_error(405)

    def log_message(self, *arguments):
        pass


def send(handler, body, status=200, headers=(), length=None):
    body = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def gives(body, status=200, headers=(), length=None):
    return lambda handler, question: send(handler, body, status, headers, length)


def light(file):
    picture = Image.open(io.BytesIO(base64.b64decode(file)))
    return sum(picture.convert("RGB").tobytes()) / (3 * 255 * picture.width * picture.height)


def scores_by_light(handler, question):
    send(handler, {"scores": [light(file) for file in question["images"]]})


def says(text):
    return gives({"choices": [{"message": {"role": "assistant", "content": text}}]})


def sleeps(seconds):
    def act(handler, question):
        time.sleep(seconds)
        scores_by_light(handler, question)

    return act


def hangs_up(handler, question):
    handler.connection.shutdown(socket.SHUT_RDWR)


def breaks_a_chunk(handler, question):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'ff\r\n{"scores": [1')


def drips(handler, question):
    """Never silent for long, never finished."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def drips_of(start, piece):
    """Begins an answer and never gets to its end: a piece every moment, for five seconds."""

    def act(handler, question):
        handler.wfile.write(start)
        for _ in range(100):
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(0.05)

    return act


@pytest.fixture
def scripted():
    running = Scripted()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def pauses(monkeypatch):
    """The waits before repetitions, as they were worked out; none of them is waited."""
    found, real = [], server.pause
    monkeypatch.setattr(server, "pause", lambda *arguments: found.append(real(*arguments)) or 0.0)
    return found


def arrived(scripted, count):
    """How many requests have arrived, once it is `count` or half a minute has passed."""
    for _ in range(1500):
        if len(scripted.seen) >= count:
            break
        time.sleep(0.02)
    return len(scripted.seen)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(server, "POLL", 0.02)
    for name in (
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "no_proxy",
        "NO_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


LIGHTS = [0.0, 0.2, 1.0, 0.4, 0.6, 0.8]


def pictures(lights=LIGHTS):
    """Grey squares of these lights, whole numbers of 255."""
    return torch.tensor(lights).view(-1, 1, 1, 1).expand(-1, 4, 5, 3)


def ask(scripted, *script, images=1, prompts=None, **settings):
    if script:
        scripted.script = list(script)
    settings = {"workers": 1, "timeout": 30.0, **settings}
    return (
        ServerReward(scripted.address, **settings)
        .score(pictures(LIGHTS[:images]), prompts or ["a fox"] * images)
        .tolist()
    )


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_the_question_holds_images_and_prompts_and_the_answers_keep_their_order(scripted, image_format):
    prompts = [f"prompt {i} ä {{}}" for i in range(6)]
    found = ask(scripted, images=6, prompts=prompts, batch=4, image_format=image_format)
    assert found == pytest.approx(LIGHTS, abs=1e-6)
    (path, headers, first), (_, _, second) = scripted.seen
    assert path == "/score" and headers["Content-Type"] == "application/json" and "Authorization" not in headers
    assert (
        first.keys() == {"images", "prompts", "metadata"}
        and first["prompts"] + second["prompts"] == prompts
        and first["metadata"] == {}
    )
    assert Image.open(io.BytesIO(base64.b64decode(first["images"][0]))).format == image_format.upper()


def test_parallel_requests_arrive_in_any_order_and_scores_stay_with_their_images(scripted):
    """The first request is answered last: after all others."""
    order, others = [], threading.Semaphore(0)

    def act(handler, question):
        order.append(question)
        if question is order[0]:
            assert all(others.acquire(timeout=30) for _ in range(5))
        scores_by_light(handler, question)
        others.release()

    assert ask(scripted, act, images=6, batch=1, workers=6) == pytest.approx(LIGHTS)
    assert len(scripted.seen) == 6


def test_a_group_is_one_request_per_run_of_equal_prompts(scripted):
    reward = ServerReward(scripted.address, group=True, batch=1, workers=1)
    prompts = ["a", "a", "a", "b", "b", "a"]
    assert reward.group_wise and reward.score(pictures(), prompts).tolist() == pytest.approx(LIGHTS)
    assert [question["prompts"] for _, _, question in scripted.seen] == [["a"] * 3, ["b"] * 2, ["a"]]
    scripted.seen.clear()
    found = combine.scores(reward, pictures(), ["a"] * 4 + ["b"] * 2, chunk=2)
    assert found.values["server"].tolist() == pytest.approx(LIGHTS)
    assert [len(question["images"]) for _, _, question in scripted.seen] == [4, 2]


def test_scores_by_name(scripted):
    both = gives({"scores": {"beauty": [1, 2], "text": [3, 4]}})
    assert ask(scripted, both, images=2, field="text") == [3, 4]
    assert ask(scripted, gives({"scores": {"only": [5]}})) == [5]
    for script, field, sentence in (
        (both, "", r"several scores \(beauty, text\)"),
        (both, "size", "no score 'size', only beauty, text"),
        (gives({"scores": [1, 2]}), "text", "leave 'field' empty"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            ask(scripted, script, images=2, field=field)


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", '"NaN"', '"inf"', '"0.5"', "true", "[1]", "1e400", "1e300", "1" + "0" * 400],
)
def test_only_finite_numbers_are_scores(scripted, value, caplog):
    found = ask(scripted, gives(f'{{"scores": [0.25, {value}, -3]}}'), images=3)
    assert found[0] == 0.25 and found[1] != found[1] and found[2] == -3 and len(scripted.seen) == 1
    (line,) = caplog.messages
    assert "no score for 1 of 3 images" in line and ("not finite" in line or "is not a number" in line)


@pytest.mark.parametrize(
    "protocol, answer",
    [
        ("scores", lambda deep: {"scores": [deep]}),
        ("scores", lambda deep: {"scores": {"a": [deep]}}),
        ("chat", lambda deep: {"choices": [{"message": {"content": {"text": deep}}}]}),
    ],
)
def test_an_answer_that_json_can_read_but_nobody_can_print(scripted, monkeypatch, protocol, answer):
    """How deep json reads differs between versions of Python, and from how deep it writes."""
    deep = []
    for _ in range(100000):
        deep = [deep]
    monkeypatch.setattr(server, "_post", lambda *arguments: answer(deep))
    with pytest.raises(RuntimeError, match="nested too deeply: this is not a reward server"):
        ask(scripted, protocol=protocol)


def test_null_is_no_score_and_no_fault(scripted, caplog):
    found = ask(scripted, gives({"scores": [None, 2, None]}), images=3)
    assert found[1] == 2 and found[0] != found[0] and found[2] != found[2]
    assert all(value != value for value in ask(scripted, gives({"scores": [None, None]}), images=2))
    assert not caplog.messages


# ---------------------------------------------------------------- faults


def test_500_twice_then_well(scripted):
    assert ask(scripted, gives("busy", 500), gives("busy", 503), scores_by_light, images=2) == pytest.approx(LIGHTS[:2])
    assert len(scripted.seen) == 3


def test_the_waits_between_repetitions_double_up_to_the_cap(scripted, pauses, monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(server, "LONGEST_WAIT", 3.0)
    ask(scripted, *[gives("", 500)] * 4, scores_by_light, retries=4)
    assert pauses == [0.5, 1.0, 2.0, 3.0] and len(scripted.seen) == 5


@pytest.mark.parametrize("status, value", [(408, "0.4"), (429, "0.4"), (503, "0.4"), (429, "date")])
def test_retry_after_is_honoured(scripted, pauses, status, value):
    if value == "date":
        value = formatdate(time.time() + 600, usegmt=True)
    assert ask(scripted, gives("wait", status, [("Retry-After", value)]), scores_by_light, images=2) == pytest.approx(
        LIGHTS[:2]
    )
    assert pauses == [0.4 if value == "0.4" else server.LONGEST_WAIT] and len(scripted.seen) == 2


@pytest.mark.parametrize("value", ["1000000", "inf", "nan", "-5", "soon", "Tue, 99 Foo", formatdate(4e9)])
def test_no_server_makes_us_wait_longer_than_the_cap(scripted, pauses, value):
    assert ask(scripted, gives("wait", 429, [("Retry-After", value)]), scores_by_light, images=2) == pytest.approx(
        LIGHTS[:2]
    )
    assert len(scripted.seen) == 2 and 0 < pauses[0] <= server.LONGEST_WAIT


PAGE = "<!DOCTYPE html><html><head><title>Welcome\nto nginx</title></head>" + "x" * 1000


@pytest.mark.parametrize(
    "act, requests, sentence",
    [
        (gives({"detail": "no such route"}, 404), 1, r"/score answered 404 \(Not Found\): no such route$"),
        (gives({"error": {"message": "too  many\nimages"}}, 400), 1, r"answered 400 \(Bad Request\): too many images$"),
        (gives("m" * 1000, 422), 1, r"answered 422 \(Unprocessable.*\): m{199}…$"),
        (gives(PAGE, 403), 1, r"answered 403 \(Forbidden\): a web page \(Welcome to nginx\)$"),
        (gives("", 500), 3, r"answered 500 \(Internal Server Error\): nothing \(tried 3 times\)$"),
        (gives({"error": "the judge is asleep"}), 1, "reports an error: the judge is asleep$"),
        (gives(PAGE), 1, r"answered with a web page \(Welcome to nginx\), which is not JSON: check the address"),
        (gives(""), 1, "answered with nothing, which is not JSON"),
        (gives("[" * 100000), 1, "which is not JSON"),
        (gives(b"\x80\x04\x95pickled"), 1, "which is not JSON"),
        (gives("[1, 2]"), 1, r"answered with \[1, 2\], which is not a JSON object"),
        (gives({"outputs": [1]}), 1, 'no list "scores"'),
        (gives({"scores": 3}), 1, 'no list "scores"'),
        (gives({"scores": [1, 2]}), 1, "gave 2 scores for 1 images"),
        (gives({"scores": []}), 1, "gave 0 scores for 1 images"),
        (gives({"scores": ["good"]}), 1, 'score "good" is not a number'),
        (gives({"scores": [float("nan")]}), 1, "score nan is not finite"),
        (sleeps(3.0), 3, r"did not answer within 0.3 s: raise the timeout, or check the server. \(tried 3 times\)"),
        (drips, 3, "did not answer within 0.3 s"),
        (drips_of(b"HTTP/1.1 2", b"0"), 3, "did not answer within 0.3 s"),
        (drips_of(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"), 3, "did not answer within 0.3 s"),
        (drips_of(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), 3, "did not answer within 0.3 s"),
        (drips_of(b"HTTP/1.1 500 Oh\r\n\r\n", b"x"), 3, "did not answer within 0.3 s"),
        (
            drips_of(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
            3,
            "did not answer within 0.3 s",
        ),
        (gives({"scores": [1]}, length=500), 3, r"broke in the middle of the answer. \(tried 3 times\)"),
        (breaks_a_chunk, 3, r"broke in the middle of the answer. \(tried 3 times\)"),
        (hangs_up, 3, r"cannot be reached \(.*\): check that the server runs. \(tried 3 times\)"),
        (gives(" " * 3000 + '{"scores": [1]}'), 1, "sends more than 0.002 MB"),
        (gives(" " * 3000, 500), 1, "sends more than 0.002 MB"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_when_all_fails_the_reason_is_said(scripted, monkeypatch, act, requests, sentence):
    monkeypatch.setattr(server, "LARGEST_ANSWER", 2000 if sentence.startswith("sends") else 4_000_000)
    with pytest.raises(RuntimeError, match=sentence) as error:
        ask(scripted, act, retries=2, timeout=0.3 if "0.3 s" in sentence else 30.0)
    assert arrived(scripted, requests) == requests and "\n" not in str(error.value) and len(str(error.value)) < 500
    assert str(error.value).startswith("The reward server 'server' gave no score for any of 1 images: ")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(scripted, status):
    other = Scripted()
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    target = f"http://localhost:{other.server_address[1]}/steal"
    with pytest.raises(
        RuntimeError, match=f"answered {status}.*redirects are not followed; if you trust {target}, make it the address"
    ):
        ask(scripted, gives("", status, [("Location", f"{target}?token=1")]))
    other.shutdown()
    other.server_close()
    thread.join()
    assert len(scripted.seen) == 1 and other.seen == []


def test_connection_refused(scripted):
    with socket.socket() as taken:  # bound but not listening: whoever connects is refused
        taken.bind(("127.0.0.1", 0))
        reward = ServerReward(f"http://127.0.0.1:{taken.getsockname()[1]}/", retries=2, workers=1)
        with pytest.raises(
            RuntimeError, match=r"cannot be reached \(.*refused.*\): check that the server runs. \(tried 3 times\)"
        ):
            reward.score(pictures(), [""] * 6)


def test_a_name_that_no_host_can_have():
    with pytest.raises(RuntimeError, match="cannot be reached"):
        ServerReward("http://a..b/", retries=0).score(pictures()[:1], [""])


def test_images_whose_request_fails_are_masked_and_counted_in_one_line(scripted, caplog):
    found = ask(
        scripted,
        scores_by_light,
        gives("too large", 413),
        scores_by_light,
        gives({"scores": [1, 2, 3]}),
        images=6,
        batch=1,
    )
    assert [value != value for value in found] == [False, True, False, True, True, True]
    (line,) = caplog.records
    assert (
        line.levelno == logging.WARNING
        and "gave no score for 4 of 6 images" in line.message
        and "413 (" in line.message
    )
    assert [value for value in found if value == value] == pytest.approx([LIGHTS[0], LIGHTS[2]]) and len(
        scripted.seen
    ) == 6


def test_a_wrong_address_is_not_tried_with_every_image(scripted):
    with pytest.raises(RuntimeError, match="for any of 6 images.*404"):
        ask(scripted, gives("", 404), images=6, batch=1, workers=1)
    time.sleep(0.1)
    assert 4 <= len(scripted.seen) <= 5  # one may have been on its way


def test_what_may_be_the_images_own_fault_is_tried_with_each(scripted):
    with pytest.raises(RuntimeError, match="for any of 6 images.*400"):
        ask(scripted, gives("", 400), images=6, batch=1, workers=2)
    assert len(scripted.seen) == 6


# ---------------------------------------------------------------- interrupts


class Interrupted(BaseException):
    pass


def test_an_interrupt_ends_it_at_once_and_nothing_more_is_sent(scripted):
    interrupted = threading.Event()

    def act(handler, question):
        assert interrupted.wait(30)
        scores_by_light(handler, question)

    def check():
        if len(scripted.seen) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        ask(scripted, act, images=6, batch=1, workers=2, check=check)  # it would hang if it waited for the answers
    interrupted.set()
    time.sleep(0.5)  # for what must not come
    assert len(scripted.seen) == 2


def test_an_interrupt_ends_the_waiting_before_a_repetition(scripted, monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 3600.0)
    monkeypatch.setattr(server, "LONGEST_WAIT", 3600.0)

    def check():
        if scripted.seen:
            raise Interrupted

    with pytest.raises(Interrupted):
        ask(scripted, gives("", 500), check=check)
    assert len(scripted.seen) == 1


def test_an_interrupt_before_the_first_request_sends_none(scripted):
    def check():
        raise Interrupted

    with pytest.raises(Interrupted):
        ask(scripted, check=check)
    assert scripted.seen == []


def test_the_check_runs_in_the_callers_thread(scripted):
    threads = set()
    ask(scripted, images=6, batch=1, workers=3, check=lambda: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}


# ---------------------------------------------------------------- chat


def chat(scripted, *script, **settings):
    return ask(scripted, *script, **{"protocol": "chat", "model": "judges/judge-7b", **settings})


def test_the_judge_sees_the_image_and_the_instruction(scripted):
    reward = ServerReward(scripted.address.replace("/score", ""), "chat", model="judges/judge-7b", workers=1)
    scripted.script = [says("Final Score: 3"), says("Final Score: 4.5")]
    assert reward.name == "judge-7b" and reward.score(pictures()[1:3], ["a {count} fox", "b"]).tolist() == [3, 4.5]
    path, _, question = scripted.seen[0]
    assert path == "/v1/chat/completions" and question["model"] == "judges/judge-7b" and question["temperature"] == 0
    (message,) = question["messages"]
    image, text = message["content"]
    assert message["role"] == "user" and image["type"] == "image_url"
    assert text["text"] == DEFAULT_INSTRUCTION.replace("{prompt}", "a {count} fox")
    kind, file = image["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64" and light(file) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "path, expected",
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/mine?x=1", "/mine?x=1"),
    ],
)
def test_a_chat_address_is_completed(path, expected):
    assert ServerReward(f"http://h:1{path}", "chat").address == f"http://h:1{expected}"
    assert ServerReward(f"http://h:1{path}").address == f"http://h:1{path}"


@pytest.mark.parametrize(
    "text, score",
    [
        ("Final Score: 4", 4),
        ("fox (object): 1\n**Final Score:** 3.5\n", 3.5),
        ("**Final Score: 2**", 2),
        ("final score: [5]", 5),
        ("Final Score: -1", -1),
        ("<think>Maybe Final Score: 2?</think>Final Score: 4/5.", 4),
    ],
)
def test_the_last_match_counts(scripted, text, score):
    assert chat(scripted, says(text)) == [score]
    assert chat(scripted, says([{"type": "text", "text": text}])) == [score]


@pytest.mark.parametrize(
    "act, sentence",
    [
        (says("A fine fox. 4 out of 5"), "does not occur in the judge's answer: …A fine fox. 4 out of 5$"),
        (says(None), "does not occur in the judge's answer: …nothing"),
        (says(4), "judge's answer is 4, which is no text"),
        (says({"text": "Final Score: 4"}), "judge's answer is .*, which is no text"),
        (says([{"type": "text", "text": 4}, "Final Score: 4", None]), "does not occur"),
        (says("Final Score: " + "9" * 400), "is not finite"),
        (gives({"choices": []}), "not a chat completion"),
        (gives({"scores": [1]}), "not a chat completion"),
        (gives({"error": {"message": "model not found"}}, 404), "404 .*: model not found"),
    ],
)
def test_an_answer_without_a_score(scripted, act, sentence, caplog):
    with pytest.raises(RuntimeError, match=sentence):
        chat(scripted, act)
    scripted.seen.clear()
    found = chat(scripted, act, says("Final Score: 1"), images=2)
    assert (
        found[0] != found[0]
        and found[1] == 1
        and re.search(sentence, caplog.messages[0])
        and "1 of 2" in caplog.messages[0]
    )
    assert len(scripted.seen) == 2


def test_other_numbers_count_only_if_the_pattern_says_so(scripted):
    assert chat(scripted, says("4 foxes, so 3.5"), pattern=r"(-?\d+(?:\.\d+)?)") == [3.5]
    with pytest.raises(RuntimeError, match='score "good" is not a number'):
        chat(scripted, says("it is good"), pattern=r"(good|bad)")


def test_a_pattern_that_would_take_for_ever_ends(scripted, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 2.0)
    with pytest.raises(RuntimeError, match="cannot be used with the judge's answer .*longer than 2 s"):
        chat(scripted, says("a" * 60 + "!"), pattern=r"((a+)+)$")


def test_a_judge_of_whole_groups(scripted):
    answer = says("The first wins.\nFinal Score: 5\nFinal Score: 2\nFinal Score: 3")
    assert chat(scripted, answer, images=3, group=True) == [5, 2, 3]
    content = scripted.seen[0][2]["messages"][0]["content"]
    assert len(scripted.seen) == 1 and [
        light(part["image_url"]["url"].split(",")[1]) for part in content[:3]
    ] == pytest.approx(LIGHTS[:3])
    assert content[3]["text"] == GROUP_INSTRUCTION.replace("{count}", "3").replace("{prompt}", "a fox")
    with pytest.raises(RuntimeError, match="gave 3 scores for 2 images"):
        chat(scripted, answer, images=2, group=True)
    assert ServerReward(scripted.address, "chat", group=True, instruction="mine").instruction == "mine"


# ---------------------------------------------------------------- keys, addresses, settings

KEY = "sk-very-secret-0123456789"


def test_the_key_is_sent_and_never_told(scripted, monkeypatch, caplog):
    monkeypatch.setenv("MY_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("TREERPO_KEYS", f"127.0.0.1:{scripted.server_address[1]}=MY_API_KEY")
    settings = dict(key_variable="MY_API_KEY", images=2, batch=1)
    assert ask(scripted, **settings) == pytest.approx(LIGHTS[:2])
    assert scripted.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    said = [
        repr(ServerReward(f"{scripted.address}?key={KEY}", key_variable="MY_API_KEY")),
        str(vars(ServerReward(scripted.address, key_variable="MY_API_KEY"))),
    ]
    echoes = [
        gives({"error": f"wrong key {KEY}"}, 401),
        gives({"error": "x" * 185 + KEY}),
        gives({"scores": [KEY]}),
        gives(PAGE[:40] + KEY),
        gives("", 307, [("Location", f"http://x/{KEY}")]),
        says(f"your key {KEY}"),
    ]
    for echo in echoes:
        for protocol in ("scores", "chat"):
            with pytest.raises(RuntimeError) as error:
                ask(scripted, echo, **settings, protocol=protocol)
            said.append(str(error.value) + repr(error.value.__cause__))
        scripted.seen.clear()
        ask(scripted, scores_by_light, echo, **settings)
    assert len(caplog.messages) == len(echoes) and "***" in said[2]
    assert not [text for text in said + caplog.messages if "secret" in text or "sk-v" in text]


@pytest.mark.parametrize(
    "variable, value, sentence",
    [
        (KEY, "", "never the key itself"),
        ("AWS_SECRET", "x", "never the key itself"),
        ("HF_TOKEN", "x", "ends in API_KEY or begins with TREERPO_"),
        ("SECRET_API_KEY", "", "is not set"),
        ("SECRET_API_KEY", "a secret\nb", "characters that no key has"),
        ("SECRET_API_KEY", "sécret", "characters"),
    ],
)
def test_what_is_wrong_with_a_key_is_said_without_it(monkeypatch, variable, value, sentence):
    monkeypatch.setenv("TREERPO_KEYS", "127.0.0.1:1=SECRET_API_KEY")
    if value:
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=sentence) as error:
        ServerReward("http://127.0.0.1:1/", key_variable=variable)
    assert "secret" not in str(error.value).lower() and error.value.__cause__ is None


@pytest.mark.parametrize(
    "table, address",
    [
        ("", "https://judge.example/"),
        ("judge.example=MY_API_KEY", "https://evil.example/"),
        ("judge.example=MY_API_KEY", "https://judge.example.evil.example/"),
        ("judge.example=MY_API_KEY", "https://evil.example/judge.example"),
        ("judge.example=MY_API_KEY", "https://judge.example:8443/"),
        ("judge.example:8443=MY_API_KEY", "https://judge.example/"),
        ("judge.example=OTHER_API_KEY, evil.example=THEIR_API_KEY", "https://judge.example/"),
        ("127.0.0.1:8000=MY_API_KEY", "http://127.0.0.1:8001/"),
        ("127.0.0.1:8000=MY_API_KEY", "http://localhost:8000/"),
        ("judge.example=MY_API_KEY", "https://[::1]:8000/"),
    ],
)
@pytest.mark.parametrize("is_set", [True, False])
def test_a_graph_sends_no_key_to_a_host_that_the_user_has_not_tied_it_to(monkeypatch, table, address, is_set):
    """The sentence says what to write where, and is the same whether or not there is such a key."""
    monkeypatch.setenv("TREERPO_KEYS", table)
    if is_set:
        monkeypatch.setenv("MY_API_KEY", KEY)
    host = address.split("/")[2]
    with pytest.raises(ValueError, match=re.escape(f"add {host}=MY_API_KEY to the environment variable TREERPO_KEYS")):
        ServerReward(address, key_variable="MY_API_KEY")


@pytest.mark.parametrize(
    "table, address",
    [
        ("judge.example=MY_API_KEY", "https://judge.example/v1"),
        ("judge.example=MY_API_KEY", "https://JUDGE.example:443/"),
        ("a.example=OTHER_API_KEY;Judge.Example:8443=MY_API_KEY", "https://judge.example:8443/"),
        ("judge.example=OTHER_API_KEY\n judge.example=MY_API_KEY ,", "https://judge.example/"),
        ("[::1]:8000=MY_API_KEY", "http://[::1]:8000/"),
        ("127.0.0.1=MY_API_KEY", "http://127.0.0.1/"),
    ],
)
def test_a_key_goes_to_the_host_it_is_tied_to(monkeypatch, table, address):
    monkeypatch.setenv("TREERPO_KEYS", table)
    monkeypatch.setenv("MY_API_KEY", KEY)
    assert ServerReward(address, key_variable="MY_API_KEY")._key() == KEY


def test_a_key_stays_where_it_was_when_the_address_changes_afterwards(scripted, monkeypatch):
    monkeypatch.setenv("TREERPO_KEYS", "judge.example=MY_API_KEY")
    monkeypatch.setenv("MY_API_KEY", KEY)
    reward = ServerReward("https://judge.example/", key_variable="MY_API_KEY")
    reward.address = scripted.address
    with pytest.raises(ValueError, match="No key goes to 127.0.0.1"):
        reward.score(pictures()[:1], [""])
    assert scripted.seen == []


def test_a_key_leaves_the_machine_only_by_https(monkeypatch):
    monkeypatch.setenv("TREERPO_KEYS", "judge.example=MY_API_KEY, 10.0.0.2:8000=MY_API_KEY")
    monkeypatch.setenv("MY_API_KEY", KEY)
    for address in ("http://judge.example/", "http://10.0.0.2:8000/"):
        with pytest.raises(ValueError, match="only encrypted.*https://"):
            ServerReward(address, key_variable="MY_API_KEY")


@pytest.mark.parametrize(
    "table", [KEY, f"judge.example={KEY}", "=MY_API_KEY", "https://h=MY_API_KEY", "h/v1=MY_API_KEY", "h:x=MY_API_KEY"]
)
def test_a_table_of_keys_that_cannot_be_read_is_not_repeated(monkeypatch, table):
    monkeypatch.setenv("TREERPO_KEYS", table)
    with pytest.raises(ValueError, match="TREERPO_KEYS must hold pairs") as error:
        ServerReward("https://judge.example/", key_variable="MY_API_KEY")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "address, sentence",
    [
        ("file:///etc/passwd", "must begin with http:// or https://"),
        ("ftp://h/x", "must begin"),
        ("data:,{}", "must begin"),
        ("/score", "must begin"),
        ("", "must begin"),
        ("http://", "must begin"),
        ("localhost:8000", "must begin"),
        ("http://h:99999/", "cannot be read"),
        ("http://[::1/", "cannot be read"),
        ("http://me:pass@h/", "must not hold a user name"),
        ("http://@h/", "must not hold a user name"),
        ("http://h/a b", "neither spaces"),
        ("http://hä/", "neither spaces"),
        ("http://h/\x01x", "neither spaces"),
    ],
)
def test_addresses_that_are_refused(address, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        ServerReward(address)
    assert "pass" not in str(error.value).replace("password", "")


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(protocol="pickle"), "Unknown protocol 'pickle': choose one of scores, chat"),
        (dict(image_format="gif"), "Unknown image format 'gif'"),
        (dict(timeout=0.0), "timeout above 0"),
        (dict(timeout=float("nan")), "timeout above 0"),
        (dict(retries=-1), "retries of 0 or more"),
        (dict(batch=0), "batch and workers"),
        (dict(workers=0), "batch and workers"),
        (dict(protocol="chat", pattern="(x"), "not a regular expression"),
        (dict(protocol="chat", pattern="(" * 9999), "not a regular expression"),
        (dict(protocol="chat", pattern="(a{99999999999999999999})"), "not a regular expression"),
        (dict(protocol="chat", pattern="x"), "has no group"),
    ],
)
def test_settings_that_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        ServerReward("http://127.0.0.1:1/", **settings)


def test_images_and_prompts_must_fit(scripted):
    with pytest.raises(ValueError, match="1 prompts for images of the shape"):
        ServerReward(scripted.address).score(pictures(), ["a"])
    assert ServerReward(scripted.address).score(pictures()[:0], []).shape == (0,) and scripted.seen == []


def test_a_proxy_is_used_but_never_for_this_machine(scripted, monkeypatch):
    monkeypatch.setenv("http_proxy", scripted.address)
    other = Scripted()
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for host in ("127.0.0.1", "localhost"):
        address = f"http://{host}:{other.server_address[1]}/"
        assert ServerReward(address).score(pictures()[1:2], [""]).tolist() == pytest.approx([0.2])
    other.shutdown()
    other.server_close()
    thread.join()
    assert len(other.seen) == 2 and scripted.seen == []
    assert ServerReward("http://judge.example/x").score(pictures()[1:2], [""]).tolist() == pytest.approx([0.2])
    assert [path for path, *_ in scripted.seen] == ["http://judge.example/x"]


@pytest.mark.parametrize(
    "image",
    [torch.zeros(1, 4, 4, 3, requires_grad=True), torch.rand(1, 4, 4, 4).half()],
    ids=["with gradient", "half with alpha"],
)
def test_any_float_image_can_be_sent(scripted, image):
    found = ServerReward(scripted.address).score(image, [""])
    assert not found.requires_grad and float(found) == pytest.approx(
        float(image[..., :3].detach().float().mean()), abs=3e-3
    )


def test_inside_inference_mode(scripted):
    with torch.inference_mode():
        assert ServerReward(scripted.address).score(pictures().clone(), [""] * 6).tolist() == pytest.approx(LIGHTS)


# ---------------------------------------------------------------- the documentation


def programs():
    return re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def started(tmp_path):
    """Runs a program of the documentation on a free port, which it returns once it listens."""
    processes = []

    def start(code, **ports):
        port = free_port()
        for old, new in {"8000": port, **ports}.items():
            code = code.replace(old.removeprefix("port"), str(new))
        file = tmp_path / "example.py"
        file.write_text(code)
        processes.append(subprocess.Popen([sys.executable, str(file)], stderr=subprocess.DEVNULL))
        for _ in range(200):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    return port
            time.sleep(0.05)
        raise AssertionError("the example does not listen")

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_the_example_server_runs_as_it_is_printed(started):
    code = programs()[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    port = started(code)
    assert ServerReward(f"http://127.0.0.1:{port}/score", batch=4).score(
        pictures(), ["x"] * 6
    ).tolist() == pytest.approx(LIGHTS, abs=1e-6)


@pytest.mark.parametrize("name", ["scores", "outputs"])
def test_the_adapter_speaks_to_a_pickle_server(started, name):
    seen = []

    class Pickled(BaseHTTPRequestHandler):
        def do_POST(self):
            question = pickle.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(question)
            lengths = [float(len(prompt)) for prompt in question["prompts"]]
            send(self, pickle.dumps({"error": "bad word"} if "bad" in question["prompts"] else {name: lengths}))

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pickled) as old:
        thread = threading.Thread(target=old.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        port = started(programs()[1], port18085=old.server_address[1])
        reward = ServerReward(f"http://127.0.0.1:{port}/score", image_format="jpeg")
        assert reward.score(pictures()[:2], ["one", "three"]).tolist() == [3, 5]
        with pytest.raises(RuntimeError, match="reports an error: bad word"):
            reward.score(pictures()[:1], ["bad"])
        old.shutdown()
        thread.join()
    assert seen[0]["images"][0].startswith(b"\xff\xd8") and seen[0]["metadata"] == {}
