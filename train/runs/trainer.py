"""The trainer of this project: Lightning's, with types for what Lightning does not declare."""

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler


class ImageTrainer(L.Trainer):
    """Lightning's trainer. Declares attributes that Lightning sets without declaring them."""

    callbacks: list[Callback]
    fast_dev_run: bool | int
    log_every_n_steps: int
    profiler: Profiler

    def add_loggers(self, loggers: Sequence[Logger]) -> None:
        """Log to these as well."""
        self.loggers = [*self.loggers, *loggers]

    def remove_callbacks(self, kind: type[Callback]) -> None:
        """Remove all callbacks of one class."""
        self.callbacks = [callback for callback in self.callbacks if not isinstance(callback, kind)]
