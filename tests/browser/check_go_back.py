"""The way back: a picture of the held-out prompts is clicked, and the next Run begins at that iteration; in both kinds
of nodes, from a TreeRPO Trainer and from a Simple Trainer.

    python tests/browser/check_go_back.py --comfyui PATH [--pictures FOLDER]
"""

import json
from pathlib import Path

from check_workflows import SMALL, open_template
from page import Page, main

QUICK = {
    f"TreeRPOTrainer.{name}": value
    for name, value in {"evaluate_every": 1, "keep_every": 1, "iterations": 3, "per_iteration": 1}.items()
}
PRESS = """(type) => {
    const node = app.graph._nodes.find((one) => one.type === type);
    node.widgets.find((one) => one.name === "go_back").callback();
}"""
SET = """([type, name, value]) => {
    app.graph._nodes.find((one) => one.type === type).widgets.find((one) => one.name === name).value = value;
}"""
VALUES = """(type) => Object.fromEntries(app.graph._nodes.find((one) => one.type === type).widgets
    .map((one) => [one.name, one.value]))"""


def trained(page: Page, run: str) -> list[dict]:
    text = (page.server.base / "output/treerpo" / run / "metrics.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def check(page: Page, mode: str, pictures: Path | None) -> None:
    browser, run = page.page, f"back {mode}"
    strips = browser.locator(".treerpo-dialog .strip")
    open_template(page, "trainer")
    page.evaluate(SMALL, QUICK)
    page.evaluate(SET, ["TreeRPOPolicy", "run_name", run])
    page.evaluate(PRESS, "TreeRPOTrainer")
    browser.get_by_text("has no pictures of held-out prompts yet").wait_for()
    browser.keyboard.press("Escape")
    page.run()
    page.evaluate(PRESS, "TreeRPOTrainer")
    strips.nth(3).wait_for()
    assert strips.locator("b").all_inner_texts() == ["before", "iteration 1", "iteration 2", "iteration 3"]
    browser.wait_for_function("() => [...document.querySelectorAll('.strip img')].every((one) => one.naturalWidth)")
    if pictures:
        browser.screenshot(path=str(pictures / f"go_back_{mode}.png"))
    strips.nth(2).click()
    values = page.evaluate(VALUES, "TreeRPOPolicy")
    assert (values["begin_from"], values["run_name"]) == (f"{run} @ 2", f"{run} from 2"), values
    page.evaluate(PRESS, "TreeRPOTrainer")  # a change of mind: the pictures are still there
    strips.nth(1).click()
    assert page.evaluate(VALUES, "TreeRPOPolicy")["begin_from"] == f"{run} @ 1"
    browser.keyboard.press("Escape")
    page.run()
    rows, before = trained(page, f"{run} from 1"), trained(page, run)
    assert rows[:1] == before[:1] and len(rows) == len(before) == 3 and rows[1]["seconds"] != before[1]["seconds"]

    open_template(page, "start_here")
    page.evaluate(SET, ["TreeRPOSimple", "lora_name", run])
    page.evaluate(PRESS, "TreeRPOSimple")
    strips.nth(0).click()
    values = page.evaluate(VALUES, "TreeRPOSimple")
    assert (values["begin_from"], values["lora_name"]) == ("(nothing)", f"{run} from 0"), values
    browser.keyboard.press("Escape")


if __name__ == "__main__":
    main(check)
