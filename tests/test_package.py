"""What holds for the package as a whole: what may import what, and what every node tells its user."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHOD = [path for path in ROOT.glob("core/*.py") if path.name != "fallback.py"] + list(ROOT.glob("core/rewards/*.py"))
ALLOWED = {"torch", "safetensors"} | sys.stdlib_module_names
PICTURES = {name: {"PIL"} for name in ("plot.py", "dashboard.py", "measure.py", "server.py")} | {"pixels.py": {"PIL", "numpy"}, "image_reward.py":
                                                                                                  {"ImageReward", "huggingface_hub"}}  # the last: when used


def imported(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", METHOD, ids=lambda path: path.stem)
def test_the_method_knows_no_host(path):
    allowed = ALLOWED | PICTURES.get(path.name, set())
    assert set(imported(path)) <= allowed


def test_core_can_be_imported_without_comfyui():
    modules = ", ".join(f"core.{path.stem}" for path in ROOT.glob("core/*.py") if path.stem not in ("__init__", "fallback"))
    code = f"import sys; import {modules}; assert not [m for m in sys.modules if m.split('.')[0] in ('comfy', 'diffusers', 'transformers')]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_widget_has_a_tooltip_and_every_node_a_description(pack):
    for node in pack.nodes.NODES:
        schema = node.define_schema()
        assert schema.node_id.startswith("TreeRPO") and schema.description
        for field in schema.inputs:
            if hasattr(field, "default"):
                assert field.tooltip, (schema.node_id, field.id)


def test_the_package_asks_for_nothing_comfyui_brings():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert lines == []
