"""Finds ComfyUI, puts it on the path, and loads the pack the way ComfyUI does."""

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# the same examples on every machine and in every run
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, else where run.py finds one."""
    if os.environ.get("COMFYUI_PATH"):
        folder = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
        if not (folder / "comfy").is_dir():
            raise pytest.UsageError(f"COMFYUI_PATH names {folder}, which is not ComfyUI.")
        return folder
    try:
        import run
    except ImportError:
        return None
    return run.find_comfyui()


COMFYUI = find_comfyui()

if COMFYUI is not None:
    # Before the repository's root, whose nodes/ would shadow ComfyUI's nodes.py.
    sys.path.insert(0, str(COMFYUI))
    try:
        import torch
        from comfy.cli_args import args

        # Before anything imports comfy.model_management, which looks for a GPU at once and fails without one.
        args.cpu = args.cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    except ImportError as error:
        MISSING = f"ComfyUI at {COMFYUI} cannot be imported here: {error}"
        COMFYUI = None
    else:
        MISSING = None
else:
    MISSING = "no ComfyUI on this machine (set COMFYUI_PATH)"


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI's package `comfy`; skips where there is none."""
    if COMFYUI is None:
        pytest.skip(MISSING)
    import comfy
    import comfy.model_management
    import comfy.sample
    import comfy.samplers
    import comfy.sd

    return comfy


@pytest.fixture(scope="session")
def pack(comfy):
    """The repository as ComfyUI loads a custom node pack: by path, under a package name of its own."""
    spec = importlib.util.spec_from_file_location(
        "treerpo_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = sys.modules["treerpo_pack"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["treerpo_pack"]
        raise
    return module


@pytest.fixture(params=["flux", "sd3"])
def graph(request, pack, tmp_path):
    """The nodes on a tiny model of either kind; a module may have its own."""
    from graph import Graph

    return Graph(pack, tmp_path, request.param)


@pytest.fixture
def flux(pack, tmp_path):
    from graph import Graph

    return Graph(pack, tmp_path, "flux")
