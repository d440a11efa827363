"""ComfyUI starts with the pack, says nothing bad about it, and needs none of the packages that some nodes can use."""

import os
import re
import subprocess
import sys

import pytest
from conftest import COMFYUI, MISSING, ROOT

from environments import overlay

OPTIONAL = (
    "open_clip",
    "diffusers",
    "peft",
    "accelerate",
    "ImageReward",
    "bitsandbytes",
    "gguf",
    "tensorboard",
    "timm",
)
ABSENT = f"""
import importlib.machinery as machinery
found = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split(".")[0] in {OPTIONAL} else found(name, path, target)
)
"""


@pytest.mark.parametrize("optional", ["there", "absent"])
def test_comfyui_starts_without_a_word_against_the_pack(optional, tmp_path):
    if COMFYUI is None:
        pytest.skip(MISSING)
    (tmp_path / "base/custom_nodes").mkdir(parents=True)
    (tmp_path / "base/custom_nodes/TreeRPO").symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "path").mkdir()
    if optional == "absent":
        (tmp_path / "path/sitecustomize.py").write_text(ABSENT)
    path = os.pathsep.join(
        str(part)
        for part in [str(tmp_path / "path"), overlay(COMFYUI, sys.executable), os.environ.get("PYTHONPATH")]
        if part
    )
    command = [
        sys.executable,
        "main.py",
        "--cpu",
        "--quick-test-for-ci",
        "--base-directory",
        str(tmp_path / "base"),
        "--database-url",
        "sqlite:///:memory:",
    ]
    done = subprocess.run(
        command, cwd=COMFYUI, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    log = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
    assert done.returncode == 0, log[-3000:]
    # run.py's own environments have that name too
    ours = [line for line in log.splitlines() if "treerpo" in line.lower() and "web root" not in line]
    assert len(ours) == 1 and re.search(r"\d seconds: ", ours[0]), (
        f"the line with the time it took to import, and nothing else: {ours}"
    )
