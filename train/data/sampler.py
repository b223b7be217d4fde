"""Which images make up which batch: a pure function of seed, epoch, step and rank.

Because nothing else decides the order, a run can resume at any step and read what it would have
read.
"""

import zlib
from dataclasses import dataclass

import numpy as np


def keyed_rng(purpose: str, *key: int) -> np.random.Generator:
    """Return a generator that depends on the purpose and on each number of the key only."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), len(key), *key])


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """The batches of one part, for one process out of `world_size`.

    All processes draw the same permutation of the part; the process of rank r takes every
    world_size-th image from r on. So step s of all processes together holds the same images as step
    s of one process with a batch world_size times larger, except in the last two steps.

    Each image is seen once an epoch, and all processes make the same number of steps: they differ
    by one image at most, and an image that would make a batch alone joins the batch before,
    because batch norm can't use a batch of one. A last batch of less than half the batch size
    shares evenly with the one before: a small last batch would distort the batch statistics that
    validation uses.
    """

    rows: np.ndarray  # int64 [N], positions of the part's images
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    weights: np.ndarray | None = None  # float64 [N], sum 1: draw with replacement by these
    repeat_first_epoch: bool = False  # use the order of epoch 0 in each epoch

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same in all processes."""
        # A single remaining image joins the batch before, so it is not counted.
        images = self._images_per_process - (self.batch_size > 1)
        return max(1, -(-images // self.batch_size))

    @property
    def _images_per_process(self) -> int:
        """Images of the process that has the fewest."""
        return len(self.rows) // self.world_size

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the positions of this process's images, int64, one array for each step."""
        rows = self._epoch_rows(epoch)[self.rank :: self.world_size]

        boundaries = np.arange(1, self.steps) * self.batch_size
        if len(boundaries):
            last_size = self._images_per_process - boundaries[-1]
            missing = self.batch_size - last_size
            if 2 * missing > self.batch_size:
                boundaries[-1] -= missing // 2
        return np.split(rows, boundaries)

    def _epoch_rows(self, epoch: int) -> np.ndarray:
        """Positions of all processes' images in the order of the epoch."""
        if not self.shuffle:
            return self.rows

        rng = keyed_rng("order", self.seed, 0 if self.repeat_first_epoch else epoch)
        if self.weights is None:
            return rng.permutation(self.rows)
        return rng.choice(self.rows, len(self.rows), p=self.weights)
