"""ComfyUI's own page in a headless Chromium, on a server of its own: to look at graphs and to check web/treerpo.js.

    with Page(nodes2=True) as page:
        page.load_api(json.loads(path.read_text("utf-8")), "first steps")
        page.run()
        page.picture("first_steps.png")
        assert not page.errors()

A development tool outside the test suite: pip install playwright, and a chromium on the PATH. Run it in a python that
can run ComfyUI.
"""

import logging
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from environments import Problem, find_comfyui
from headless import Client, Server

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingNodesWarning": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False,
}  # nothing over the graph
RUN = """(seconds) => new Promise(async (done) => {
  const ends = ["execution_success", "execution_error", "execution_interrupted"];
  const end = (result) => { clearTimeout(late); ends.forEach((name) => app.api.removeEventListener(name, heard)); done(result) };
  const heard = (event) => end([event.type, event.detail?.exception_message ?? ""]);
  const late = setTimeout(() => end(["late", ""]), seconds * 1000);
  ends.forEach((name) => app.api.addEventListener(name, heard));
  const queued = await app.queuePrompt(0, 1);
  const errors = JSON.stringify(app.lastNodeErrors ?? "");
  if (queued === false && errors !== "{}") end(["refused", errors]); // older pages say false and name no error when all is well
})"""


class Page:
    """`with Page() as page: ...` starts a server with this pack and opens its page.

    comfyui: ComfyUI's folder, None = where run.py finds one; it runs in this python (older versions: with their own
    frontend beside it). nodes2: start with Nodes 2.0 on. size: of the window, in pixels. server: a running
    headless.Server to use instead.
    """

    def __init__(self, comfyui=None, nodes2=False, size=(1900, 1050), server=None):
        self.comfyui, self.settings, self.size, self.server = (
            comfyui,
            {**SETTINGS, "Comfy.VueNodes.Enabled": nodes2},
            size,
            server,
        )
        self.console = []  # (text, address of the script) of every error the page reported, ours or not

    def __enter__(self):
        self._stack = ExitStack()
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _open(self):
        try:
            from playwright.sync_api import sync_playwright
        except ImportError:
            raise Problem("The browser checks need playwright: pip install playwright") from None
        program = next(filter(None, map(shutil.which, BROWSERS)), None)
        if program is None:
            raise Problem("The browser checks need Chromium on the PATH: install chromium.")
        if self.server is None:
            comfyui = self.comfyui or find_comfyui()
            if comfyui is None:
                raise Problem("There is no ComfyUI on this machine: give its folder with --comfyui.")
            self.server = self._stack.enter_context(Server(Path(comfyui), sys.executable, pack=ROOT))
        self.client = Client(self.server.url)
        self.client.request("/settings", self.settings)
        browser = self._stack.enter_context(sync_playwright()).chromium.launch(
            executable_path=program, headless=True, args=QUIET
        )
        self._stack.callback(browser.close)
        self.page = browser.new_page(viewport={"width": self.size[0], "height": self.size[1]})
        self.page.set_default_timeout(120_000)
        self.page.on(
            "console",
            lambda message: (
                self.console.append((message.text, (message.location or {}).get("url", "")))
                if message.type == "error"
                else None
            ),
        )
        self.page.on("pageerror", lambda error: self.console.append((str(error), error.stack or "")))
        self.reload()

    def reload(self):
        """Load the page (again), and wait until ComfyUI is there."""
        self.page.goto(self.server.url, wait_until="domcontentloaded")
        self.page.wait_for_function("() => window.app?.canvas && window.app.extensionManager")
        self.page.wait_for_function(
            "() => app.extensions.some((one) => one.name === 'TreeRPO') && [...document.styleSheets].some((one) => "
            "one.href?.includes('treerpo'))"
        )
        self.page.wait_for_timeout(2000)  # the page goes on loading the last graph
        self.page.keyboard.press("Escape")

    def nodes2(self, on):
        """Switch between the classic nodes and Nodes 2.0."""
        self.page.evaluate("(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", on)
        self.page.wait_for_timeout(1500)

    def load_api(self, graph, name="graph"):
        """Open a graph in API format."""
        self.page.evaluate("([graph, name]) => app.loadApiJson(graph, name)", [graph, name])
        self.page.wait_for_timeout(1500)

    def load_graph(self, graph, name="graph"):
        """Open a graph as the editor saves it."""
        self.page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, name])
        self.page.wait_for_timeout(1500)

    def evaluate(self, script, argument=None):
        return self.page.evaluate(script, argument)

    def run(self, seconds=300):
        """Queue the graph as the Run button does, and wait until it has finished."""
        how, why = self.page.evaluate(RUN, seconds)
        if how != "execution_success":
            raise Problem(
                {
                    "late": f"The graph was not finished after {seconds} s.",
                    "refused": f"ComfyUI refused the graph: {why}",
                }.get(how, f"The graph failed: {why}")
            )
        self.page.wait_for_timeout(1500)  # pictures load

    def errors(self):
        """What the page reported about this pack's own script."""
        return [text for text, where in self.console if "/extensions/treerpo/" in (text + where).lower()]

    def fit(self, *types, scale=1.0):
        """Show the whole graph, or only nodes of these types, at most at this scale."""
        self.page.evaluate(
            """([types, most]) => {
          const shown = app.graph._nodes.filter((n) => !types.length || types.includes(n.type)), c = app.canvas;
          const groups = types.length ? [] : app.graph._groups.map((g) => [...g.pos, ...g.size]);
          const boxes = [...shown.map((n) => [n.pos[0], n.pos[1] - 34, n.size[0], (n.flags?.collapsed ? 0 : n.size[1]) + 34]), ...groups];
          const [l, t] = [0, 1].map((i) => Math.min(...boxes.map((b) => b[i]))), [r, b] = [0, 1].map((i) => Math.max(...boxes.map((b) => b[i] + b[i + 2])));
          const room = c.canvas.getBoundingClientRect();
          c.ds.scale = Math.min((room.width - 160) / (r - l), (room.height - 200) / (b - t), most);
          c.ds.offset[0] = 90 / c.ds.scale - l; c.ds.offset[1] = 110 / c.ds.scale - t;  // below the page's own bars
          c.setDirty(true, true);
        }""",
            [list(types), scale],
        )
        self.page.wait_for_timeout(1000)

    def box(self, kind):
        """Where the first node of this type is on the screen: a clip for `picture`."""
        return self.page.evaluate(
            """(type) => { const n = app.graph._nodes.find((one) => one.type === type), d = app.canvas.ds, room = app.canvas.canvas.getBoundingClientRect();
          const title = window.LiteGraph.NODE_TITLE_HEIGHT ?? 30, at = (v, i) => (v + d.offset[i]) * d.scale + (i ? room.top : room.left);
          return { x: at(n.pos[0], 0) - 8, y: at(n.pos[1] - title, 1) - 8, width: n.size[0] * d.scale + 16, height: (n.size[1] + title) * d.scale + 16 } }""",
            kind,
        )

    def picture(self, file=None, clip=None):
        """PNG of the window, with the graph fitted into it, or of a part {x, y, width, height} of the window as it is."""
        if clip is None:
            self.fit()
        return self.page.screenshot(path=file and str(file), **({"clip": clip} if clip else {}))


def main(check):
    """The command line of a check: it runs once with the classic nodes and once with Nodes 2.0."""
    import argparse

    parser = argparse.ArgumentParser(description=__import__("__main__").__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder")
    parser.add_argument("--pictures", type=Path, help="a folder for screenshots")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    try:
        with Page(options.comfyui) as page:
            # ComfyUI 0.3.64: not yet for users
            hidden = page.evaluate(
                "() => app.ui.settings.settingsLookup?.['Comfy.VueNodes.Enabled']?.type === 'hidden'"
            )
            for nodes2 in (False,) if hidden else (False, True):
                page.nodes2(nodes2)
                check(page, "nodes2" if nodes2 else "classic", options.pictures)
                logging.info("%s: ok", "Nodes 2.0" if nodes2 else "classic nodes")
            if page.errors():
                raise SystemExit("errors in the page:\n" + "\n".join(page.errors()))
    except Problem as problem:
        raise SystemExit(str(problem)) from None
