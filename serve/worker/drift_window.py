"""Drift: how far live traffic has moved from the validation data, as a population stability index for each signal.

Each worker keeps a window of its last images and publishes its histograms; whoever answers /metrics adds those of all
workers up and compares with the bundle's baseline. So the index is right with any number of processes. Where the window
is too small for all bins, as for thousands of classes, neighbours share one.
"""

import threading
import time
from bisect import bisect_right
from collections import deque

import numpy as np

from models.bundle import Histogram, Manifest
from models.drift import image_signals
from models.image import read_header
from serve.metrics.derived_metrics import MIN_IMAGES_PER_BIN
from serve.wire import TENSOR

AT_ONCE = 4  # images of one batch, at most: the thread that measures is one that could predict
RATE = (
    25  # images a second and worker that are measured: a fair sample at a cost that can't be seen
)


class Drift:
    """An observer of batches. Predictor threads share it; one that finds it busy goes on without."""

    def __init__(self, counters, window: int, model):
        self.counters, self.window, self.due, self.lock = counters, window, 0.0, threading.Lock()
        self.start(model)

    def __call__(self, batch) -> None:
        now = time.monotonic()
        if now < self.due or not self.lock.acquire(blocking=False):
            return
        try:
            if self.edges and batch.model is self.model:
                taken = min(len(batch.waiting), AT_ONCE)
                self.due = now + taken / RATE
                for i in range(taken):
                    self.add(signals(batch, i))
        finally:
            self.lock.release()

    def start(self, model) -> None:
        """Begin an empty window with the baseline of a model. An idle worker too: the sum is over all of them."""
        with self.lock:
            for name, labels in list(self.counters.slots):
                if name.startswith("drift_"):
                    self.counters.set(name, *labels, to=0)
            manifest: Manifest = model.manifest
            self.model, self.seen = model, deque[list[int]]()
            self.edges, self.bins = dict[str, list[float]](), dict[str, list[int]]()
            for name, histogram in manifest.baseline.items():
                self.edges[name], counts = coarse(
                    histogram, max(2, self.window // MIN_IMAGES_PER_BIN)
                )
                for i, count in enumerate(counts):
                    self.counters.set("drift_baseline", name, str(i), to=count)
                self.bins[name] = [
                    self.counters.slot("drift_window", name, str(i)) for i in range(len(counts))
                ]

    def add(self, values: dict[str, float]) -> None:
        """Count one image in its bins, and the oldest one no more."""
        slots = [
            self.bins[name][bisect_right(edges, values[name])] for name, edges in self.edges.items()
        ]
        self.seen.append(slots)
        for slot in slots:
            self.counters.values[slot] += 1
        if len(self.seen) > self.window:
            for slot in self.seen.popleft():
                self.counters.values[slot] -= 1


def coarse(histogram: Histogram, most: int) -> tuple[list[float], list[int]]:
    """Edges between bins, and counts, of a histogram of at most `most` bins: neighbours share one where there are more.

    All get about the same mass. What is more frequent than that keeps a bin of its own.
    """
    counts = np.array(histogram.counts)
    if len(counts) <= most:
        return histogram.edges[1:-1], histogram.counts
    middle = (counts.cumsum() - counts / 2) / max(1, counts.sum())
    first = np.flatnonzero(np.diff(np.minimum(middle * most, most - 1).astype(int), prepend=-1))
    return [histogram.edges[i] for i in first[1:]], np.add.reduceat(counts, first).tolist()


def signals(batch, i: int) -> dict[str, float]:
    """All signals of image i of a batch, by the names in `models.bundle.DRIFT_SIGNALS`."""
    probabilities, energy = batch.outputs[0][i], batch.outputs[1][i]
    index = int(probabilities.argmax())
    job, (height, width, _) = batch.waiting[i].job, batch.pixels[i].shape
    if not job.flags & TENSOR:
        size = read_header(job.body)
        height, width = size.height, size.width
    return {
        "class": index,
        "confidence": float(probabilities[index]),
        "energy": float(energy),
        **image_signals(batch.pixels[i])._asdict(),
        "width": width,
        "height": height,
    }
