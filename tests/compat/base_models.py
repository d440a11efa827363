"""Run tests/test_families.py and the tests against diffusers, and write what they found into docs/base_models.md.

python tests/compat/base_models.py        # COMFYUI_PATH names ComfyUI where it is not found; about two minutes
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
[tests/test_families.py](../tests/test_families.py),
[test_interchange_families.py](../tests/test_interchange_families.py) and
[test_backend_diffusers.py](../tests/test_backend_diffusers.py) found. No real weights and no GPU were tried.

- [What is in the table](#what-is-in-the-table)
- [The table](#the-table)
- [Left out](#left-out)

## What is in the table

- *latents*: channels, and their size in proportion to the picture's; `x 1` = with a time, of one frame.
- *drawn with*: what *Simple Trainer* takes, at most 10 steps, as in ComfyUI's templates (a test reads them).
  Where there is none: AuraFlow, Hunyuan Image 2.1 and Kandinsky 5 as in diffusers, Krea 2 as its authors say, SD3 as
  TreeGRPO; Ideogram 4's is a guess. The shift is the model's own in ComfyUI. A distilled model (Turbo, Lightning ...)
  has the shapes of its base model, so only its file's name can tell it.
- *gradient = finite differences*: of all adapters, in float64 (1e-3); with checkpointing the same (1e-6).
- *rollout = update*: the velocity is the same bit for bit with gradients off, on, and checkpointed, in float32 and in
  bfloat16; a rollout keeps nothing for a backward pass.
- *first ratio 1*: of every edge, exactly, before any update.
- *euler*: branching 1 without noise is ComfyUI's KSampler (euler), without CFG and with (1e-4).
- *LoRA file*: through ComfyUI's own loaders, merged and bypass, all keys, it draws what was trained (1e-4).
- *MODEL as before*: after training, an error and an interrupt, bit for bit, with nothing left on its layers.
- *prompts apart*: prompts of unequal length in one batch, each as alone (1e-4).
- *LoRA in diffusers*: saved in diffusers' form and read by diffusers {diffusers}'s own
  load_lora_weights, it gives the same velocity (1e-4); back in ComfyUI too. *as X*: the same network as X, not run by
  itself. *not tried*: diffusers has the network, this pack no table of its layers' names.
- *diffusers engine*: `standalone.launch` runs it, with ComfyUI's velocities (1e-4) and the first three columns; without
  reference images.

Kontext, FLUX.2 and Qwen-Image-Edit were run with a reference image for each prompt, which the Trainer takes from
*Prompt List*; others that edit (OmniGen 2, Boogu ...) have ways of their own to read a picture: by hand only. Fill was
run without a picture to fill.

## The table

"""


LORA, ENGINE = "LoRA in diffusers", "diffusers engine"
BESIDE = {  # tests of these two columns, and what the families are called in them
    "test_interchange_families.py::test_a_trained_lora_is_the_same_in_diffusers": LORA,
    "test_interchange.py::test_our_lora_is_the_same_in_diffusers": LORA,
    "test_backend_diffusers.py::test_velocity_is_that_of_comfyui": ENGINE,
    "test_backend_diffusers.py::test_gradients_are_finite_differences": ENGINE,
    "test_backend_diffusers.py::test_rollout_is_update_bit_for_bit": ENGINE,
    "test_backend_diffusers.py::test_ratio_is_one_before_any_update": ENGINE,
}
NAMES = {
    "flux": "FLUX.1-dev",
    "sd3": "SD3",
    "sd3.5": "SD3.5",
    "flux2": "FLUX.2",
    "flux2 klein": "FLUX.2 klein",
    "z-image": "Z-Image",
    "qwen-image": "Qwen-Image",
}


class Results:
    """Of each family, its checks: True or the error's last line."""

    def __init__(self):
        self.found = defaultdict(dict)

    def pytest_runtest_logreport(self, report):
        place = re.search(r"([\w.]+::\w+)\[(.+)\]$", report.nodeid)
        if not place or not (report.when == "call" or report.failed):
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = True if report.passed else (crash.message.splitlines() or ["?"])[0] if crash else "skipped"
        if place[1].endswith("::test_family"):
            name, _, check = place[2].rpartition("-")
            self.found[name][check] = reason
        elif place[1] in BESIDE:
            name = re.sub("-(all linear|attention.*|[a-z]+_sde|cps|exact)$", "", place[2])
            told = self.found[NAMES.get(name, name)]
            told[BESIDE[place[1]]] = told.get(BESIDE[place[1]], True) if reason is True else reason


def row(family, told: dict, checks: list[str]) -> str:
    """The family's line. told: of each check, as in Results."""
    import families
    from test_families import refused

    from core.hosts.architectures import architecture_of
    from core.hosts.comfy_host import downscale

    model = families.load(family)
    form, (cfg, steps) = model.model.latent_format, architecture_of(model).habit()
    latents = f"{form.latent_channels}{' x 1' if form.latent_dimensions == 3 else ''}, 1/{downscale(model)}"
    beside = [cell(family, check, told) for check in (LORA, ENGINE)]
    if refused(family):
        cells = [f"refused: {refused(family)}", *["–" for _ in checks[1:]]]
    else:
        cells = ["yes" if told[check] is True else f"no: {told[check]}" for check in checks]
    return " | ".join([family.name, family.config, latents, f"cfg {cfg:g}, {min(steps, 10)} steps", *cells, *beside])


def cell(family, check: str, told: dict) -> str:
    """What a column beside test_families' says: the test's result, or that of the same network."""
    import families
    import worlds

    from core.hosts.architectures import ARCHITECTURES
    from core.hosts.diffusers_networks import KINDS

    if check in told:
        return "yes" if told[check] is True else f"no: {told[check]}"

    def network(other) -> str:
        return next(row.network for row in ARCHITECTURES if row.name == (other.row or other.name))

    own = network(family)
    if check == ENGINE and (family.references or family.config == "FluxInpaint"):
        return "–"  # it is given no reference images, and nothing to fill
    if own and (check == LORA or own in KINDS):
        return f"as {next(other.name for other in families.FAMILIES if network(other) == own)}"
    if check == ENGINE:
        return "–"
    return "not in diffusers" if family.name in worlds.ONLY_COMFYUI else "not tried"


def page(found: dict) -> str:
    """The whole page."""
    import comfyui_version
    import diffusers
    import torch
    from families import FAMILIES, OTHERS
    from test_families import CHECKS

    checks = list(CHECKS)
    heads = ["family", "class in ComfyUI", "latents", "drawn with", *checks, LORA, ENGINE]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [row(family, found.get(family.name, {}), checks) for family in FAMILIES]
    head = HEAD.format(
        version=comfyui_version.__version__, torch=torch.__version__.partition("+")[0], diffusers=diffusers.__version__
    )
    left_out = [f"- {reason} {', '.join(names.split())}" for reason, names in OTHERS.items()]
    return head + "\n".join(f"| {line} |" for line in lines) + "\n\n## Left out\n\n" + "\n".join(left_out) + "\n"


def main() -> None:
    results = Results()
    wanted = [str(HERE.parent / "test_families.py") + "::test_family", *(str(HERE.parent / name) for name in BESIDE)]
    code = pytest.main([*wanted, "-q", "-p", "no:warnings"], plugins=[results])
    PAGE.write_text(page(results.found), "utf-8")
    sys.exit(int(code))


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(REPO)]
    main()
