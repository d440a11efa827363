"""Every command in the README and the docs can be typed as it stands: its script, module and files exist, and its
options are read by the script's own parser. Nothing is started.
"""

import itertools
import json
import re
import shlex
import subprocess
import sys

import pytest
from test_docs import ROOT

import headless
import run

PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "web" / "docs").rglob("*.md")),
]
PROGRAM = re.compile(r"(python3?|pip|curl|comfy|accelerate|torchrun) ")
BENCHMARKS = sorted(path.stem for path in ROOT.glob("benchmarks/*.py") if "__main__" in path.read_text("utf-8"))
FOLDERS = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")

# Runs each script up to the moment when it has read its arguments; prints what its parser said against them.
READER = """
import argparse, contextlib, io, json, runpy, sys
from pathlib import Path
from unittest.mock import MagicMock

sys.modules |= dict.fromkeys(["playwright", "playwright.sync_api"], MagicMock())  # the browser checks' only other need
path, parse_args = list(sys.path), argparse.ArgumentParser.parse_args

class Read(BaseException):
    pass

def read(self, *args, **kwargs):
    parse_args(self, *args, **kwargs)
    raise Read

argparse.ArgumentParser.parse_args = read
answers = []
for script, arguments in json.load(sys.stdin):
    said = io.StringIO()
    sys.argv, sys.path[:] = [script, *arguments], [str(Path(script).resolve().parent), *path]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_path(script, run_name="__main__")
        answers.append("it reads no arguments")
    except Read:
        answers.append("")
    except BaseException as error:
        answers.append(said.getvalue()[-300:] or repr(error))
print("ANSWERS" + json.dumps(answers))
"""


def commands(text: str) -> list[str]:
    """In indented and fenced blocks, and in `code`."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE) + [line for block in blocks for line in block.splitlines()]
    code = re.findall(r"`([^`]+)`", re.sub(r"^ {4}\S.*$", "", text, flags=re.MULTILINE))
    return [" ".join(line.split()) for line in [*lines, *code] if PROGRAM.match(line)]


def spelled_out(command: str) -> list[list[str]]:
    """Its words; `a|b` is either, NAME each benchmark, N and S a number."""
    choices = []
    for word in shlex.split(command, comments=True):
        if word == "NAME":
            choices.append(BENCHMARKS)
        elif re.fullmatch(r"[\w.-]+(\|[\w.-]+)+", word):
            choices.append(word.split("|"))
        else:
            choices.append(["1" if word in ("N", "S") else word])
    return [list(words) for words in itertools.product(*choices)]


def script_of(words: list[str], page: str) -> tuple[str, list[str]] | None:
    """(script, arguments) for Python, from `python X.py ...`, `accelerate launch -m package ...` and the like."""
    if "-m" in words:
        at = words.index("-m")
        script = words[at + 1].replace(".", "/") + ".py"
    else:
        at = 0
        script = words[1]
        if f"Save it as `{script}`" in page:
            return None
    assert (ROOT / script).is_file(), f"there is no {script}"
    return script, words[at + 2 :]


def read_by_run(arguments: list[str]) -> tuple[str, list[str]] | None:
    """What `run.py` makes of its arguments: a benchmark's own, or None when it has read them all itself."""
    args, rest = run.make_parser().parse_known_args(arguments)
    if args.command == "workflow":
        graph = headless.load_graph(ROOT / args.file)
        for setting in args.set:
            headless.apply_setting(graph, setting)
    if args.command == "bench":
        assert args.name in BENCHMARKS, f"there is no benchmark {args.name}"
        return f"benchmarks/{args.name}.py", rest
    assert args.command == "test" or not rest, rest
    return None


def checked(command: str, page: str) -> list[tuple[str, list[str]]]:
    """Fails on what can be seen at once; the rest is for the scripts' own parsers."""
    for file in re.findall(rf"(?<![\w./])(?:{FOLDERS})/[\w./-]*\w", command):
        assert (ROOT / file).exists(), f"there is no {file}"
    left = []
    for words in spelled_out(command):
        if words[0] == "pip":
            source = "".join(path.read_text("utf-8") for path in ROOT.glob("**/*.py") if "tests" not in path.parts[-2:])
            names = [word for word in words[2:] if word[0] != "-"]
            assert words[1] == "install" and all(re.search(rf"\b{name}\b", source) for name in names), names
        elif words[0] == "curl":
            known = ["/prompt", *re.findall(r'"(/treerpo/\w+)"', (ROOT / "nodes" / "pick.py").read_text("utf-8"))]
            assert words[1:] and any(word.endswith(f":8188{route}") for word in words for route in known), known
            for word in words:
                if word.startswith("{") and "$(" not in word:
                    json.loads(word)
        elif words[0] != "comfy":
            script, arguments = script_of(words, page) or ("", [])
            if script == "run.py":
                script, arguments = read_by_run(arguments) or ("", [])
            if arguments:
                left.append((script, arguments))
    return left


FOUND = [(path, command) for path in PAGES for command in commands(path.read_text("utf-8"))]


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What every script said against its arguments, all read in one process."""
    asked = []
    for path, command in FOUND:
        try:
            asked += checked(command, path.read_text("utf-8"))
        except (AssertionError, SystemExit, OSError, ValueError, run.Problem):
            pass  # its own test says so
    ran = subprocess.run(
        [sys.executable, "-c", READER], input=json.dumps(asked), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "ANSWERS" in ran.stdout, ran.stderr
    return dict(zip(map(str, asked), json.loads(ran.stdout.partition("ANSWERS")[2])))


@pytest.mark.parametrize("path, command", FOUND, ids=lambda it: it if isinstance(it, str) else it.name)
def test_command(path, command, answers):
    for asked in checked(command, path.read_text("utf-8")):
        assert answers[str(asked)] == "", asked


def test_commands_are_found():
    """Else the test above could pass on nothing."""
    text = "`python a.py`\n\n    pip install b  # why\n\n```bash\ncurl c\n```\n```python\npython = 1\n```\n"
    assert commands(text) == ["pip install b # why", "curl c", "python a.py"]
    assert {path.name for path, _ in FOUND} >= {"README.md", "developers.md", "training.md", "scaling.md", "zh.md"}


def test_benchmarks_are_listed():
    text = (ROOT / "docs" / "developers.md").read_text("utf-8")
    listed = re.search(r"bench NAME +# ([\w, ]+)", text).group(1)
    assert sorted(listed.split(", ")) == BENCHMARKS
