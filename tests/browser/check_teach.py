"""Teach My Taste in the page, by mouse and keyboard: questions one after another, undo, none, skip, a reload and Stop
in between, and before and after at the end. The person likes pastel pictures, and sees them as the page does.

    python tests/browser/check_teach.py [--comfyui PATH] [--pictures FOLDER]
"""

import json

from page import ROOT, main

QUESTIONS = 10
# of the pictures in the dialog: the number of the one whose coloured pixels are palest
PALEST = """() => {
    const shown = [...document.querySelectorAll(".treerpo-dialog .grid button")];
    const pale = shown.map((button) => {
        const image = button.querySelector("img"), canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
        let sum = 0, count = 0;
        for (let i = 0; i < data.length; i += 4) {
            const rgb = [data[i], data[i + 1], data[i + 2]], low = Math.min(...rgb), high = Math.max(...rgb);
            if (high - low > 40) sum += low, count++;
        }
        return count ? sum / count : 0;
    });
    return pale.indexOf(Math.max(...pale)) + 1;
}"""
SHOWN = """(before) => {
    const dialog = document.querySelector(".treerpo-dialog");
    const images = [...(dialog?.querySelectorAll(".grid img") ?? [])];
    return images.length && images.every((image) => image.complete && image.naturalWidth) && images[0].src !== before;
}"""
SETTINGS = """(values) => {
    const { widgets } = app.graph._nodes.find((one) => one.type === "TreeRPOTeach");
    for (const [key, value] of Object.entries(values)) widgets.find((one) => one.name === key).value = value;
}"""
FIRST = "() => document.querySelector('.treerpo-dialog .grid img')?.src ?? ''"


def book(page, name) -> list[dict]:
    file = page.server.base / "output/treerpo" / name / "picks.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def check(page, renderer, pictures):
    graph = json.loads((ROOT / "workflows/teach_my_taste.json").read_text("utf-8"))
    browser, name = page.page, f"taste {renderer}"

    def opened():
        page.load_graph(graph, "teach")
        page.evaluate(SETTINGS, {"lora_name": name, "questions": QUESTIONS, "settle": 12})

    opened()
    runs = len(page.client.get("/history"))
    browser.get_by_test_id("queue-button").first.click()
    seen = ""

    def question():
        nonlocal seen
        browser.wait_for_function(SHOWN, arg=seen, timeout=120000)
        seen = page.evaluate(FIRST)

    def press(key):
        question()
        browser.keyboard.press(key)

    question()
    assert "question 1 of 10" in browser.locator(".treerpo-dialog header").inner_text()
    assert browser.locator(".treerpo-dialog button", has_text="Undo").count() == 0
    first = seen
    browser.locator(f".treerpo-dialog .grid button[data-number='{page.evaluate(PALEST)}']").click()
    question()
    if pictures:
        browser.wait_for_timeout(500)
        page.picture(pictures / f"teach_question_{renderer}.png")
    browser.keyboard.press("u")  # the first answer was wrong
    question()
    assert seen == first, "undo shows the question before once more"
    browser.keyboard.press(str(page.evaluate(PALEST)))
    press("n")
    press("s")
    for _ in range(2):
        question()
        browser.keyboard.press(str(page.evaluate(PALEST)))
    question()
    waiting = seen
    page.reload()  # it presses Esc at its end
    browser.locator(".treerpo-badge").click()
    seen = ""
    question()
    assert seen == waiting, "after a reload the same question is there"
    browser.keyboard.press(str(page.evaluate(PALEST)))
    question()
    page.client.request("/interrupt", {})
    browser.wait_for_function("() => !document.querySelector('.treerpo-dialog')", timeout=30000)
    before = len(book(page, name))
    opened()
    browser.get_by_test_id("queue-button").first.click()
    seen = ""
    while len({row["id"] for row in book(page, name) if row["by"] == "person"}) < QUESTIONS:
        question()
        browser.keyboard.press(str(page.evaluate(PALEST)))
        browser.wait_for_timeout(200)
    while len(page.client.get("/history")) < runs + 2:
        browser.wait_for_timeout(500)
    rows = book(page, name)
    assert len(rows) > before and {"none"} <= {row["answer"] for row in rows}
    assert {row["by"] for row in rows} == {"person", "skip"}
    newest = max(page.client.get("/history").values(), key=lambda run: run["prompt"][0])
    assert newest["status"]["status_str"] == "success", newest["status"]
    assert "picks; it would have made" in json.dumps(newest["outputs"])
    if pictures:
        browser.wait_for_timeout(1500)
        page.picture(pictures / f"teach_after_{renderer}.png")


if __name__ == "__main__":
    main(check)
