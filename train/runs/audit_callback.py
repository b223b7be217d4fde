"""The audit as a part of training and testing."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from train import audit
from train.learning.trainer import ours
from train.runs import distributed


class Audit(L.Callback):
    """Looks at the data before the first step, in one process; the report lies beside the run's checkpoints."""

    def __init__(self, enabled: bool = True):
        """
        Args:
            enabled: look for duplicates, leakage and doubtful labels before training; once for the same data and split.
        """
        self.enabled = enabled

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        checkpoint = trainer.checkpoint_callback
        place = checkpoint.dirpath if isinstance(checkpoint, ModelCheckpoint) else None
        self._look(trainer, Path(place or trainer.default_root_dir) / "audit")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, None)

    def _look(self, trainer: L.Trainer, out: Path | None) -> None:
        us = ours(trainer)
        if not self.enabled or us.fast_dev_run:
            return
        audit.take(
            us.datamodule, distributed.wait_for(trainer, lambda: audit.run(us.datamodule, out))
        )
