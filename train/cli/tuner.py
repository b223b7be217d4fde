"""A learning rate and a batch size to begin with, found by short trials with the settings of a recipe.

python -m train find-lr DATA [--recipe R] [fit flags]
python -m train find-batch-size DATA [--recipe R] [fit flags]
"""

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from train.data import ImageData
from train.failures import Diverged, is_out_of_memory
from train.learning.schedules import ScheduleConfig
from train.learning.system import Classifier
from train.learning.trainer import ours

LOWEST, HIGHEST, SWEEP = 1e-6, 10.0, 120  # learning rates, and steps from one to the other
SMOOTHING = 0.9  # of the losses, as a moving average
DIVERGED = 3.0  # times the least loss
SMALLEST, WARM_UP, TIMED = 16, 3, 8  # batch size, and steps of a trial
ENOUGH = 0.95  # of the best speed: the smallest batch size that has it is proposed
# of the trainer's settings:
KEPT = (
    "accelerator",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "benchmark",
    "deterministic",
)


@dataclass
class Sweep(ScheduleConfig):
    """Rises by the same factor at each step, for all groups of parameters alike."""

    peak: float = 1.0  # the rate that shares are of

    def rate(self, step: int) -> float:
        return LOWEST * (HIGHEST / LOWEST) ** (step / (SWEEP - 1))

    def factor(self, step: int, total_steps: int) -> float:
        return self.rate(step) / self.peak


class Losses(Callback):
    """Keeps the loss of each step, and ends the trial when it has clearly left the least behind."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        if len(self.losses) % 10 == 0:
            smooth = smoothed(self.values())
            trainer.should_stop = not smooth[-1] < DIVERGED * smooth.min()

    def values(self) -> np.ndarray:
        """float64 [steps], up to the first that is no number."""
        values = torch.stack(self.losses).double().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(values))
        return values[: bad[0]] if len(bad) else values


class Speed(Callback):
    """Images a second after the first steps."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step, self.images, self.seconds = 0, 0, math.inf

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.step += 1
        ours(
            trainer
        ).lightning_module.sums.clear()  # no loss ends a trial: steps take as long with NaN
        if self.step == WARM_UP:
            self._began = _now(pl_module.device)
        elif self.step > WARM_UP:
            self.images += len(batch[0])
        if self.step == WARM_UP + TIMED:
            self.seconds = _now(pl_module.device) - self._began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def smoothed(values: np.ndarray) -> np.ndarray:
    """Moving average, corrected for its start at zero."""
    out, mean = np.empty(len(values)), 0.0
    for i, value in enumerate(values):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        out[i] = mean / (1 - SMOOTHING ** (i + 1))
    return out


def find_lr(settings: dict[str, Any], system: Classifier, data: ImageData) -> None:
    """Raise the rate from step to step (Smith, 2017) and print where the loss falls fastest."""
    config, sweep, watch = system.optimizer, Sweep(peak=system.optimizer.lr), Losses()
    system.schedule = sweep
    with contextlib.suppress(Diverged):  # here that is no failure
        trial(settings, watch, SWEEP).fit(system, datamodule=data)
    losses = smoothed(watch.values())
    if len(losses) < 10:
        raise ValueError(
            f"find-lr: the loss is no number after {len(losses)} steps with the lowest rates; "
            "look at the data and at trainer.precision"
        )
    rates = np.array([sweep.rate(step) for step in range(len(losses))])
    least = int(losses.argmin())
    slopes = np.gradient(losses, np.log(rates))
    steepest = int(slopes[: max(least, 2)].argmin())
    print("learning rate      loss")
    for step in range(4, len(losses), 8):
        print(f"{rates[step]:13.1e} {losses[step]:9.4f}")
    found = f"--model.optimizer.lr {rates[steepest]:.1e}"
    if config.name == "muon":
        found += (
            f" --model.optimizer.others_lr {config.others_lr * rates[steepest] / config.lr:.1e}"
        )
    print(
        f"{found}  (the loss falls fastest there and is least at {rates[least]:.1e}; the recipe has {config.lr:.1e})"
    )


def find_batch_size(settings: dict[str, Any], system: Classifier, data: ImageData) -> None:
    """Double the batch until the memory ends, the data ends or it brings no more, and print the smallest that is
    about as fast as the fastest."""
    speeds: dict[int, float] = {}
    size, why = SMALLEST, "the data ends"
    print("batch size    images/s   memory")
    while not speeds or size <= data.counts["train"]:
        data.batch_size, watch = size, Speed()
        try:
            trial(settings, watch, WARM_UP + TIMED).fit(system, datamodule=data)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = "memory ends"
            break
        speeds[size] = watch.images / watch.seconds
        print(f"{size:10} {speeds[size]:11,.0f}   {_memory()}", flush=True)
        if (
            len(speeds) > 2
            and max(list(speeds.values())[-2:]) < max(list(speeds.values())[:-2]) / ENOUGH
        ):
            why = "larger is not faster"
            break
        size *= 2
    if not speeds:
        raise ValueError(
            f"find-batch-size: not even batches of {SMALLEST} fit; try a smaller --data.size or network"
        )
    best = next(size for size, speed in speeds.items() if speed >= ENOUGH * max(speeds.values()))
    print(
        f"--data.batch_size {best}  (tried to {max(speeds)}: {why}; another batch size wants another learning rate: "
        "find-lr)"
    )


def trial(settings: dict[str, Any], callback: Callback, steps: int) -> L.Trainer:
    """A trainer for some steps on one device that leaves nothing behind."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return L.Trainer(
        **{name: settings[name] for name in KEPT},
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=10**9,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _memory() -> str:
    return (
        f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB"
        if torch.cuda.is_available()
        else "-"
    )
