"""The number of epochs that a time budget allows, from the measured time of a step.

The steps of the measurement change nothing: gradients are dropped, batch statistics and random
numbers restored.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import lightning as L
import torch

from train.data import ImageData
from train.learning.system import Batch, Classifier

MEASURED_STEPS = 4
MAX_SECONDS = 15.0  # after which no further step is measured
RESERVE = 0.05  # share of the budget that is left free: epochs and export vary


@dataclass(frozen=True)
class EpochTime:
    """Measured seconds of an epoch and of the evaluation of one image."""

    epoch: float  # training and validation
    evaluated_image: float


@dataclass(frozen=True)
class Plan:
    """The epochs that are run, and when the command ends."""

    epochs: int
    epoch_seconds: float
    end: datetime

    def describe(self) -> str:
        """Return the plan in words."""
        if self.epochs == 0:
            return f"the time budget leaves no epoch of {self.epoch_seconds:.0f} s; keeps the probe"
        plural = "s" if self.epochs > 1 else ""
        return (
            f"{self.epochs} epoch{plural} of {self.epoch_seconds:.0f} s, done at {self.end:%H:%M}"
        )


def plan_epochs(
    budget_seconds: float,
    elapsed_seconds: float,
    time_of_epoch: EpochTime,
    export_seconds: float,
    max_epochs: int | None,
    has_probe: bool,
) -> Plan:
    """Return how many epochs fit into the budget, at most `max_epochs`.

    Raises ValueError, with the least budget, where nothing can be published in time.
    """
    spare = (1 - RESERVE) * budget_seconds - elapsed_seconds - export_seconds
    epochs = max(0, int(spare // time_of_epoch.epoch))
    if max_epochs is not None and max_epochs >= 0:
        epochs = min(epochs, max_epochs)

    needed = elapsed_seconds + export_seconds
    if not has_probe:
        needed += time_of_epoch.epoch
    is_too_short = spare < 0 or (epochs == 0 and not has_probe)
    if is_too_short:
        least = needed / (1 - RESERVE)
        raise ValueError(
            f"fit.time_budget: {budget_seconds:.0f} s are too short: {elapsed_seconds:.0f} s have "
            f"passed and the bundle takes {export_seconds:.0f} s; give at least {least:.0f}s"
        )

    left = export_seconds + epochs * time_of_epoch.epoch
    return Plan(epochs, time_of_epoch.epoch, datetime.now() + timedelta(seconds=left))


def measure_epoch(trainer: L.Trainer, system: Classifier, data: ImageData) -> EpochTime:
    """Run some steps on the device of the trainer and return the time of an epoch."""
    device = trainer.strategy.root_device
    buffers = {name: value.clone() for name, value in system.network.named_buffers()}
    devices = [device] if device.type == "cuda" else []
    loader = data.train_dataloader()
    with torch.random.fork_rng(devices):
        system.to(device).train()
        train_seconds = _measure_steps(iter(loader), lambda batch: _train(trainer, system, batch))
        system.eval()
        val_loader = data.val_dataloader()
        val_seconds = _measure_steps(iter(val_loader), lambda batch: _evaluate(system, batch))

    for name, value in system.network.named_buffers():
        value.copy_(buffers[name])
    system.zero_grad(set_to_none=True)
    system.cpu().train()
    val_images = data.counts["val"]
    epoch = train_seconds * len(loader) + val_seconds * len(val_loader)
    return EpochTime(epoch, val_seconds * len(val_loader) / val_images)


def _measure_steps(batches: Iterator[Batch], run: Callable[[Batch], None]) -> float:
    """Return the seconds of a step: the median, without the first where there are several."""
    seconds: list[float] = []
    started = time.monotonic()
    for batch in batches:
        step_started = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - step_started)
        if len(seconds) > MEASURED_STEPS or time.monotonic() - started > MAX_SECONDS:
            break
    measured = sorted(seconds[1:] or seconds)
    return measured[len(measured) // 2]


def _train(trainer: L.Trainer, system: Classifier, batch: Batch) -> None:
    images, labels = batch
    with trainer.precision_plugin.forward_context():
        loss = torch.nn.functional.cross_entropy(system(images), labels)
    loss.backward()
    system.zero_grad(set_to_none=True)
    _wait_for(images.device)


@torch.no_grad()
def _evaluate(system: Classifier, batch: Batch) -> None:
    images, _ = batch
    system(images)
    _wait_for(images.device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
