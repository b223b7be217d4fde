"""A batch inside a predictor: first decoded images, then the outputs of the graph."""

from dataclasses import dataclass

import numpy as np

from serve.model import Model
from serve.worker.batcher import QueuedJob


@dataclass(slots=True)
class DecodedBatch:
    """Jobs whose images are decoded, and the model that will run on them."""

    model: Model
    started: float  # when a predictor took the batch, seconds of time.monotonic()
    is_alone: bool  # no other job waits or runs, so the run may use all threads
    jobs: list[QueuedJob]
    pixels: list[np.ndarray]  # uint8 [H, W, C] of each job
    decode_us: list[int]  # microseconds of each job

    def select(self, positions: list[int]) -> "DecodedBatch":
        """Return the part of the batch at these positions."""
        return DecodedBatch(
            self.model,
            self.started,
            self.is_alone,
            [self.jobs[i] for i in positions],
            [self.pixels[i] for i in positions],
            [self.decode_us[i] for i in positions],
        )


@dataclass(slots=True)
class CompletedBatch:
    """A batch that has run and is answered. Observers get it."""

    model: Model
    jobs: list[QueuedJob]
    pixels: np.ndarray  # uint8 [N, H, W, C]
    outputs: list[np.ndarray]  # probabilities [N, K], energy [N]; cam, embedding if run
