"""Drift and feedback: metrics that are not sums, computed in a scrape from the summed counts."""

from collections.abc import Iterator, Mapping

import numpy as np
from prometheus_client.core import GaugeMetricFamily, Metric

from models.drift import MIN_IMAGES_PER_BIN, drift_index
from serve.metrics.definitions import FEEDBACK_BINS

# A value for each combination of label values.
Counts = Mapping[tuple[str, ...], float]


def compute(
    drift_baseline: Counts, drift_window: Counts, feedback_window: Counts, model_info: Counts
) -> Iterator[Metric]:
    """Yield the derived metrics from the summed counts of the metrics that the parameters name."""
    digests = {labels[-1] for labels, served in model_info.items() if served}
    yield from compute_drift(drift_baseline, drift_window, len(digests))
    yield from compute_feedback(feedback_window)


def compute_drift(baseline: Counts, window: Counts, models: int) -> Iterator[Metric]:
    """Yield the drift metrics from counts by (signal, bin), summed over workers.

    There is no index while the window is too small for its bins, nor while workers swap models one
    after the other and `models`, the number of models served, is 2. Bins that are empty on both
    sides are ignored: they may belong to an earlier model. What chance explains is subtracted.
    """
    psi_metric = GaugeMetricFamily(
        "imago_drift_psi",
        "Population stability index of the last images against the bundle's baseline, "
        "less what chance explains: 0 without drift, above 0.25 the data has changed considerably.",
        labels=("signal",),
    )
    images = 0.0
    for signal in sorted({signal for signal, _ in window}):
        indices = sorted(int(index) for name, index in window if name == signal)
        live = np.array([window[signal, str(i)] for i in indices])
        expected = np.array([baseline.get((signal, str(i)), 0.0) for i in indices])
        images = max(images, live.sum())

        min_images = MIN_IMAGES_PER_BIN * np.count_nonzero(expected)
        if models == 1 and expected.any() and live.sum() >= min_images:
            psi_metric.add_metric((signal,), drift_index(expected, live))

    yield psi_metric
    yield GaugeMetricFamily(
        "imago_drift_images", "Images in the windows that drift is measured on.", images
    )


def compute_feedback(window: Counts) -> Iterator[Metric]:
    """Yield accuracy and expected calibration error of the last labels, summed over processes.

    `window` counts by (part, bin of confidence); the parts are the number of labels, how many of
    them were correct, and the sum of their confidences. The calibration error is defined by Naeini
    et al. (2015).
    """
    total = 0.0
    correct = 0.0
    calibration_gap = 0.0
    for i in range(FEEDBACK_BINS):
        bin_correct = window.get(("correct", str(i)), 0.0)
        bin_confidence = window.get(("confidence", str(i)), 0.0)
        total += window.get(("count", str(i)), 0.0)
        correct += bin_correct
        calibration_gap += abs(bin_correct - bin_confidence)

    accuracy = GaugeMetricFamily(
        "imago_feedback_accuracy", "Share of correct predictions among the last labels."
    )
    error = GaugeMetricFamily(
        "imago_feedback_ece", "Expected calibration error of the last labels, 0 to 1."
    )
    if total:
        accuracy.add_metric((), correct / total)
        error.add_metric((), calibration_gap / total)
    yield accuracy
    yield error
