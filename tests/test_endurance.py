"""The endurance benchmark in short: what it measures over 20 kills and 500 iterations is held here over a few."""

import json
import os
import subprocess
import sys

import pytest
from conftest import COMFYUI, MISSING, ROOT


def bench(folder, *arguments):
    if COMFYUI is None:
        pytest.skip(MISSING)
    target = folder / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "endurance.py"), "--json", str(target), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(COMFYUI)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())


def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(tmp_path):
    found = bench(tmp_path, "--part", "kills", "--kills", "1", "--between", "10", "--model", "sd3")["kills"]
    assert found["same_lora"] and found["same_metrics"] and found["kills"] >= 1


def test_iterations_leave_nothing_behind(tmp_path):
    found = bench(tmp_path, "--part", "long", "--iterations", "40", "--model", "sd3")["long"]
    assert found["hooks_left"] == found["injections_left"] == 0
    assert found["bytes_per_iteration"] < 200_000, "one leaked tree would be millions"
