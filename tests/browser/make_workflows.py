"""Draws the drag-and-drop graphs: workflows/<name>.json, from workflows/api/<name>.json and the texts below; and the
blueprint in subgraphs/.

    python tests/browser/make_workflows.py [name ...] --comfyui PATH

Run it after a node's inputs have changed. The graph is made and saved by ComfyUI's own page in Chromium; here it only
gets its places, its groups and its notes. Needs playwright and a chromium.
"""

import argparse
import json
from pathlib import Path

from page import ROOT, Page

MOST = (1900, 1000)  # pixels of a graph: readable when it is opened
GAP, PADDING, TITLE, HEAD = 10, 14, 42, 30  # between nodes, inside a group, its title, a node's title bar
WIDTH = 330
WIDE = {"TreeRPOTrainer": 420, "TreeRPOSimple": 400, "TreeRPOTeach": 400, "TreeRPOPick": 370}
ROOM = {
    "TreeRPOTreeView": 190,
    "TreeRPOTrainer": 200,
    "TreeRPOSimple": 300,
    "TreeRPOTeach": 300,
    "TreeRPOAdvantages": 180,
    "TreeRPOScore": 200,
    "TreeRPOUpdate": 70,
    "TreeRPORegression": 70,
    "TreeRPONoise": 70,
    "TreeRPOPick": 175,
    "PreviewImage": 260,
    "SaveImage": 260,
    "TreeRPOPrompts": 60,
    "TreeRPOPromptList": 30,
    "TreeRPOShape": 0,
    "TreeRPOLayerTuning": 130,
    "TreeRPOPreflight": 80,
}  # for pictures and texts that appear when the graph runs
FOLDED = {("SaveImage", "Before"), ("SaveImage", "After")}  # what they show is shown already
BLUE, GREEN, ORANGE, PURPLE, GREY = "#3f789e", "#4a7a4a", "#a1663a", "#6f5a8f", "#555555"


TIDY = """() => {
    const nodes = app.graph._nodes, only = (node) => nodes.filter((other) => other.type === node.type).length === 1;
    for (const node of nodes) {
        if (node.type.startsWith("TreeRPO") && only(node) && !/[:+]/.test(node.title)) node.title = node.constructor.title ?? node.title;  // the node's own name, as artists search for it
        for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
    }
}"""


LOWEST = "() => Object.fromEntries(app.graph._nodes.map(n => [n.id, Array.from(n.computeSize())]))"
# Nodes 2.0 need more: the height of each without its title, drawn as low as it goes, and with its foot
LOWEST_2 = """async () => {
    for (const node of app.graph._nodes) node.setSize([340, 10]);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
    await new Promise((done) => setTimeout(done, 1500));
    const drawn = (node) => document.querySelector(`[data-node-id="${node.id}"]`)?.offsetHeight ?? 40;
    const foot = (node) => node.widgets?.some((widget) => widget.options?.advanced) ? 26 : 0;
    return Object.fromEntries(app.graph._nodes.map((node) => [node.id, drawn(node) - 30 + foot(node)]));
}"""


def stage(title: str, color: str, note: str, *columns: list[str], width: int = WIDTH) -> dict:
    """A group: a note at its top, and columns of nodes by their titles in the API graph."""
    return {"title": title, "color": color, "note": note, "columns": columns, "width": width}


FLUX_FILES = (
    """Files as ComfyUI's FLUX examples name them. Other names: choose yours. **fp8_e4m3fn** halves the memory."""
)
HPS_FILES = """Weights go to `models/rewards`; `download` fetches them."""
RUNS = """Queue again and the run goes on, also after a restart. Another **run_name** begins anew."""
JUDGE = """The **judge** is never trained on: if it falls while the reward rises, the run pauses."""
BYPASS = """On an fp8 or bf16 model load the LoRA with *Load LoRA (Bypass, Model Only)*: exactly what was trained."""
VISION = """**CLIP Vision** sees your pictures: any file of `models/clip_vision`. No reward weights are needed."""
TEACH = """It asks about each prompt of an iteration: **1** to **4** = the best, **N** = none, **S** = skip, **U** = undo.
Stop whenever you like; Run goes on. Every pick is kept."""

GRAPHS = {
    "start_here": [
        stage(
            "START: press Run",
            BLUE,
            "One to two minutes, nothing to download. A tiny FLUX learns a **taste**: pastel, dotted, smiling. Press "
            "Run again and it learns on. For another taste take another lora_name.",
            ["Model", "Taste", "Judge"],
        ),
        stage(
            "Train",
            PURPLE,
            "Model, prompts and a reward in, a LoRA out. Put your own loaders here.",
            ["Train"],
        ),
        stage(
            "Draw",
            GREEN,
            "The same noise without and with the LoRA, for prompts it was not trained on.",
            ["Held-out prompts", "Size", "Decode before", "Decode after"],
            ["Sample before", "Sample after"],
        ),
        stage("Before and after", ORANGE, "", ["Before", "After"]),
    ],
    "teach_my_taste": [
        stage(
            "START: press Run, then pick",
            BLUE,
            "Nothing to download. It asks which picture you like best: click it, or press 1 to 4. **N** = none of "
            "these, **S** = skip, **U** = undo. It learns in between.",
            ["Model", "Follow the prompt"],
        ),
        stage(
            "Teach",
            PURPLE,
            "Decide for a look and stay with it: pastel, framed, smiling ... Thirty picks are enough for a start.",
            ["Teach"],
        ),
        stage("Draw with your LoRA", GREEN, "", ["Held-out prompts", "Size", "Sample", "Decode"]),
        stage("Your taste", ORANGE, "", ["Pictures"]),
    ],
    "flux_teach": [
        stage("START: FLUX.1-dev", BLUE, FLUX_FILES, ["FLUX.1-dev", "Text encoders", "VAE", "CLIP Vision"]),
        stage("Teach: press Run, then pick", PURPLE, TEACH, ["Teach"]),
        stage("Result", ORANGE, "", ["Dashboard"]),
    ],
    "sd35_teach": [
        stage("START: SD3.5 medium", BLUE, VISION, ["SD3.5 medium", "Text encoders", "CLIP Vision"]),
        stage("Teach: press Run, then pick", PURPLE, TEACH, ["Teach"]),
        stage("Result", ORANGE, "", ["Dashboard"]),
    ],
    "gamed_reward": [
        stage(
            "START: press Run",
            BLUE,
            "An example of a reward that is **gamed**: *as large as possible*. The shapes grow, and get ugly: better by "
            "number, worse by eye. The **judge**, which is not trained on, sees it: the run pauses and says so.",
            ["Model", "Size of the shape", "Judge"],
        ),
        stage("Train", PURPLE, "It pauses after some thirty iterations, a minute or less.", ["Train"]),
        stage("Result", ORANGE, "", ["Dashboard"]),
    ],
    "first_steps": [
        stage(
            "START: press Run",
            BLUE,
            "One Run is one iteration, a second or two; they add up. **Run (Instant)** trains on and on. Watch the "
            "pictures: pastel, dotted, smiling, as the reward likes.",
            ["Model", "Policy", "Prompts"],
        ),
        stage("Grow trees", GREEN, "", ["Sigmas", "Size", "Shape", "Noise"]),
        stage("Draw and judge", ORANGE, "Choose another taste in the reward.", ["Sampler", "Decode", "Reward"]),
        stage("Score", ORANGE, "Credit goes up the tree, to the step that earned it.", ["Score", "Advantages"]),
        stage("Learn", PURPLE, "", ["Tree View", "Update", "Save"]),
    ],
    "flux_by_hand": [
        stage(
            "START: FLUX.1-dev",
            BLUE,
            f"{FLUX_FILES} One Run is one iteration.",
            ["FLUX.1-dev", "Text encoders", "VAE", "Policy"],
        ),
        stage("Prompts and trees", GREEN, "", ["Prompts", "Sigmas", "Size", "Shape"]),
        stage(
            "Draw and judge",
            ORANGE,
            "",
            ["Noise", "Sampler", "Decode", "HPSv2.1"],
        ),
        stage("Score", ORANGE, "Credit goes up the tree, to the step that earned it.", ["Score", "Advantages"]),
        stage(
            "Learn",
            PURPLE,
            "",
            ["Tree View", "Update", "Save"],
        ),
    ],
    "flux_trainer": [
        stage("START: FLUX.1-dev", BLUE, FLUX_FILES, ["FLUX.1-dev", "Text encoders", "VAE", "Policy"]),
        stage("Prompts and trees", GREEN, "", ["Prompts", "Sigmas", "Size", "Shape"]),
        stage("What is good", ORANGE, f"{JUDGE} {HPS_FILES}", ["HPSv2.1", "Judge: ImageReward", "Noise"]),
        stage("Train: press Run", PURPLE, f"100 iterations. Stop whenever you like. {RUNS}", ["Trainer"]),
        stage("Result", PURPLE, "", ["Dashboard", "Save", "Preflight"], width=280),
    ],
    "flux_text": [
        stage("START: FLUX.1-dev", BLUE, FLUX_FILES, ["FLUX.1-dev", "Text encoders", "VAE", "Policy"]),
        stage("Prompts and trees", GREEN, "", ["Prompts", "Sigmas", "Size", "Shape"]),
        stage(
            "What is good",
            ORANGE,
            f"**OCR** looks for the text in quotes: `pip install rapidocr onnxruntime`, no download. {JUDGE}",
            ["OCR", "Judge: ImageReward", "Noise"],
        ),
        stage("Train: press Run", PURPLE, f"100 iterations. Stop whenever you like. {RUNS}", ["Trainer"]),
        stage("Result", PURPLE, "", ["Dashboard", "Save", "Preflight"], width=280),
    ],
    "sd35_trainer": [
        stage(
            "START: SD3.5 medium",
            BLUE,
            "",
            ["SD3.5 medium", "Text encoders", "Policy", "Prompts"],
        ),
        stage("Trees", GREEN, "", ["Sigmas", "Size", "Shape", "Noise"]),
        stage(
            "What is good",
            ORANGE,
            "",
            ["HPSv2.1", "CLIPScore", "0.8 HPSv2.1 + 0.2 CLIPScore", "Judge: ImageReward", "Negative"],
        ),
        stage(
            "Train: press Run",
            PURPLE,
            "CFG 4.5, as TreeGRPO trains: SD3.5 draws badly without. CFG 1 costs half.",
            ["Trainer"],
        ),
        stage("Result", PURPLE, BYPASS, ["Dashboard", "Save"], width=280),
    ],
    "dynamic_treerpo": [
        stage("START: FLUX.1-dev", BLUE, FLUX_FILES, ["FLUX.1-dev", "Text encoders", "VAE", "Policy"]),
        stage(
            "Prompts and trees",
            GREEN,
            "",
            ["Prompts", "Sigmas", "Size", "Shape"],
        ),
        stage(
            "What is good",
            ORANGE,
            "",
            ["HPSv2.1", "Judge: ImageReward", "Noise", "Objective"],
        ),
        stage(
            "Train: press Run",
            PURPLE,
            "Sliding window, noise that grows with depth, **LayerTuning-RL**: beta, pace and exact weights are our "
            "reading of the paper.",
            ["Trainer"],
        ),
        stage("Result", PURPLE, BYPASS, ["Dashboard", "Save"], width=280),
    ],
    "trainer": [
        stage(
            "START: press Run",
            BLUE,
            "No download: the whole Trainer in some two to three minutes. Then put your own loaders here.",
            ["Model", "Policy", "Prompts"],
        ),
        stage("Trees", GREEN, "", ["Sigmas", "Size", "Shape", "Noise"]),
        stage("What is good", ORANGE, f"A taste. {JUDGE}", ["Reward", "Judge", "Objective"]),
        stage("Train", PURPLE, f"Stop whenever you like. {RUNS}", ["Trainer"]),
        stage("Result", PURPLE, "Draw with the LoRA in the graph *compare*.", ["Dashboard", "Save"], width=280),
    ],
    "rank_images": [
        stage(
            "START: your pictures",
            BLUE,
            "**No training.** Copy a folder into ComfyUI's `input` folder and write its name. A `.txt` beside a "
            "picture is its prompt.",
            ["Folder"],
        ),
        stage(
            "What is good",
            ORANGE,
            f"Any mix of rewards. {HPS_FILES}",
            ["HPSv2.1", "ImageReward", "Sharpness", "Combine"],
        ),
        stage("Score", PURPLE, "All pictures with their scores, best first.", ["Score"]),
        stage("Ranked", PURPLE, "All, and the best four of each prompt.", ["Ranking", "Best"]),
    ],
    "best_of_n": [
        stage(
            "START: draw many",
            BLUE,
            "**No training**: draw 16 images and keep the best four. Put your own model here.",
            ["Model", "Prompt", "Size"],
        ),
        stage("Draw", GREEN, "Any sampler will do.", ["Sample", "Decode", "Reward"]),
        stage("Score", PURPLE, "The prompt goes in too, for rewards that read it.", ["Score"]),
        stage("Keep the best", PURPLE, "The best four, and all of them in order.", ["Best", "Ranking"]),
    ],
    "pick_the_winner": [
        stage(
            "START: press Run",
            BLUE,
            "**You are the reward.** The first Run shows nine images: press a key from 1 to 9, or click. The next Run "
            "learns from it and asks again.",
            ["Model", "Policy", "Prompts"],
        ),
        stage("Trees", GREEN, "", ["Sigmas", "Size", "Shape", "Noise"]),
        stage(
            "Draw",
            GREEN,
            "Nine images of one prompt. Click a leaf in *Tree View*. Picks are kept in `picks.jsonl`.",
            ["Sampler", "Decode"],
        ),
        stage("Pick", ORANGE, "", ["Pick", "Advantages"]),
        stage("Learn", PURPLE, "", ["Tree View", "Update", "Save"]),
    ],
    "compare": [
        stage(
            "START: model and LoRA",
            BLUE,
            "Run **first_steps** some times before: it saves this LoRA. Put your own model, LoRA and prompts here.",
            ["Model", "LoRA", "Reward"],
        ),
        stage(
            "Draw",
            GREEN,
            "The same seed: what differs comes from the LoRA. With an fp8 or bf16 model of your own take *Load LoRA "
            "(Bypass, Model Only)*: exactly what was trained.",
            ["Held-out prompts", "Size", "Decode before", "Decode after"],
            ["Sample before", "Sample after"],
        ),
        stage(
            "Before and after",
            ORANGE,
            "The number is the reward of each picture.",
            ["Score before", "Before"],
            ["Score after", "After"],
        ),
    ],
}

FAMILIES = {  # other flow models: what their first group holds
    "z_image": ("Z-Image", ["Z-Image", "Text encoder", "VAE", "Shift"]),
    "flux2_klein": ("FLUX.2 klein", ["FLUX.2 klein base", "Text encoder", "VAE"]),
    "qwen_image": ("Qwen-Image", ["Qwen-Image", "Text encoder", "VAE", "Shift"]),
}
NOT_MEASURED = (
    """Files as ComfyUI's own template names them. Tested on a tiny network of this kind, not on these weights yet."""
)
for name, (title, loaders) in FAMILIES.items():
    GRAPHS[f"{name}_teach"] = [
        stage(f"START: {title}", BLUE, f"{NOT_MEASURED} {VISION}", [*loaders, "CLIP Vision"]),
        stage("Teach: press Run, then pick", PURPLE, TEACH, ["Teach"]),
        stage("Result", ORANGE, "", ["Dashboard"]),
    ]
    GRAPHS[f"{name}_simple"] = [
        stage(f"START: {title}", BLUE, f"{NOT_MEASURED} {HPS_FILES}", [*loaders, "HPSv2.1"]),
        stage("Train: press Run", PURPLE, "Stop whenever you like; the LoRA is saved, and Run goes on.", ["Train"]),
        stage("Result", ORANGE, "", ["Dashboard"]),
    ]


def arranged(graph: dict, stages: list[dict], titles: dict[int, str], low: dict[int, list[float]]) -> dict:
    """The graph with places, notes and groups.

    titles: API title by node id; low: the page's own smallest size of each node.
    """
    by_title = {titles[node["id"]]: node for node in graph["nodes"]}
    placed, x, groups, notes, number = set(), 0, [], [], max(by_id["id"] for by_id in graph["nodes"]) + 1
    for part in stages:
        left, tops = x + PADDING, []
        widths = [
            max(WIDE.get(by_title[title]["type"], part["width"]) for title in column) for column in part["columns"]
        ]
        inner = sum(widths) + GAP * (len(widths) - 1)
        top = TITLE + HEAD
        if part["note"]:
            lines = -(-len(part["note"]) * 6.9 // (inner - 36))
            note_height = max(90, 44 + 19 * lines)  # a note is never smaller than 90 pixels
            notes.append(
                {
                    "id": number,
                    "type": "MarkdownNote",
                    "title": "About",
                    "pos": [left, top],
                    "size": [inner, note_height],
                    "flags": {},
                    "order": 0,
                    "mode": 0,
                    "inputs": [],
                    "outputs": [],
                    "properties": {},
                    "widgets_values": [part["note"]],
                    "color": "#332",
                    "bgcolor": "#222",
                }
            )
            number += 1
            top += note_height + GAP + HEAD
        for column, width in zip(part["columns"], widths):
            y = top
            for title in column:
                node = by_title[title]
                folded = (node["type"], title) in FOLDED
                height = low[node["id"]][1] + (0 if folded else ROOM.get(node["type"], 0))
                if folded:
                    node["flags"]["collapsed"] = True
                node["pos"], node["size"] = [left, y], [width, height]
                placed.add(title)
                y += (0 if folded else height) + GAP + HEAD
            tops.append(y - HEAD)
            left += width + GAP
        groups.append(
            {
                "id": len(groups) + 1,
                "title": part["title"],
                "bounding": [x, 0, inner + 2 * PADDING, max(tops)],
                "color": part["color"],
                "font_size": 26,
                "flags": {},
            }
        )
        x += inner + 2 * PADDING + GAP
    missing = set(by_title) - placed
    if missing:
        raise SystemExit(f"no place for {', '.join(sorted(missing))}")
    tallest = max(group["bounding"][3] for group in groups)
    if x - GAP > MOST[0] or tallest > MOST[1]:
        print(
            f"{stages[0]['title']}: too large, {x - GAP:.0f} x {tallest:.0f}",
            [round(group["bounding"][3]) for group in groups],
        )
    for group in groups:
        group["bounding"][3] = tallest
    graph["nodes"] += notes
    graph["groups"] = groups
    graph["last_node_id"] = number
    return graph


def make(page: Page, name: str) -> None:
    api = json.loads((ROOT / "workflows/api" / f"{name}.json").read_text("utf-8"))
    page.reload()  # a second graph in the same page may take over widgets of the first
    page.load_api(api, name)
    low = {int(number): size for number, size in page.evaluate(LOWEST).items()}
    page.nodes2(True)
    for number, height in page.evaluate(LOWEST_2).items():
        low[int(number)][1] = max(low[int(number)][1], height)
    page.nodes2(False)
    titles = {int(number): node["_meta"]["title"] for number, node in api.items()}
    page.evaluate(TIDY)
    graph = arranged(
        json.loads(page.evaluate("() => JSON.stringify(app.graph.serialize())")), GRAPHS[name], titles, low
    )
    page.load_graph(graph, name)
    kept = json.loads(page.evaluate("() => JSON.stringify(app.graph.serialize())"))
    for node in kept["nodes"]:
        node.pop("order", None)
        node["properties"] = {key: value for key, value in node["properties"].items() if key == "Node name for S&R"}
    kept["extra"] = {}
    (ROOT / "workflows" / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")


BLUEPRINT = """(name) => {
    const one = (type) => app.graph._nodes.find((node) => node.type === type);
    const inside = ["TreeRPOSampler", "VAEDecode", "TreeRPOScore", "TreeRPOAdvantages", "TreeRPORegression"].map(one);
    const outlets = [["TreeRPOScore", "sheet"], ["TreeRPOAdvantages", "picture"], ["TreeRPORegression", "curve"]];
    for (const [type, slot] of outlets) {  // what is connected to the outside becomes an output
        const preview = LiteGraph.createNode("PreviewImage");
        app.graph.add(preview);
        one(type).connect(one(type).findOutputSlot(slot), preview, 0);
    }
    const { subgraph, node } = app.graph.convertToSubgraph(new Set(inside));
    const update = subgraph._nodes.find((one) => one.type === "TreeRPORegression");
    update.widgets.find((widget) => widget.name === "learning_rate").value = 3e-4;  // for a model of true size
    subgraph.addInput("learning_rate", "FLOAT").connect(update.inputs.find((input) => input.name === "learning_rate"), update);
    subgraph.name = node.title = name;
    const graph = app.graph.serialize();
    const kept = graph.nodes.find((other) => other.type === subgraph.id);
    for (const input of kept.inputs) input.link = null;
    for (const output of kept.outputs) output.links = [];
    return JSON.stringify({ revision: 0, last_node_id: kept.id, last_link_id: 0, nodes: [{ ...kept, pos: [0, 0], size: [300, 320], order: 0 }], links: [], version: 0.4,
                            definitions: { subgraphs: graph.definitions.subgraphs }, extra: {} });
}"""


def make_blueprint(page: Page, name: str = "Tree iteration") -> None:
    """subgraphs/<name>.json: sample, decode, score, advantages and update of first_steps as one node."""
    page.reload()
    page.load_graph(json.loads((ROOT / "workflows/first_steps.json").read_text("utf-8")))
    graph = json.loads(page.evaluate(BLUEPRINT, name))
    graph["definitions"]["subgraphs"][0] |= {
        "category": "TreeRPO",
        "description": "Tree sample, score, update: one iteration of online RL as one node. Connect a policy, prompts "
        "and a reward, "
        "and queue it again and again.",
    }
    (ROOT / "subgraphs").mkdir(exist_ok=True)
    (ROOT / "subgraphs" / f"{name}.json").write_text(json.dumps(graph, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--comfyui", type=Path)
    options = parser.parse_args()
    with Page(options.comfyui) as page:
        for name in options.names or GRAPHS:
            make(page, name)
        make_blueprint(page)


if __name__ == "__main__":
    main()
