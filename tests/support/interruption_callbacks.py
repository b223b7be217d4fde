"""Lightning callbacks for runs under test; they execute in the training process.

`SendSignal` sends real signals at a chosen moment. `RecordBatches` records the images that each
process trains on.
"""

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
    """Sends the signal that the environment variable SEND_SIGNAL describes, KIND:MOMENT:NUMBER.

    TERM:step:7 is SIGTERM to this process within the seventh step. Moments: `step`; `validation` of
    epoch NUMBER; `epoch`, its start; `end` of the training; `after` it, for every callback;
    `export`, NUMBER tenths of a second after the training. Kinds: a signal's name without SIG;
    LAUNCHER, SIGTERM to the process that started this one; GROUP, SIGTERM to all processes of this
    one's group; SLEEP, no signal, but a minute's pause, and half a second at the moment before;
    STALL, the same pause after a tenth of a second at each moment before.
    """

    def __init__(self) -> None:
        description = os.environ.get("SEND_SIGNAL") or "TERM:never:0"
        self.kind, self.moment, self.number = description.split(":")
        self.is_sent = False
        if self.kind == "GROUP":
            os.setpgid(0, 0)  # a new process group, as under a launcher

    def _send_at(self, moment: str, number: int, trainer: L.Trainer) -> None:
        if self.kind == "SLEEP" and (moment, str(number + 1)) == (self.moment, self.number):
            time.sleep(0.5)  # a slow step
        if self.kind == "STALL" and moment == self.moment and not self.is_sent:
            time.sleep(0.1)  # a fast step
        is_due = (moment, str(number)) == (self.moment, self.number)
        if self.is_sent or not is_due or not trainer.is_global_zero:
            return

        self.is_sent = True
        if self.kind in ("SLEEP", "STALL"):
            print("asleep", flush=True)
            time.sleep(60)
        elif self.kind == "LAUNCHER":
            os.kill(os.getppid(), signal.SIGTERM)
        elif self.kind == "GROUP":
            # Sent by another process: decoding workers take a signal of their parent for the end
            # of the epoch.
            subprocess.run(["sh", "-c", f"kill -TERM -{os.getpid()}"])
            time.sleep(0.5)  # the processes without a handler end
        else:
            os.kill(os.getpid(), getattr(signal, f"SIG{self.kind}"))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._send_at("step", trainer.fit_loop.total_batch_idx + 1, trainer)
        if self.is_sent and self.kind == "LAUNCHER":
            time.sleep(0.1)  # the launcher passes the signal on

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._send_at("validation", trainer.current_epoch + 1, trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._send_at("epoch", trainer.current_epoch + 1, trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._send_at("end", 0, trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.moment == "export":
            seconds = int(self.number) / 10
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
        self._send_at("after", 0, trainer)


class RecordBatches(Callback):
    """Appends one line per image to $RECORD/<rank>: the epoch and the SHA-256 of the image."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int
    ) -> None:
        with open(Path(os.environ["RECORD"]) / str(trainer.global_rank), "a") as file:
            for image in batch[0].numpy():
                digest = hashlib.sha256(image.tobytes()).hexdigest()
                print(trainer.current_epoch, digest, file=file)
