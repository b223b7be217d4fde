"""What each epoch came to, for the curves of the report; kept through checkpoints."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class History(Callback):
    """One row an epoch: `epoch`, `seconds`, `lr`, what training came to, and validation in an epoch that had one."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._began: float | None = None
        self._validated: dict[
            str, float
        ] = {}  # in the epoch under way; Lightning shows the last one for ever

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began, self._epoch = (
            time.monotonic(),
            trainer.current_epoch,
        )  # also of an epoch that is resumed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch > self._epoch:
            self._close(trainer)  # the metrics of an epoch are all there once the next one begins
        self._began, self._epoch = time.monotonic(), trainer.current_epoch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/")
            }

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close(trainer)

    def _close(self, trainer: L.Trainer) -> None:
        if self._began is None:
            return
        found = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if not name.endswith("_step") and not name.startswith(("lr-", "val/"))
        }
        rates = [
            group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups
        ]
        self.rows = [row for row in self.rows if row["epoch"] < self._epoch + 1]
        about = {
            "epoch": self._epoch + 1,
            "seconds": time.monotonic() - self._began,
            "lr": max(rates),
        }
        self.rows.append(about | found | self._validated)
        self._began, self._validated = None, {}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "validated": self._validated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self._validated = state["rows"], state["validated"]
