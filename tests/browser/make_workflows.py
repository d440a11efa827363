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

GAP, PADDING, TITLE = 40, 30, 50
WIDTH = 340
WIDE = {
    "TreeRPOTreeView": 620,
    "TreeRPOTrainer": 640,
    "TreeRPOAdvantages": 560,
    "TreeRPOScore": 460,
    "ImageCompare": 420,
    "TreeRPOUpdate": 400,
    "TreeRPORegression": 400,
    "TreeRPOPick": 460,
    "PreviewImage": 560,
    "SaveImage": 400,
}
ROOM = {
    "TreeRPOTreeView": 420,
    "TreeRPOTrainer": 330,
    "TreeRPOAdvantages": 330,
    "TreeRPOScore": 400,
    "TreeRPOUpdate": 200,
    "TreeRPORegression": 200,
    "TreeRPONoise": 200,
    "TreeRPOPick": 420,
    "PreviewImage": 300,
    "SaveImage": 330,
    "ImageCompare": 420,
    "TreeRPOPrompts": 160,
    "TreeRPOPromptList": 200,
    "TreeRPOShape": 60,
    "TreeRPOLayerTuning": 200,
    "TreeRPOPreflight": 160,
}  # for pictures and texts that appear when the graph runs
BLUE, GREEN, ORANGE, PURPLE, GREY = "#3f789e", "#4a7a4a", "#a1663a", "#6f5a8f", "#555555"


TIDY = """() => {
    const nodes = app.graph._nodes, only = (node) => nodes.filter((other) => other.type === node.type).length === 1;
    for (const node of nodes) {
        if (node.type.startsWith("TreeRPO") && only(node) && !/[:+]/.test(node.title)) node.title = node.constructor.title ?? node.title;  // the node's own name, as artists search for it
        for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
    }
}"""


def stage(title: str, color: str, note: str, *columns: list[str]) -> dict:
    """A group: a note at its top, and columns of nodes by their titles in the API graph."""
    return {"title": title, "color": color, "note": note, "columns": columns}


FLUX_FILES = """**Files** as ComfyUI's own FLUX examples name them: `models/diffusion_models/flux1-dev.safetensors`, `models/text_encoders/t5xxl_fp16.safetensors` and
`clip_l.safetensors`, `models/vae/ae.safetensors`. Other names: choose yours in the loaders.

`fp8_e4m3fn` halves the model's memory; the LoRA on top always learns in float32."""
HPS_FILES = (
    """Rewards look for their weights in `models/rewards` (see the README); switch `download` on to fetch them."""
)
RUNS = """A run belongs to its **run_name** and lives in `output/treerpo/<run name>`. Queue again and it goes on, also after a restart. Another name begins anew."""
POLICY = f"""**Tree Policy** adds a LoRA that can learn. Your model itself is never changed. {RUNS}"""
BYPASS = """To use the LoRA on an fp8 or bf16 model, take *Load LoRA (Bypass, Model Only)*: exactly what was trained."""
TREE = """**Tree Shape** x **Depth Noise**: inside a window of steps each latent branches into several, with fresh noise. Images that share their beginning share the cost, and credit goes
to the step that earned it. Train at the size you sample at."""

GRAPHS = {
    "first_steps": [
        stage(
            "1  A tiny model",
            BLUE,
            "**Press Run.** No download needed: a tiny FLUX that draws shapes comes with TreeRPO. One run is one "
            "iteration, a second or two; **Run (Instant)** trains on and on. Watch the pictures: more and more are "
            "pastel, dotted and smiling, and show what the prompt asks for. That is what the reward likes.",
            ["Model", "Policy", "Prompts"],
        ),
        stage("2  Grow trees", GREEN, TREE, ["Sigmas", "Size", "Shape"], ["Noise", "Sampler"]),
        stage(
            "3  Score",
            ORANGE,
            "**Tiny Shapes Reward** is a taste: choose another. With a big model put HPSv2.1, ImageReward, your own "
            "server, or *Pick the Winner* here.",
            ["Decode", "Reward"],
            ["Score"],
        ),
        stage(
            "4  Learn",
            PURPLE,
            "**Tree Advantages** compares the images of each prompt and hands credit up the tree. **Tree "
            "Regression Update** learns to go where the better images are, and saves the run; *GRPO Update* is the "
            "papers' way. **Tree View**: click a leaf.",
            ["Advantages", "Tree View"],
            ["Update", "Save"],
        ),
    ],
    "flux_by_hand": [
        stage("1  FLUX.1-dev", BLUE, FLUX_FILES, ["FLUX.1-dev", "Text encoders", "VAE"]),
        stage("2  What learns, on which prompts", BLUE, POLICY, ["Policy", "Prompts"]),
        stage(
            "3  Grow a tree",
            GREEN,
            f"{TREE} 27 images per prompt here. Out of memory? Lower `micro_batch` in Tree Sampler and GRPO Update; "
            "the result stays the same.",
            ["Sigmas", "Size", "Shape"],
            ["Noise", "Sampler"],
        ),
        stage("4  Score", ORANGE, HPS_FILES, ["Decode", "HPSv2.1"], ["Score"]),
        stage(
            "5  Learn",
            PURPLE,
            "One Run is one iteration; **Run (Instant)** trains on. Expect to see a difference after some tens of "
            "iterations. **Tree View**: click a leaf.",
            ["Advantages", "Tree View"],
            ["Update", "Save"],
        ),
    ],
    "flux_trainer": [
        stage("1  FLUX.1-dev", BLUE, FLUX_FILES, ["FLUX.1-dev", "Text encoders", "VAE"]),
        stage(
            "2  What learns, on which prompts",
            BLUE,
            f"{POLICY} Four of the prompts are held out: they are never trained on and show whether it is still good.",
            ["Policy", "Prompts"],
        ),
        stage("3  How trees grow", GREEN, TREE, ["Sigmas", "Size", "Shape"], ["Noise"]),
        stage(
            "4  What is good",
            ORANGE,
            "HPSv2.1 is what the model learns to please. The **judge** is never trained on: if it falls while the "
            f"reward rises, the run pauses and says so. {HPS_FILES}",
            ["HPSv2.1", "Judge: ImageReward"],
        ),
        stage(
            "5  Train",
            PURPLE,
            "**100 iterations in one Run**, with a live picture. Stop whenever you like; the next Run goes on. **VRAM "
            "Preflight** estimates the memory first; `free_others` (advanced) moves text encoder and rewards off the "
            f"GPU while the model works. {BYPASS}",
            ["Preflight"],
            ["Trainer"],
            ["Dashboard", "Save"],
        ),
    ],
    "sd35_trainer": [
        stage(
            "1  SD3.5 medium",
            BLUE,
            "**Files**: `models/checkpoints/sd3.5_medium.safetensors`, `models/text_encoders/clip_l.safetensors`, "
            "`clip_g.safetensors`, `t5xxl_fp16.safetensors`.",
            ["SD3.5 medium", "Text encoders"],
        ),
        stage("2  What learns, on which prompts", BLUE, POLICY, ["Policy", "Prompts"]),
        stage(
            "3  How trees grow",
            GREEN,
            "TreeGRPO's setting: 10 steps, branching 3, depth 3 (27 images per prompt), random windows with ratio "
            "0.5, noise 0.7. It trains with CFG 4.5; here CFG is 1, which costs half and is safer.",
            ["Sigmas", "Size", "Shape"],
            ["Noise"],
        ),
        stage(
            "4  What is good",
            ORANGE,
            "TreeGRPO's reward: **0.8 HPSv2.1 + 0.2 CLIPScore**, each compared on its own scale within a prompt's "
            f"images. {HPS_FILES}",
            ["HPSv2.1", "CLIPScore"],
            ["0.8 HPSv2.1 + 0.2 CLIPScore", "Judge: ImageReward"],
        ),
        stage(
            "5  Train",
            PURPLE,
            "Learning rate 1e-4 for a LoRA (the paper trains all weights with 1e-5), weight decay 0.01. Stop whenever "
            f"you like; the next Run goes on. {BYPASS}",
            ["Trainer"],
            ["Dashboard", "Save"],
        ),
    ],
    "dynamic_treerpo": [
        stage("1  FLUX.1-dev", BLUE, FLUX_FILES, ["FLUX.1-dev", "Text encoders", "VAE"]),
        stage("2  What learns, on which prompts", BLUE, POLICY, ["Policy", "Prompts"]),
        stage(
            "3  How trees grow",
            GREEN,
            "Dynamic-TreeRPO: branching 2, depth 4 (16 images), a **sliding window**, and noise that **grows with the "
            "depth** (equation 6, beta). Beta, steps and the window's pace are not published: these are our values.",
            ["Sigmas", "Size", "Shape"],
            ["Noise"],
        ),
        stage("4  What is good", ORANGE, HPS_FILES, ["HPSv2.1", "Judge: ImageReward"]),
        stage(
            "5  LayerTuning-RL",
            ORANGE,
            "Adds a supervised term towards each prompt's best image to GRPO. Published: the term, its coefficient "
            "lambda, the best-path target. **Our reading**: the exact weights, "
            "and the formula of the dynamic clip range (`sensitivity`).",
            ["Objective"],
        ),
        stage("6  Train", PURPLE, "Stop whenever you like; the next Run goes on.", ["Trainer"], ["Dashboard", "Save"]),
    ],
    "trainer": [
        stage(
            "1  A tiny model",
            BLUE,
            "**No download needed**: see the whole Trainer work in some three minutes, then put your own loaders here.",
            ["Model", "Policy", "Prompts"],
        ),
        stage("2  How trees grow", GREEN, TREE, ["Sigmas", "Size", "Shape"], ["Noise", "Objective"]),
        stage(
            "3  What is good",
            ORANGE,
            "The reward is a taste: pastel, dotted, smiling, and what the prompt asks for. The **judge** is never "
            "trained on: if it falls while the reward rises, the run pauses and says so. **Training Objective**: Tree "
            "Regression learns fastest on this model; GRPO and LayerTuning-RL are the papers' ways.",
            ["Reward", "Judge"],
        ),
        stage("4  Train", PURPLE, f"{RUNS} Stop whenever you like.", ["Trainer"], ["Dashboard", "Save"]),
    ],
    "rank_images": [
        stage(
            "1  Your pictures",
            BLUE,
            "**No training here.** Copy a folder into ComfyUI's `input` folder and write its name. A `.txt` beside a "
            "picture is its prompt; without one the prompt written here counts.",
            ["Folder"],
        ),
        stage(
            "2  What is good",
            ORANGE,
            f"Any mix of rewards; each counts on its own scale. {HPS_FILES} Sharpness needs no file.",
            ["HPSv2.1", "ImageReward"],
            ["Sharpness", "Combine"],
        ),
        stage(
            "3  Ranked",
            PURPLE,
            "All pictures with their scores, best first, and the best four of each prompt.",
            ["Score"],
            ["Ranking", "Best"],
        ),
    ],
    "best_of_n": [
        stage(
            "1  Draw many",
            BLUE,
            "**No training here**: draw 16 images and keep the best four. Put your own model and sampler in.",
            ["Model", "Prompt", "Size"],
            ["Sample", "Decode"],
        ),
        stage(
            "2  Keep the best",
            PURPLE,
            "The same prompt goes into *Score Images*, for rewards that read it.",
            ["Reward", "Score"],
            ["Best", "Ranking"],
        ),
    ],
    "pick_the_winner": [
        stage("1  A tiny model", BLUE, f"**You are the reward.** {RUNS}", ["Model", "Policy", "Prompts"]),
        stage(
            "2  Grow a tree",
            GREEN,
            "Nine images of one prompt: one for each of the keys 1 to 9.",
            ["Sigmas", "Size", "Shape"],
            ["Noise", "Sampler"],
        ),
        stage(
            "3  Pick",
            ORANGE,
            "**First Run**: the nine images are shown, and nothing is trained. Press a key, or click; the answer is "
            "written into `picks`. **Second Run**: it learns from your pick, and the next Run shows new images. Mode "
            "*live* asks in the middle of a run instead. *Human Reward* does the same for the Trainer.",
            ["Decode"],
            ["Pick"],
        ),
        stage(
            "4  Learn",
            PURPLE,
            "Your picks are kept with the run, in `picks.jsonl`.",
            ["Advantages", "Tree View"],
            ["Update", "Save"],
        ),
    ],
    "compare": [
        stage(
            "1  Model and LoRA",
            BLUE,
            "Run **first_steps** some times before: it saves the LoRA `treerpo-shapes-flux`. Put your own loaders, "
            "LoRA and prompts here.",
            ["Model", "LoRA", "Reward"],
            ["Held-out prompts", "Size"],
        ),
        stage(
            "2  The same noise, without and with",
            GREEN,
            "Both samplers have the same seed: what differs comes from the LoRA. With an **fp8 or bf16** model of your "
            "own, put *Load LoRA (Bypass, Model Only)* here: it gives exactly what was trained, *Load LoRA* rounds.",
            ["Sample before", "Decode before"],
            ["Sample after", "Decode after"],
        ),
        stage(
            "3  Before and after",
            PURPLE,
            "The sheets show each picture with its score. With Nodes 2.0 you can slide over *Compare* (ComfyUI has no "
            "classic form of that node).",
            ["Compare"],
            ["Score before", "Before"],
            ["Score after", "After"],
        ),
    ],
}


def arranged(graph: dict, stages: list[dict], titles: dict[int, str], low: dict[int, list[float]]) -> dict:
    """The graph with places, notes and groups.

    titles: API title by node id; low: the page's own smallest size of each node.
    """
    by_title = {titles[node["id"]]: node for node in graph["nodes"]}
    placed, x, groups, notes, number = set(), 0, [], [], max(by_id["id"] for by_id in graph["nodes"]) + 1
    for part in stages:
        left, tops = x + PADDING, []
        widths = [max(WIDE.get(by_title[title]["type"], WIDTH) for title in column) for column in part["columns"]]
        inner = sum(widths) + GAP * (len(widths) - 1)
        note_height = 60 + 22 * sum(max(1, -(-len(line) * 7.4 // (inner - 40))) for line in part["note"].splitlines())
        note = {
            "id": number,
            "type": "MarkdownNote",
            "title": "About",
            "pos": [left, TITLE + 30],
            "size": [inner, note_height],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [part["note"].replace("\n", " ").replace("  ", "\n\n")],
            "color": "#332",
            "bgcolor": "#222",
        }
        notes.append(note)
        number += 1
        for column, width in zip(part["columns"], widths):
            y = TITLE + 30 + note_height + GAP + 30
            for title in column:
                node = by_title[title]
                height = max(low[node["id"]][1] + 30, low[node["id"]][1] + ROOM.get(node["type"], 0))
                node["pos"], node["size"] = [left, y], [width, height]
                placed.add(title)
                y += height + GAP + 30
            tops.append(y)
            left += width + GAP
        groups.append(
            {
                "id": len(groups) + 1,
                "title": part["title"],
                "bounding": [x, 0, inner + 2 * PADDING, max(tops)],
                "color": part["color"],
                "font_size": 28,
                "flags": {},
            }
        )
        x += inner + 2 * PADDING + GAP
    missing = set(by_title) - placed
    if missing:
        raise SystemExit(f"no place for {', '.join(sorted(missing))}")
    tallest = max(group["bounding"][3] for group in groups)
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
    low = {
        int(number): size
        for number, size in page.evaluate(
            "() => Object.fromEntries(app.graph._nodes.map(n => [n.id, Array.from(n.computeSize())]))"
        ).items()
    }
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
