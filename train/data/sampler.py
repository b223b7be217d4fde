"""Which images make up which batch: pure functions of (seed, epoch, step), whole on any number of processes."""

import zlib
from dataclasses import dataclass

import numpy as np


def rng(purpose: str, *key: int) -> np.random.Generator:
    """Random numbers that depend on the purpose and on every number of the key, and on nothing else."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), len(key), *key])


@dataclass(frozen=True, slots=True)
class Order:
    """The batches of one part, for one process out of `world`.

    All processes draw the same permutation of the part; the process of rank r takes every world-th image from r on, so
    step s of all processes together is batch s of one process with a world times larger batch, save for some images of
    the last two. Every image is seen once an epoch and every process makes the same number of steps: processes differ
    by one image at most, and an image that would need a step of its own joins the batch before instead, as batch norm
    has no use for one alone. Where the last batch would be less than half a one, it shares with the one before: its
    statistics count as much as theirs, and what is validated next rests on them.
    """

    rows: np.ndarray  # int64 [N], the part's images
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    rank: int = 0
    world: int = 1
    weights: np.ndarray | None = (
        None  # float64 [N], sum 1: draw with replacement by these instead of a permutation
    )
    still: bool = False  # every epoch is like the first

    @property
    def steps(self) -> int:
        return max(1, -(-(self._fewest - (self.batch_size > 1)) // self.batch_size))

    @property
    def _fewest(self) -> int:
        """Images of the process that has the fewest."""
        return len(self.rows) // self.world

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of each step's images of this process, int64, in the order of the steps."""
        rows = self.rows
        if self.shuffle:
            draw = rng("order", self.seed, 0 if self.still else epoch)
            rows = (
                draw.permutation(rows)
                if self.weights is None
                else draw.choice(rows, len(rows), p=self.weights)
            )
        edges = np.arange(1, self.steps) * self.batch_size
        if len(edges):
            missing = self.batch_size - (self._fewest - edges[-1])  # of the last batch
            edges[-1] -= missing // 2 if 2 * missing > self.batch_size else 0
        return np.split(rows[self.rank :: self.world], edges)
