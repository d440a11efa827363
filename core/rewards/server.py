"""Scores from a server that the user runs: a scorer that answers in JSON, or a vision language model as judge.

Peers (flow_grpo, verl-omni) exchange pickles, and to unpickle an answer is to run whatever code the server put into it.
The same fields travel as JSON here; nothing in an answer is executed. The contract: docs/server_reward.md.
"""

import base64
import concurrent.futures
import dataclasses
import email.utils
import functools
import http.client
import json
import logging
import math
import re
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable

import torch
from torch import Tensor

from ..patterns import search
from ..references import reference_of
from .combine import neighbours
from .contract import Reward, refuse_unpaired
from .deadline import Deadline
from .keys import is_here, key_for
from .measure import encoded

log = logging.getLogger("treerpo")

PROTOCOLS = ("scores", "chat")
FORMATS = ("png", "jpeg")
# seconds before the first repetition, which double; at most so many, whatever Retry-After asks
FIRST_WAIT, LONGEST_WAIT = (0.5, 30.0)
LARGEST_ANSWER = 4_000_000  # bytes
POLL = 0.1  # seconds between two looks for an interrupt
SAME_FOR_ALL = (401, 404, 405)  # no other image would fare better
ENOUGH = 4  # requests in a row that must fail so before the rest is given up

DEFAULT_INSTRUCTION = """Judge a generated image by the text it was made from. Two things count:
1. Agreement with the text: are the objects, their attributes and their relations as described?
2. Quality of the picture: clarity, detail, colour, and how pleasing it is as a whole.
Go through the elements of the text and say which of them the image shows. \
Then give one score from 1 (bad) to 5 (excellent) \
in a last line that reads 'Final Score: ' and the number.
Text: [{prompt}]"""
GROUP_INSTRUCTION = """These {count} generated images were made from the same text. Compare them with each other. \
Two things count:
1. Agreement with the text: are the objects, their attributes and their relations as described?
2. Quality of the picture: clarity, detail, colour, and how pleasing it is as a whole.
At the end give each image a score from 1 (bad) to 5 (excellent), in the order of the images, \
one line for each that reads 'Final Score: ' and the number: {count} such lines, and no others.
Text: [{prompt}]"""
EDITED = """The first picture is the source of an edit, and the text says how to change it. Judge only what comes \
after it: whether it is changed as the text says, and the same as the source in all else.
"""
DEFAULT_PATTERN = r"(?i)Final Score:[\s*_\[]*(-?\d+(?:\.\d+)?)"  # also in Markdown's bold, and in brackets


class Fault(Exception):
    """Why a request, or one image of it, has no score."""

    def __init__(self, text: str, again: bool = False, wait: float = 0.0, for_all: bool = False):
        """again: worth repeating, after at least `wait` seconds.

        for_all: it would be the same for every other image.
        """
        super().__init__(text)
        self.again, self.wait, self.for_all = again, wait, for_all


@dataclasses.dataclass
class ServerReward(Reward):
    """A reward from a server. Images that get no score are NaN, and one line of the log says how many and why."""

    # http:// or https://; for chat, one that ends in /v1 or has no path is completed
    address: str = dataclasses.field(repr=False)
    protocol: str = (
        "scores"  # "scores": images and prompts as JSON, numbers back; "chat": OpenAI-compatible chat completions
    )
    timeout: float = 60.0  # seconds for one request, from its beginning to the end of the answer
    retries: int = 3  # repetitions after a fault of the connection, 408, 429 or 5xx
    name: str | None = None  # None: the field's or the model's name, else "server"
    field: str = ""  # scores: which list to take when the answer holds several by name
    model: str = ""  # chat: the model's name on the server
    instruction: str = DEFAULT_INSTRUCTION  # chat: {prompt} and {count} (of images) are filled in
    pattern: str = DEFAULT_PATTERN  # chat: a regular expression whose first group is the score; its last match counts
    # name of the environment variable with the API key, tied to this host in TREERPO_KEYS (keys.py); "" = no key
    key_variable: str = dataclasses.field(default="", repr=False)
    batch: int = 16  # scores: images per request
    workers: int = 4  # requests at a time
    image_format: str = "png"  # "png" is exact, "jpeg" (quality 95) smaller
    # raises when the user interrupts
    check: Callable[[], object] | None = dataclasses.field(default=None, repr=False, compare=False)
    group: bool = False  # neighbouring images of one prompt in a single request, however many

    def __post_init__(self):
        self.address = checked_address(self.address.strip(), self.protocol == "chat")
        for value, choices, what in (
            (self.protocol, PROTOCOLS, "protocol"),
            (self.image_format, FORMATS, "image format"),
        ):
            if value not in choices:
                raise ValueError(f"Unknown {what} '{value}': choose one of {', '.join(choices)}.")
        if (
            not (math.isfinite(self.timeout) and self.timeout > 0)
            or self.retries < 0
            or self.batch < 1
            or self.workers < 1
        ):
            raise ValueError(
                "Server Reward needs a timeout above 0, retries of 0 or more, and a batch and workers of 1 or more."
            )
        if self.protocol == "chat" and self.pattern != DEFAULT_PATTERN:
            try:
                groups, _ = search(self.pattern, [])
            except ValueError as error:
                raise ValueError(
                    f"The pattern '{self.pattern[:60]}' is not a regular expression that can be used ({error})."
                ) from None
            if not groups:
                raise ValueError(
                    f"The pattern '{self.pattern[:60]}' has no group: put the part that is the score in parentheses."
                )
        if self.group and self.instruction == DEFAULT_INSTRUCTION:
            self.instruction = GROUP_INSTRUCTION
        self.name = self.name or self.field or self.model.rsplit("/", 1)[-1] or "server"
        self._key()

    @property
    def group_wise(self) -> bool:
        """Whether score() must get all images of a prompt in one call."""
        return self.group

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[B, H, W, 3] in 0..1, B prompts -> [B] on the CPU, NaN where there is no score.

        Raises RuntimeError when no image got a score and the server is not the one who said so (null); ValueError for
        bad settings.
        """
        refuse_unpaired(images, prompts)
        scores, faults, key, parts = torch.full((len(images),), torch.nan), {}, self._key(), self._parts(prompts)
        tasks = [functools.partial(self._ask, images[part], prompts[part], key) for part in parts]
        for part, answers in zip(parts, in_parallel(tasks, self.workers, self.check)):
            for i, answer in _per_image(part, answers):
                if isinstance(answer, Fault):
                    faults[i] = answer
                elif answer is not None:
                    scores[i] = answer
        tell(self.name, faults, len(images))
        return scores

    def _parts(self, prompts: list[str]) -> list[slice]:
        """The images of each request."""
        if not self.group:
            size = self.batch if self.protocol == "scores" else 1
            return [slice(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
        return neighbours(prompts)

    def _ask(
        self, images: Tensor, prompts: list[str], key: str, stop: threading.Event
    ) -> list[float | None | Fault] | Fault:
        """One request: an answer per image, or why there is none."""

        def read(answer: dict) -> list[float | None | Fault]:
            if self.protocol == "scores":
                return _scores(answer, len(images), self.field)
            return _judgements(answer, len(images), self.pattern)

        return ask(self.address, self._question(images, prompts), read, key, self.timeout, self.retries, stop)

    def _question(self, images: Tensor, prompts: list[str]) -> dict:
        """The body of a request."""
        if self.protocol == "scores":
            question = {"images": self._files(images), "prompts": prompts, "metadata": {}}
            sources = [reference_of(prompt) for prompt in prompts]
            if any(source is not None for source in sources):
                question["references"] = [None if source is None else self._files([source])[0] for source in sources]
            return question
        text = self.instruction.replace("{count}", str(len(images))).replace("{prompt}", prompts[0])
        source = reference_of(prompts[0])
        if source is not None:
            images, text = [source, *images], EDITED + text
        return chat(self.model, images, text, self.image_format)

    def _files(self, images) -> list[str]:
        return [base64.b64encode(encoded(image, self.image_format.upper())).decode() for image in images]

    def _key(self) -> str:
        """The API key. It is read when it is needed and never kept."""
        return key_for(self.address, self.key_variable)


def tell(name: str, faults: dict[int, Fault], images: int) -> None:
    """One line of the log for images without a score; RuntimeError where none has one."""
    if not faults:
        return
    why = faults[min(faults)]
    if len(faults) == images:
        raise RuntimeError(f"The reward server '{name}' gave no score for any of {images} images: {why}")
    log.warning("The reward server '%s' gave no score for %d of %d images: %s", name, len(faults), images, why)


def in_parallel(tasks: list[Callable[[threading.Event], object]], workers: int, check) -> list:
    """What each task answers, in their order; `workers` at a time, each given an event that tells it to stop.

    check: runs in the caller's thread while they work, may raise; None = nothing. When the first ENOUGH that end all
    fail in a way that would be the same for every other, the rest is not tried and fails likewise.
    """
    check, stop, answers = check or (lambda: None), threading.Event(), [None] * len(tasks)
    pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="reward server")
    try:
        check()
        waiting, hopeless = {pool.submit(task, stop): number for number, task in enumerate(tasks)}, 0
        while waiting:
            done, _ = concurrent.futures.wait(waiting, timeout=POLL, return_when=concurrent.futures.FIRST_COMPLETED)
            check()
            for future in done:
                number = waiting.pop(future)
                answers[number] = last = future.result()
                hopeless += isinstance(last, Fault) and last.for_all
            if waiting and hopeless == len(tasks) - len(waiting) >= ENOUGH:  # a wrong address
                for number in waiting.values():
                    answers[number] = last
                break
        return answers
    finally:
        stop.set()  # what is on its way ends with its timeout, in its thread; nobody waits for it
        pool.shutdown(wait=False, cancel_futures=True)


def ask(address: str, question: dict, read: Callable, key: str, timeout: float, retries: int, stop: threading.Event):
    """What `read` makes of the server's answer to one question, or the Fault; repeated where that may help."""
    body = json.dumps(question).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "TreeRPO"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    for attempt in range(retries + 1):
        try:
            return read(_post(address, body, headers, timeout, key))
        except Fault as fault:
            last = fault
        except RecursionError:
            last = Fault("The server's answer is nested too deeply: this is not a reward server.", for_all=True)
        if not last.again or attempt == retries or stop.wait(pause(attempt, last.wait)):
            break
    text = str(last) + (f" (tried {attempt + 1} times)" if attempt else "")
    return Fault(text.replace(key, "***") if key else text, for_all=last.for_all)


def chat(model: str, images: Tensor, text: str, image_format: str) -> dict:
    """The body of a chat completion's request: the images, then the text."""
    files = [base64.b64encode(encoded(image, image_format.upper())).decode() for image in images]
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/{image_format};base64,{file}"}} for file in files
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        "temperature": 0,
    }


def answer_text(answer: dict) -> str:
    """The text of a chat completion. Raises Fault."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise Fault(
            "The server's answer is not a chat completion: for one, the address ends in /v1/chat/completions.",
            for_all=True,
        ) from None
    if isinstance(text, list):
        parts = [part.get("text") for part in text if isinstance(part, dict)]
        text = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(text or "", str):
        raise Fault(f"The judge's answer is {trimmed(json.dumps(text), 40)}, which is no text.")
    return text or ""


def _per_image(part: slice, answers: list[float | None | Fault] | Fault) -> list[tuple[int, float | None | Fault]]:
    numbers = range(part.start, part.stop)
    return [(i, answers) for i in numbers] if isinstance(answers, Fault) else list(zip(numbers, answers))


def checked_address(address: str, chat: bool) -> str:
    """The address requests go to. Raises ValueError for anything but plain http and https."""
    try:
        parts = urllib.parse.urlsplit(address)
        parts.port  # raises too
    except ValueError as error:
        raise ValueError(f"The server's address cannot be read ({error}).") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            "The server's address must begin with http:// or https:// and a host, such as http://127.0.0.1:8000/score."
        )
    if not (address.isascii() and address.isprintable()) or " " in address:
        raise ValueError(
            "The server's address must have neither spaces nor letters outside ASCII: write them as %20 and so on."
        )
    if "@" in parts.netloc:
        raise ValueError(
            "The server's address must not hold a user name or password, for it is stored in the graph: use "
            "key_variable."
        )
    path = parts.path.rstrip("/")
    if chat and path in ("", "/v1"):
        path = "/v1/chat/completions"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path if chat else parts.path, parts.query, ""))


def _shown(address: str) -> str:
    """For messages: without the query, which may hold a key."""
    return address.partition("?")[0]


def _opener(address: str, deadline: Deadline) -> urllib.request.OpenerDirector:
    """Knows http and https only: no files, no redirects, no stored passwords; and no proxy for this machine itself."""
    opener = urllib.request.OpenerDirector()
    proxies = {} if is_here(urllib.parse.urlsplit(address).hostname) else None  # None: as the environment says
    for handler in (urllib.request.ProxyHandler(proxies), *deadline.handlers()):
        opener.add_handler(handler)
    return opener


def pause(attempt: int, asked: float = 0.0) -> float:
    """Seconds to wait after a failed attempt, counted from 0: doubling, at least what the server asked for, never above
    the cap.
    """
    return min(max(asked, FIRST_WAIT * 2**attempt), LONGEST_WAIT)


def _post(address: str, body: bytes, headers: dict[str, str], timeout: float, key: str = "") -> dict:
    """The JSON object in the server's answer, in which the key is blotted out. Raises Fault."""
    where = _shown(address)
    late = Fault(
        f"{where} did not answer within {timeout:g} s: raise the timeout, or check the server.",
        again=True,
        for_all=True,
    )
    with Deadline(timeout) as deadline:
        try:
            request = urllib.request.Request(address, body, headers, method="POST")
            with _opener(address, deadline).open(request, timeout=timeout) as response:
                raw = _read(response, where)
                raw = raw.replace(key.encode(), b"***") if key else raw
                if not deadline.cut and not 200 <= response.status < 300:
                    raise _refusal(response, raw, where)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = getattr(error, "reason", error)
            raise late if deadline.cut or isinstance(reason, TimeoutError) else _broken(reason, where) from None
        if deadline.cut:  # to the reader it looks like the end of the answer
            raise late
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        raise Fault(
            f"{where} answered with {trimmed(raw)}, which is not JSON: check the address.", for_all=True
        ) from None
    if not isinstance(answer, dict):
        raise Fault(f"{where} answered with {trimmed(raw)}, which is not a JSON object.")
    if answer.get("error"):
        raise Fault(f"{where} reports an error: {_message(answer, raw)}")
    return answer


def _read(response, where: str) -> bytes:
    """The whole body."""
    raw = bytearray()
    while piece := response.read1(65536):
        raw += piece
        if len(raw) > LARGEST_ANSWER:
            raise Fault(
                f"{where} sends more than {LARGEST_ANSWER / 1e6:g} MB as its answer: this is not a reward server."
            )
    if response.length:  # what is still missing of the announced length
        raise http.client.IncompleteRead(raw)
    return bytes(raw)


def _broken(error, where: str) -> Fault:
    """A connection that failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Fault(f"The certificate of {where} is not trusted ({error.verify_message}).", for_all=True)
    if isinstance(error, http.client.IncompleteRead):
        return Fault(f"The connection to {where} broke in the middle of the answer.", again=True, for_all=True)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return Fault(
        f"{where} cannot be reached ({trimmed(reason)}): check that the server runs.", again=True, for_all=True
    )


def _refusal(response, raw: bytes, where: str) -> Fault:
    """An answer whose status is not success."""
    status = (
        f"{where} answered {response.status} "
        f"({trimmed(response.reason or http.client.responses.get(response.status, ''))})"
    )
    if 300 <= response.status < 400:
        target = _shown(urllib.parse.urljoin(where, response.headers.get("Location", "")))
        return Fault(
            f"{status}: redirects are not followed; if you trust {trimmed(target)}, make it the address.", for_all=True
        )
    again = response.status in (408, 429) or response.status >= 500
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        answer = None
    return Fault(
        f"{status}: {_message(answer, raw)}",
        again,
        _retry_after(response.headers.get("Retry-After")),
        response.status in SAME_FOR_ALL,
    )


def _retry_after(header: str | None) -> float:
    """Seconds; 0 when the server does not say. The header is a number of seconds or a date."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _message(answer, raw: bytes) -> str:
    """What the server says in its own words: {"error": "..."}, {"error": {"message": "..."}}, {"detail": ...} or the
    body.
    """
    for name in ("error", "detail", "message"):
        if isinstance(answer, dict) and answer.get(name):
            found = answer[name]
            return trimmed(found.get("message") or found if isinstance(found, dict) else found)
    return trimmed(raw)


def trimmed(text, length: int = 200) -> str:
    """One short line, whatever the server sent."""
    text = text[:20000].decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    if re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE):
        title = re.search(r"<title[^>]*>([^<]*)", text, re.IGNORECASE)
        text = f"a web page ({title[1].strip()})" if title else "a web page"
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return (text if len(text) <= length else text[: length - 1] + "…") or "nothing"


def _scores(answer: dict, count: int, field: str) -> list[float | None | Fault]:
    """{"scores": [...]} or {"scores": {name: [...]}} -> a score per image."""
    found = answer.get("scores")
    if isinstance(found, dict):
        names = ", ".join(sorted(map(str, found)))
        if not field and len(found) != 1:
            raise Fault(
                f"The server gives several scores ({trimmed(names)}): write the name of one into 'field'.",
                for_all=True,
            )
        found = found.get(field) if field else next(iter(found.values()))
        if found is None:
            raise Fault(f"The server gives no score '{field}', only {trimmed(names)}: correct 'field'.", for_all=True)
    elif field and isinstance(found, list):
        raise Fault(
            f"The server gives one list of scores without names: leave 'field' empty instead of '{field}'.",
            for_all=True,
        )
    if not isinstance(found, list):
        raise Fault('The server\'s answer has no list "scores": see docs/server_reward.md.', for_all=True)
    if len(found) != count:
        raise Fault(
            f"The server gave {len(found)} scores for {count} images: it must give one per image, null where it has "
            "none."
        )
    return [None if value is None else _number(value) for value in found]


def _judgements(answer: dict, count: int, pattern: str) -> list[float | Fault]:
    """A chat completion -> a score per image: the pattern's last match for one image, exactly `count` matches for
    several.
    """
    text = answer_text(answer)
    try:
        _, (found,) = search(pattern, [text], count)
    except ValueError as error:
        raise Fault(f"The pattern for the score cannot be used with the judge's answer ({error}).") from None
    if not found.count:
        raise Fault(f"The pattern for the score does not occur in the judge's answer: …{trimmed(text[-200:])}")
    if count > 1 and found.count != count:
        raise Fault(
            f"The judge gave {found.count} scores for {count} images: the instruction must ask for one per image."
        )
    return [_number(value, text=True) for value in found.last]


def _number(value, text: bool = False) -> float | Fault:
    """A finite number, or why it is none. text: it was cut out of a text."""
    try:
        if isinstance(value, bool) or not (isinstance(value, (int, float)) or text):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return Fault(f"the server's score {trimmed(json.dumps(value), 40)} is not a number.")
    return (
        number
        if abs(number) <= torch.finfo(torch.float32).max
        else Fault(f"the server's score {trimmed(value, 40)} is not finite.")
    )
