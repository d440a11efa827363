"""The translations in locales/<language>/nodeDefs.json fit the nodes, and what ComfyUI does with them."""

import json
import re
import shutil
import subprocess

import pytest
from test_docs import FIRST, NODES, ROOT, inputs, translations

WHOLE = "zh"  # has every node; the others have the nodes of FIRST
SOME = ["ja", "ko", "ru", "fr", "es", "de"]  # ComfyUI 0.33's page offers all but German, which waits for it
AS_IT_IS = re.compile(  # options that are names of models, methods, formats and numbers
    r"flux|sd3|float32|bfloat16|[01]|\w+_sde|cps|exact|\w*grpo|trajectory|tmpo|geneval|adamw\w*|ComfyUI|"
    r"diffusers \(PEFT\)"
)

SAID = re.compile(r'\bsay\("([^"]*)"')


def translated(node: str) -> list[str]:
    """A node's inputs in a translation: ComfyUI's frontend has '_' for dots, and one key per growing input."""
    growing = [
        f"{name}_{row['grows']}{i}" for name, row in inputs(node).items() if "grows" in row for i in range(row["most"])
    ]
    return [*inputs(node), *growing]


def texts(entry: dict) -> list[str]:
    fields = [*entry.get("inputs", {}).values(), *entry.get("outputs", {}).values()]
    return [entry.get("display_name", ""), entry.get("description", "")] + [
        field[part] for field in fields for part in ("name", "tooltip") if part in field
    ]


def test_languages():
    assert sorted(path.name for path in (ROOT / "locales").iterdir()) == sorted(["en", WHOLE, *SOME])


@pytest.mark.parametrize("language", [WHOLE, *SOME])
def test_nothing_is_missing(language, pack):
    """Nor is anything too much. An output has a tooltip where the node gives it one."""
    table = translations(language)
    schemas = {node.define_schema().node_id: node.define_schema() for node in pack.nodes.NODES}
    assert sorted(table) == sorted(NODES if language == WHOLE else FIRST)
    for node, entry in table.items():
        assert entry["display_name"] and entry["description"], node
        assert sorted(entry["inputs"]) == sorted(translated(node)), node
        assert all(field["name"] and field["tooltip"] for field in entry["inputs"].values()), node
        assert list(entry["outputs"]) == [str(i) for i in range(len(NODES[node]["outputs"]))], node
        assert all(field["name"] for field in entry["outputs"].values()), node
        explained = [str(i) for i, output in enumerate(schemas[node].outputs) if output.tooltip]
        assert [i for i, field in entry["outputs"].items() if "tooltip" in field] == explained, node
        shown = {field.id for field in schemas[node].inputs if getattr(field, "placeholder", None)}
        assert {name for name, field in entry["inputs"].items() if "placeholder" in field} == shown, node


@pytest.mark.parametrize("language", sorted(path.parent.name for path in ROOT.glob("locales/*/nodeDefs.json")))
def test_translations_name_what_exists_and_hold_no_formatting(language):
    """Names and descriptions are vue-i18n messages, in which {}, @ and | mean something; tooltips are shown as they
    are.
    """
    for node, entry in translations(language).items():
        assert set(entry) <= {"display_name", "description", "inputs", "outputs"}, node
        assert set(entry.get("inputs", {})) <= set(translated(node)), node
        assert all(int(i) < len(NODES[node]["outputs"]) for i in entry.get("outputs", {})), node
        fields = [*entry.get("inputs", {}).values(), *entry.get("outputs", {}).values()]
        assert all(set(field) <= {"name", "tooltip", "options", "placeholder"} for field in fields), node
        messages = [
            entry.get("display_name", ""),
            entry.get("description", ""),
            *(field.get("name", "") for field in fields),
        ]
        assert not [text for text in messages if re.search(r"[{}@|]", text)], node


@pytest.mark.parametrize("language", [WHOLE, *SOME])
def test_inputs_of_a_node_can_be_told_apart(language):
    for node, entry in translations(language).items():
        names = [entry["inputs"][name]["name"] for name in inputs(node)]
        assert len(set(names)) == len(names), node


@pytest.mark.parametrize("language", [WHOLE, *SOME])
def test_options_that_a_tooltip_explains_exist(language):
    for node, entry in translations(language).items():
        for name, row in inputs(node).items():
            if "options" in row:
                explained = re.findall(
                    r"(?:^|[.,;:。，；：、]) ?([a-zA-Z][\w() -]*?) ?[=＝]", entry["inputs"][name]["tooltip"]
                )
                assert set(explained) <= set(row["options"]), (node, name)


@pytest.mark.parametrize("language", [WHOLE, *SOME])
def test_numbers_are_those_of_the_english_tooltip(language, pack):
    """Defaults, sizes and rates, as whoever changes an English tooltip would forget here."""
    english = translations("en")
    for node in pack.nodes.NODES:
        schema = node.define_schema()
        fields = translations(language).get(schema.node_id, {}).get("inputs", {})
        for field in schema.inputs:
            said = english.get(schema.node_id, {}).get("inputs", {}).get(field.id, {}).get("tooltip")
            wanted = set(re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?:e-\d)?(?![\w.])", field.tooltip or said or ""))
            if fields.get(field.id):
                missing = {number for number in wanted if number not in fields[field.id]["tooltip"]}
                assert not missing, (schema.node_id, field.id, missing)


@pytest.mark.parametrize("language", [WHOLE, *SOME])
def test_nodes_are_called_as_they_are_in_that_language(language):
    """A tooltip that sends someone to another node names it as the node search does."""
    table = translations(language)
    renamed = {NODES[node]["display_name"] for node, entry in table.items()} - {
        entry["display_name"] for entry in table.values()
    }
    for node, entry in table.items():
        others = renamed - {NODES[node]["display_name"]}
        assert not [title for title in others for text in texts(entry) if title in text], node


@pytest.mark.parametrize("language", [WHOLE, *SOME])
def test_options_have_words(language):
    """No two of a list have the same."""
    for node, entry in translations(language).items():
        for name, row in inputs(node).items():
            options = [option for option in row.get("options", []) if node != "TreeRPOMyTaste"]
            wanted = [] if all(AS_IT_IS.fullmatch(option) for option in options) else options
            said = entry["inputs"][name].get("options", {})
            assert list(said) == wanted and all(said.values()) and len(set(said.values())) == len(said), (node, name)


def test_dialogs_have_words_in_every_language():
    """What web/*.js says with `say`: each sentence is in each language's main.json, with the same values in it."""
    calls = [
        call for path in (ROOT / "web").glob("*.js") for call in re.findall(r"\bsay\((.)", path.read_text("utf-8"))
    ]
    found = [text for path in (ROOT / "web").glob("*.js") for text in SAID.findall(path.read_text("utf-8"))]
    assert len(calls) == calls.count('"'), "the sentence itself stands in the call"
    for language in [WHOLE, *SOME]:
        said = json.loads((ROOT / "locales" / language / "main.json").read_text("utf-8"))["treerpo"]
        assert sorted(said) == sorted(set(found)), language
        for text, words in said.items():
            assert words and sorted(re.findall(r"{\d}", text)) == sorted(re.findall(r"{\d}", words)), (language, text)


@pytest.mark.skipif(not shutil.which("node"), reason="no Node.js here to run the script with")
def test_script_shows_options_and_empty_boxes_in_the_language(tmp_path):
    """web/treerpo.js with ComfyUI's two modules replaced: what a list and a text box of a new node then show."""
    for name, text in {
        "package.json": '{"type": "module"}',
        "extensions/TreeRPO/treerpo.js": (ROOT / "web" / "treerpo.js").read_text("utf-8"),
        "scripts/app.js": "export const app = { registerExtension: (it) => (app.it = it), ui: { settings: "
        "{ getSettingValue: (id) => (id === 'Comfy.Locale' ? 'zh' : undefined) } } };",
        "scripts/api.js": "export const api = { addEventListener() {}, getCustomNodesI18n: async () => "
        f"({{ zh: {{ nodeDefs: {json.dumps(translations('zh'))} }} }}) }};",
        "check.js": """
            import { app } from "./scripts/app.js";
            globalThis.window = globalThis.document = { addEventListener() {} };
            await import("./extensions/TreeRPO/treerpo.js");
            const box = (name, placeholder) => ({ name, options: {}, element: { placeholder } });
            const preset = { name: "preset", options: { values: ["gentle", "normal"] } };
            const prompts = box("prompts", "One prompt per line."), of_pick = box("prompts", "prompts");
            await app.it.init();
            app.it.nodeCreated({ comfyClass: "TreeRPOSimple", widgets: [preset, prompts] });
            app.it.nodeCreated({ comfyClass: "TreeRPOPick", widgets: [of_pick] });
            const method = { name: "method", options: { values: ["GRPO"] } };
            app.it.nodeCreated({ comfyClass: "TreeRPOObjective", widgets: [method] });
            app.it.nodeCreated({ comfyClass: "KSampler", widgets: [box("prompts", "prompts")] });
            const label = preset.options.getOptionLabel;
            const boxes = [prompts, of_pick].map((widget) => widget.element.placeholder);
            const labels = [label("gentle"), label("other"), label(null), method.options.getOptionLabel("GRPO")];
            console.log(JSON.stringify([...labels, ...boxes]));
            process.exit(); // the script goes on looking at the page
        """,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    run = subprocess.run(
        ["node", "check.js"], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [
        "温和 (gentle)",
        "other",
        "",
        "GRPO",
        "每行一个提示词，十个以上效果最好。",
        "提示词",
    ]


def test_english_only_adds_what_the_nodes_do_not_say(pack):
    english = translations("en")
    for node in pack.nodes.NODES:
        schema = node.define_schema()
        said = {field.id for field in schema.inputs if field.tooltip}
        assert not said & set(english.get(schema.node_id, {}).get("inputs", {})), schema.node_id
