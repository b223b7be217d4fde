"""Batches on the device, from pixels in memory or from a stream, augmented there."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from models.image import InputSpec
from train.data.pixels import Decoded, loader
from train.data.sampler import Order, rng
from train.data.source import DataError, Items

Batch = tuple[
    Tensor, Tensor
]  # uint8 [B, C, H, W] in channels-last layout, int64 [B] or float [B, K] when mixed
Augment = Callable[[Tensor, Tensor, Tensor, int, np.random.Generator], Batch]


class Batches(ABC):
    """What `MemoryBatches` and `StreamBatches` share: epochs, steps, where to resume.

    What step s of epoch e holds depends on (seed, e, s) alone, augmentation included. Lightning sets the epoch through
    `sampler`. `state_dict` tells the epoch and how many of its steps were handed out; after `load_state_dict` that
    epoch goes on after them, and any other begins at its first step.
    """

    def __init__(
        self, labels: Tensor, order: Order, device: torch.device, augment: Augment | None = None
    ):
        """`labels` int64 [N] of all rows, on `device`; `order` says which rows make which batch."""
        self.labels, self.order, self.device, self.augment = labels, order, device, augment
        self.epoch, self.step = 0, 0
        self._resume: tuple[int, int] | None = None

    batch_sampler = None  # Lightning looks here before it asks `sampler` whether it shuffles

    @property
    def sampler(self) -> "Batches":
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.step = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.step = self._resume = state["epoch"], state["step"]

    def __len__(self) -> int:
        """Steps of a whole epoch, also when this one is resumed in its midst."""
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        first = self._resume[1] if self._resume and self._resume[0] == epoch else 0
        self._resume = None
        rows = self.order.epoch(epoch)[first:]
        for step, images in enumerate(self._images(rows), first):
            index = torch.from_numpy(rows[step - first]).to(self.device, non_blocking=True)
            batch = images, self.labels.index_select(0, index)
            if self.augment is not None:
                draw = rng("augment", self.order.seed, epoch, step, self.order.rank)
                batch = self.augment(*batch, index, epoch, draw)
            self.step = step + 1
            yield batch

    @abstractmethod
    def _images(self, rows: list[np.ndarray]) -> Iterator[Tensor]:
        """Batches uint8 [B, C, H, W] on the device, one for each array of rows."""


class MemoryBatches(Batches):
    """Cut from one tensor by index. A tensor in the host's memory may feed another device."""

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        order: Order,
        device: torch.device,
        augment: Augment | None = None,
    ):
        """`pixels` uint8 [N, H, W, C] on `device` or on the CPU."""
        super().__init__(labels, order, device, augment)
        self.pixels = pixels

    def _images(self, rows: list[np.ndarray]) -> Iterator[Tensor]:
        flat = self.pixels.flatten(1)
        for some in rows:
            index = torch.from_numpy(some).to(flat.device, non_blocking=True)
            images = flat.index_select(0, index).view(-1, *self.pixels.shape[1:])
            if images.device != self.device:
                images = images.pin_memory().to(self.device, non_blocking=True)
            yield images.permute(0, 3, 1, 2)


class StreamBatches(Batches):
    """Read and decoded by worker processes, some batches ahead."""

    def __init__(
        self,
        items: Items,
        positions: np.ndarray,
        spec: InputSpec,
        labels: Tensor,
        order: Order,
        device: torch.device,
        augment: Augment | None = None,
        workers: int = 0,
    ):
        """`positions` int64 [N] of the rows among the `items`."""
        super().__init__(labels, order, device, augment)
        self.decoded, self.positions, self.workers = Decoded(items, spec), positions, workers

    def _images(self, rows: list[np.ndarray]) -> Iterator[Tensor]:
        batches = [self.positions[some] for some in rows]
        for images in loader(self.decoded, batches, self.workers, pin=self.device.type == "cuda"):
            if isinstance(images, DataError):
                raise images
            yield torch.as_tensor(images).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
