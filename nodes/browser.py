"""What reaches the browser beside a node's outputs: events, status lines, and images in ComfyUI's temp folder."""

import sys
from pathlib import Path

import folder_paths

MARKUP = dict.fromkeys(map(ord, '<>&"'))  # for str.translate: taken out


def server():
    """ComfyUI's server; there is none in tests and scripts."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def send(event: str, data: dict) -> None:
    if server() is not None:
        server().send_sync(event, data)


def send_text(text: str, node_id) -> None:
    """A status line under the node, of our own words and numbers: no prompt, no name of a file, a server or a reward.

    ComfyUI 0.3.64's frontend shows it as HTML, so what could be markup does not get through either.
    """
    if node_id is not None and server() is not None:
        server().send_progress_text(text.translate(MARKUP), node_id)


def temporary(subfolder: str, names: list[str], kept: int) -> tuple[Path, list[dict]]:
    """The folder for images of these names, made if need be, and what /view needs to find each. Of earlier images only
    the newest `kept` stay: a long run must not fill the disk.
    """
    folder = Path(folder_paths.get_temp_directory()) / subfolder
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)[:-kept]:
        old.unlink(missing_ok=True)
    return folder, [{"filename": name, "subfolder": subfolder, "type": "temp"} for name in names]
