"""What is written about the nodes fits the nodes: help pages, links and pictures. Read from data/schema.json, which
test_schema.py compares with the nodes themselves.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NODES = json.loads((ROOT / "tests" / "data" / "schema.json").read_text("utf-8"))
PAGES = ROOT / "web" / "docs"
FIRST = [  # the nodes that an artist meets first: in all languages, and with help pages in Chinese
    "TreeRPOTinyModel",
    "TreeRPOTinyReward",
    "TreeRPOSimple",
    "TreeRPOTeach",
    "TreeRPOMyTaste",
    "TreeRPOPick",
    "TreeRPOScore",
    "TreeRPOHPS",
    "TreeRPOTrainer",
    "TreeRPOSaveLora",
]
WRITTEN = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *(path for folder in ("docs", "web", "tests") for path in sorted((ROOT / folder).rglob("*.md"))),
]


def inputs(node: str) -> dict[str, dict]:
    return {row["name"]: row for row in NODES[node]["inputs"]}


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def translations(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))


def test_every_node_has_a_help_page_and_every_page_a_node():
    assert {path.stem for path in PAGES.glob("*.md")} == set(NODES)


@pytest.mark.parametrize("node", NODES)
def test_help_page_fits_its_node(node):
    """In `code` that looks like a name, a page names this node's own inputs, outputs and options; other nodes' inputs
    are *Title → input*.
    """
    titles = {entry["display_name"]: set(inputs(other)) for other, entry in NODES.items()}
    fits(node, (PAGES / f"{node}.md").read_text("utf-8"), NODES[node]["display_name"], titles)


@pytest.mark.parametrize("node", FIRST)
def test_chinese_help_page_fits_its_node(node):
    """ComfyUI's page for a language is <node>/<language>.md. Inputs are there with the name they have in Chinese."""
    chinese = translations("zh")
    text = (PAGES / node / "zh.md").read_text("utf-8")
    titles = {entry["display_name"]: {row["name"] for row in entry["inputs"].values()} for entry in chinese.values()}
    fits(node, text, chinese[node]["display_name"], titles)
    english = (PAGES / f"{node}.md").read_text("utf-8")
    assert pictures(english) == pictures(text) and numbers(english) <= numbers(text), "the English page has changed"
    named = {name: f"{row['name']} `{name}`" for name, row in chinese[node]["inputs"].items()}
    assert [words for words in named.values() if words not in text] == []


def pictures(text: str) -> list[str]:
    return re.findall(r"!\[[^\]\n]*\]\(([^)\s]+)\)", text)


def numbers(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\.?\d+(?:\.\d+)*(?:e-\d)?", text))


def test_pages_in_other_languages_are_of_the_first_nodes():
    found = {path.relative_to(PAGES).as_posix() for path in PAGES.glob("*/*.md")}
    assert found == {f"{node}/zh.md" for node in FIRST}


def fits(node: str, text: str, title: str, titles: dict[str, set[str]]):
    """`titles`: what *Title → input* may name."""
    assert text.startswith(f"# {title}\n")
    own = inputs(node)
    known = {
        *own,
        *(row["name"] for row in NODES[node]["outputs"]),
        *(str(option) for row in own.values() for option in row.get("options", [])),
    }
    named = set(re.findall(r"`([a-z][a-z0-9_]*)`", text))
    assert named <= known, "no input, output or option of this node"
    assert {name for name, row in own.items() if not row.get("advanced")} <= named, "inputs that are not explained"
    for other, name in re.findall(r"\*([^*\n]+) → ([^*\n]+)\*", text):
        assert name in titles.get(other, ()), f"there is no {other} → {name}"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_pictures_exist(path):
    folder = PAGES if path.is_relative_to(PAGES) else path.parent  # ComfyUI has one folder for help pages' pictures
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text("utf-8"))):
        if not re.match(r"[a-z]+:|#", target):
            assert (folder / target.split("#")[0]).exists(), target


def anchors(path) -> set[str]:
    """What a link may name after #, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_into_pages_find_their_heading(path):
    for target, anchor in re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", without_code(path.read_text("utf-8"))):
        if not re.match(r"[a-z]+:", target):
            assert anchor in anchors(path.parent / target if target else path), f"{target}#{anchor}"


DOCS = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_docs_are_short_and_begin_with_their_contents(path):
    text = path.read_text("utf-8")
    assert len(text.encode()) <= 8000
    contents = re.findall(r"^- \[(.*)\]\(#", text.partition("\n## ")[0], re.M)
    assert contents == re.findall(r"^## (.*)$", text, re.M) != []


def test_readme_is_short_and_every_page_of_the_docs_can_be_reached_from_it():
    readme, reached = ROOT / "README.md", set()
    assert len(readme.read_bytes()) <= 7000
    left = [readme]
    while left:
        page = left.pop()
        reached.add(page)
        targets = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text("utf-8"))
        found = {(page.parent / target).resolve() for target in targets if not re.match(r"[a-z]+:", target)}
        left += [other for other in found - reached if other.parent == ROOT / "docs"]
    assert [path.name for path in DOCS if path not in reached] == []


@pytest.mark.parametrize("path", sorted(PAGES.rglob("*.md")), ids=lambda path: path.relative_to(PAGES).as_posix())
def test_help_pages_hold_only_links_that_work_in_comfyui(path):
    """ComfyUI finds a page's pictures beside it, but not its relative links; and it serves nothing outside web/."""
    text = without_code(path.read_text("utf-8"))
    assert not [
        target for target in re.findall(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)", text) if not target.startswith("https://")
    ]
    for target in re.findall(r"!\[[^\]\n]*\]\(([^)\s]+)\)", text):
        assert (PAGES / target).resolve().is_relative_to(PAGES), target


def test_pictures_of_help_pages_are_of_a_node_or_the_readmes():
    for path in (PAGES / "images").iterdir():
        if path.stem in NODES:
            continue
        assert path.read_bytes() == (ROOT / "docs" / "images" / path.name).read_bytes(), (
            f"copy docs/images/{path.name} to web/docs/images again"
        )


def test_every_help_page_has_a_picture():
    assert [path.name for path in PAGES.glob("*.md") if "](images/" not in path.read_text("utf-8")] == []
