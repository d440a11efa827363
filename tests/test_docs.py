"""What is written about the nodes fits the nodes: help pages, translations, links and pictures. Read from
data/schema.json, which test_schema.py compares with the nodes themselves.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NODES = json.loads((ROOT / "tests" / "data" / "schema.json").read_text("utf-8"))
PAGES = ROOT / "web" / "docs"
BY_TITLE = {entry["display_name"]: node for node, entry in NODES.items()}
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


def translated(node: str) -> list[str]:
    """A node's inputs in a translation: ComfyUI's frontend has '_' for dots, and one key per growing input."""
    growing = [
        f"{name}_{row['grows']}{i}" for name, row in inputs(node).items() if "grows" in row for i in range(row["most"])
    ]
    return [*inputs(node), *growing]


def test_every_node_has_a_help_page_and_every_page_a_node():
    assert {path.stem for path in PAGES.glob("*.md")} == set(NODES)


@pytest.mark.parametrize("node", NODES)
def test_help_page_fits_its_node(node):
    """In `code` that looks like a name, a page names this node's own inputs, outputs and options; other nodes' inputs
    are *Title → input*.
    """
    text = (PAGES / f"{node}.md").read_text("utf-8")
    assert text.startswith(f"# {NODES[node]['display_name']}\n")
    own = inputs(node)
    known = {
        *own,
        *(row["name"] for row in NODES[node]["outputs"]),
        *(str(option) for row in own.values() for option in row.get("options", [])),
    }
    named = set(re.findall(r"`([a-z][a-z0-9_]*)`", text))
    assert named <= known, "no input, output or option of this node"
    assert {name for name, row in own.items() if not row.get("advanced")} <= named, "inputs that are not explained"
    for title, name in re.findall(r"\*([^*\n]+) → ([^*\n]+)\*", text):
        assert title in BY_TITLE and name in inputs(BY_TITLE[title]), f"there is no {title} → {name}"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_pictures_exist(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text("utf-8"))):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
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


def test_chinese_is_complete():
    chinese = translations("zh")
    assert set(chinese) == set(NODES)
    for node, entry in chinese.items():
        assert entry["display_name"] and entry["description"], node
        assert sorted(entry["inputs"]) == sorted(translated(node)), node
        assert all(field["name"] and field["tooltip"] for field in entry["inputs"].values()), node
        assert list(entry["outputs"]) == [str(i) for i in range(len(NODES[node]["outputs"]))], node


@pytest.mark.parametrize("language", sorted(path.parent.name for path in ROOT.glob("locales/*/nodeDefs.json")))
def test_translations_name_what_exists_and_hold_no_formatting(language):
    """Names and descriptions are vue-i18n messages, in which {}, @ and | mean something; tooltips are shown as they
    are.
    """
    for node, entry in translations(language).items():
        assert set(entry.get("inputs", {})) <= set(translated(node)), node
        assert all(int(i) < len(NODES[node]["outputs"]) for i in entry.get("outputs", {})), node
        fields = [*entry.get("inputs", {}).values(), *entry.get("outputs", {}).values()]
        messages = [
            entry.get("display_name", ""),
            entry.get("description", ""),
            *(field.get("name", "") for field in fields),
        ]
        assert not [text for text in messages if re.search(r"[{}@|]", text)], node


def test_english_only_adds_what_the_nodes_do_not_say(pack):
    english = translations("en")
    for node in pack.nodes.NODES:
        schema = node.define_schema()
        said = {field.id for field in schema.inputs if field.tooltip}
        assert not said & set(english.get(schema.node_id, {}).get("inputs", {})), schema.node_id
