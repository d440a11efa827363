"""Saved graphs keep working: ids, inputs and outputs of all nodes against the snapshot in data/schema.json.

    python tests/test_schema.py --write     renews the snapshot, in the environment that runs the tests

It refuses to forget or rename anything that a saved graph may hold. A graph in API format finds inputs by their names,
one saved by the editor finds widgets by their places: so new inputs are optional, and stand last.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

SNAPSHOT = Path(__file__).parent / "data" / "schema.json"
FROM_DISK = {
    "file",
    "clip_file",
    "recognition_file",
    "resume",
    "begin_from",
}  # inputs whose options are files and runs of this machine
HOW = (
    "If this is meant, renew the snapshot: python tests/test_schema.py --write. Node ids, inputs and outputs must not "
    "be removed or renamed; new inputs are optional and stand last."
)


def described(nodes) -> dict:
    """What graphs and users rely on, by node id; inputs in the order that ComfyUI shows them: required ones first."""
    found = {}
    for node in nodes:
        schema = node.define_schema()
        inputs = collapsed([described_input(field) for field in schema.inputs])
        outputs = [
            {
                "name": output.display_name or output.id or output.get_io_type(),
                "type": output.get_io_type(),
                **({"list": True} if output.is_output_list else {}),
            }
            for output in schema.outputs
        ]
        found[schema.node_id] = {
            "display_name": schema.display_name,
            "inputs": sorted(inputs, key=lambda field: not field["required"]),
            "outputs": outputs,
        }
    return json.loads(json.dumps(found))


def described_input(field) -> dict:
    if hasattr(field, "template"):  # growing inputs
        return {
            "name": field.id,
            "type": field.template.input.get_io_type(),
            "required": not field.optional,
            "grows": field.template.prefix,
            "most": field.template.max,
        }
    row = {"name": field.id, "type": field.get_io_type(), "required": not field.optional}
    if field.extra_dict.get("advanced"):
        row["advanced"] = True
    if getattr(field, "default", None) is not None:
        row["default"] = field.default
    if getattr(field, "options", None) and field.id not in FROM_DISK:
        row["options"] = list(field.options)
    return row


def collapsed(inputs: list[dict]) -> list[dict]:
    """On ComfyUI without growing inputs they are many optional ones, 'rewards.reward0' and so on: shown as the growing
    input they stand for.
    """
    found = []
    for row in inputs:
        name, dot, single = row["name"].partition(".")
        if not dot:
            found.append(row)
        elif found and found[-1]["name"] == name:
            found[-1]["most"] += 1
        else:
            found.append(
                {"name": name, "type": row["type"], "required": True, "grows": re.sub(r"\d+$", "", single), "most": 1}
            )
    return found


def broken(old: dict, new: dict) -> list[str]:
    """What would break graphs saved with `old`, a sentence each."""
    found = []
    for node, before in old.items():
        if node not in new:
            found.append(f"{node} is gone")
            continue
        rows = {row["name"]: row for row in new[node]["inputs"]}
        names = [row["name"] for row in before["inputs"]]
        for row in before["inputs"]:
            now = rows.get(row["name"])
            if now is None:
                found.append(f"{node}: the input {row['name']} is gone")
                continue
            if (
                now["type"] != row["type"]
                or now.get("grows") != row.get("grows")
                or now.get("most", 0) < row.get("most", 0)
            ):
                found.append(f"{node}: the input {row['name']} is of another kind")
            if now["required"] and not row["required"]:
                found.append(f"{node}: the input {row['name']} was optional")
            found += [
                f"{node}: {row['name']} has no option '{option}' any more"
                for option in row.get("options", [])
                if option not in now.get("options", [])
            ]
        found += [
            f"{node}: the new input {name} is not optional"
            for name, row in rows.items()
            if name not in names and row["required"]
        ]
        if set(names) <= set(rows) and list(rows)[: len(names)] != names:
            found.append(f"{node}: the inputs are in another order")
        if [(row["name"], row["type"], row.get("list")) for row in new[node]["outputs"][: len(before["outputs"])]] != [
            (row["name"], row["type"], row.get("list")) for row in before["outputs"]
        ]:
            found.append(f"{node}: an output is gone, renamed, moved or of another type")
    return found


def text(nodes: dict) -> str:
    """As JSON with a line per input and output, so that a change is easy to see."""
    parts = []
    for node, entry in nodes.items():
        lists = ",\n".join(
            f'  "{key}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in entry[key]) + "\n  ]"
            for key in ("inputs", "outputs")
        )
        parts.append(f' "{node}": {{\n  "display_name": {json.dumps(entry["display_name"])},\n{lists}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def test_nodes_are_as_in_the_snapshot(pack):
    new = described(pack.nodes.NODES)
    old = json.loads(SNAPSHOT.read_text("utf-8")) if SNAPSHOT.is_file() else {}
    problems = broken(old, new)
    assert not problems, f"Saved graphs would break: {'; '.join(problems)}. {HOW}"
    if os.environ.get("TREERPO_WRITE_SCHEMA"):
        SNAPSHOT.write_text(text(new), "utf-8")
        return
    different = sorted(node for node in old.keys() | new.keys() if old.get(node) != new.get(node))
    assert not different, f"Not as in {SNAPSHOT.name}: {', '.join(different)}. {HOW}"


NODE = {
    "N": {
        "display_name": "N",
        "inputs": [
            {"name": "a", "type": "INT", "required": True, "default": 1},
            {"name": "b", "type": "COMBO", "required": False, "options": ["x", "y"]},
        ],
        "outputs": [{"name": "o", "type": "IMAGE"}, {"name": "p", "type": "INT"}],
    }
}


def changed(change) -> dict:
    copy = json.loads(json.dumps(NODE))
    change(copy["N"])
    return copy


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda n: n["inputs"].pop(0), "a is gone"),
        (lambda n: n["inputs"][0].update(name="c"), "a is gone"),
        (lambda n: n["inputs"][0].update(type="FLOAT"), "another kind"),
        (lambda n: n["inputs"][1].update(required=True), "was optional"),
        (lambda n: n["inputs"][1].update(options=["x"]), "no option 'y'"),
        (lambda n: n["inputs"].append({"name": "c", "type": "INT", "required": True}), "not optional"),
        (lambda n: n["inputs"].insert(1, {"name": "c", "type": "INT", "required": False}), "another order"),
        (lambda n: n["inputs"].reverse(), "another order"),
        (lambda n: n["outputs"].pop(), "an output is gone"),
        (lambda n: n["outputs"].reverse(), "an output is gone"),
        (lambda n: n["outputs"][0].update(name="q"), "an output is gone"),
    ],
)
def test_what_breaks_graphs_is_noticed(change, says):
    assert [problem for problem in broken(NODE, changed(change)) if says in problem]


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.update(display_name="M"),
        lambda n: n["inputs"][0].update(default=2),
        lambda n: n["inputs"][1].update(options=["z", "x", "y"]),
        lambda n: n["inputs"].append({"name": "c", "type": "INT", "required": False}),
        lambda n: n["outputs"].append({"name": "q", "type": "INT"}),
    ],
)
def test_what_breaks_no_graph_is_allowed(change):
    assert broken(NODE, changed(change)) == [] and broken({}, NODE) == []


def test_growing_inputs_look_the_same_on_comfyui_without_them():
    single = [{"name": f"rewards.reward{i}", "type": "R", "required": False} for i in range(3)]
    assert collapsed([*single, NODE["N"]["inputs"][0]]) == [
        {"name": "rewards", "type": "R", "required": True, "grows": "reward", "most": 3},
        NODE["N"]["inputs"][0],
    ]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    os.environ["TREERPO_WRITE_SCHEMA"] = "1"
    sys.exit(pytest.main([f"{__file__}::test_nodes_are_as_in_the_snapshot", "-q"]))
