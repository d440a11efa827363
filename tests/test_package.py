"""What holds for the package as a whole: what may import what, and what every node tells its user."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = [path for path in ROOT.glob("core/**/*.py") if "hosts" not in path.parts]
BESIDES = {"torch", "safetensors"} | sys.stdlib_module_names
PICTURES = {"PIL"}
MORE = {  # file: what it may import besides
    "launch.py": {"standalone"},
    "pictures/plot.py": PICTURES,
    "pictures/curve.py": PICTURES,
    "pictures/theme.py": PICTURES,
    "pictures/dashboard.py": PICTURES,
    "pictures/reading.py": PICTURES,
    "rewards/measure.py": PICTURES,
    "rewards/server.py": PICTURES,
    "rewards/pixels.py": PICTURES | {"numpy"},
    "rewards/image_reward.py": {"ImageReward", "huggingface_hub"},  # when used
    "rewards/ocr.py": {"numpy", "rapidocr", "onnxruntime"},  # the last two when used
    "rewards/clip.py": {"?"},  # open_clip or transformers, named in the sentence when it is missing
    "rewards/drawing.py": {"?"},  # embedded/, whose name depends on whether ComfyUI has loaded us
    "runs/health.py": {"scipy"},  # ComfyUI brings it
    "runs/config.py": {"yaml"},  # for standalone use
    "runs/trainer.py": {"bitsandbytes"},  # where the user chooses it
}
BELOW = {  # part of core: the parts it may import
    "launch": set(),  # an old name
    "files": set(),
    "patterns": set(),
    "model": set(),
    "references": set(),
    "method": {"model"},
    "lora": {"files", "patterns"},
    "pictures": {"method"},
    "rewards": {"files", "method", "patterns", "pictures", "references"},
    "runs": {"files", "lora", "method", "model", "pictures", "references", "rewards"},
    "hosts": {"lora", "method", "model", "references"},
}


def imported(source: str, package: str) -> set[str]:
    """Every module the source names, dotted and absolute: by import, also relative or inside a function, or by a
    string.

    package: which the source is in, such as core.method. "?" = a name that is only known when it runs.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__", "find_spec", "exec", "eval") and not _method_of_model(node.func):
                given = node.args[0] if node.args else None
                found.add(given.value if isinstance(given, ast.Constant) and isinstance(given.value, str) else "?")
        elif isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "modules":
            found.add(node.slice.value if isinstance(node.slice, ast.Constant) else "?")
    return found


def _method_of_model(function) -> bool:
    """`net.eval()` is torch's, not Python's."""
    return getattr(function, "attr", "") == "eval"


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def own(path: Path) -> set[str]:
    """What a file of ours imports of core, as dotted modules."""
    return {name for name in imported(path.read_text("utf-8"), package_of(path)) if name.split(".")[0] == "core"}


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_knows_no_host(path):
    roots = {name.split(".")[0] for name in imported(path.read_text("utf-8"), package_of(path))}
    assert roots <= BESIDES | {"core"} | MORE.get(str(path.relative_to(ROOT / "core").as_posix()), set())


@pytest.mark.parametrize("path", sorted(ROOT.glob("core/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_part_of_the_core_stands_on_those_below_it(path):
    inside = path.relative_to(ROOT / "core").parts
    part = inside[0].removesuffix(".py")
    used = {name.split(".")[1] for name in own(path) if "." in name}
    assert used <= BELOW.get(part, set()) | ({part} if len(inside) > 1 else set())


def test_no_module_of_the_core_imports_itself_by_a_detour():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("core/**/*.py")}
    uses = {
        name: {other for other in own(path) if other in modules and other != name} for name, path in modules.items()
    }
    while free := [name for name, others in uses.items() if not others & uses.keys()]:
        for name in free:
            del uses[name]
    assert not uses


@pytest.mark.parametrize("line", [
    "import comfy.samplers",
    "from comfy import samplers",
    "def late():\n    import comfy.samplers",
    'import importlib\nimportlib.import_module("comfy.samplers")',
    'from importlib import import_module\nimport_module("comfy.samplers")',
    'samplers = __import__("comfy.samplers")',
    'import sys\nsys.modules["comfy.samplers"]',
    "from ..runs import trainer",
    "from ..runs.trainer import Trainer",
    "def late():\n    from .. import runs",
    'import importlib\nimportlib.import_module("core.runs.trainer")',
    "import importlib\nname = 'comfy' + '.samplers'\nimportlib.import_module(name)",
])  # fmt: skip
def test_an_import_planted_in_the_tree_is_found(line, tmp_path):
    source = (ROOT / "core/method/tree.py").read_text("utf-8")
    allowed = BESIDES | {"core.method", "core.model"}

    def strange(text: str) -> set[str]:
        names = imported(text, "core.method")
        return {name for name in names if not {name.split(".")[0], ".".join(name.split(".")[:2])} & allowed}

    assert not strange(source) and strange(f"{source}\n{line}\n")


def test_core_can_be_imported_without_comfyui():
    files = [path for path in CORE if path.name != "launch.py"]
    modules = ", ".join(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files
    )
    hosts = "('comfy', 'diffusers', 'transformers', 'standalone')"
    code = f"import sys; import {modules}; assert not [m for m in sys.modules if m.split('.')[0] in {hosts}]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_widget_has_a_tooltip_and_every_node_a_description(pack):
    for node in pack.nodes.NODES:
        schema = node.define_schema()
        assert schema.node_id.startswith("TreeRPO") and schema.description
        for field in schema.inputs:
            if hasattr(field, "default"):
                assert field.tooltip, (schema.node_id, field.id)


def test_the_package_asks_for_nothing_comfyui_brings():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert lines == []
