"""Tree View in the page: drawn, clicked through, sent on, and still there after the page was loaded again.

python tests/browser/check_tree_view.py [--comfyui PATH] [--pictures FOLDER]
"""

import json
import uuid

from page import ROOT, main


def graph(depth=2, prompts=2):
    """First steps without the update, so that every run grows the same trees; with Tree View."""
    found = json.loads((ROOT / "workflows/api/first_steps.json").read_text("utf-8"))
    found = {
        name: node
        for name, node in found.items()
        if node["class_type"] not in ("TreeRPORegression", "TreeRPOSaveLora", "TreeRPOTreeView")
    }
    found["1"]["inputs"]["model"] = "sd3"  # older ComfyUI takes FLUX sizes as fixed
    found["3"]["inputs"]["per_iteration"] = prompts
    found["6"]["inputs"].update(branching=3, depth=depth, window="fixed")
    found["20"] = {
        "class_type": "TreeRPOTreeView",
        "_meta": {"title": "Tree View"},
        "inputs": {"tree": ["8", 0], "rewards": ["11", 0], "leaf": 0, "advantages": ["12", 0], "leaves": ["8", 1]},
    }
    return found


def widget(page, name):
    return page.evaluate(
        "(name) => app.graph._nodes.find((n) => n.type === 'TreeRPOTreeView').widgets.find((w) => w.name === "
        "name).value",
        name,
    )


def check(page, name, pictures):
    page.load_api(graph(), f"tree {name}")
    # as saved workflows have one
    page.load_graph({**page.evaluate("() => app.graph.serialize()"), "id": str(uuid.uuid4())}, f"tree {name}")
    tree, dialog = page.page.locator(".treerpo-tree"), page.page.locator(".treerpo-dialog")
    assert "appears here" in tree.inner_text()
    page.run()
    assert tree.locator(".leaf").count() == 18 and tree.locator("line").count() == 24
    broken = page.evaluate(
        "() => Promise.all([...document.querySelectorAll('.treerpo-tree image')].map((i) => "
        "fetch(i.href.baseVal).then((r) => r.ok)))"
    )
    assert all(broken) and len(broken) == 18
    page.fit("TreeRPOTreeView")
    if pictures:
        page.picture(pictures / f"tree_view_{name}.png", page.box("TreeRPOTreeView"))
    box = tree.bounding_box()
    right = max(leaf.bounding_box()["x"] + leaf.bounding_box()["width"] for leaf in tree.locator(".frame").all())
    assert right <= box["x"] + box["width"], "the tree is wider than its node"

    clicked_through(page, tree, dialog, pictures and pictures / f"leaf_{name}.png")
    keyboard(page, tree, dialog)
    sent_on(page, tree, dialog)
    kept(page, tree)


def clicked_through(page, tree, dialog, picture):
    tree.locator("[data-number='5']").click()
    assert dialog.get_by_text("Leaf 5 of 18").is_visible() and dialog.get_by_text("2 of 3").count() == 2
    page.page.wait_for_function("() => document.querySelector('.treerpo-dialog img').naturalWidth === 64")
    if picture:
        page.page.screenshot(path=str(picture))
    for key, leaf in (("ArrowRight", 6), ("ArrowDown", 15), ("ArrowLeft", 14), ("ArrowUp", 5)):
        page.page.keyboard.press(key)
        assert dialog.get_by_text(f"Leaf {leaf} of 18").is_visible()
    dialog.get_by_text("Use this leaf").click()
    assert widget(page, "leaf") == 5
    page.page.keyboard.press("Escape")
    assert dialog.count() == 0


def keyboard(page, tree, dialog):
    """In the tree itself, and without ComfyUI hearing it."""
    tree.locator("[data-number='1']").focus()
    for key in ("ArrowRight", "ArrowDown"):
        page.page.keyboard.press(key)
    assert page.evaluate("() => document.activeElement.dataset.number") == "11"
    page.page.keyboard.press("Enter")
    assert dialog.get_by_text("Leaf 11 of 18").is_visible()
    nodes = page.evaluate("() => app.graph._nodes.length")
    page.evaluate("() => app.canvas.selectNode?.(app.graph._nodes[0])")
    page.page.keyboard.press("Delete")
    assert page.evaluate("() => app.graph._nodes.length") == nodes, "a key reached ComfyUI through the open panel"
    page.page.keyboard.press("Escape")


def sent_on(page, tree, dialog):
    tree.locator("[data-number='5']").click()
    dialog.get_by_text("To Load Image").click()
    dialog.get_by_text("is in a new Load Image node").wait_for()
    page.page.keyboard.press("Escape")
    file = page.evaluate(
        "() => app.graph._nodes.find((n) => n.type === 'LoadImage').widgets.find((w) => w.name === 'image').value"
    )
    assert (page.server.base / "input" / file).is_file()
    page.run()
    assert "★ 5" in tree.inner_text().replace("\n", " ")


def kept(page, tree):
    """Collapsed and opened, in another workflow and back, the page loaded again, removed."""
    for _ in range(2):
        page.evaluate("() => app.graph._nodes.find((n) => n.type === 'TreeRPOTreeView').collapse(true)")
        page.page.wait_for_timeout(300)
    saved = page.evaluate("() => app.graph.serialize()")
    page.load_graph({"nodes": [], "links": [], "version": 0.4}, "other")
    assert tree.count() == 0
    page.load_graph(saved, "back")
    assert tree.locator(".leaf").count() == 18
    page.reload()
    page.load_graph(saved, "back again")
    tree.locator(".leaf").nth(17).wait_for()
    page.evaluate("() => app.graph.remove(app.graph._nodes.find((n) => n.type === 'TreeRPOTreeView'))")
    page.page.wait_for_timeout(300)
    assert tree.count() == 0


if __name__ == "__main__":
    main(check)
