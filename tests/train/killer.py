"""A callback for the tests' runs: sends this process a real signal at a chosen moment, which KILL names.

KILL=TERM:step:7 is SIGTERM within the seventh step; KILL=KILL:validation:2 is SIGKILL in the second epoch's
validation. Moments: step, validation, epoch (its start), end (of the training).
"""
import os
import signal

import lightning as L
from lightning.pytorch.callbacks import Callback


class Killer(Callback):
    def __init__(self) -> None:
        self.kind, self.moment, self.number = (os.environ.get("KILL") or "TERM:never:0").split(":")

    def _strike(self, moment: str, number: int) -> None:
        if (moment, str(number)) == (self.moment, self.number):
            self.moment = "never"
            os.kill(os.getpid(), getattr(signal, f"SIG{self.kind}"))

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self._strike("step", trainer.fit_loop.total_batch_idx + 1)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self._strike("validation", trainer.current_epoch + 1)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._strike("epoch", trainer.current_epoch + 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._strike("end", 0)
