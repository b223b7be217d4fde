"""Callbacks for the tests' runs: one sends real signals at a chosen moment, one notes which images are trained on."""

import hashlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class SendSignal(Callback):
    """Sends what the environment variable SEND_SIGNAL says, e.g. TERM:step:7 for SIGTERM to this process within the seventh step.

    Moments: step, validation (in this epoch), epoch (its start), end (of the training), after (it, for every callback),
    export (so many tenths of a second after the training). LAUNCHER:… is SIGTERM to the process that started this one;
    GROUP:… to all processes of this one's group; SLEEP:… hangs for a minute.
    """

    def __init__(self) -> None:
        self.kind, self.moment, self.number = (
            os.environ.get("SEND_SIGNAL") or "TERM:never:0"
        ).split(":")
        self.struck = False
        if self.kind == "GROUP":
            os.setpgid(0, 0)  # a group of its own, as a launcher gives it

    def _strike(self, moment: str, number: int, trainer: L.Trainer) -> None:
        if (
            self.struck
            or (moment, str(number)) != (self.moment, self.number)
            or not trainer.is_global_zero
        ):
            return
        self.struck = True
        if self.kind == "SLEEP":
            print("asleep", flush=True)
            time.sleep(60)
        elif self.kind == "LAUNCHER":
            os.kill(os.getppid(), signal.SIGTERM)
        elif self.kind == "GROUP":
            # by another process, as workers that decode take a signal of their parent for the end of the epoch
            subprocess.run(["sh", "-c", f"kill -TERM -{os.getpid()}"])
            time.sleep(0.5)  # whom it ends has ended
        else:
            os.kill(os.getpid(), getattr(signal, f"SIG{self.kind}"))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._strike("step", trainer.fit_loop.total_batch_idx + 1, trainer)
        if self.struck and self.kind == "LAUNCHER":
            time.sleep(0.1)  # the word takes a while to come round

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._strike("validation", trainer.current_epoch + 1, trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._strike("epoch", trainer.current_epoch + 1, trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._strike("end", 0, trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.moment == "export" and stage == "fit":
            threading.Timer(int(self.number) / 10, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if stage == "fit":
            self._strike("after", 0, trainer)


class RecordBatches(Callback):
    """Appends a line an image to $RECORD/<rank>: epoch and digest of the image."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int
    ) -> None:
        with open(Path(os.environ["RECORD"]) / str(trainer.global_rank), "a") as file:
            for image in batch[0].numpy():
                print(trainer.current_epoch, hashlib.sha256(image.tobytes()).hexdigest(), file=file)
