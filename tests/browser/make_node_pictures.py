"""Pictures of single nodes for the help pages: web/docs/images/<NodeId>.png, of every node whose page names one.

    python tests/browser/make_node_pictures.py [NodeId ...] --comfyui PATH

Nodes that a template has are shown after a run of it, the others alone, with their defaults; in Nodes 2.0. Needs
playwright and a chromium.
"""

import argparse
import json
from pathlib import Path

from check_workflows import CHANGES, LOOKS, SMALL, SUBSTITUTE, open_template, prepare
from page import ROOT, Page

HELP = ROOT / "web/docs"
ALONE = """async (type) => {
    for (const other of [...app.graph._nodes]) app.graph.remove(other);  // not clear(): a new node must not get the number, and with it the values, of an old one
    const node = LiteGraph.createNode(type);
    node.pos = [0, 0];
    app.graph.add(node);
    node.size = [Math.max(380, node.size[0]), 10];
}"""


BOX = """(type) => {
    const id = app.graph._nodes.find((node) => node.type === type).id, { x, y, width, height } = document.querySelector(`[data-node-id="${id}"]`).getBoundingClientRect();
    return { x: x - 6, y: y - 6, width: width + 12, height: height + 12 };
}"""


def wanted() -> set[str]:
    """Nodes whose help page shows a picture of the node itself."""
    return {page.stem for page in HELP.glob("*.md") if f"images/{page.stem}.png" in page.read_text("utf-8")}


def snap(page: Page, node: str) -> None:
    page.fit(node)
    page.page.mouse.move(page.size[0] / 2, page.size[1] - 5)
    page.picture(HELP / "images" / f"{node}.png", page.evaluate(BOX, node))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nodes", nargs="*")
    parser.add_argument("--comfyui", type=Path)
    options = parser.parse_args()
    left = set(options.nodes) or wanted()
    page = Page(options.comfyui, nodes2=True, size=(1900, 1300))
    page.settings |= LOOKS
    with page:
        prepare(page.server.base)
        for file in sorted((ROOT / "workflows").glob("*.json")):
            here = left & {node["type"] for node in json.loads(file.read_text("utf-8"))["nodes"]}
            if not here or file.stem == "compare":
                continue
            open_template(page, file.stem)
            page.evaluate(SUBSTITUTE, "sd3" if "sd35" in file.stem else "flux")
            page.evaluate(SMALL, CHANGES)
            page.run()
            page.page.keyboard.press("Escape")
            for node in sorted(here):
                snap(page, node)
            left -= here
        for node in sorted(left):
            page.evaluate(ALONE, node)
            page.page.wait_for_timeout(800)
            snap(page, node)


if __name__ == "__main__":
    main()
