"""What the judge sees in the demo's pictures before and after: a sentence, and then all of it as JSON on the last line.

    python -m standalone.figures FOLDER

FOLDER has before*.png and after*.png, which show the prompts of workflows/api/compare.json in turn.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from core.pictures.reading import read_picture
from core.runs.prompts import lines
from embedded import shapes
from embedded.judge import expected_quality, figures_of, judge

GRAPHS = Path(__file__).resolve().parent.parent / "workflows" / "api"
PICTURES = 48  # before, and after


def graph(name: str) -> dict[str, dict]:
    """Inputs of every node of a shipped graph, by the node's title."""
    nodes = json.loads((GRAPHS / f"{name}.json").read_text("utf-8"))
    return {node["_meta"]["title"]: node["inputs"] for node in nodes.values()}


def seen(before: Tensor, after: Tensor, prompts: list[str], wish: dict[str, str]) -> dict[str, dict[str, float]]:
    """taste, follows, quality and diversity (embedded/judge.py), each before and after, of pictures [B, H, W, 3] that
    show the prompts in turn; `like for like`: how well the untuned model draws the styles that are shown after, and
    how well they are drawn after.
    """
    drawn, shown = judge(before), judge(after)
    both = [figures_of(found, in_turn(prompts, len(found["quality"])), wish) for found in (drawn, shown)]
    found = {name: {"before": both[0][name], "after": both[1][name]} for name in both[0]}
    likely = float(expected_quality(drawn, shown).mean())
    return found | {"like for like": {"before": likely, "after": both[1]["quality"]}}


def in_turn(prompts: list[str], count: int) -> list[str]:
    """Prompts of `count` pictures."""
    return [prompts[i % len(prompts)] for i in range(count)]


def said(found: dict[str, dict[str, float]]) -> str:
    """One line of figures before and after."""
    return "The judge: " + ", ".join(f"{name} {at['before']:.2f} -> {at['after']:.2f}" for name, at in found.items())


def main() -> None:
    folder, comparison = Path(sys.argv[1]), graph("compare")
    wish = {name: value for name, value in comparison["Reward"].items() if value in shapes.STYLES.get(name, ())}
    pictures = [
        torch.cat([read_picture(path) for path in sorted(folder.glob(f"{when}*.png"))]) for when in ("before", "after")
    ]
    found = seen(*pictures, lines(comparison["Held-out prompts"]["text"]), wish)
    print(said(found), json.dumps(found), sep="\n")


if __name__ == "__main__":
    main()
