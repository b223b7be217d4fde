"""Augmented batches on the device, from pixels in memory or from decoding workers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from models.image import MAX_PIXELS, InputSpec
from train.data.pixels import PixelBatches, build_worker_loader
from train.data.sampler import EpochOrder, keyed_rng
from train.data.source import DataError, Items

# uint8 [B, C, H, W] in channels-last layout; labels int64 [B], or float32 [B, K] of mixed images
Batch = tuple[Tensor, Tensor]

# (images, labels, positions int64 [B], epoch, generator) -> batch
Augment = Callable[[Tensor, Tensor, Tensor, int, np.random.Generator], Batch]


class BatchLoader(ABC):
    """The batches of one part: epochs, steps, and where to resume.

    Step s of epoch e depends on (seed, e, s) only, augmentation included. Lightning sets the epoch
    through `sampler`. `state_dict` holds the epoch and the number of its steps handed out. After
    `load_state_dict` that epoch continues after those steps; any other starts at its first step.
    """

    batch_sampler = None  # Lightning reads this before it asks `sampler` whether it shuffles

    def __init__(
        self,
        labels: Tensor,
        order: EpochOrder,
        device: torch.device,
        augment: Augment | None = None,
    ):
        """Store what makes batches.

        Args:
            labels: int64 [N] of all images, on `device`.
            order: which images make up which batch.
            device: where batches are put.
            augment: applied to each batch.
        """
        self.labels = labels
        self.order = order
        self.device = device
        self.augment = augment
        self.epoch = 0
        self.step = 0
        self._resume_at: tuple[int, int] | None = None  # (epoch, step)

    @property
    def sampler(self) -> "BatchLoader":
        """The object whose `set_epoch` Lightning calls."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch that the next iteration reads."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.step = 0

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its steps handed out."""
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the epoch of `state` after its steps."""
        self.epoch = state["epoch"]
        self.step = state["step"]
        self._resume_at = (self.epoch, self.step)

    def __len__(self) -> int:
        """Steps of a whole epoch, also where this one is resumed."""
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        first_step = self._take_first_step(epoch)
        batches = self.order.batches(epoch)[first_step:]
        for step, images in enumerate(self._load_images(batches), first_step):
            rows = torch.from_numpy(batches[step - first_step])
            rows = rows.to(self.device, non_blocking=True)
            labels = self.labels.index_select(0, rows)
            if self.augment is not None:
                rng = keyed_rng("augment", self.order.seed, epoch, step, self.order.rank)
                images, labels = self.augment(images, labels, rows, epoch, rng)
            self.step = step + 1
            yield images, labels

    def _take_first_step(self, epoch: int) -> int:
        """Return the step to start the epoch at, and forget where to resume."""
        resume_at = self._resume_at
        self._resume_at = None
        if resume_at is None or resume_at[0] != epoch:
            return 0
        return resume_at[1]

    @abstractmethod
    def _load_images(self, batches: list[np.ndarray]) -> Iterator[Tensor]:
        """Yield uint8 [B, C, H, W] on the device for each array of positions."""


class MemoryBatchLoader(BatchLoader):
    """Selects batches from one tensor. A tensor in host memory may feed another device."""

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        order: EpochOrder,
        device: torch.device,
        augment: Augment | None = None,
    ):
        """`pixels` uint8 [N, H, W, C] on `device` or on the CPU; the rest as in `BatchLoader`."""
        super().__init__(labels, order, device, augment)
        self.pixels = pixels

    def _load_images(self, batches: list[np.ndarray]) -> Iterator[Tensor]:
        flat = self.pixels.flatten(1)
        image_shape = self.pixels.shape[1:]
        for positions in batches:
            rows = torch.from_numpy(positions).to(flat.device, non_blocking=True)
            images = flat.index_select(0, rows).view(-1, *image_shape)
            if images.device != self.device:
                images = images.pin_memory().to(self.device, non_blocking=True)
            yield images.permute(0, 3, 1, 2)


class StreamBatchLoader(BatchLoader):
    """Reads and decodes batches in worker processes, some batches ahead."""

    def __init__(
        self,
        items: Items,
        spec: InputSpec,
        labels: Tensor,
        order: EpochOrder,
        device: torch.device,
        augment: Augment | None = None,
        workers: int = 0,
        max_pixels: int = MAX_PIXELS,
    ):
        """`spec`: what items are decoded to; `workers`: 0 decodes in this process."""
        super().__init__(labels, order, device, augment)
        self.dataset = PixelBatches(items, spec, max_pixels)
        self.workers = workers

    def _load_images(self, batches: list[np.ndarray]) -> Iterator[Tensor]:
        pin_memory = self.device.type == "cuda"
        for pixels in build_worker_loader(self.dataset, batches, self.workers, pin_memory):
            if isinstance(pixels, DataError):
                raise pixels
            images = torch.as_tensor(pixels).to(self.device, non_blocking=True)
            yield images.permute(0, 3, 1, 2)
