"""The drift of a set of images against the baseline of a bundle, as the service measures it."""

from bisect import bisect_right
from collections.abc import Mapping

import numpy as np

from models.bundle import Histogram
from models.drift import count_bins, drift_index, histogram, merge_bins

LARGE_DRIFT = 0.25  # by convention, of a population stability index


class DriftReport:
    """Counts the signals of images in the bins of the baseline."""

    def __init__(self, baseline: Mapping[str, Histogram]):
        self.baseline = baseline
        self.images = 0
        self.counts: dict[str, np.ndarray] = {}
        for signal, expected in baseline.items():
            self.counts[signal] = np.zeros(len(expected.counts), np.int64)

    def add(self, signals: Mapping[str, float]) -> None:
        """Count the signals of one image, by the names of the baseline."""
        self.images += 1
        for signal, counts in self.counts.items():
            edges = np.asarray(self.baseline[signal].edges)
            counts += histogram(np.array([signals[signal]]), edges)

    def indices(self) -> dict[str, float]:
        """Return the drift index of each signal; none without a baseline or images."""
        if not self.images:
            return {}
        return {signal: self._index(signal) for signal in self.counts}

    def _index(self, signal: str) -> float:
        """Return the index over bins for which both sides have enough images."""
        expected = self.baseline[signal]
        max_bins = count_bins(sum(expected.counts), self.images)
        inner_edges, expected_counts = merge_bins(expected.edges, expected.counts, max_bins)
        counts = np.zeros(len(expected_counts), np.int64)
        for lower_edge, count in zip(expected.edges, self.counts[signal], strict=False):
            counts[bisect_right(inner_edges, lower_edge)] += count
        return drift_index(np.array(expected_counts), counts)

    def __str__(self) -> str:
        indices = self.indices()
        if not indices:
            return "drift: unknown, the model has no baseline or no image was classified"
        values = sorted(indices.items(), key=lambda item: -item[1])
        text = ", ".join(f"{signal} {index:.2f}" for signal, index in values)
        verdict = "large" if values[0][1] > LARGE_DRIFT else "not large"
        return f"drift against the validation data: {verdict} ({text}; large is above 0.25)"
