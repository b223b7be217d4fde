"""Progress of a training run on stderr: one bar on a terminal, and one line an epoch."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from train.learning.system import Classifier

SHORTEST_WINDOW = 60.0  # seconds
MARKS = 100  # of a window


class Pace:
    """Measures the seconds per batch over a window of the latest time.

    The window is one epoch, as soon as one has ended, so that it always holds one validation; it is
    never shorter than a minute. Batches of an earlier start of the run do not count.
    """

    def __init__(self, batches: int, now: float):
        """`batches`: those that are done already; `now`: seconds of any clock."""
        self._marks = deque([(now, batches)])
        self._window = SHORTEST_WINDOW  # seconds
        self._seconds_per_batch: float | None = None
        self._lock = threading.Lock()  # the training and the drawing thread measure

    def use_window(self, seconds: float) -> None:
        """Measure over the latest `seconds`, or over the shortest window."""
        self._window = max(SHORTEST_WINDOW, seconds)

    def measure(self, batches: int, now: float) -> float | None:
        """Return the seconds per batch; None before the first batch is done."""
        with self._lock:
            if now - self._marks[-1][0] >= self._window / MARKS:
                self._marks.append((now, batches))
            while len(self._marks) > 1 and self._marks[1][0] <= now - self._window:
                self._marks.popleft()
            started, done_before = self._marks[0]
            if batches > done_before:
                self._seconds_per_batch = (now - started) / (batches - done_before)
            return self._seconds_per_batch


class TimeLeftColumn(ProgressColumn):
    """A column with the time that is left, as h:mm:ss."""

    def __init__(self, estimate: Callable[[], float | None]):
        super().__init__()
        self._estimate = estimate

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        return Text(f"left {format_seconds(self._estimate())}", style="progress.remaining")


class _TrainingProgress(Progress):
    """A bar that reads its position when it is drawn, so that a step only counts."""

    def __init__(self, read_position: Callable[[], int], *columns: ProgressColumn, **options: Any):
        self._read_position = read_position
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Move the bar, and draw it."""
        for task in self.tasks:
            self.update(task.id, completed=self._read_position())
        return super().get_renderables()


def format_seconds(seconds: float | None) -> str:
    """Return a duration as h:mm:ss."""
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))


class ProgressBar(LightningProgressBar):
    """One bar over the whole run, drawn by a separate thread, and one line an epoch.

    It never reads a tensor within an epoch, so it costs no time in a step. Where the output is not
    a terminal, it prints only the lines. The time left includes the steps after the fit.

    Args:
        quiet: print nothing.
    """

    def __init__(self, quiet: bool = False):
        super().__init__()
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)
        self._epochs: int | None = None  # None where steps or time end the run
        self._total_batches: int | float | None = None  # of the run; None where it is unknown
        self._batches = 0  # done, also by earlier starts of the run
        self._pace = Pace(0, 0.0)
        self._epoch_started = 0.0
        self._images = 0  # of the current epoch
        self._validation_started = 0.0
        self.seconds_per_image = 0.0  # of the latest validation
        self._estimate_export: Callable[[float], float] | None = None
        self._finished_epoch: tuple[str, str] | None = None  # epoch and speed, not printed yet
        # In that epoch; trainer.callback_metrics also keeps the metrics of an earlier validation.
        self._has_validated = False

    def expect_export(self, estimate_seconds: Callable[[float], float]) -> None:
        """Include the steps after the fit in the time left.

        `estimate_seconds` returns what they take, given the seconds per image of a validation.
        """
        self._estimate_export = estimate_seconds

    def disable(self) -> None:
        """Print nothing from now on."""
        self.console.quiet = True

    def enable(self) -> None:
        """Print in the first process."""
        self.console.quiet = not self.trainer.is_global_zero

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        if trainer.max_epochs and trainer.max_epochs > 0:
            self._epochs = trainer.max_epochs
        self._total_batches = self._count_batches(trainer)
        self._batches = trainer.fit_loop.total_batch_idx + 1
        self._pace = Pace(self._batches, time.monotonic())
        self._progress = _TrainingProgress(
            lambda: self._batches,
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeLeftColumn(self._estimate_seconds_left),
            console=self.console,
            transient=True,
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train",
            total=self._total_batches,
            completed=self._batches,
            epoch=self._epoch_text(trainer),
            speed="",
        )
        self._progress.start()
        # Lightning does not call on_train_epoch_start for an epoch that it resumes.
        self._epoch_started = time.perf_counter()

    def _estimate_seconds_left(self) -> float | None:
        """Return the estimated time until the bundle is published; None where it is unknown."""
        seconds_per_batch = self._pace.measure(self._batches, time.monotonic())
        if self._total_batches is None or seconds_per_batch is None:
            return None
        seconds = max(0, self._total_batches - self._batches) * seconds_per_batch
        if self._estimate_export is not None:
            seconds += self._estimate_export(self.seconds_per_image)
        return seconds

    def _count_batches(self, trainer: L.Trainer) -> int | float | None:
        """Return the batches of the whole run; None where their number is unknown."""
        total = trainer.num_training_batches * self._epochs if self._epochs else None
        if trainer.max_steps > 0:
            return min(total or trainer.max_steps, trainer.max_steps)
        return total

    def _epoch_text(self, trainer: L.Trainer) -> str:
        return f"{trainer.current_epoch + 1}/{self._epochs or '?'}"

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of the epoch before."""
        self._print_finished_epoch(trainer)
        self._pace.use_window(time.perf_counter() - self._epoch_started)
        self._epoch_started = time.perf_counter()
        self._images = 0
        self._progress.update(self._task, epoch=self._epoch_text(trainer))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the batch and its images."""
        self._batches += 1
        self._images += len(batch[0]) * trainer.world_size
        if trainer.is_last_batch:
            images_per_second = self._images / (time.perf_counter() - self._epoch_started)
            speed = f"{images_per_second:,.0f} img/s"
            self._finished_epoch = (f"epoch {self._epoch_text(trainer)}", speed)
            self._progress.update(self._task, speed=speed)

    def _print_finished_epoch(self, trainer: L.Trainer) -> None:
        """Print the line of an epoch. Its metrics are complete when the next epoch begins."""
        if self._finished_epoch is None:
            return
        epoch, speed = self._finished_epoch
        metrics = trainer.callback_metrics
        parts = ["train"]
        if self._has_validated:
            parts.append("val")

        columns = [epoch]
        for part in parts:
            if f"{part}/loss" in metrics:
                loss = metrics[f"{part}/loss"]
                accuracy = metrics[f"{part}/accuracy"]
                column = f"{part} loss {loss:.4f} accuracy {accuracy:.4f}"
                if f"{part}/balanced_accuracy" in metrics:
                    column += f" (balanced {metrics[f'{part}/balanced_accuracy']:.4f})"
                columns.append(column)
        columns.append(speed)
        seconds_left = self._estimate_seconds_left()
        if seconds_left:
            columns.append(f"left {format_seconds(seconds_left)}")
        self.console.print("  ".join(columns), soft_wrap=True)

        self._finished_epoch = None
        self._has_validated = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to time the validation."""
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that this epoch has validation metrics, and the time per image."""
        assert isinstance(pl_module, Classifier)
        seconds = time.perf_counter() - self._validation_started
        self.seconds_per_image = seconds / max(1, pl_module.data.counts["val"])
        self._has_validated = not trainer.sanity_checking

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of the last epoch and remove the bar."""
        self._print_finished_epoch(trainer)
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove the bar."""
        self._stop()

    def _stop(self) -> None:
        if hasattr(self, "_progress"):
            self._progress.stop()
