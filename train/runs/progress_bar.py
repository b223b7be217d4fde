"""Progress of a training run on stderr: one bar on a terminal, and one line an epoch."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBar(LightningProgressBar):
    """One bar over the whole run, drawn by a separate thread, and one line an epoch.

    It never reads a tensor within an epoch, so it costs no time in a step. Where the output is not
    a terminal, it prints only the lines.

    Args:
        quiet: print nothing.
    """

    def __init__(self, quiet: bool = False):
        super().__init__()
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)
        self._epochs: int | None = None  # None where steps or time end the run
        self._epoch_started = 0.0
        self._images = 0  # of the current epoch
        self._finished_epoch: tuple[str, str] | None = None  # epoch and speed, not printed yet
        # In that epoch; trainer.callback_metrics also keeps the metrics of an earlier validation.
        self._has_validated = False

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
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train",
            total=self._total_batches(trainer),
            completed=trainer.fit_loop.total_batch_idx + 1,
            epoch=self._epoch_text(trainer),
            speed="",
        )
        self._progress.start()
        # Lightning does not call on_train_epoch_start for an epoch that it resumes.
        self._epoch_started = time.perf_counter()

    def _total_batches(self, trainer: L.Trainer) -> int | float | None:
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
        """Advance the bar."""
        self._images += len(batch[0]) * trainer.world_size
        self._progress.advance(self._task)
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
        self.console.print("  ".join(columns), soft_wrap=True)

        self._finished_epoch = None
        self._has_validated = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that this epoch has validation metrics."""
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
