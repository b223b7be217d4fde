"""Drift: histograms of a worker's last images, to compare with the bundle's baseline.

Each worker keeps a window of its last images and publishes their histograms as counters. The
metrics server sums them over all workers and computes an index for each signal, so the index is
right with any number of workers. There are as many bins as the baseline and the window have images
for.
"""

import threading
import time
from bisect import bisect_right
from collections import deque

from models.bundle import Histogram
from models.drift import count_bins, measure_signals, merge_bins
from models.image import read_header
from serve.metrics.shared_counters import SharedCounters
from serve.model import Model
from serve.wire import TENSOR
from serve.worker.batch import CompletedBatch

# Few images of a batch are measured, because the thread that measures is one that could predict.
MAX_IMAGES_PER_BATCH = 4
# A fair sample of the traffic, at a cost that does not show.
MAX_IMAGES_PER_SECOND = 25


class DriftWindow:
    """Counts the signals of the last images of a worker. An observer of completed batches.

    All predictors share it. One that finds it locked skips its batch instead of waiting.
    """

    def __init__(self, counters: SharedCounters, size: int, model: Model):
        self.counters = counters
        self.size = size  # images
        self.next_sample = 0.0  # seconds of time.monotonic()
        self.lock = threading.Lock()
        self.start(model)

    def start(self, model: Model) -> None:
        """Begin an empty window for a model and publish its baseline.

        Idle workers do this too, since the baselines of all workers are summed.
        """
        with self.lock:
            self._clear_counters()
            self.model = model
            # For each image in the window, the indices of its bins in `counters.values`.
            self.images: deque[list[int]] = deque()
            self.edges: dict[str, list[float]] = {}  # between the bins of each signal
            self.bins: dict[str, list[int]] = {}  # their indices in `counters.values`
            for signal, histogram in model.baseline.items():
                self._add_signal(signal, histogram)

    def __call__(self, batch: CompletedBatch) -> None:
        """Measure the first images of the batch, if enough time has passed since the last ones."""
        now = time.monotonic()
        if now < self.next_sample or not self.lock.acquire(blocking=False):
            return
        try:
            if not self.edges or batch.model is not self.model:
                return
            count = min(len(batch.jobs), MAX_IMAGES_PER_BATCH)
            self.next_sample = now + count / MAX_IMAGES_PER_SECOND
            for i in range(count):
                self._add(measure_image(batch, i))
        finally:
            self.lock.release()

    def _clear_counters(self) -> None:
        for name, labels in list(self.counters.slots):
            if name.startswith("drift_"):
                self.counters.set(name, *labels, to=0)

    def _add_signal(self, signal: str, histogram: Histogram) -> None:
        """Publish the baseline of a signal and create the bins of its window."""
        max_bins = count_bins(sum(histogram.counts), self.size)
        edges, counts = merge_bins(histogram.edges, histogram.counts, max_bins)
        self.edges[signal] = edges
        self.bins[signal] = []
        for i, count in enumerate(counts):
            self.counters.set("drift_baseline", signal, str(i), to=count)
            self.bins[signal].append(self.counters.slot("drift_window", signal, str(i)))

    def _add(self, values: dict[str, float]) -> None:
        """Count an image in the bins of its signals, and remove the oldest one."""
        bins: list[int] = []
        for signal, edges in self.edges.items():
            position = bisect_right(edges, values[signal])
            bins.append(self.bins[signal][position])

        self.images.append(bins)
        for index in bins:
            self.counters.values[index] += 1
        if len(self.images) > self.size:
            for index in self.images.popleft():
                self.counters.values[index] -= 1


def measure_image(batch: CompletedBatch, i: int) -> dict[str, float]:
    """Return all signals of image `i`, by the names in `models.bundle.DRIFT_SIGNALS`."""
    pixels = batch.pixels[i]
    job = batch.jobs[i].job

    height, width, _ = pixels.shape
    if not job.flags & TENSOR:  # the size of the file, not of the network's input
        header = read_header(job.body)
        height = header.height
        width = header.width

    return measure_signals(batch.outputs[0][i], batch.outputs[1][i], pixels, height, width)
