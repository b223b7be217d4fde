"""Metrics that are no sums: computed when somebody scrapes, from counts that were summed over all processes."""

from collections.abc import Iterable, Mapping

import numpy as np
from prometheus_client.core import GaugeMetricFamily, Metric

from models.drift import psi

HIDDEN = "Counts that another metric is computed from."
FROM = ("drift_baseline", "drift_window", "feedback_window", "model_info")
ENOUGH = 10  # images for each bin before an index of drift means anything
BINS = 15  # of confidence, equally wide, as for the ECE of the bundle

Counts = Mapping[tuple[str, ...], float]


def families(counts: Mapping[str, Counts]) -> Iterable[Metric]:
    digests = {labels[-1] for labels, served in counts["model_info"].items() if served}
    yield from drift(counts["drift_baseline"], counts["drift_window"], len(digests))
    yield from feedback(counts["feedback_window"])


def drift(baseline: Counts, window: Counts, models: int) -> Iterable[Metric]:
    """Metrics from counts by (signal, bin), summed over workers.

    There is no index yet of a window too small for its bins, and none while workers swap one after the other and serve
    two models. A bin that neither side has anything in says nothing; it may be one of a model before.
    """
    index = GaugeMetricFamily(
        "imago_drift_psi",
        "Population stability index of the last images against the bundle's "
        "baseline; above 0.25 much has moved.",
        labels=("signal",),
    )
    images = 0.0
    for signal in sorted({name for name, _ in window}):
        bins = sorted(int(b) for name, b in window if name == signal)
        live = np.array([window[signal, str(b)] for b in bins])
        images = max(images, live.sum())
        expected = np.array([baseline.get((signal, str(b)), 0.0) for b in bins])
        used = (expected > 0) | (live > 0)
        if models == 1 and live.sum() >= ENOUGH * np.count_nonzero(expected) and expected.any():
            index.add_metric((signal,), psi(expected[used], live[used]))
    yield index
    yield GaugeMetricFamily(
        "imago_drift_images", "Images in the windows that drift is measured on.", images
    )


def feedback(window: Counts) -> Iterable[Metric]:
    """Accuracy and expected calibration error (Naeini et al. 2015) of the labels in the windows of all processes."""
    bins = [
        [window.get((part, str(i)), 0.0) for part in ("count", "correct", "confidence")]
        for i in range(BINS)
    ]
    count = sum(b[0] for b in bins)
    accuracy = GaugeMetricFamily(
        "imago_feedback_accuracy", "Share of answers that were right, of the last labels."
    )
    error = GaugeMetricFamily(
        "imago_feedback_ece", "Expected calibration error of the last labels, 0..1."
    )
    if count:
        accuracy.add_metric((), sum(b[1] for b in bins) / count)
        error.add_metric((), sum(abs(b[1] - b[2]) for b in bins) / count)
    yield accuracy
    yield error
