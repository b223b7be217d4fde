"""Which images make up which batch: pure functions of (seed, epoch, step), whole on any number of processes."""
from dataclasses import dataclass

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on every number of the key and on nothing else."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


@dataclass(frozen=True, slots=True)
class Order:
    """The batches of one part, for one process out of `world`.

    All processes draw the same permutation of the part; the process of rank r takes every world-th image from r on, so
    step s of all processes together is batch s of one process with a world times larger batch. Every image is seen
    once an epoch and every process makes the same number of steps: what does not fill the last batch is shared out to
    within one image, and where that would leave a process with none, the last batch has one image more elsewhere.
    """

    index: np.ndarray  # int64 [N], positions of the part's images
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    rank: int = 0
    world: int = 1
    weights: np.ndarray | None = None  # float64 [N]: draw with replacement by these instead of a permutation

    @property
    def steps(self) -> int:
        return max(1, -(-(len(self.index) // self.world) // self.batch_size))

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The positions of each step's images of this process, int64, in the order of the steps."""
        index = self.index
        if self.shuffle and self.weights is not None:
            draw = generator(self.seed, epoch)
            chosen = torch.multinomial(torch.from_numpy(self.weights), len(index), True, generator=draw)
            index = index[chosen.numpy()]
        elif self.shuffle:
            index = index[torch.randperm(len(index), generator=generator(self.seed, epoch)).numpy()]
        mine = index[self.rank::self.world]
        return np.split(mine, range(self.batch_size, self.steps * self.batch_size, self.batch_size))
