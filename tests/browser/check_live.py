"""What is seen of a run while it goes on, from Run to its end: the Simple Trainer's picture, never empty once the
training has begun, and its sentences. Run is pressed twice: the second goes on, and says so.

    python tests/browser/check_live.py --comfyui PATH [--pictures FOLDER]
"""

from pathlib import Path

from check_workflows import SMALL, open_template
from page import Page, main

TIMES = 6  # iterations of each Run
# what the trainer's node shows in this moment: [its text, whether there is a picture that is drawn]
SEEN = """() => {
    const node = app.graph._nodes.find((one) => one.type === "TreeRPOSimple");
    const box = document.querySelector(`[data-node-id="${node.id}"]`);
    const text = (node.widgets.find((one) => one.name === "$$node-text-preview")?.value ?? "").trim();
    const images = box ? [...box.querySelectorAll("img")].filter((one) => one.checkVisibility()) : node.imgs ?? [];
    return [text, images.some((one) => one.complete && one.naturalWidth > 100)];
}"""
WATCH = f"""() => {{
    window.treerpoSeen = [];
    clearInterval(window.treerpoWatch);
    window.treerpoWatch = setInterval(() => window.treerpoSeen.push(({SEEN})()), 100);
}}"""


def watched(page: Page) -> list[tuple[str, bool]]:
    """Each text of a Run in turn, and whether a picture was there from the second look at it on."""
    page.evaluate(WATCH)
    page.run()
    shown = []
    for text, drawn in page.evaluate("() => window.treerpoSeen"):
        if not shown or shown[-1][0] != text:
            shown.append((text, []))
        shown[-1][1].append(drawn)
    return [(text, all(drawn[3:])) for text, drawn in shown]


def check(page: Page, mode: str, pictures: Path | None) -> None:
    open_template(page, "start_here")
    page.evaluate(SMALL, {"TreeRPOSimple.lora_name": f"live {mode}", "TreeRPOSimple.iterations": TIMES})
    first, second = watched(page), watched(page)
    if pictures:
        page.picture(pictures / f"live_{mode}.png")
    for shown, begins in ((first, "Begins with iteration 1 of 6."), (second, "Goes on at iteration 7 of 12.")):
        at = next((i for i, (text, _) in enumerate(shown) if text.startswith(begins)), None)
        assert at is not None, (begins, shown)
        assert all(drawn for _, drawn in shown[at:]), shown
    assert "6 iterations done." in first[-1][0], first
    assert "12 iterations done. This Run went on at iteration 7." in second[-1][0], second


if __name__ == "__main__":
    main(check)
