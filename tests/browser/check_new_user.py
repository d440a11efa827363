"""What a new user does, from dropping the folder in to the first tuned picture; counts the actions and the minutes.

    python tests/browser/check_new_user.py --comfyui PATH [--iterations N] [--pictures FOLDER]

A fresh ComfyUI without any model. Everything after the start is done with mouse and keyboard in the page, without
waiting longer than the page needs. Needs playwright and a chromium.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from page import Page


class NewUser:
    """Does one thing after the other, and keeps count."""

    def __init__(self, page: Page):
        self.page, self.done, self.began = page, [], time.perf_counter()

    def acts(self, what: str, deed) -> None:
        deed()
        self.done.append(what)
        print(f"{len(self.done):3d}  {what}  ({time.perf_counter() - self.began:.0f} s)", flush=True)

    def open_template(self, name: str) -> None:
        browser = self.page.page
        self.acts("click Templates", lambda: browser.get_by_label("Templates", exact=True).first.click())
        self.acts(
            "click TreeRPO", lambda: browser.get_by_role("dialog").get_by_text("TreeRPO", exact=True).first.click()
        )
        self.acts(f"click {name}", lambda: browser.get_by_test_id(f"template-workflow-{name}").click())
        browser.wait_for_function(
            "(name) => app.graph._nodes.some((node) => node.type.startsWith('TreeRPO')) && "
            "app.extensionManager.workflow.activeWorkflow?.path.includes(name)",
            arg=name,
        )
        browser.wait_for_timeout(500)

    def finished(self, count: int) -> None:
        """Waits until ComfyUI has finished so many runs in all."""
        while True:
            runs = self.page.client.get("/history")
            bad = [run["status"] for run in runs.values() if run["status"]["status_str"] != "success"]
            if bad:
                raise SystemExit(f"a run failed: {json.dumps(bad[0])[:600]}")
            if len(runs) >= count:
                return
            time.sleep(0.3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder")
    parser.add_argument("--iterations", type=int, help="another number than the template's, to be quicker")
    parser.add_argument("--pictures", type=Path, help="a folder for a screenshot")
    options = parser.parse_args()
    began = time.perf_counter()
    with Page(options.comfyui) as page:
        browser, user, opened = page.page, NewUser(page), time.perf_counter()
        user.began = began
        user.done += ["drop the folder into custom_nodes", "start ComfyUI", "open its page"]
        user.open_template("start_here")
        if options.iterations:
            browser.evaluate(
                "(count) => app.graph._nodes.find((one) => one.type === 'TreeRPOSimple').widgets"
                ".find((one) => one.name === 'iterations').value = count",
                options.iterations,
            )
        user.acts("click Run", lambda: browser.get_by_test_id("queue-button").first.click())
        user.finished(1)
        print(
            f"{len(user.done)} actions, {(time.perf_counter() - began) / 60:.1f} minutes from the start of ComfyUI to "
            f"before and after, {time.perf_counter() - opened:.0f} s of them with the page open",
            flush=True,
        )
        if options.pictures:
            page.picture(options.pictures / "new_user.png")
        return 1 if page.errors() else 0


if __name__ == "__main__":
    sys.exit(main())
