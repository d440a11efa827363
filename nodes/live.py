"""What is seen of a run while it goes on: bar, status line, dashboard; all by ComfyUI's own means."""

import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import comfy.model_management
import comfy.utils
from PIL import Image

from ..core.files import write_picture
from ..core.pictures import plot
from ..core.pictures.dashboard import Sample, dashboard, status_line
from ..core.pictures.theme import DARK, LIGHT, Theme
from ..core.runs.evaluation import strips
from ..core.runs.health import Watch
from ..core.runs.trainer import Event
from .browser import send_text
from .runs import way_back

COMPARE = "Open the template compare to see before and after."
LIVE_SHARE = 0.01  # of the time at most for the live picture
BAR_PAUSE = 0.5  # seconds between two movements of the bar inside an iteration: the page draws all it shows for each


class Live:
    """What is seen of a run while it goes on: bar, status line, dashboard; all by ComfyUI's own means."""

    def __init__(self, node_id, run, iterations: Callable[[], int], tensorboard: bool):
        """iterations: of the whole run, as far as can be foreseen now."""
        self.node_id, self.run, self.foreseen, self.first = node_id, run, iterations, run.iteration
        self.iterations = iterations()
        self.began = time.perf_counter()
        self.drawn = self.pause = 0.0  # when the picture was drawn, and how long to wait for the next
        self.moved = 0.0  # when the bar was
        self.bar = comfy.utils.ProgressBar(max(self.iterations - self.first, 1) * 100, node_id=node_id)
        self.event: Event | None = None
        self.writer = _tensorboard(run.folder / "tensorboard") if tensorboard else None

    def begin(self) -> None:
        """What this Run is about to do, and a first picture."""
        if self.first < self.iterations:
            at = f"Goes on at iteration {self.first + 1}" if self.first else "Begins with iteration 1"
            send_text(f"{at} of {self.iterations}. Stop whenever you like: Run goes on.", self.node_id)
            self.show()

    def show(self) -> None:
        """The bar, and the picture in the node."""
        picture = self.picture(DARK)
        self.bar.update_absolute((self.run.iteration - self.first) * 100, None, ("JPEG", picture, max(picture.size)))

    def progress(self, done: int, total: int, denoised) -> None:
        """Sampling is shown as three quarters of an iteration."""
        if time.perf_counter() - self.moved > BAR_PAUSE:
            self.bar.update_absolute((self.run.iteration - self.first) * 100 + 75 * done // total)
            self.moved = time.perf_counter()

    def report(self, event: Event) -> None:
        self.event, self.iterations = event, self.foreseen()
        self.bar.total = max(self.iterations - self.first, 1) * 100
        done = self.run.iteration - self.first
        text = status_line(
            event.row, self.run.iteration, self.iterations, (time.perf_counter() - self.began) / done, memory()
        )
        send_text("\n".join(filter(None, (text, event.note, event.message))), self.node_id)
        began = time.perf_counter()
        if began - self.drawn > self.pause or self.run.iteration == self.iterations or event.message:
            self.show()
            self.drawn = time.perf_counter()
            self.pause = (self.drawn - began) / LIVE_SHARE
        else:
            self.bar.update_absolute(done * 100)
        if self.writer is not None:
            for name, value in event.row.items():
                self.writer.add_scalar(name, value, self.run.iteration - 1)
        if self.run.iteration % self.run.config["trainer"]["keep_every"] == 0 or self.run.iteration == self.iterations:
            self.samples(event)

    def samples(self, event: Event) -> None:
        """The iteration's images with their scores, as samples/<iteration>.png, and the dashboard."""
        sheet = plot.score_sheet(event.images, event.total, event.prompts, f"iteration {self.run.iteration}", columns=9)
        for name, picture in ((f"samples/{self.run.iteration:06d}.png", sheet), ("dashboard.png", self.picture())):
            write_picture(self.run.folder / name, picture)
        kept = max(self.run.config["trainer"]["keep_last"], 1)  # as many as checkpoints
        for old in sorted((self.run.folder / "samples").glob("[0-9]*.png"), key=lambda file: file.stem)[:-kept]:
            with suppress(OSError):
                old.unlink()

    def picture(self, theme: Theme = LIGHT):
        """The dashboard: dark in the page, light on the disk."""
        best = worst = None
        if self.event is not None and self.event.total.isfinite().any():
            best, worst = (
                self.sample(int(values.argmax()))
                for values in (self.event.total.nan_to_num(float("-inf")), -self.event.total.nan_to_num(float("inf")))
            )
        rows = [
            ("before" if at == 0 else f"{at}", picture)
            for at, path in strips(self.run.folder, self.run.iteration)
            if (picture := opened(path)) is not None
        ]
        picture = dashboard(self.run.metrics, best, worst, theme=theme)
        return plot.with_strips(picture, rows, theme, "held-out prompts: same prompts, same noise")

    def sample(self, i: int):
        return Sample(self.event.images[i], float(self.event.total[i]), self.event.prompts[i])

    def end(self, ended: str, watch: Watch, go_on: str) -> str:
        """How it ended, told; on a second line what can be done next: `go_on` where it is done."""
        trained = self.run.iteration - self.first
        ended += f" This Run went on at iteration {self.first + 1}." if self.first and trained else ""
        status = f"{ended}\nNext: {self.next(watch, go_on)}"
        send_text(status, self.node_id)
        return status

    def next(self, watch: Watch, go_on: str) -> str:
        """What can be done after a Run that was not stopped."""
        if self.run.extra.get("paused"):
            back = way_back(self.run.folder, watch.rollback) if watch.rollback is not None else None
            to = "A new name begins again from the base model."
            if back:
                to = (
                    f"To go on from {back[0]}, press Go back to a picture and click iteration {watch.rollback} "
                    f"(by hand: begin_from … @ {back[1]}, and a new name)."
                )
            return " ".join(filter(None, [COMPARE if watch.finished else "", to, "Run goes on all the same."]))
        if self.run.iteration < self.iterations:
            return f"Run goes on. {COMPARE}"
        return f"{COMPARE} {go_on}" if self.run.iteration > self.first else go_on

    def broken_off(self, stopped: bool) -> str:
        """What is said of a Run that was stopped or failed."""
        at = f"{'Stopped' if stopped else 'Ended by an error'} at {self.run.iteration} of {self.iterations}"
        if not self.run.iteration:
            return f"{at}: no iteration was done yet, Run begins again."
        return f"{at}, saved.\nNext: Run goes on. {COMPARE}" if stopped else f"{at}, saved; Run goes on."

    @contextmanager
    def to_its_end(self):
        """However the training inside ends, the node says how, and no longer how much is left."""
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, comfy.model_management.InterruptProcessingException)
            if stopped and self.run.iteration > self.first:
                with suppress(comfy.model_management.InterruptProcessingException):  # pressed twice
                    self.show()
            send_text(self.broken_off(stopped), self.node_id)
            raise
        finally:
            if self.writer is not None:
                self.writer.close()


def opened(path: Path):
    """A strip as a picture; None where it is damaged or gone."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGBA")
    except (OSError, ValueError):
        return None


def memory() -> int | None:
    """Bytes in use on the GPU; None on a CPU."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        return None
    return comfy.model_management.get_total_memory(device) - comfy.model_management.get_free_memory(device)


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "TensorBoard is switched on in the Trainer, but the package is not installed: pip install tensorboard, or "
            "switch it off."
        ) from None
    return SummaryWriter(str(folder))
