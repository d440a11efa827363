"""Run tests/test_families.py and write what it found into docs/base_models.md.

python tests/compat/base_models.py        # COMFYUI_PATH names ComfyUI where it is not found; about half a minute
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
PAGE = REPO / "docs" / "base_models.md"
HEAD = """# Base models: which of ComfyUI's models can be trained

Every flow model for images that ComfyUI {version} loads, and Wan for single ones, as a tiny random network of ComfyUI's
own classes, on a CPU with torch {torch}. `python tests/compat/base_models.py` wrote this from what
[tests/test_families.py](../tests/test_families.py) found. No real weights and no GPU were tried.

- [What is in the table](#what-is-in-the-table)
- [The table](#the-table)
- [Left out](#left-out)

## What is in the table

- *latents*: channels, and their size in proportion to the picture's; `x 1` = with a time, of one frame.
- *drawn with*: what *Simple Trainer* takes by itself, after ComfyUI's templates where it has one for the model. A
  distilled model (Turbo, Lightning ...) has the shapes of its base model, so only its file's name can tell it:
  Z-Image-Turbo cannot be told from Z-Image by its weights.
- *gradient = finite differences*: of all adapters, in float64 (1e-3); with checkpointing the same (1e-6).
- *rollout = update*: the velocity is the same bit for bit with gradients off, on, and checkpointed, in float32 and in
  bfloat16; a rollout keeps nothing for a backward pass.
- *first ratio 1*: of every edge, exactly, before any update.
- *euler*: branching 1 without noise is ComfyUI's KSampler (euler), without CFG and with (1e-4).
- *LoRA file*: through ComfyUI's own loaders, merged and bypass, all keys, it draws what was trained (1e-4).
- *MODEL as before*: after training, after an error in it and after an interrupt, bit for bit, with nothing left on its
  layers.
- *prompts apart*: prompts of unequal length in one batch, each as alone (1e-4).

Kontext, FLUX.2 and Qwen-Image-Edit were run with reference images, another one for each prompt; Fill without a picture
to fill.

## The table

"""


class Results:
    """Of each family, its checks: True or the error's last line."""

    def __init__(self):
        self.found = defaultdict(dict)

    def pytest_runtest_logreport(self, report):
        place = re.search(r"::test_family\[(.+)-([^-]+)\]$", report.nodeid)
        if place and (report.when == "call" or report.failed):
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message.splitlines() or ["?"])[0] if crash else "skipped"
            self.found[place[1]][place[2]] = True if report.passed else reason


def row(family, told: dict, checks: list[str]) -> str:
    """The family's line. told: of each check, as in Results."""
    import families
    from test_families import refused

    from core.hosts.architectures import architecture_of
    from core.hosts.comfy_host import downscale

    model = families.load(family)
    form, (cfg, steps) = model.model.latent_format, architecture_of(model).habit()
    latents = f"{form.latent_channels}{' x 1' if form.latent_dimensions == 3 else ''}, 1/{downscale(model)}"
    if refused(family):
        cells = [f"refused: {refused(family)}", *["–" for _ in checks[1:]]]
    else:
        cells = ["yes" if told[check] is True else f"no: {told[check]}" for check in checks]
    return " | ".join([family.name, family.config, latents, f"cfg {cfg:g}, {min(steps, 10)} steps", *cells])


def page(found: dict) -> str:
    """The whole page."""
    import comfyui_version
    import torch
    from families import FAMILIES, OTHERS
    from test_families import CHECKS

    checks = list(CHECKS)
    heads = ["family", "class in ComfyUI", "latents", "drawn with", *checks]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [row(family, found.get(family.name, {}), checks) for family in FAMILIES]
    head = HEAD.format(version=comfyui_version.__version__, torch=torch.__version__.partition("+")[0])
    left_out = [f"- {reason} {', '.join(names.split())}" for reason, names in OTHERS.items()]
    return head + "\n".join(f"| {line} |" for line in lines) + "\n\n## Left out\n\n" + "\n".join(left_out) + "\n"


def main() -> None:
    results = Results()
    code = pytest.main([str(HERE.parent / "test_families.py"), "-q", "-k", "test_family"], plugins=[results])
    PAGE.write_text(page(results.found), "utf-8")
    sys.exit(int(code))


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(REPO)]
    main()
