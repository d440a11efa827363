"""Run check.py in isolated environments with old and new libraries, and try what installing changes in ComfyUI's
environment.

    python tests/compat/matrix.py [--only 4.57] [--comfyui FOLDER] [--cache FOLDER]
    python tests/compat/matrix.py --tables        # Markdown of what the cache folder holds, nothing is run

The environments are made once, with uv where there is one, else with venv and pip, in the cache folder: about 6 GB each
with torch's CUDA libraries. Needs the Pythons that ROWS name; a row whose Python is missing is reported as not run.
Slow, so never part of the test suite.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
OLD_IMAGE_REWARD = REPO / "tests" / "golden" / "requirements-image-reward.txt"


@dataclass
class Row:
    python: str  # major.minor
    packages: tuple[str, ...]
    comfyui: bool = True  # on top of ComfyUI's requirements, with today's open_clip_torch; else only the packages
    without: str = ""  # a package of ComfyUI's that is removed before the scores


ROWS = {
    "4.50": Row("3.10", ("transformers==4.50.3", "torch==2.5.1")),
    "4.57": Row("3.11", ("transformers==4.57.6", "torch==2.8.0")),
    "5.0": Row("3.12", ("transformers==5.0.0", "torch==2.11.0")),
    # torchaudio ends at 2.11, and ComfyUI needs the two to match
    "current": Row("3.13", ("transformers>=5.23", "torch==2.11.0")),
    "newest-torch": Row("3.12", ("transformers>=5.23", "torch>=2.15"), without="torchaudio"),
    "image-reward": Row("3.11", ("torch==2.2.2", "torchvision==0.17.2"), comfyui=False),
}
DRY_RUNS = {
    "TreeRPO's requirements.txt": ("-r", str(REPO / "requirements.txt")),
    "open_clip_torch": ("open_clip_torch",),
    "image-reward 1.5": ("image-reward==1.5",),
}


def run(*command, quiet: bool = False) -> str:
    """The command's output. Raises RuntimeError with the end of its error output."""
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", PIP_DISABLE_PIP_VERSION_CHECK="1", UV_NO_PROGRESS="1", PYTHONNOUSERSITE="1"
    )
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-15:]) or f"exit code {done.returncode}")
    if not quiet and done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    return done.stdout


def find_python(version: str) -> str | None:
    """An interpreter of this version: on the path or of pyenv."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (shutil.which(f"python{version}"), sys.executable, *sorted(root.glob(f"{version}.*/bin/python"))):
        try:
            if (
                found
                and run(found, "-c", "import sys; print('%d.%d' % sys.version_info[:2])", quiet=True).strip() == version
            ):
                return str(found)
        except (RuntimeError, OSError):  # one of pyenv's shims, for example
            continue
    return None


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def create(folder: Path, python: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if uv := shutil.which("uv"):
        run(uv, "venv", "--quiet", "--seed", "--python", python, folder)
    else:
        run(python, "-m", "venv", folder)


def install(folder: Path, *what: str) -> None:
    if uv := shutil.which("uv"):
        run(uv, "pip", "install", "--quiet", "--python", python_of(folder), *what)
    else:
        run(python_of(folder), "-m", "pip", "install", "--quiet", *what, quiet=True)


def installed(folder: Path) -> dict[str, str]:
    """Versions by normalised name."""
    found = json.loads(run(python_of(folder), "-m", "pip", "list", "--format", "json", quiet=True))
    return {normal(item["name"]): item["version"] for item in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def dry_run(folder: Path, what: tuple[str, ...]) -> dict:
    """What pip would change: {"changes": {name: [from, to]}, "adds": {name: version}}, or {"error": ...}."""
    report = folder / "report.json"
    try:
        run(python_of(folder), "-m", "pip", "install", "--quiet", "--dry-run", "--report", report, *what, quiet=True)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[-1]}
    before = installed(folder)
    wanted = {
        normal(item["metadata"]["name"]): item["metadata"]["version"]
        for item in json.loads(report.read_text("utf-8"))["install"]
    }
    return {
        "changes": {
            name: [before[name], version] for name, version in wanted.items() if before.get(name, version) != version
        },
        "adds": {name: version for name, version in wanted.items() if name not in before},
    }


def prepare(row: Row, folder: Path, comfyui: Path) -> dict:
    """Make the environment, unless it is there; what each dry run would have changed on the way."""
    record = folder / "install.json"
    files = (REPO / "requirements.txt", comfyui / "requirements.txt" if row.comfyui else OLD_IMAGE_REWARD)
    key = [str(row), *(file.read_text("utf-8") for file in files)]
    if record.exists() and (found := json.loads(record.read_text("utf-8")))["key"] == key:
        return found["dry_runs"]
    create(folder, find_python(row.python))
    found = {}
    if row.comfyui:
        install(folder, "-r", str(comfyui / "requirements.txt"), *row.packages)
        for name, what in DRY_RUNS.items():
            found[name] = dry_run(folder, what)
            if name == "open_clip_torch":
                install(folder, "open_clip_torch")
        if row.without:
            run(python_of(folder), "-m", "pip", "uninstall", "--quiet", "--yes", row.without)
    else:
        lines = [
            line
            for line in OLD_IMAGE_REWARD.read_text("utf-8").splitlines()
            if not re.match(r"(torch|torchvision)\b", line)
        ]
        (folder / "requirements.txt").write_text("\n".join(lines) + "\n", "utf-8")
        install(folder, *row.packages, *(line for line in lines if re.match("(setuptools|wheel|numpy)=", line)))
        install(
            folder, "--no-build-isolation", "-r", str(folder / "requirements.txt"), *row.packages, "open_clip_torch"
        )
    record.write_text(json.dumps({"key": key, "dry_runs": found}), "utf-8")
    return found


def measure(name: str, cache: Path, comfyui: Path) -> dict:
    """One row of the matrix."""
    row = ROWS[name]
    if find_python(row.python) is None:
        return {"error": f"not run: no Python {row.python} here"}
    try:
        dry_runs = prepare(row, cache / name, comfyui)
        found = json.loads(run(python_of(cache / name), HERE / "check.py", quiet=True).splitlines()[-1])
    except RuntimeError as error:
        return {"error": f"not run: {error}"}
    return {**found, "dry_runs": dry_runs, "date": time.strftime("%Y-%m-%d")}


def cell(result: dict | None) -> str:
    if result is None:
        return "–"
    return (
        f"ok, {result['difference']:.0e}".replace("0e+00", "0")
        if result["ok"]
        else f"**no**: {result['why'].replace('|', '/')}"
    )


def version_table(rows: dict[str, dict]) -> list[str]:
    names = [
        name
        for name in next(iter(rows.values()), {}).get("versions", {})
        if any(row["versions"][name] for row in rows.values())
    ]
    lines = ["| " + " | ".join(["environment", "Python", *names]) + " |", "|" + " --- |" * (len(names) + 2)]
    for name, row in rows.items():
        lines.append(
            "| " + " | ".join([name, row["python"], *(row["versions"][package] or "–" for package in names)]) + " |"
        )
    return lines


def score_table(rows: dict[str, dict], names: list[str]) -> list[str]:
    lines = [
        "| " + " | ".join(["environment", *names, "imports nothing heavy"]) + " |",
        "|" + " --- |" * (len(names) + 2),
    ]
    for name, row in rows.items():
        lazy = f"**no**: {', '.join(row['eager_imports'])}" if row["eager_imports"] else "ok"
        lines.append("| " + " | ".join([name, *(cell(row["models"].get(model)) for model in names), lazy]) + " |")
    return lines


def install_table(rows: dict[str, dict]) -> list[str]:
    lines = ["| environment | pip install | changes | adds |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        for what, found in row["dry_runs"].items():
            if "error" in found:
                lines.append(f"| {name} | {what} | **fails**: {found['error']} | |")
                continue
            changes = (
                ", ".join(f"{package} {old} → {new}" for package, (old, new) in sorted(found["changes"].items()))
                or "nothing"
            )
            adds = ", ".join(f"{package} {version}" for package, version in sorted(found["adds"].items())) or "nothing"
            lines.append(
                f"| {name} | {what} | {changes} | "
                f"{adds if len(found['adds']) <= 6 else str(len(found['adds'])) + ' packages'} |"
            )
    return lines


def tables(rows: dict[str, dict]) -> str:
    """Markdown."""
    missing = [f"{name}: {row['error']}" for name, row in rows.items() if "error" in row]
    rows = {name: row for name, row in rows.items() if "error" not in row}
    names = list(dict.fromkeys(model for row in rows.values() for model in row["models"]))
    extra = [name for name in names if "package" in name]
    parts = [
        version_table(rows),
        score_table(rows, [name for name in names if name not in extra]),
        install_table(rows),
        missing,
    ]
    if extra:
        parts.insert(2, score_table({name: row for name, row in rows.items() if extra[0] in row["models"]}, extra))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def failed(row: dict) -> bool:
    """Scores that are wrong, heavy imports, or an installed version that TreeRPO or open_clip_torch would change."""
    if "error" in row or row["eager_imports"] or not all(result["ok"] for result in row["models"].values()):
        return True
    return any(
        found.get("changes", True) for name, found in row["dry_runs"].items() if not name.startswith("image-reward")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROWS, action="append")
    parser.add_argument(
        "--comfyui",
        type=Path,
        default=os.environ.get("COMFYUI_PATH"),
        help="default: COMFYUI_PATH, else where run.py finds one",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "treerpo" / "compat",
    )
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    file = options.cache / "results.json"
    rows = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if not options.tables:
        comfyui = options.comfyui or find_comfyui()
        if comfyui is None:
            parser.error("no ComfyUI found: name its folder with --comfyui.")
        for name in options.only or ROWS:
            rows[name] = measure(name, options.cache, Path(comfyui))
            print(json.dumps({"row": name, **rows[name]}), flush=True)
            file.write_text(json.dumps(rows, indent=1), "utf-8")
    rows = {name: rows[name] for name in ROWS if name in rows}
    print(tables(rows))
    return int(any(failed(row) for name, row in rows.items() if not options.only or name in options.only))


def find_comfyui() -> Path | None:
    sys.path.insert(0, str(REPO))
    import run as pack

    return pack.find_comfyui()


if __name__ == "__main__":
    sys.exit(main())
