"""What the benchmarks share: ComfyUI in this process with the pack loaded as ComfyUI loads it, timing, and memory."""

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_comfyui() -> None:
    """ComfyUI from COMFYUI_PATH (run.py sets it), on the path. Exits with one sentence where there is none."""
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        sys.exit("This benchmark measures inside ComfyUI, and none was found: set COMFYUI_PATH.")
    sys.path[:] = [comfyui, *[p for p in sys.path if Path(p or ".").resolve() != ROOT], str(ROOT / "tests")]
    import torch
    from comfy.cli_args import args

    args.cpu = args.cpu or not torch.accelerator.is_available()


def load_pack():
    """The pack as ComfyUI loads it."""
    load_comfyui()
    spec = importlib.util.spec_from_file_location(
        "treerpo_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    pack = sys.modules["treerpo_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return pack


def graph(pack, model: str):
    """The by-hand graph on an embedded model, with its files in a temporary folder."""
    from graph import Graph

    built = Graph(pack, Path(tempfile.mkdtemp(prefix="treerpo-bench-")), model)
    built.forget()
    return built


class Peak:
    """Highest memory while the block runs, above where it started: the GPU's where there is one, else this process's
    resident set.
    """

    def __enter__(self):
        import psutil
        import torch

        gc.collect()
        self.cuda = torch.cuda if torch.cuda.is_available() else None
        if self.cuda:
            self.cuda.synchronize()
            self.cuda.reset_peak_memory_stats()
            self.start = self.cuda.memory_allocated()
            return self
        trim()
        process = psutil.Process()
        self.start = self.highest = process.memory_info().rss
        self.running = True

        def watch():
            while self.running:
                self.highest = max(self.highest, process.memory_info().rss)
                time.sleep(0.005)

        self.thread = threading.Thread(target=watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        if self.cuda:
            self.cuda.synchronize()
            self.highest = self.cuda.max_memory_allocated()
        else:
            self.running = False
            self.thread.join()
        self.bytes = self.highest - self.start


def trim() -> None:
    """Hand freed memory back to the system (glibc), so that a peak is a run's own, not hidden in an earlier one's."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def timed(work) -> float:
    """Seconds, the GPU's queue included."""
    import torch

    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def arguments(description: str, **options) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the results there as well")
    for name, (default, text) in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default {default})")
    return parser.parse_args()


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def save(results: dict, path: Path | None) -> None:
    """A run that is stopped in the middle of it leaves the file as it was."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(path)
