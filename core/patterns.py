"""Regular expressions from outside: a graph, a run.yaml, a LoRA file.

Some need centuries for a short text, such as (a+)+$ for many letters a, and Python's re lets nothing else run
meanwhile: ComfyUI would stand still. So they run in a process of their own, which is ended when its time is up.
"""

import json
import subprocess
import sys
from typing import NamedTuple

SECONDS = 10.0  # for one call, Python's start included
LONGEST = 100_000  # characters of a text that are looked at: its end
KEPT = 1000  # characters of a match

# Reads [pattern, texts, most] as JSON; writes {groups, found} or {error}.
_CHILD = f"""
import collections, json, re, sys
pattern, texts, most = json.load(sys.stdin)
try:
    pattern = re.compile(pattern)
    found = []
    for text in texts:
        count, last = 0, collections.deque(maxlen=most)
        for match in pattern.finditer(text):
            count += 1
            last.append((match[min(pattern.groups, 1)] or "")[:{KEPT}])
        found.append([count, list(last)])
    answer = dict(groups=pattern.groups, found=found)
except (re.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
    answer = dict(error=str(error) or type(error).__name__)
json.dump(answer, sys.stdout)
"""


class Found(NamedTuple):
    """All matches in one text."""

    count: int
    last: list[str]  # the last ones' first group (the whole match where the expression has none), in their order


def search(pattern: str, texts: list[str], most: int = 1) -> tuple[int, list[Found]]:
    """How many groups the expression has, and what it finds in each text; of the matches the last `most` are kept.

    ValueError, with what is wrong with the expression, when it is none or takes too long.
    """
    question = json.dumps([pattern, [text[-LONGEST:] for text in texts], most])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=question.encode(),
            capture_output=True,
            timeout=SECONDS,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"it takes longer than {SECONDS:g} s: use no repetition of something that repeats itself"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"the process that tries it ended without an answer: {error}") from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["groups"], [Found(*found) for found in answer["found"]]
