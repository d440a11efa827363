"""The shipped graphs against a running ComfyUI: every node, input, value and wire exists, and the drag-and-drop form
says the same as its API twin.
"""

import json
import sys

import pytest
from conftest import COMFYUI, MISSING, ROOT

import run

WORKFLOWS = ROOT / "workflows"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
FILES = (".safetensors", ".pt", ".pth")  # a choice among files that this machine need not have
NOTES = ("MarkdownNote", "Note")


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The node definitions of a running ComfyUI."""
    if COMFYUI is None:
        pytest.skip(MISSING)
    with run.Server(COMFYUI, sys.executable, base=tmp_path_factory.mktemp("base")) as server:
        yield run.Client(server.url).get("/object_info")


def api(name, known):
    """A graph in API format, without core's nodes that an older ComfyUI does not have; all of ours must be there."""
    graph = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text("utf-8"))
    return {
        number: node
        for number, node in graph.items()
        if node["class_type"] in known or node["class_type"].startswith("TreeRPO")
    }


def drawn(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))


def specs(known, node_type):
    """(type, options) of every input of a node; growing inputs by their first name."""
    inputs = known[node_type]["input"]
    return {
        name: (spec[0], spec[1] if len(spec) > 1 else {})
        for group in ("required", "optional")
        for name, spec in inputs.get(group, {}).items()
    }


def as_api(graph, known):
    """A drawn graph as ComfyUI's page would queue it."""
    origin = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    found = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES or (node["type"] not in known and not node["type"].startswith("TreeRPO")):
            continue
        options, values, inputs = specs(known, node["type"]), iter(node.get("widgets_values") or []), {}
        for field in node["inputs"]:
            # a widget without a value of its own writes none
            if "widget" in field and (value := next(values, None)) is not None:
                inputs[field["name"]] = value
                if options[field["name"]][1].get("control_after_generate"):
                    next(values)
            if field["link"] is not None:
                inputs[field["name"]] = origin[field["link"]]
        found[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return found


def problems(graph, known):
    """What ComfyUI would refuse, or an artist would miss."""
    for number, node in graph.items():
        where = f"{number} {node['class_type']}"
        if node["class_type"] not in known:
            yield f"{where}: no such node"
            continue
        options = specs(known, node["class_type"])
        for name, value in node["inputs"].items():
            kind, extra = options.get(name) or options.get(name.partition(".")[0], (None, {}))
            if kind is None:
                yield f"{where}: no input {name}"
            elif isinstance(value, list):
                source = graph.get(value[0])
                given = known[source["class_type"]]["output"][value[1]] if source else None
                wanted = extra["template"]["input"]["required"] if kind == "COMFY_AUTOGROW_V3" else None
                wanted = next(iter(wanted.values()))[0] if wanted else kind
                if given is None or (given != wanted and given not in str(wanted).split(",") and wanted != "*"):
                    yield f"{where}.{name}: takes {wanted}, gets {given}"
            elif isinstance(kind, list) or kind == "COMBO":
                choices = kind if isinstance(kind, list) else extra.get("options", [])
                if value not in choices and not str(value).endswith(FILES):
                    yield f"{where}.{name}: {value!r} is none of {choices}"
            elif kind in ("INT", "FLOAT") and not extra.get("min", value) <= value <= extra.get("max", value):
                yield f"{where}.{name}: {value} is out of range"
        for name, spec in known[node["class_type"]]["input"].get("required", {}).items():
            if not any(key.partition(".")[0] == name for key in node["inputs"]):
                yield f"{where}: nothing for {name}"


def test_there_is_something_to_check():
    assert len(NAMES) >= 8 and sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_node_input_value_and_wire_exists(name, known):
    if "flux2" in name and "flux2" not in json.dumps(known["CLIPLoader"]):
        pytest.skip("this ComfyUI does not load FLUX.2")
    assert list(problems(api(name, known), known)) == []


def test_what_is_wrong_is_found(known):
    graph = api("first_steps", known)
    graph["8"]["inputs"] |= {"policy": ["7", 0], "cfg": 99.0, "nonsense": 1}
    graph["7"]["inputs"]["kind"] = "loud"
    del graph["9"]["inputs"]["vae"]
    graph["14"]["class_type"] = "TreeRPOGone"
    assert len(list(problems(graph, known))) == 6


@pytest.mark.parametrize("name", NAMES)
def test_the_drawn_graph_is_its_api_twin(name, known):
    graph, twin = as_api(drawn(name), known), api(name, known)
    assert graph.keys() == twin.keys()
    for number, node in twin.items():
        assert graph[number]["class_type"] == node["class_type"]
        defaults = {field: options.get("default") for field, (_, options) in specs(known, node["class_type"]).items()}
        for field, value in graph[number]["inputs"].items():
            assert value == node["inputs"].get(field, defaults.get(field, value)), (
                f"{number} {node['class_type']}.{field}"
            )
        assert all(
            graph[number]["inputs"].get(field) == value
            for field, value in node["inputs"].items()
            if isinstance(value, list)
        )


def test_no_two_graphs_go_on_with_the_same_run(known):
    """Whoever tries one after the other would be told that the run was begun with other settings."""
    kinds = {"TreeRPOPolicy": "run_name", "TreeRPOSimple": "lora_name", "TreeRPOTeach": "lora_name"}
    nodes = [node for name in NAMES for node in api(name, known).values()]
    runs = [node["inputs"][kinds[node["class_type"]]] for node in nodes if node["class_type"] in kinds]
    assert len(runs) > 15 and len(set(runs)) == len(runs)


@pytest.mark.parametrize("name", NAMES)
def test_drawn_graphs_are_tidy(name):
    graph = drawn(name)
    boxes = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    groups = [group["bounding"] for group in graph["groups"]]
    for i, (x, y, wide, high) in enumerate(boxes):
        assert not [
            box
            for box in boxes[i + 1 :]
            if x < box[0] + box[2] and box[0] < x + wide and y - 30 < box[1] + box[3] and box[1] - 30 < y + high
        ], "nodes overlap"
        assert (
            sum(
                left <= x and x + wide <= left + width and top <= y and y + high <= top + height
                for left, top, width, height in groups
            )
            == 1
        ), "each node in one group"
    assert sum(node["type"] in NOTES for node in graph["nodes"]) >= 2, "it is explained"
    assert graph["groups"][0]["title"].startswith("START"), "one sees where to begin"
    wide, high = (max(group[k] + group[k + 2] for group in groups) for k in (0, 1))
    assert wide <= 1900 and high <= 1000, "it can be read when it is opened"
    columns = {link[0]: (link[1], link[3]) for link in graph["links"]}
    place = {
        node["id"]: next(k for k, group in enumerate(groups) if group[0] <= node["pos"][0] < group[0] + group[2])
        for node in graph["nodes"]
    }
    assert all(place[source] <= place[target] for source, target in columns.values()), "wires go from left to right"
    assert (WORKFLOWS / f"{name}.jpg").stat().st_size < 300_000


def test_the_page_knows_where_every_model_file_is_from():
    """web/missing_files.js says it to who queues a graph without them."""
    sources = json.loads((ROOT / "web/model_files.json").read_text("utf-8"))
    named = {
        value
        for path in (ROOT / "workflows/api").glob("*.json")
        for node in json.loads(path.read_text("utf-8")).values()
        if "Loader" in node["class_type"] and "Lora" not in node["class_type"]
        for value in node["inputs"].values()
        if isinstance(value, str) and value.endswith(".safetensors")
    }
    assert named == sources.keys()
    for name, (folder, size, address) in sources.items():
        assert folder in ("diffusion_models", "checkpoints", "text_encoders", "vae", "clip_vision") and 0.1 < size < 50
        assert address.startswith("https://huggingface.co/") and address.endswith(f"/{name}")
