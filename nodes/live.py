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
from ..core.runs.evaluation import strips
from ..core.runs.trainer import Event
from .browser import send_text

LIVE_SHARE = 0.01  # of the time at most for the live picture


class Live:
    """What is seen of a run while it goes on: bar, status line, dashboard; all by ComfyUI's own means."""

    def __init__(self, node_id, run, iterations: Callable[[], int], tensorboard: bool):
        """iterations: of the whole run, as far as can be foreseen now."""
        self.node_id, self.run, self.foreseen, self.first = node_id, run, iterations, run.iteration
        self.iterations = iterations()
        self.began = time.perf_counter()
        self.drawn = self.pause = 0.0  # when the picture was drawn, and how long to wait for the next
        self.bar = comfy.utils.ProgressBar(max(self.iterations - self.first, 1) * 100, node_id=node_id)
        self.event: Event | None = None
        self.writer = _tensorboard(run.folder / "tensorboard") if tensorboard else None

    def progress(self, done: int, total: int, denoised) -> None:
        """Sampling is shown as three quarters of an iteration."""
        self.bar.update_absolute((self.run.iteration - self.first) * 100 + 75 * done // total)

    def report(self, event: Event) -> None:
        self.event, self.iterations = event, self.foreseen()
        self.bar.total = max(self.iterations - self.first, 1) * 100
        done = self.run.iteration - self.first
        text = status_line(
            event.row, self.run.iteration, self.iterations, (time.perf_counter() - self.began) / done, memory()
        )
        send_text("\n".join(filter(None, (text, event.note, event.message))), self.node_id)
        began = time.perf_counter()
        if began - self.drawn > self.pause or self.run.iteration == self.iterations:
            self.bar.update_absolute(done * 100, None, ("JPEG", self.picture(), 900))
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

    def picture(self):
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
        return plot.with_strips(dashboard(self.run.metrics, best, worst), rows)

    def sample(self, i: int):
        return Sample(self.event.images[i], float(self.event.total[i]), self.event.prompts[i])

    def end(self, status: str, go_on: str) -> None:
        """How it ended, and what can be done next: `go_on` where it is done."""
        send_text(f"{status} {go_on if self.run.iteration >= self.iterations else 'Run goes on.'}", self.node_id)

    @contextmanager
    def to_its_end(self):
        """However the training inside ends, the node says how, and no longer how much is left."""
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, comfy.model_management.InterruptProcessingException)
            what = "Stopped" if stopped else "Ended by an error"
            saved = ", saved; Run goes on" if self.run.iteration else ""
            send_text(f"{what} at {self.run.iteration} of {self.iterations}{saved}.", self.node_id)
            raise
        finally:
            if self.writer is not None:
                self.writer.close()


def opened(path: Path):
    """A strip as a picture; None where it is damaged or gone."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
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
