"""What a trainer has beside what Lightning's class declares."""

from typing import TYPE_CHECKING, Protocol, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler

if TYPE_CHECKING:
    from train.data import ImageData
    from train.data.loader import Batches
    from train.learning.system import Classifier


class Ours(Protocol):
    """What Lightning's connectors set, and its own members where ours are of one kind."""

    callbacks: list[Callback]
    datamodule: "ImageData"
    fast_dev_run: bool | int
    lightning_module: "Classifier"
    log_every_n_steps: int
    overfit_batches: int | float
    profiler: Profiler
    train_dataloader: "Batches"


def ours(trainer: L.Trainer) -> Ours:
    """The same trainer, seen as what it is here."""
    return cast(Ours, trainer)
