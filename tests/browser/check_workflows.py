"""Every shipped graph as an artist meets it: opened from the template browser, looked through, queued from the page,
finished.

    python tests/browser/check_workflows.py [name ...] --comfyui PATH [--pictures FOLDER] [--nodes2] [--thumbnails]
        [--whole]

The big models and the reward models' weights are not here: loaders are replaced, in the page, by the tiny model that
comes with the pack, and tiny random weights lie under the official names; sizes and iterations are made small.
Screenshots of the finished graphs go to FOLDER. --nodes2: with Nodes 2.0. Needs playwright and a chromium.
"""

import argparse
import io
import json
import sys
from pathlib import Path

from page import ROOT, Page, Problem
from PIL import Image, ImageDraw, ImageOps

sys.path[:0] = [str(ROOT / "tests")]
# all text drawn, nothing over the graph
LOOKS = {"Comfy.Minimap.Visible": False, "LiteGraph.Canvas.MinFontSizeForLOD": 0, "Comfy.Graph.CanvasInfo": False}

SUBSTITUTE = """(kind) => {
    // loaders of big models -> the tiny model's outputs: [output of the loader, output of the tiny model]
    const loaders = {UNETLoader: [[0, 0]], CLIPLoader: [[0, 1]], DualCLIPLoader: [[0, 1]], CLIPVisionLoader: [], TripleCLIPLoader: [[0, 1]], VAELoader: [[0, 2]], CheckpointLoaderSimple: [[0, 0], [2, 2]]};
    const found = app.graph._nodes.filter(node => node.type in loaders);
    if (!found.length) return 0;
    const tiny = LiteGraph.createNode("TreeRPOTinyModel");
    app.graph.add(tiny);
    tiny.pos = [...found[0].pos];
    tiny.widgets.find(widget => widget.name === "model").value = kind;
    for (const node of found) {
        for (const [from, to] of loaders[node.type])
            for (const link of [...(node.outputs[from]?.links ?? [])]) {
                const wire = app.graph.links.get?.(link) ?? app.graph.links[link];
                tiny.connect(to, app.graph.getNodeById(wire.target_id), wire.target_slot);
            }
        app.graph.remove(node);
    }
    return found.length;
}"""
SMALL = """(changes) => {
    for (const node of app.graph._nodes)
        for (const widget of node.widgets ?? [])
            if (`${node.type}.${widget.name}` in changes) widget.value = changes[`${node.type}.${widget.name}`];
}"""
CHANGES = {
    **{
        f"{node}.text": "a red circle on a white background\na blue square on a black background\na green triangle on "
        "a gray background\na yellow cross on a black background\n"
        "a cyan circle on a gray background\nan orange square on a white background\na purple triangle on a black "
        "background\na pink cross on a white background"
        for node in ("TreeRPOPrompts", "TreeRPOPromptList")
    },
    "TreeRPOTeach.prompts": "a red circle on a white background\na blue square on a black background",
    "TreeRPOTeach.questions": 3,
    "TreeRPOTeach.settle": 1,
    "TreeRPOSimple.iterations": 3,
    "EmptySD3LatentImage.width": 64,
    "EmptySD3LatentImage.height": 64,
    "TreeRPOTrainer.iterations": 3,
    "TreeRPOTrainer.evaluate_every": 3,
    "TreeRPOPolicy.checkpointing": False,
    "TreeRPOPolicy.targets": "attention+mlp",
    "TreeRPOTrainer.learning_rate": 5e-4,
}
WRITTEN = {
    "TreeRPOPromptList.text": "\n".join(
        f'a {shape} on a white background "{letter}"'
        for shape, letter in (("red circle", "O"), ("blue circle", "o"), ("green cross", "X"), ("pink cross", "x"))
    )
}  # for OCR: what the tiny model draws, as letters
# a person who always takes the first picture
PICKS = """() => {
    window.treerpoPicks ??= setInterval(() => document.querySelector(".treerpo-dialog .grid button")?.click(), 250);
}"""
FAULTS = """() => {
    const faults = [];
    for (const node of app.graph._nodes) {
        if (!(node.type in LiteGraph.registered_node_types) && !["MarkdownNote", "Note"].includes(node.type)) faults.push(`no node ${node.type}`);
        for (const input of node.inputs ?? [])
            if (input.link != null && !(app.graph.links.get?.(input.link) ?? app.graph.links[input.link])) faults.push(`${node.type}.${input.name}: broken link`);
    }
    return faults;
}"""

# titles of the nodes that show a picture, one for each picture that is seen
SHOWING = """() => app.graph._nodes.filter((node) => !node.flags?.collapsed).flatMap((node) => {
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`);
    const seen = drawn ? [...drawn.querySelectorAll("img")].filter((one) => one.checkVisibility()) : node.imgs ?? [];
    return seen.map((one) => [node.title, one.src]);
})"""

# nodes that cover one another, or leave their group: as they are drawn, in pixels of the graph
CROWDED = """() => {
    const scale = app.canvas.ds.scale, title = LiteGraph.NODE_TITLE_HEIGHT, most = 2, found = [];
    const boxes = app.graph._nodes.map((node) => {
        const seen = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect(), [x, y] = node.pos;
        const folded = node.flags?.collapsed, top = y - title;
        const wide = seen ? seen.width / scale : folded ? node._collapsed_width ?? 80 : node.size[0];
        const high = seen ? seen.height / scale : title + (folded ? 0 : node.size[1]);
        return { name: node.title, x, y: top, right: x + wide, bottom: top + high };
    });
    boxes.forEach((one, index) => {
        for (const other of boxes.slice(index + 1)) {
            const wide = Math.min(one.right, other.right) - Math.max(one.x, other.x);
            const high = Math.min(one.bottom, other.bottom) - Math.max(one.y, other.y);
            const by = [wide, high].map(Math.round);
            if (wide > most && high > most) found.push(`${one.name} covers ${other.name} by ${by.join(" x ")}`);
        }
        const home = app.graph._groups.find(({ pos, size }) => one.x >= pos[0] && one.x < pos[0] + size[0]);
        const over = home ? [one.right, one.bottom].map((end, i) => end - home.pos[i] - home.size[i]) : [0];
        const out = Math.max(...over);
        if (out > most) found.push(`${one.name} leaves its group by ${Math.round(out)}`);
    });
    return found;
}"""

AREA = """() => {
    const { scale, offset } = app.canvas.ds, room = app.canvas.canvas.getBoundingClientRect(), boxes = app.graph._groups.map((group) => [...group.pos, ...group.size]);
    const at = (x, y) => [(x + offset[0]) * scale + room.left, (y + offset[1]) * scale + room.top];
    return [...at(Math.min(...boxes.map((box) => box[0])), Math.min(...boxes.map((box) => box[1]))),
            ...at(Math.max(...boxes.map((box) => box[0] + box[2])), Math.max(...boxes.map((box) => box[1] + box[3])))];
}"""
# whose pictures go on the card: before and after where there are two
OUTCOMES = ["TreeRPOTrainer", "TreeRPOSimple", "TreeRPOPick", "TreeRPOAdvantages", "TreeRPOScore"]
SHOWN = """(types) => {
    for (const type of types) {
        const nodes = app.graph._nodes.filter((one) => one.type === type);
        const shown = nodes.map((node) => app.nodeOutputs[node.id]?.images?.[0]).filter((image) => image);
        if (shown.length) return shown.slice(0, 2);
    }
    return [];
}"""
CARDS = {
    "first_steps": ("First steps", "A tiny FLUX learns in seconds. No download."),
    "trainer": ("Trainer on the tiny model", "A whole run in one node. No download."),
    "flux_by_hand": ("FLUX.1-dev by hand", "Every stage of tree RL as a node of its own"),
    "flux_trainer": ("FLUX.1-dev Trainer", "HPSv2.1 as reward, ImageReward as judge"),
    "flux_text": ("Teach FLUX.1-dev to write", "OCR scores the text in quotes, letter by letter"),
    "sd35_trainer": ("SD3.5 medium Trainer", "TreeGRPO: 0.8 HPSv2.1 + 0.2 CLIPScore"),
    "dynamic_treerpo": ("Dynamic-TreeRPO", "Sliding window, deeper noise, LayerTuning-RL"),
    "rank_images": ("Rank a folder of pictures", "Any mix of rewards, no training"),
    "best_of_n": ("Best of 16", "Draw many, keep the best. No training."),
    "pick_the_winner": ("Pick the winner", "Your own taste as the reward"),
    "teach_my_taste": ("Teach my taste", "You pick, it learns. No download."),
    "flux_teach": ("Teach FLUX.1-dev", "You pick, it learns (shown: the tiny model)"),
    "sd35_teach": ("Teach SD3.5", "You pick, it learns (shown: the tiny model)"),
    "z_image_teach": ("Teach Z-Image", "You pick, it learns (shown: the tiny model)"),
    "z_image_simple": ("Train Z-Image", "A reward in, a LoRA out (shown: the tiny model)"),
    "flux2_klein_teach": ("Teach FLUX.2 klein", "You pick, it learns (shown: the tiny model)"),
    "flux2_klein_simple": ("Train FLUX.2 klein", "A reward in, a LoRA out (shown: the tiny model)"),
    "qwen_image_teach": ("Teach Qwen-Image", "You pick, it learns (shown: the tiny model)"),
    "qwen_image_simple": ("Train Qwen-Image", "A reward in, a LoRA out (shown: the tiny model)"),
    "gamed_reward": ("A gamed reward", "Better by number, worse by eye. No download."),
    "start_here": ("Start here", "Press Run: a LoRA, and before and after"),
    "compare": ("Compare", "Without and with the LoRA, same noise"),
}


def prepare(base: Path) -> None:
    """Tiny weights under the official names, and pictures to rank."""
    from golden import inputs, models

    rewards = base / "models/rewards"
    models.write("hps_v2", rewards)
    models.write("image_reward", rewards / "ImageReward")
    models.write("clipscore_hf", base / "models/clip_vision/clip-vit-large-patch14")
    (base / "input").mkdir(exist_ok=True)
    for name, picture in list(inputs.images().items())[:6]:
        picture.convert("RGB").save(base / "input" / f"{name}.png")


def open_template(page: Page, name: str) -> None:
    """Load a graph by clicking on its card in the template browser."""
    page.reload()
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.page.get_by_role("dialog").get_by_text("TreeRPO", exact=True).first.click()
    page.page.get_by_test_id(f"template-workflow-{name}").click()
    page.page.wait_for_function("() => app.graph._nodes.some(node => node.type.startsWith('TreeRPO'))")
    page.page.wait_for_timeout(1500)


def crowded(page: Page) -> list[str]:
    """Nodes that lie over one another, or outside their group, in the renderer that is on."""
    page.fit()
    return page.evaluate(CROWDED)


def differences(queued: dict, twin: dict) -> list[str]:
    """Where what the page would queue is not the API twin.

    (A widget without a value of its own, such as ImageCompare's, does not count.)
    """
    found = [
        f"{number}: the page has {queued.get(number, {}).get('class_type')}, the API twin "
        f"{twin.get(number, {}).get('class_type')}"
        for number in queued.keys() | twin.keys()
        if queued.get(number, {}).get("class_type") != twin.get(number, {}).get("class_type")
    ]
    return found or [
        f"{number} {node['class_type']}.{field}: the page queues {queued[number]['inputs'].get(field)!r}, the API "
        f"twin says {value!r}"
        for number, node in twin.items()
        for field, value in node["inputs"].items()
        if value != "" and queued[number]["inputs"].get(field) != value
    ]


def check(page: Page, name: str, pictures: Path | None, cards: bool, whole: bool = False) -> list[str]:
    """What is wrong with this graph; nothing, if all is well."""
    open_template(page, name)
    twin = json.loads((ROOT / "workflows/api" / f"{name}.json").read_text("utf-8"))
    queued = json.loads(page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))
    if faults := page.evaluate(FAULTS) + differences(queued, twin) + crowded(page):
        return faults
    if page.evaluate(SUBSTITUTE, "sd3" if "sd35" in name else "flux") or not whole:
        page.evaluate(SMALL, CHANGES | (WRITTEN if name == "flux_text" else {}))
    if page.evaluate("() => app.graph._nodes.some((node) => node.type === 'TreeRPOTeach')"):
        page.evaluate(PICKS)
    page.run()
    if name == "pick_the_winner":  # the first run only asks
        page.page.keyboard.press("5")
        page.run()
        if not list((page.server.base / "output/treerpo/my picks").glob("metrics.jsonl")):
            return ["the pick was not learned from"]
    shown = [tuple(one) for one in page.evaluate(SHOWING)]
    if twice := {title for title, source in shown if shown.count((title, source)) > 1}:
        return [f"{', '.join(twice)} shows its picture twice"]
    if name == "compare" and [title for title, _ in shown] != ["Score before", "Score after"]:
        return [f"pictures are seen in {shown}, not side by side"]
    if faults := [one for one in crowded(page) if " covers " in one]:  # with the pictures and sentences of a run
        return faults
    if cards:
        thumbnail(page, name)
    if pictures:
        picture = drawn(page)
        picture.thumbnail((1800, 1800), Image.Resampling.LANCZOS)
        picture.save(pictures / f"{name}.jpg", quality=82)
    return page.errors()


REWIRE = """() => {
    const stages = ["TreeRPOSampler", "VAEDecode", "TreeRPOScore", "TreeRPOAdvantages", "TreeRPORegression"];
    const nodes = app.graph._nodes;
    const all = nodes.find((node) => node.isSubgraphNode?.()), save = nodes.find((node) => node.type === "TreeRPOSaveLora");
    const wire = (id) => app.graph.links.get?.(id) ?? app.graph.links[id];
    for (const stage of nodes.filter((node) => stages.includes(node.type)))
        for (const input of stage.inputs) {
            const link = input.link == null ? null : wire(input.link), place = all.inputs.findIndex((one) => one.name === input.name);
            if (link && place >= 0 && all.inputs[place].link == null && !stages.includes(app.graph.getNodeById(link.origin_id).type))
                app.graph.getNodeById(link.origin_id).connect(link.origin_slot, all, place);
        }
    for (const stage of nodes.filter((node) => [...stages, "TreeRPOTreeView"].includes(node.type))) app.graph.remove(stage);
    all.connect(all.findOutputSlot("policy"), save, save.findInputSlot("policy"));
}"""


def check_blueprint(page: Page) -> list[str]:
    """The blueprint, found by searching for its name, does the work of the five nodes it stands for."""
    open_template(page, "first_steps")
    page.fit()
    page.page.mouse.dblclick(page.size[0] / 2, page.size[1] - 60)
    page.page.wait_for_timeout(1000)
    page.page.keyboard.type("Tree iteration")
    page.page.wait_for_timeout(1500)
    page.page.keyboard.press("Enter")
    page.page.wait_for_function("() => app.graph._nodes.some((node) => node.isSubgraphNode?.())")
    page.evaluate(REWIRE)
    page.evaluate(SMALL, {"TreeRPOPolicy.run_name": "blueprint", "TreeRPOSaveLora.lora_name": "blueprint"})
    page.run()
    rows = (page.server.base / "output/treerpo/blueprint/metrics.jsonl").read_text("utf-8").splitlines()
    return page.errors() if len(rows) == 1 else [f"{len(rows)} iterations instead of 1"]


def drawn(page: Page) -> Image.Image:
    """The graph as it is on the screen, without the page around it."""
    return Image.open(io.BytesIO(page.picture())).convert("RGB").crop(page.evaluate(AREA))


def signs() -> Image.Image:
    """Drawn signs with their scores by OCR, best first."""
    import torch

    from benchmarks.ocr import drawn as sign
    from core.pictures.plot import score_sheet
    from core.pictures.theme import DARK
    from core.rewards.ocr import Ocr

    prompts = ['a sign that says "OPEN 24"'] * 4
    images = torch.stack([sign("OPEN 24", 1, damage) for damage in ("", "wrong letter", "covered", "blur")])
    scores = Ocr().score(images, prompts)
    return score_sheet(
        list(images), scores, prompts, "OCR", ranked=[scores.argsort(descending=True).tolist()], theme=DARK
    )


def thumbnail(page: Page, name: str) -> None:
    """workflows/<name>.jpg, a card of the template browser: what comes out of the graph, and what it is for.

    The upper 15 % stay free: ComfyUI puts a badge there.
    """
    from core.pictures.plot import font

    card = Image.new("RGB", (560, 560), (27, 27, 31))
    draw = ImageDraw.Draw(card)
    title, line = CARDS[name]
    draw.text((24, 452), title, fill=(240, 240, 244), font=font(38))
    draw.text((24, 508), line, fill=(180, 185, 195), font=font(21))
    base = page.server.base / "thumbnails"
    if "teach" in name.split("_"):  # what any of them looks like, seen with the tiny model
        shown = [Image.open(ROOT / "web/docs/images/teach.png").convert("RGB")]
    elif "simple" in name.split("_"):
        shown = [Image.open(ROOT / "workflows/start_here.jpg").convert("RGB").crop((0, 88, 560, 438))]
    elif name == "flux_text":  # what the reward says of drawn signs: the tiny model cannot write
        shown = [signs()]
    else:
        images = [page.client.download(image, base) for image in page.evaluate(SHOWN, OUTCOMES)]
        shown = [Image.open(image).convert("RGB") for image in images] or [drawn(page)]
    fitting = [ImageOps.contain(image, (528, 340 // len(shown) - 5 * (len(shown) - 1))) for image in shown]
    top = 88 + (350 - sum(image.height for image in fitting) - 10 * (len(fitting) - 1)) // 2
    for image in fitting:
        card.paste(image, ((560 - image.width) // 2, top))
        top += image.height + 10
    card.save(ROOT / "workflows" / f"{name}.jpg", quality=88)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder")
    parser.add_argument("--pictures", type=Path, help="a folder for screenshots")
    parser.add_argument("--thumbnails", action="store_true", help="renew workflows/<name>.jpg")
    parser.add_argument("--nodes2", action="store_true")
    parser.add_argument(
        "--whole", action="store_true", help="the tiny model's own graphs run as long as they are shipped"
    )
    options = parser.parse_args()
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    # it needs the LoRA of first_steps
    shipped = sorted((path.stem for path in (ROOT / "workflows").glob("*.json")), key=lambda name: name == "compare")
    page, failed = Page(options.comfyui, options.nodes2, (2400, 1200)), 0
    page.settings |= LOOKS
    with page:
        prepare(page.server.base)
        for name in options.names or [*shipped, "blueprint"]:
            try:
                faults = (
                    check_blueprint(page)
                    if name == "blueprint"
                    else check(page, name, options.pictures, options.thumbnails, options.whole)
                )
            except Problem as problem:
                faults = [str(problem)]
            print(f"{name}: {'; '.join(faults) or 'fine'}", flush=True)
            failed += bool(faults)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
