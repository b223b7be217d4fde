"""Batches on the device, from pixels in memory."""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from train.data.order import Order, generator

Batch = tuple[Tensor, Tensor]  # uint8 [B, C, H, W] in channels-last layout, int64 [B]
Augment = Callable[[Tensor, Tensor, Tensor, int, torch.Generator], Batch]


class MemoryLoader:
    """Batches cut from one uint8 tensor by index, on its device; augmented there.

    What step s of epoch e holds depends on (seed, e, s) alone. `state_dict` says how far the loader was read, and after
    `load_state_dict` the next epoch to be read begins at that step. Lightning sets the epoch through `sampler`.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, order: Order, augment: Augment | None = None):
        """`pixels` uint8 [N, H, W, C] and `labels` int64 [N] of all parts; `order` names those to read."""
        self.pixels, self.labels, self.order, self.augment = pixels, labels, order, augment
        self.current, self.step, self._resume = 0, 0, 0

    @property
    def sampler(self) -> "MemoryLoader":
        return self

    def set_epoch(self, epoch: int) -> None:
        self.current = epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.current, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.current, self._resume = state["epoch"], state["step"]

    def __len__(self) -> int:
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        first, self._resume = self._resume, 0
        epoch = self.current
        batches = self.order.epoch(epoch)
        for step in range(first, len(batches)):
            self.step = step + 1
            yield self._batch(torch.from_numpy(batches[step]), epoch, step)

    def _batch(self, index: Tensor, epoch: int, step: int) -> Batch:
        index = index.to(self.pixels.device, non_blocking=True)
        images = self.pixels.index_select(0, index).permute(0, 3, 1, 2)
        labels = self.labels.index_select(0, index)
        if self.augment is None:
            return images, labels
        draw = generator(self.order.seed, epoch, step, self.order.rank)
        return self.augment(images, labels, index, epoch, draw)
