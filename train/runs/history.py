"""Metrics of each epoch, for the curves of the report; kept in checkpoints."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class History(Callback):
    """Collects one row an epoch: `epoch`, `seconds`, `lr`, training and validation metrics."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._epoch = 0  # the current one, from 0
        self._epoch_started: float | None = None  # None when its row is written
        # Of the current epoch only; trainer.callback_metrics keeps those of an earlier epoch.
        self._validation_metrics: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to time the first epoch."""
        # Lightning does not call on_train_epoch_start for an epoch that it resumes.
        self._epoch_started = time.monotonic()
        self._epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the row of the epoch before, whose metrics are complete only now."""
        if trainer.current_epoch > self._epoch:
            self._write_row(trainer)
        self._epoch_started = time.monotonic()
        self._epoch = trainer.current_epoch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of the validation for the row of this epoch."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validation_metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the row of the last epoch."""
        self._write_row(trainer)

    def _write_row(self, trainer: L.Trainer) -> None:
        """Append the row of the current epoch, unless it is written already."""
        if self._epoch_started is None:
            return
        row: dict[str, float] = {
            "epoch": self._epoch + 1,
            "seconds": time.monotonic() - self._epoch_started,
            "lr": _learning_rate(trainer),
        }
        for name, value in trainer.callback_metrics.items():
            if not name.endswith("_step") and not name.startswith(("lr-", "val/")):
                row[name] = float(value)
        row |= self._validation_metrics

        self.rows = [old for old in self.rows if old["epoch"] < self._epoch + 1]
        self.rows.append(row)
        self._epoch_started = None
        self._validation_metrics = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"rows": self.rows, "validated": self._validation_metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the rows of a checkpoint."""
        self.rows = state["rows"]
        self._validation_metrics = state["validated"]


def _learning_rate(trainer: L.Trainer) -> float:
    """Return the highest learning rate of all parameter groups."""
    rates: list[float] = []
    for optimizer in trainer.optimizers:
        rates += [group["lr"] for group in optimizer.param_groups]
    return max(rates)
