"""How the training is doing, for Prometheus, on a port of its own while the job runs.

Nothing is computed for it in a step: a scrape reads Python's own counters. The loss and accuracy of the epoch so far
come from the system's sums, which are copied from the device without waiting every `log_every_n_steps`.
"""

import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from train.learning.trainer import ours

PREFIX = "imago_train_"


class Monitor(Callback, Collector):
    """Serves the metrics of each node's first process, which stand for those beside it: they take the same steps."""

    def __init__(self, port: int | None = None, host: str = "0.0.0.0"):
        """
        Args:
            port: where Prometheus finds the metrics of the training, at /metrics; none by default.
            host: the address to listen on.
        """
        if port is not None and not 0 < port < 65536:
            raise ValueError(f"monitor.port: {port} is not between 1 and 65535")
        self.port, self.host = port, host
        self._trainer: L.Trainer | None = None
        self._images, self._sums = 0, torch.zeros(4, dtype=torch.float64)
        self._speed, self._since = 0.0, (time.monotonic(), 0)
        self._metrics: dict[str, float] = {}
        self._fitting = False

    def start(self, trainer: L.Trainer) -> None:
        """Serve from now on. Raises ValueError where the port is taken."""
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
        self._since = time.monotonic(), self._images
        self._fitting = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fitting = False

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._trainer is None:
            return
        self._images += len(batch[0]) * trainer.world_size // trainer.num_nodes
        every = ours(trainer).log_every_n_steps  # 0 for never, save at the end of an epoch
        if trainer.is_last_batch or (every and (batch_idx + 1) % every == 0):
            self._sums.copy_(
                ours(trainer).lightning_module.sums["train"].totals(), non_blocking=True
            )
            then, images = self._since
            self._since = now, _ = time.monotonic(), self._images
            self._speed = (self._images - images) / (now - then)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._trainer is not None:
            self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._since = time.monotonic(), self._images  # a validation does not count as slow training

    def collect(self) -> Iterator[Metric]:
        trainer = self._trainer
        assert trainer is not None  # `start` has registered this
        loss, right, images, _ = self._sums.tolist()
        epochs = (
            trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else float("inf")
        )
        yield _gauge(
            "fitting",
            "1 from the first epoch to the last; 0 in the audit before and in making the bundle "
            "after.",
            self._fitting,
        )
        yield _gauge("epoch", "Epoch under way, from 1.", min(trainer.current_epoch + 1, epochs))
        yield _gauge(
            "epochs", "Epochs asked for; infinite where steps or time end the run.", epochs
        )
        yield _gauge("step", "Optimizer steps done.", trainer.global_step)
        yield CounterMetricFamily(
            PREFIX + "images",
            "Images trained on by this node since this start.",
            value=self._images,
        )
        yield _gauge("images_per_second", "Speed of training over the last steps.", self._speed)
        if images:
            yield _gauge("loss", "Mean loss of the epoch so far.", loss / images)
            yield _gauge("accuracy", "Training accuracy of the epoch so far.", right / images)
        for name, about in (
            ("val/loss", "Loss of the last validation."),
            ("val/accuracy", "Accuracy there."),
        ):
            if name in self._metrics:
                yield _gauge(name.replace("/", "_"), about, self._metrics[name])
        if trainer.optimizers:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            yield _gauge("learning_rate", "Of the first group of parameters.", rate)
        device = trainer.strategy.root_device
        if device.type == "cuda":
            yield _gauge(
                "gpu_memory_bytes",
                "Memory of the GPU taken by tensors.",
                torch.cuda.memory_allocated(device),
            )
            yield _gauge(
                "gpu_memory_peak_bytes", "The most so far.", torch.cuda.max_memory_allocated(device)
            )

    def describe(self) -> list[Metric]:
        return []  # so that registering does not collect yet


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, about, value=value)
