"""Judges behind an OpenAI-compatible address, against a small real server that speaks its protocol as vLLM and
llama.cpp do: what it refuses they refuse, and its answers have their fields. It judges by the light of the pictures.
"""

import base64
import hashlib
import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from graph import Graph
from PIL import Image

from core.rewards import judge, load, server
from core.rewards.judge import PAIR, POINT, Judge, opponents, questions_for

POINTS, PAIRS = judge.PRESETS[1:]
LOWEST = -3.4028234663852886e38  # llama.cpp's logprob of what has no probability


class OpenAI(ThreadingHTTPServer):
    """/v1/chat/completions for one model. `style`: whose fields the answers have."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.style, self.seen, self.lock, self.say = "vllm", [], threading.Lock(), None
        self.busy = self.most_busy = 0
        self.barrier = None  # requests that must be here at the same time

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
        if self.server.barrier is not None:
            self.server.barrier.wait(20)
        wrong = self.refused(body)
        if wrong:
            return self.send({"error": {"message": wrong, "type": "BadRequestError", "code": 400}}, 400)
        pictures, text = self.asked(body)
        self.send(self.completion(body, (self.server.say or self.answer)(pictures, text)))

    def refused(self, body):
        if self.path != "/v1/chat/completions":
            return "not found"
        if body["model"] != "judge":
            return f"The model `{body['model']}` does not exist."
        if body.get("top_logprobs") and not body.get("logprobs"):
            return "when using `top_logprobs`, `logprobs` must be set to true"
        if body.get("top_logprobs", 0) > 20:
            return "Requested sample logprobs of more than 20, which is greater than max allowed: 20"

    def asked(self, body):
        (message,) = body["messages"]
        assert message["role"] == "user"
        *images, text = message["content"]
        assert text["type"] == "text" and all(part["type"] == "image_url" for part in images)
        return [light(part["image_url"]["url"]) for part in images], text["text"]

    def answer(self, pictures, text):
        """Text, and for each of its tokens the chances of it and of others."""
        if text == PAIR.replace("{prompt}", "a fox"):
            a, b = pictures
            parts = ((a, b), (1 - a, 1 - b), (0.5, 0.5))
            names = ("Alignment", "Coherence", "Style")
            lines = [f"{n} Score:\n Image 1: {x / (x + y)}\n Image 2: {y / (x + y)}" for n, (x, y) in zip(names, parts)]
            return "\n\n".join(lines), []
        if text == POINT.replace("{prompt}", "a fox"):
            (a,) = pictures
            return f"Alignment Score (1-5): {1 + 4 * a}\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 2", []
        yes = 0.9 * pictures[0] if "dark" not in text else 0.9 * (1 - pictures[0])
        return "Yes", [{"Yes": 0.8 * yes, "yes": 0.2 * yes, "No": 0.9 - yes, "The": 0.1}]

    def completion(self, body, said):
        text, chances = said
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
            "logprobs": None,
        }
        if body.get("logprobs") and chances is not None:
            choice["logprobs"] = {"content": [self.step(step) for step in chances[: body.get("max_tokens", 99)]]}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "judge",
            "choices": [choice],
            "usage": {},
        }

    def step(self, chances):
        least = LOWEST if self.server.style == "llama.cpp" else -9999.0
        top = [
            {"token": token, "logprob": math.log(chance) if chance else least, "bytes": list(token.encode())}
            | ({"id": 7} if self.server.style == "llama.cpp" else {})
            for token, chance in sorted(chances.items(), key=lambda pair: -pair[1])
        ]
        return {**top[0], "top_logprobs": top}

    def send(self, answer, status=200):
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *arguments):
        pass


def light(url):
    head, _, data = url.partition(",")
    assert head in ("data:image/jpeg;base64", "data:image/png;base64")
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    return sum(picture.tobytes()) / (3 * 255 * picture.width * picture.height)


@pytest.fixture
def openai(monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(server, "POLL", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = OpenAI()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


LIGHTS = [0.2, 1.0, 0.0, 0.6, 0.4, 0.8]


def pictures(lights=LIGHTS):
    return torch.tensor(lights).view(-1, 1, 1, 1).expand(-1, 8, 8, 3)


def asked(openai, preset="yes or no", **options):
    return Judge(openai.address, preset, model="judge", **{"retries": 0, "timeout": 30.0, **options})


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-3, rtol=0)


# ---------------------------------------------------------------- yes or no


@pytest.mark.parametrize("style", ["vllm", "llama.cpp"])
def test_yes_is_scored_by_its_probability(openai, style):
    openai.style = style
    close(asked(openai).score(pictures(), ["a fox"] * 6), LIGHTS)
    (body, *_) = openai.seen
    assert body["messages"][0]["content"][-1]["text"] == 'Does this figure show "a fox"? Please answer yes or no.'
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["temperature"] == 0


def test_several_questions_are_one_score(openai):
    lines = "Is {prompt} bright?\nIs it dark? -> no\n\n[a cat]\nIs the cat dark?\n[a  dog]\nIs the dog dark?"
    assert questions_for("a cat", lines) == [
        ("Is a cat bright?", "yes"),
        ("Is it dark?", "no"),
        ("Is the cat dark?", "yes"),
    ]
    assert questions_for("a fox", "[a cat]\nIs it?") == [
        ('Does this figure show "a fox"? Please answer yes or no.', "yes")
    ]
    three = pictures([0.8, 0.8, 0.8])
    prompts = ["a cat", "a dog", "a fox"]
    close(asked(openai, questions=lines).score(three, prompts), [0.6, 0.6, 0.8])
    close(asked(openai, questions=lines, each="all").score(three, prompts), [0.128, 0.128, 0.64])


def test_the_same_is_not_asked_twice(openai):
    reward = asked(openai)
    first = reward.score(pictures([0.4, 0.4, 0.8]), ["a fox", "a fox", "a fox"])
    assert len(openai.seen) == 2
    again = reward.score(pictures([0.8, 0.4]), ["a fox", "a fox"])
    assert len(openai.seen) == 2 and torch.equal(again, first[[2, 0]])
    reward.score(pictures([0.8]), ["a cat"])
    assert len(openai.seen) == 3


def test_questions_are_asked_in_parallel(openai):
    openai.barrier = threading.Barrier(5)  # nobody is answered before five are here
    close(asked(openai, workers=5).score(pictures(LIGHTS[:5]), ["a fox"] * 5), LIGHTS[:5])


@pytest.mark.parametrize(
    "tokens, score",
    [
        ([{"Yes": 0.3, "No": 0.1}], 0.75),
        ([{" yes": 0.3, "NO": 0.1, "Maybe": 0.6}], 0.75),
        ([{"\n\n": 0.99}, {"Yes": 0.5, "No": 0.5}], 0.5),
        ([{"**": 1.0}, {"▁Yes": 0.9, "ĠNo": 0.1}], 0.9),
        ([{"No": 1.0, "Yes": 0.0}], 0.0),
    ],
)
def test_spellings_count_together_and_marks_before_are_passed_over(openai, tokens, score):
    openai.say = lambda pictures, text: ("Yes", tokens)
    close(asked(openai).score(pictures([0.5]), ["a fox"]), [score])


@pytest.mark.parametrize(
    "said, sentence",
    [
        (("Yes", None), "gave no probabilities of its answer \\(logprobs\\): use one that does, such as vLLM"),
        (("<think>", [{"<think>": 1.0}]), "did not begin with yes or no, but with <think>: switch its thinking off"),
        (("", [{"Yes": float("nan")}]), "did not begin with yes or no"),
    ],
)
def test_an_answer_without_yes_and_no_is_one_sentence(openai, said, sentence):
    openai.say = lambda pictures, text: said
    with pytest.raises(RuntimeError, match=sentence) as caught:
        asked(openai).score(pictures([0.5]), ["a fox"])
    assert "\n" not in str(caught.value)


def test_a_server_that_refuses_is_quoted(openai):
    with pytest.raises(RuntimeError, match="400 .*The model `other` does not exist"):
        Judge(openai.address, "yes or no", model="other").score(pictures([0.5]), ["a fox"])


def test_an_image_without_an_answer_has_no_score(openai, caplog):
    openai.say = lambda pictures, text: ("Yes", [{"Yes": 1.0} if pictures[0] > 0.5 else {"Well": 1.0}])
    found = asked(openai).score(pictures([0.2, 0.8]), ["a fox", "a fox"])
    assert found.isnan().tolist() == [True, False] and found[1] == 1
    assert "gave no score for 1 of 2 images" in caplog.text


# ---------------------------------------------------------------- UnifiedReward-2.0


def test_the_prompts_are_the_authors_own():
    """Of point_score_ACS_ and pair_score_image_generation.py, with {prompt} in the place of theirs."""
    found = [hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in (POINT, PAIR)]
    assert found == ["f05a20669e2506a5", "3ab0b4295481226a"]


def test_points_are_the_mean_of_three_or_one_of_them(openai):
    for field, score in (("", (3.4 + 3.5 + 2) / 3), ("alignment", 3.4), ("Coherence", 3.5), ("style", 2.0)):
        close(asked(openai, POINTS, field=field).score(pictures([0.6]), ["a fox"]), [score])
    openai.say = lambda pictures, text: (
        "**Alignment Score (1-5):** 4.5\nCoherence Score (1-5): 2\nStyle Score: **1**",
        [],
    )
    close(asked(openai, POINTS).score(pictures([0.6]), ["a fox"]), [2.5])
    openai.say = lambda pictures, text: ("Alignment Score (1-5): 4.5\nStyle Score (1-5): 2", [])
    with pytest.raises(RuntimeError, match="has no coherence score"):
        asked(openai, POINTS).score(pictures([0.6]), ["a fox"])


def test_pairs_rank_a_group(openai):
    reward = asked(openai, PAIRS, field="alignment", comparisons=4)
    assert reward.group_wise
    found = reward.score(pictures(), ["a fox"] * 6)
    assert found.argsort().tolist() == torch.tensor(LIGHTS).argsort().tolist() and abs(found.mean()) < 1e-5
    assert len(openai.seen) == 12, "each picture meets four others"
    all_pairs = asked(openai, PAIRS, field="alignment", comparisons=9)
    assert all_pairs.score(pictures(), ["a fox"] * 6).argmax() == 1 and len(openai.seen) == 12 + 15
    even = asked(openai, PAIRS, field="style").score(pictures(), ["a fox"] * 6)
    close(even, [0.0] * 6)


def test_a_picture_alone_of_its_prompt_has_no_score_in_pairs(openai):
    found = asked(openai, PAIRS).score(pictures([0.1, 0.9, 0.5]), ["a fox", "a fox", "a cat"])
    assert found.isnan().tolist() == [False, False, True]
    assert asked(openai, PAIRS).score(pictures([0.1]), ["a cat"]).isnan().all() and len(openai.seen) == 1


@pytest.mark.parametrize("count", [2, 3, 5, 9, 27])
@pytest.mark.parametrize("comparisons", [1, 2, 4, 7])
def test_everyone_meets_as_many_and_is_shown_first_as_often(count, comparisons):
    pairs = opponents(count, comparisons)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) and all(i != j for i, j in pairs)
    met = [sum(i in pair for pair in pairs) for i in range(count)]
    first = [sum(i == pair[0] for pair in pairs) for i in range(count)]
    assert len(set(met)) == 1 and met[0] >= min(comparisons - 1, count - 1)
    assert max(abs(2 * a - b) for a, b in zip(first, met)) <= 1


# ---------------------------------------------------------------- the reward


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"preset": "x"}, "Unknown preset 'x' of a judge: choose one of yes or no"),
        ({"each": "x"}, "Unknown 'each' 'x'"),
        ({"field": "beauty"}, "UnifiedReward has no 'beauty'"),
        ({"comparisons": 0}, "comparisons of 1 or more"),
        ({"timeout": math.nan}, "a timeout above 0"),
        ({"key_variable": "OPENAI_API_KEY"}, "TREERPO_KEYS"),
    ],
)
def test_settings_that_are_refused(monkeypatch, options, sentence):
    monkeypatch.delenv("TREERPO_KEYS", raising=False)
    with pytest.raises(ValueError, match=sentence) as caught:
        load("server", "http://127.0.0.1:9", **{"preset": "yes or no", **options})
    assert "\n" not in str(caught.value)


def test_an_interrupt_ends_it(openai):
    class Stop(Exception):
        pass

    calls = []

    def check():
        calls.append(1)
        if len(calls) > 2:
            raise Stop

    openai.barrier = threading.Barrier(2)
    with pytest.raises(Stop):
        asked(openai, check=check, workers=1).score(pictures(), ["a fox"] * 6)
    openai.barrier.abort()
    assert len(openai.seen) <= 2


def test_the_self_test_costs_two_requests(openai):
    from core.rewards.self_test import doubts

    openai.say = lambda pictures, text: ("Yes", [{"Yes": 0.9, "No": 0.1} if "sun" in text else {"Yes": 0.2, "No": 0.8}])
    assert doubts(asked(openai)) == "" and len(openai.seen) == 2
    openai.say = lambda pictures, text: ("Yes", [{"Yes": 0.9, "No": 0.1}])
    assert "1 of 1 known pairs" in doubts(asked(openai))


def test_the_node_and_run_yaml(openai, pack, tmp_path):
    graph = Graph(pack, tmp_path, "sd3")
    node = dict(address=openai.address, protocol="scores", model="judge")
    made = graph.call("Server", **node, preset="UnifiedReward-2.0 in pairs", field="alignment")[0]
    made.tried = ""
    *_, order = graph.call("Score", reward_model=made, images=pictures(), prompts="a fox")
    assert order == torch.tensor(LIGHTS).argsort(descending=True).tolist()
    kind, address, options = made.origin
    again = load(kind, address, **options)
    assert again.origin == made.origin and again.name == "judge"
    assert graph.call("Server", **node)[0].name == "judge", "in my own words, as before"
