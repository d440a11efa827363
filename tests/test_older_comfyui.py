"""Backend, graph, refusals, start-up and shipped graphs on older ComfyUI releases, each in a process of its own: SD3
only, since tiny FLUX loads from 0.9 on.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMFYUI

NEWER = ("this ComfyUI does not load", "this ComfyUI has no")  # what an older ComfyUI is allowed to skip, and says
FILES = (
    "test_backend_comfy.py",
    "test_graph.py",
    "test_bad_input.py",
    "test_reward_nodes.py",
    "test_trainer.py",
    "test_start_up.py",
    "test_workflows.py",
)


def others() -> list[Path]:
    """TREERPO_COMFYUI_OLDER (paths joined like PATH), else every ComfyUI-* beside the ComfyUI in use."""
    if "TREERPO_COMFYUI_OLDER" in os.environ:
        return [Path(path) for path in os.environ["TREERPO_COMFYUI_OLDER"].split(os.pathsep) if path]
    if COMFYUI is None:
        return []
    return [path for path in sorted(COMFYUI.parent.glob("ComfyUI-*")) if (path / "comfy").is_dir() and path != COMFYUI]


@pytest.mark.parametrize("comfyui", others() or [None], ids=lambda path: path.name if path else "none")
def test_sd3_on(comfyui):
    if comfyui is None:
        pytest.skip("no older ComfyUI (set TREERPO_COMFYUI_OLDER, or put a ComfyUI-* folder beside ComfyUI)")
    tests = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        *(str(tests / name) for name in FILES),
        "-q",
        "-k",
        "sd3 or bad_input or reward_nodes or start_up or workflows",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "-rs",
    ]
    result = subprocess.run(
        command,
        cwd=tests,
        env={**os.environ, "COMFYUI_PATH": str(comfyui)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    lines = result.stdout.strip().splitlines()
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    assert "passed" in lines[-1] and all(any(why in line for why in NEWER) for line in skipped), skipped
