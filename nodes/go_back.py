"""The way back to an earlier picture of a run, for web/go_back.js: which there are, and what begin_from leads there."""

from itertools import count
from pathlib import Path

from ..core.runs.evaluation import all_strips
from . import browser
from .runs import NOTHING, known_runs, run_folder, way_back


def pictures(name: str) -> dict:
    """The held-out pictures of a run over its iterations, each with where one gets when one goes back to it.

    {"pictures": [{"iteration", "image": what /view needs, "back": iteration, "choice": begin_from, "name": of the new
    run}]}; "choice" is None where nothing that old is kept. Raises ValueError for what cannot be a run's name.
    """
    folder, runs, found = run_folder(name), known_runs(), []
    for iteration, path in all_strips(folder):
        back = way_back(folder, iteration) if iteration else (0, None)
        one = {"iteration": iteration, "image": _image(path, folder), "back": None, "choice": None, "name": None}
        if back:
            one["back"], which = back
            one["choice"] = f"{folder.name} @ {which}" if which else NOTHING
            one["name"] = _free(f"{folder.name} from {back[0]}", runs)
        found.append(one)
    return {"pictures": found}


def _image(path: Path, folder: Path) -> dict:
    return {"filename": path.name, "subfolder": f"treerpo/{folder.name}/{path.parent.name}", "type": "output"}


def _free(name: str, runs: list[str]) -> str:
    """A name that no run has: name, name 2, name 3 ..."""
    return next(one for i in count(1) if (one := f"{name} {i}" if i > 1 else name) not in runs)


def add_routes(instance) -> None:
    """GET /treerpo/pictures?run=NAME."""
    from aiohttp import web

    @instance.routes.get("/treerpo/pictures")
    async def of_a_run(request):
        try:
            return web.json_response(pictures(request.query.get("run", "")))
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)


if browser.server() is not None:
    add_routes(browser.server())
