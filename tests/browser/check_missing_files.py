"""Graphs of real models, queued without their files: one dialog says which, from where, how large and into which
folder; in both kinds of nodes.

    python tests/browser/check_missing_files.py --comfyui PATH [--pictures FOLDER]
"""

import json
from pathlib import Path

from check_workflows import open_template
from page import ROOT, Page, main

KNOWN = json.loads((ROOT / "web/model_files.json").read_text("utf-8"))


def wanted(name: str) -> set[str]:
    """Model files that a template's loaders name."""
    graph = json.loads((ROOT / "workflows/api" / f"{name}.json").read_text("utf-8"))
    return {
        value
        for node in graph.values()
        if not node["class_type"].startswith("TreeRPO")
        for value in node["inputs"].values()
        if isinstance(value, str) and value.endswith(".safetensors")
    }


def check(page: Page, mode: str, pictures: Path | None) -> None:
    browser = page.page
    for name in ("flux_trainer", "sd35_trainer", "z_image_teach", "qwen_image_simple"):
        open_template(page, name)
        browser.get_by_test_id("queue-button").first.click()
        dialog = browser.locator(".treerpo-dialog")
        dialog.wait_for()
        links = {one.inner_text(): one.get_attribute("href") for one in dialog.locator("a").all()}
        assert links == {file: KNOWN[file][2] for file in wanted(name)}, (mode, name, links)
        text = dialog.inner_text()
        for folder, size, _ in (KNOWN[file] for file in links):
            assert f"into models/{folder}" in text and f"about {size:g} GB" in text, (folder, size, text)
        if pictures:
            browser.screenshot(path=str(pictures / f"missing_{name}_{mode}.png"))
        if name == "flux_trainer":
            assert text.count("HPS_v2.1_compressed.pt is not there yet") == 1, text
            dialog.get_by_text("Switch on download").first.click()
            reward = "app.graph._nodes.find((one) => one.type === 'TreeRPOHPS').widgets"
            assert page.evaluate(f"() => {reward}.find((one) => one.name === 'download').value") is True
        browser.keyboard.press("Escape")
        dialog.wait_for(state="detached")
    open_template(page, "start_here")  # nothing is missing: nothing is said
    page.evaluate("() => app.graph._nodes.find((one) => one.type === 'TreeRPOSimple').disconnectInput(0)")
    browser.get_by_test_id("queue-button").first.click()
    browser.wait_for_timeout(2000)
    assert page.evaluate("() => Object.keys(app.lastNodeErrors ?? {}).length") and not dialog.count()


if __name__ == "__main__":
    main(check)
