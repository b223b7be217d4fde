"""Prometheus metrics of a training run, served by a thread of the training process.

A step only adds to Python counters, which a scrape reads. Loss and accuracy of the current epoch
come from the system's sums, which are copied from the device every `log_every_n_steps` steps,
without waiting for it.
"""

import time
from collections.abc import Iterator
from threading import Event
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from train.learning.system import Classifier
from train.runs.preemption import NOTICE
from train.runs.trainer import ImageTrainer

PREFIX = "imago_train_"
SCRAPE_SECONDS = 120  # longer than the interval of most Prometheus servers
SCRAPE_POLL_SECONDS = 0.2


class Monitor(Callback, Collector):
    """Serves metrics in the first process of each node; the others take the same steps.

    Args:
        port: port of the Prometheus metrics of the training, at /metrics; none by default.
        host: address to listen on.
    """

    def __init__(self, port: int | None = None, host: str = "0.0.0.0"):
        if port is not None and not 0 < port < 65536:
            raise ValueError(f"monitor.port: {port} is not between 1 and 65535")
        self.port = port
        self.host = host
        self._trainer: ImageTrainer | None = None
        self._is_refused = False
        self._scraped = Event()
        self._is_fitting = False
        self._images = 0  # trained on by this node since this start
        self._sums = torch.zeros(4, dtype=torch.float64)  # see EpochSums.totals
        self._images_per_second = 0.0
        self._measured_at = time.monotonic()
        self._measured_images = 0  # `_images` at that time
        self._validation_metrics: dict[str, float] = {}

    def start(self, trainer: ImageTrainer) -> None:
        """Serve metrics from now on. Raises ValueError where the port is taken."""
        if self.port is None or trainer.local_rank:
            return
        self._trainer = trainer
        if trainer.strategy.root_device.type == "cuda":
            self._sums = self._sums.pin_memory()

        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(self)
        try:
            start_http_server(self.port, self.host, registry)
        except OSError as error:
            raise ValueError(
                f"monitor.port: can't listen on {self.host}:{self.port}: {error.strerror}"
            ) from error

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to measure the speed."""
        self._start_measuring()
        self._is_fitting = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that the epochs are over."""
        self._is_fitting = False

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the images, and copy the sums of the epoch every few steps."""
        if self._trainer is None:
            return
        self._images += len(batch[0]) * trainer.world_size // trainer.num_nodes

        every = self._trainer.log_every_n_steps  # 0 for at the end of an epoch only
        if trainer.is_last_batch or (every and (batch_idx + 1) % every == 0):
            assert isinstance(pl_module, Classifier)
            self._sums.copy_(pl_module.sums["train"].totals(), non_blocking=True)
            self._measure_speed()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of the validation."""
        if self._trainer is not None:
            metrics = trainer.callback_metrics
            self._validation_metrics = {name: float(value) for name, value in metrics.items()}
        # The time of a validation does not count as training.
        self._start_measuring()

    def _start_measuring(self) -> None:
        self._measured_at = time.monotonic()
        self._measured_images = self._images

    def _measure_speed(self) -> None:
        """Compute the speed since the last call, and start the next measurement."""
        seconds = time.monotonic() - self._measured_at
        self._images_per_second = (self._images - self._measured_images) / seconds
        self._start_measuring()

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; called in a thread of the metrics server."""
        trainer = self._trainer
        assert trainer is not None  # `start` sets it before it registers this collector
        yield from self._collect_progress(trainer)
        yield from self._collect_quality()
        is_refused = self._is_refused
        yield _gauge(
            "gate_refused",
            "1 where the new version is worse than the latest one, which stays.",
            is_refused,
        )
        if is_refused:
            self._scraped.set()
        if trainer.optimizers:
            learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
            yield _gauge(
                "learning_rate", "Learning rate of the first parameter group.", learning_rate
            )
        yield from _collect_gpu_memory(trainer.strategy.root_device)

    def _collect_progress(self, trainer: ImageTrainer) -> Iterator[Metric]:
        """Yield epochs, steps, images and speed."""
        has_epochs = bool(trainer.max_epochs and trainer.max_epochs > 0)
        epochs = float(trainer.max_epochs or 0) if has_epochs else float("inf")
        yield _gauge(
            "fitting",
            "1 while epochs run; 0 in the audit before and while the bundle is written.",
            self._is_fitting,
        )
        yield _gauge("epoch", "Current epoch, from 1.", min(trainer.current_epoch + 1, epochs))
        yield _gauge(
            "epochs", "Epochs of the run; infinite where steps or time end the run.", epochs
        )
        yield _gauge("step", "Optimizer steps done.", trainer.global_step)
        yield CounterMetricFamily(
            PREFIX + "images",
            "Images trained on by this node since this start.",
            value=self._images,
        )
        yield _gauge(
            "images_per_second", "Training speed over the last steps.", self._images_per_second
        )

    def _collect_quality(self) -> Iterator[Metric]:
        """Yield loss and accuracy of the current epoch and of the last validation."""
        loss, correct, images, _ = self._sums.tolist()
        if images:
            yield _gauge("loss", "Mean loss of the current epoch.", loss / images)
            yield _gauge("accuracy", "Training accuracy of the current epoch.", correct / images)
        if "val/loss" in self._validation_metrics:
            loss = self._validation_metrics["val/loss"]
            yield _gauge("val_loss", "Loss of the last validation.", loss)
        if "val/accuracy" in self._validation_metrics:
            accuracy = self._validation_metrics["val/accuracy"]
            yield _gauge("val_accuracy", "Accuracy of the last validation.", accuracy)

    def report_refusal(self) -> None:
        """Export that the gate refused the new version; wait until that is scraped once.

        The process ends afterwards, and a scrape at intervals would miss it.
        """
        if self._trainer is None:
            return
        self._is_refused = True
        end = time.monotonic() + SCRAPE_SECONDS
        while not NOTICE.signum and time.monotonic() < end:
            if self._scraped.wait(SCRAPE_POLL_SECONDS):
                return

    def describe(self) -> list[Metric]:
        """Return nothing: otherwise the registry would call `collect` when this registers."""
        return []


def _collect_gpu_memory(device: torch.device) -> Iterator[Metric]:
    if device.type != "cuda":
        return
    allocated = torch.cuda.memory_allocated(device)
    peak = torch.cuda.max_memory_allocated(device)
    yield _gauge("gpu_memory_bytes", "GPU memory in use by tensors.", allocated)
    yield _gauge("gpu_memory_peak_bytes", "Highest GPU memory in use by tensors.", peak)


def _gauge(name: str, description: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, description, value=value)
