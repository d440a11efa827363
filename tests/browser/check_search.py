"""The words an artist types into the node search find the node that does it, in both kinds of nodes.

    python tests/browser/check_search.py --comfyui PATH [--pictures FOLDER]

Ours is among the first three, not counting others that have the word itself in their name ("style": Apply Style Model).
"""

import re
from pathlib import Path

from page import Page, main

TRAINS = ["Teach My Taste", "Simple Trainer", "TreeRPO Trainer"]
WORDS = {  # what is typed: which nodes are right
    "taste": ["Teach My Taste", "My Taste"],
    "rank": ["Score Images"],
    "teach": ["Teach My Taste"],
    "learn": TRAINS,
    "lora training": TRAINS,
    "flux train": TRAINS,
    "preference": ["Teach My Taste", "Pick the Winner"],
    "DPO": TRAINS,
    "GRPO": ["GRPO Update", *TRAINS],
    "RL": TRAINS,
    "style": TRAINS,
}
OTHERS = {"load image": "Load Image", "style": "Load Style Model", "ksampler": "KSampler"}  # we push nobody aside
FOUND = """() => [...document.querySelectorAll('#results-list [role=option]')].slice(0, 12)
    .map((one) => one.querySelector('.truncate').textContent.trim())"""


def found(page: Page, words: str) -> list[str]:
    """Names of the first nodes that the search, opened with a double click, lists for these words."""
    browser = page.page
    box = browser.get_by_placeholder("Add a node...")
    for _ in range(5):  # the page has to have drawn itself
        browser.mouse.dblclick(page.size[0] - 700, page.size[1] - 200)
        browser.wait_for_timeout(700)
        if box.count():
            break
    before = page.evaluate(FOUND)
    browser.keyboard.type(words)
    for _ in range(20):
        browser.wait_for_timeout(500)
        if (now := page.evaluate(FOUND)) == before:
            break
        before = now
    while box.count():
        browser.keyboard.press("Escape")
        browser.wait_for_timeout(500)
    return now


def check(page: Page, mode: str, pictures: Path | None) -> None:
    page.evaluate("() => app.graph.clear()")
    for words, right in WORDS.items():
        names = found(page, words)
        behind = [name for name in names if name in right or not re.search(rf"\b{words}\b", name, re.IGNORECASE)]
        assert any(name in right for name in behind[:3]), (mode, words, names)
    for words, first in OTHERS.items():
        assert found(page, words)[0] == first, (mode, words)


if __name__ == "__main__":
    main(check)
