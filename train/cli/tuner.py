"""The commands find-lr and find-batch-size: short trials that suggest a value for a recipe.

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
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback

from train.data import ImageData
from train.failures import Diverged, is_out_of_memory
from train.learning.optimizers import OptimizerConfig
from train.learning.schedules import ScheduleConfig
from train.learning.system import Classifier

# The learning-rate sweep
LOWEST_RATE = 1e-6
HIGHEST_RATE = 10.0
SWEEP_STEPS = 120  # from the lowest rate to the highest
MIN_FINITE_STEPS = 10  # with fewer, there is no curve to read a rate from
SMOOTHING = 0.9  # of the losses, as an exponential moving average
DIVERGENCE_FACTOR = 3.0  # a loss this many times the lowest one ends the sweep
CHECK_EVERY_STEPS = 10  # steps between checks for divergence
FIRST_PRINTED_STEP = 4
PRINT_EVERY_STEPS = 8

# The batch sizes
SMALLEST_BATCH = 16
WARM_UP_STEPS = 3
TIMED_STEPS = 8
SUFFICIENT_SPEED = 0.95  # of the highest one: the smallest such batch size is suggested

# Settings of the trainer that also apply to the trials
TRIAL_SETTINGS = (
    "accelerator",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "benchmark",
    "deterministic",
)


@dataclass
class RateSweep(ScheduleConfig):
    """A learning rate that rises by the same factor in each step, for all parameter groups."""

    base_rate: float = 1.0  # the optimizer's learning rate, which factors multiply

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return LOWEST_RATE * (HIGHEST_RATE / LOWEST_RATE) ** (step / (SWEEP_STEPS - 1))

    def factor(self, step: int, total_steps: int) -> float:
        """Return what the base rate is multiplied by in a step."""
        return self.rate(step) / self.base_rate


class LossRecorder(Callback):
    """Records the loss of each step, and ends the trial when the loss has clearly diverged."""

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Record the loss and check for divergence."""
        self._losses.append(outputs["loss"].detach().clone())
        if len(self._losses) % CHECK_EVERY_STEPS == 0:
            trainer.should_stop = self._has_diverged()

    def _has_diverged(self) -> bool:
        losses = self.finite_losses()
        if len(losses) < len(self._losses):
            return True
        smoothed = smooth(losses)
        return bool(smoothed[-1] >= DIVERGENCE_FACTOR * smoothed.min())

    def finite_losses(self) -> np.ndarray:
        """Return the losses up to the first that is not finite, float64 [steps]."""
        losses = torch.stack(self._losses).double().cpu().numpy()
        bad_steps = np.flatnonzero(~np.isfinite(losses))
        return losses[: bad_steps[0]] if len(bad_steps) else losses


class SpeedMeter(Callback):
    """Measures images a second over `TIMED_STEPS` steps that follow `WARM_UP_STEPS` steps."""

    def __init__(self) -> None:
        self._step = 0
        self._images = 0  # of the timed steps
        self._started = 0.0  # time of the last warm-up step
        self._seconds = math.inf  # of all timed steps

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the images of the timed steps, and time them."""
        assert isinstance(pl_module, Classifier)
        # A loss that is not finite would end the trial, although it does not change the speed.
        pl_module.sums.clear()

        self._step += 1
        if self._step == WARM_UP_STEPS:
            self._started = _synchronized_time(pl_module.device)
        elif self._step > WARM_UP_STEPS:
            self._images += len(batch[0])
        if self._step == WARM_UP_STEPS + TIMED_STEPS:
            self._seconds = _synchronized_time(pl_module.device) - self._started

    def images_per_second(self) -> float:
        """Return the measured speed."""
        return self._images / self._seconds


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the exponential moving average, corrected for its start at zero."""
    smoothed = np.empty(len(values))
    average = 0.0
    for i, value in enumerate(values):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        smoothed[i] = average / (1 - SMOOTHING ** (i + 1))
    return smoothed


def find_learning_rate(trainer_settings: Namespace, system: Classifier, data: ImageData) -> None:
    """Raise the learning rate in each step and print the one at which the loss falls fastest.

    The learning-rate range test of Smith, "Cyclical Learning Rates for Training Neural Networks"
    (2017).
    """
    sweep = RateSweep(base_rate=system.optimizer.lr)
    recorder = LossRecorder()
    system.use_schedule(sweep)
    with contextlib.suppress(Diverged):  # high rates are expected to diverge
        build_trial_trainer(trainer_settings, recorder, SWEEP_STEPS).fit(system, datamodule=data)

    losses = smooth(recorder.finite_losses())
    if len(losses) < MIN_FINITE_STEPS:
        raise ValueError(
            f"find-lr: the loss is not finite after {len(losses)} steps at the lowest rates; check "
            "the data and --trainer.precision"
        )
    rates = np.array([sweep.rate(step) for step in range(len(losses))])
    _print_sweep(rates, losses)
    _print_suggested_rate(rates, losses, system.optimizer)


def _print_sweep(rates: np.ndarray, losses: np.ndarray) -> None:
    print("learning rate      loss")
    for step in range(FIRST_PRINTED_STEP, len(losses), PRINT_EVERY_STEPS):
        print(f"{rates[step]:13.1e} {losses[step]:9.4f}")


def _print_suggested_rate(
    rates: np.ndarray, losses: np.ndarray, optimizer: OptimizerConfig
) -> None:
    """Print the flags for the rate, below that of the lowest loss, at which the loss falls fastest.

    Muon's second rate is scaled by the same factor as its first.
    """
    lowest = int(losses.argmin())
    slopes = np.gradient(losses, np.log(rates))
    steepest = int(slopes[: max(lowest, 2)].argmin())

    flags = f"--model.optimizer.lr {rates[steepest]:.1e}"
    if optimizer.name == "muon":
        others_rate = optimizer.others_lr * rates[steepest] / optimizer.lr
        flags += f" --model.optimizer.others_lr {others_rate:.1e}"
    print(
        f"{flags}  (the loss falls fastest there and is lowest at {rates[lowest]:.1e}; the recipe "
        f"has {optimizer.lr:.1e})"
    )


def find_batch_size(trainer_settings: Namespace, system: Classifier, data: ImageData) -> None:
    """Time growing batch sizes and print the smallest that is about as fast as the fastest.

    The size doubles until the memory is too small, the data has fewer images, or the speed no
    longer rises.
    """
    print("batch size    images/s   memory")
    speeds: dict[int, float] = {}  # images a second, by batch size
    size = SMALLEST_BATCH
    reason = "the data ends"
    while not speeds or size <= data.counts["train"]:
        speed = _measure_speed(trainer_settings, system, data, size)
        if speed is None:
            reason = "the memory ends"
            break
        speeds[size] = speed
        print(f"{size:10} {speed:11,.0f}   {_peak_memory()}", flush=True)
        if _has_stopped_rising(list(speeds.values())):
            reason = "larger is not faster"
            break
        size *= 2

    if not speeds:
        raise ValueError(
            f"find-batch-size: not even batches of {SMALLEST_BATCH} fit into memory; try a smaller "
            "--data.size or network"
        )
    sufficient = SUFFICIENT_SPEED * max(speeds.values())
    best = min(size for size, speed in speeds.items() if speed >= sufficient)
    print(
        f"--data.batch_size {best}  (tried up to {max(speeds)}: {reason}; another batch size needs "
        "another learning rate: find-lr)"
    )


def _measure_speed(
    trainer_settings: Namespace, system: Classifier, data: ImageData, batch_size: int
) -> float | None:
    """Return images a second with a batch size, or None where the memory is too small."""
    data.use_batch_size(batch_size)
    meter = SpeedMeter()
    trainer = build_trial_trainer(trainer_settings, meter, WARM_UP_STEPS + TIMED_STEPS)
    try:
        trainer.fit(system, datamodule=data)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return meter.images_per_second()


def _has_stopped_rising(speeds: list[float]) -> bool:
    """Whether the last two batch sizes gain less than 5 % over the best one before them."""
    if len(speeds) <= 2:
        return False
    return max(speeds[-2:]) < max(speeds[:-2]) / SUFFICIENT_SPEED


def build_trial_trainer(trainer_settings: Namespace, callback: Callback, steps: int) -> L.Trainer:
    """Build a trainer that runs this number of steps on one device and writes nothing."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return L.Trainer(
        **{name: trainer_settings[name] for name in TRIAL_SETTINGS},
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


def _peak_memory() -> str:
    if not torch.cuda.is_available():
        return "-"
    return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB"
