"""Pick the Winner in the page: asked, answered by keys and clicks, closed and brought back. The server's side is played
here, so that every answer of it can be tried.

    python tests/browser/check_pick.py [--comfyui PATH] [--pictures FOLDER]
"""

import json

from page import main

PROMPT = "a red circle on a white background <img src=x onerror=alert(1)>"
NODE = {"7": {"class_type": "TreeRPOPick", "_meta": {"title": "Pick the Winner"}, "inputs": {"picks": ""}}}


class Asked:
    """The server's side: sends questions, keeps the answers, and says what it is told to say."""

    def __init__(self, page):
        self.page, self.answers, self.status, self.error, self.waiting = page, [], 200, "", []
        self.images = page.evaluate("""async () => { const made = []; for (let i = 0; i < 9; i++) { const c = document.createElement("canvas"); c.width = c.height = 256;
          const d = c.getContext("2d"); d.fillStyle = "#eee"; d.fillRect(0, 0, 256, 256); d.fillStyle = `hsl(${i * 40}, 80%, 45%)`; d.beginPath(); d.arc(128, 128, 30 + 10 * i, 0, 7); d.fill();
          const form = new FormData(); form.append("image", await new Promise((done) => c.toBlob(done)), `pick_${i}.png`); form.append("overwrite", "true");
          const { name } = await (await app.api.fetchApi("/upload/image", { method: "POST", body: form })).json(); made.push({ filename: name, subfolder: "", type: "input" }); }
          return made; }""")
        page.page.unroute_all()
        page.page.route("**/treerpo/pick", self._answer)

    def _answer(self, route):
        if route.request.method == "GET":
            return route.fulfill(json={"questions": self.waiting})
        self.answers.append(json.loads(route.request.post_data))
        route.fulfill(status=self.status, json={"ok": True} if self.status == 200 else {"error": self.error})

    def question(self, id, **more):
        return {
            "id": id,
            "node_id": "7",
            "prompt": PROMPT,
            "how": "best",
            "group": 1,
            "groups": 1,
            "count": 9,
            "images": self.images[: more.get("count", 9)],
            "seconds_left": 60,
            "live": True,
            "iteration": 12,
            **more,
        }

    def ask(self, id, **more):
        self.event("treerpo.pick", self.question(id, **more))

    def event(self, name, data):
        self.page.evaluate("([name, detail]) => app.api.dispatchEvent(new CustomEvent(name, { detail }))", [name, data])

    def answer(self):
        """The newest answer, once it is there."""
        self.page.page.wait_for_timeout(300)
        return self.answers.pop()


def press(page, *keys):
    for key in keys:
        page.page.keyboard.press(key)


def check(page, name, pictures):
    page.load_api(NODE, f"pick {name}")
    page.fit(scale=0.8)
    server = Asked(page)
    dialog, badge = page.page.locator(".treerpo-dialog"), page.page.locator(".treerpo-badge")
    live(page, server, dialog, pictures and pictures / f"pick_{name}.png")
    kinds(page, server, dialog, pictures and pictures / f"ranking_{name}.png")
    refused(page, server, dialog)
    later(page, server, dialog, badge)
    not_while_typing(page, server, dialog)
    two_runs(page, server, dialog)
    assert not badge.count() and not dialog.count()


def live(page, server, dialog, picture):
    server.ask("first", groups=2)
    server.ask("second", group=2, groups=2, prompt="another prompt")
    page.page.wait_for_function(
        "() => [...document.querySelectorAll('.treerpo-dialog img')].every((i) => i.naturalWidth)"
    )
    assert dialog.locator(".prompt").inner_text() == PROMPT and dialog.locator("img").count() == 9
    assert dialog.get_by_text("prompt 1 of 2").is_visible() and "s left" in dialog.locator(".clock").inner_text()
    if picture:
        page.page.screenshot(path=str(picture))
    nodes = page.evaluate("() => app.graph._nodes.length")
    page.evaluate("() => app.canvas.selectNode?.(app.graph._nodes[0])")
    press(page, "Delete", "q", "r")
    assert page.evaluate("() => app.graph._nodes.length") == nodes, "a key reached ComfyUI through the overlay"
    press(page, "3")
    assert server.answer() == {"id": "first", "answer": "3"}
    assert dialog.locator(".prompt").inner_text() == "another prompt"
    dialog.locator("[data-number='7']").click()
    assert server.answer() == {"id": "second", "answer": "7"} and not dialog.count()


def kinds(page, server, dialog, picture):
    server.ask("a", how="best and worst")
    press(page, "3")
    assert dialog.get_by_text("Which is the worst?").is_visible()
    press(page, "7")
    assert server.answer() == {"id": "a", "answer": "3 / 7"}
    server.ask("b", how="best and worst", count=4)
    press(page, "9", "2", "Enter")  # there is no image 9; one without a worst
    assert server.answer() == {"id": "b", "answer": "2"}
    server.ask("c", how="ranking", count=9)
    press(page, "3", "1", "5", "Backspace")
    dialog.locator("[data-number='8']").click()
    if picture:
        page.page.screenshot(path=str(picture))
    press(page, "Enter")
    assert server.answer() == {"id": "c", "answer": "3 > 1 > 8"}
    server.ask("d")
    press(page, "0")
    assert server.answer() == {"id": "d", "answer": "-"} and not dialog.count()


def refused(page, server, dialog):
    server.status, server.error = 400, "There is no image 12."
    server.ask("bad")
    press(page, "1")
    server.answer()
    assert dialog.get_by_role("alert").inner_text() == "There is no image 12."
    server.status, server.error = 404, "Nobody waits for this answer any more."
    press(page, "1")
    server.answer()
    assert (
        dialog.get_by_text("Nobody waits for this answer any more.").is_visible() and not dialog.locator("img").count()
    )
    press(page, "Escape")
    server.status = 200


def later(page, server, dialog, badge):
    server.ask("wait", seconds_left=None)
    press(page, "Escape")
    assert not dialog.count() and "1 waiting" in badge.inner_text() and not server.answers
    badge.click()
    assert dialog.count() and not badge.count()
    server.event("treerpo.pick_done", {"id": "wait", "by": "time-out"})
    assert not dialog.count() and not badge.count()
    server.waiting = [server.question("reloaded")]  # the page is loaded again while a question waits
    page.reload()
    page.page.locator(".treerpo-dialog img").first.or_(badge).wait_for()
    server.waiting = []
    if badge.count():  # the checks press Escape when the page is there
        badge.click()
    press(page, "4")
    assert server.answer() == {"id": "reloaded", "answer": "4"}
    page.load_api(NODE, "again")


def not_while_typing(page, server, dialog):
    page.evaluate(
        "() => { const box = document.createElement('textarea'); box.id = 'writing'; document.body.append(box); "
        "box.focus(); }"
    )
    server.ask("typing")
    page.page.keyboard.type("1 or 2")
    assert page.page.locator("#writing").input_value() == "1 or 2" and not server.answers and dialog.count()
    page.evaluate("() => document.getElementById('writing').remove()")
    press(page, "2")
    assert server.answer() == {"id": "typing", "answer": "2"}


def two_runs(page, server, dialog):
    """Answers go into the node's widget, and the last one offers to run again."""

    def picks():
        return page.evaluate("() => app.graph._nodes[0].widgets.find((w) => w.name === 'picks').value")

    page.evaluate(
        "() => { window.queued = 0; app.queuePrompt = async () => { window.queued++; }; "
        "app.graph._nodes[0].widgets.find((w) => w.name === 'picks').value = 'old: 1' }"
    )
    for group, id in ((1, "aaa"), (2, "bbb")):
        server.ask(id, live=False, seconds_left=None, group=group, groups=2)
    press(page, "5")
    assert picks() == "old: 1\naaa: 5"
    press(page, "0")
    assert picks() == "aaa: 5\nbbb: -" and not server.answers
    assert dialog.get_by_text("All answered").is_visible()
    press(page, "Enter")
    assert page.evaluate("() => window.queued") == 1 and not dialog.count()
    # the images of prompt 2 have changed, those of prompt 1 not
    server.ask("ccc", live=False, seconds_left=None, group=2, groups=2)
    press(page, "1")
    assert picks() == "aaa: 5\nccc: 1"
    press(page, "Escape")
    server.ask("ddd", live=False, seconds_left=None)
    page.load_graph({"nodes": [], "links": [], "version": 0.4}, "other")  # its node is gone: nobody to answer to
    page.page.wait_for_function(
        "() => !document.querySelector('.treerpo-dialog') && !document.querySelector('.treerpo-badge')"
    )


if __name__ == "__main__":
    main(check)
