"""What happens around the loop: progress for a person, and pictures of predictions for the logs."""

import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from models.image import decode
from train.learning.trainer import ours


class ProgressBar(LightningProgressBar):
    """One bar over the whole run, drawn by a thread of its own, and one line an epoch.

    It never reads a tensor within an epoch, so it costs no step any time. Where the output is no terminal, only the
    lines an epoch are printed.
    """

    def __init__(self, quiet: bool = False):
        """
        Args:
            quiet: print nothing.
        """
        super().__init__()
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)
        self._began, self._images = 0.0, 0
        self._done: tuple[str, str] | None = None  # epoch and speed of an epoch not yet told
        self._validated = False  # in that epoch; Lightning shows the last validation for ever

    def disable(self) -> None:
        self.console.quiet = True

    def enable(self) -> None:
        self.console.quiet = not self.trainer.is_global_zero

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        total = trainer.num_training_batches * epochs if epochs else None
        if trainer.max_steps > 0:
            total = min(total or trainer.max_steps, trainer.max_steps)
        self._epochs = epochs
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
            total=total,
            completed=trainer.fit_loop.total_batch_idx + 1,
            epoch=self._epoch(trainer),
            speed="",
        )
        self._progress.start()
        self._began = time.perf_counter()  # an epoch that is resumed has no other start

    def _epoch(self, trainer: L.Trainer) -> str:
        return f"{trainer.current_epoch + 1}/{self._epochs or '?'}"

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell(trainer)
        self._began, self._images = time.perf_counter(), 0
        self._progress.update(self._task, epoch=self._epoch(trainer))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._images += len(batch[0]) * trainer.world_size
        self._progress.advance(self._task)
        if trainer.is_last_batch:
            speed = self._images / (time.perf_counter() - self._began)
            self._done = f"epoch {self._epoch(trainer)}", f"{speed:,.0f} img/s"
            self._progress.update(self._task, speed=self._done[1])

    def _tell(self, trainer: L.Trainer) -> None:
        """One line on the epoch that ended; its metrics are there when the next one begins."""
        if not self._done:
            return
        found, words = trainer.callback_metrics, [self._done[0]]
        for part in ("train", "val") if self._validated else ("train",):
            if f"{part}/loss" in found:
                words.append(
                    f"{part} loss {found[f'{part}/loss']:.4f} accuracy {found[f'{part}/accuracy']:.4f}"
                )
        self.console.print("  ".join([*words, self._done[1]]), soft_wrap=True)
        self._done, self._validated = None, False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell(trainer)
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if hasattr(self, "_progress"):
            self._progress.stop()


class EarlyStopping(LightningEarlyStopping):
    """Ends the run when validation no longer gets better; off unless `patience` is given."""

    def __init__(
        self,
        patience: int = 0,
        monitor: str = "val/loss",
        mode: str = "auto",
        min_delta: float = 0.0,
    ):
        """
        Args:
            patience: validations without a better value before the run ends; 0 never ends it.
            monitor: the metric.
            mode: min or max; auto follows the metric.
            min_delta: how much better counts.
        """
        if patience < 0:
            raise ValueError(f"early_stopping.patience: {patience} is less than 0")
        super().__init__(
            monitor, min_delta, patience or 10**9, mode=mode, verbose=patience > 0, strict=False
        )  # a run that ends within its first epoch has no validation


class SamplePredictions(Callback):
    """Draws some validation images with their predictions after a validation, for every logger."""

    def __init__(self, images: int = 16, every_epochs: int = 1):
        """
        Args:
            images: how many validation images; 0 for none.
            every_epochs: draw after every so many epochs.
        """
        if images < 0 or every_epochs < 1:
            raise ValueError("samples: images must be 0 or more and every_epochs 1 or more")
        self.images, self.every_epochs = images, every_epochs
        self._pixels: np.ndarray | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last = trainer.current_epoch + 1 == trainer.max_epochs
        due = (trainer.current_epoch + 1) % self.every_epochs == 0 or last
        if (
            not self.images
            or not due
            or not trainer.loggers
            or not trainer.is_global_zero
            or trainer.sanity_checking
        ):
            return
        data = ours(trainer).datamodule
        if self._pixels is None:
            found = data.samples(self.images)
            self._pixels = np.stack([decode(image, data.input) for _, image, _ in found])
            self._labels = [label for _, _, label in found]
        batch = torch.from_numpy(self._pixels).permute(0, 3, 1, 2).to(pl_module.device)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            probabilities = pl_module(batch).float().softmax(1).cpu().numpy()
        picture = contact_sheet(self._pixels, self._labels, probabilities, data.classes)
        for logger in trainer.loggers:
            log_image(logger, "val/predictions", picture, trainer.global_step)


def contact_sheet(
    pixels: np.ndarray, labels: list[int], probabilities: np.ndarray, classes: list[str]
) -> np.ndarray:
    """Images uint8 [n,H,W,C] in a grid, each with its prediction: green where right, else red with the true class."""
    cell, line, columns = 112, 30, min(8, len(pixels))
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + line)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, image in enumerate(pixels):
        x, y = i % columns * cell, i // columns * (cell + line)
        tile = Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image).convert("RGB")
        sheet.paste(tile.resize((cell - 4, cell - 4), Image.Resampling.NEAREST), (x + 2, y + 2))
        guess = int(probabilities[i].argmax())
        right = guess == labels[i]
        text = f"{_short(classes[guess])} {probabilities[i, guess]:.2f}"
        text += "" if right else f"\nnot {_short(classes[labels[i]])}"
        draw.multiline_text(
            (x + 3, y + cell), text, "darkgreen" if right else "firebrick", font, spacing=1
        )
    return np.asarray(sheet)


def _short(name: str) -> str:
    return name if len(name) <= 12 else name[:11] + "…"


def log_image(logger: Any, name: str, picture: np.ndarray, step: int) -> None:
    """A picture uint8 [H,W,3] to a logger of Lightning: TensorBoard, W&B, MLflow; as a PNG file beside the CSV."""
    kind = type(logger).__name__
    if kind == "TensorBoardLogger":
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif kind == "WandbLogger":
        logger.log_image(name, [picture], step=step)
    elif kind == "MLFlowLogger":
        logger.experiment.log_image(logger.run_id, picture, artifact_file=f"{name}/{step:07d}.png")
    elif logger.log_dir:
        file = Path(logger.log_dir) / name / f"{step:07d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
