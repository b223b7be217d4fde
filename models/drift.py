"""Drift: signals measured on images and answers, and how two distributions are compared.

Training keeps histograms of the validation data in the manifest. The server takes the same
histograms of live traffic and reports by how much the population stability index between the two
exceeds what chance explains: both sides are samples, and the validation part is often small.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

MIN_IMAGES_PER_BIN = 10
"""On each side. With fewer, an index is mostly noise."""

MIN_BINS = 2

NORMAL_QUANTILE = 2.326
"""Of 99 %: how sure it is that chance does not explain an index above 0."""


class ImageSignals(NamedTuple):
    """Signals of the pixels that the network sees."""

    brightness: float
    """Mean of gray, 0..255."""

    contrast: float
    """Standard deviation of gray, 0..127.5."""

    sharpness: float
    """log(1 + variance of the Laplacian); 0 for a flat image."""


def image_signals(pixels: np.ndarray) -> ImageSignals:
    """Measure one image, uint8 [H, W, C], RGB or gray.

    Sharpness is the focus measure of Pech-Pacheco et al., "Diatom autofocusing in brightfield
    microscopy" (2000), on a log scale because it spans decades.
    """
    is_colour = pixels.shape[2] == 3
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if is_colour else pixels[:, :, 0]

    mean, deviation = cv2.meanStdDev(gray)
    _, laplacian_deviation = cv2.meanStdDev(cv2.Laplacian(gray, cv2.CV_16S))
    return ImageSignals(
        brightness=float(mean[0, 0]),
        contrast=float(deviation[0, 0]),
        sharpness=float(np.log1p(laplacian_deviation[0, 0] ** 2)),
    )


def measure_signals(
    probabilities: np.ndarray, energy: float, pixels: np.ndarray, height: int, width: int
) -> dict[str, float]:
    """Return all signals of an image and its outputs, by the names of a baseline.

    `probabilities` is [K], `pixels` the network's input, uint8 [H, W, C]; `height` and `width` are
    those of the file.
    """
    index = int(probabilities.argmax())
    return {
        "class": index,
        "confidence": float(probabilities[index]),
        "energy": float(energy),
        **image_signals(pixels)._asdict(),
        "width": width,
        "height": height,
    }


def bin_edges(values: np.ndarray, bins: int = 10) -> np.ndarray:
    """Return edges for `histogram` that suit the values of a baseline: bins of equal mass.

    Values with at most `bins` levels (image sizes, often a single one) get one bin a level and one
    empty bin on either side, in which a new level is counted.
    """
    levels = np.unique(np.asarray(values, np.float64))
    if len(levels) > bins:
        return np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)))

    margin = 0.5
    if len(levels) > 1:
        margin = min(1.0, np.diff(levels).min()) / 2
    between = (levels[1:] + levels[:-1]) / 2
    low = levels[0] - margin
    high = levels[-1] + margin
    return np.concatenate([[low - margin, low], between, [high, high + margin]])


def class_edges(classes: int) -> np.ndarray:
    """Return edges that give every class index 0..classes-1 its own bin."""
    return np.arange(classes + 1) - 0.5


def histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count values by bin: int64 [len(edges) - 1]. The outer bins are open: every value counts."""
    inner = np.asarray(edges, np.float64)[1:-1]
    bins = np.searchsorted(inner, values, side="right")
    return np.bincount(bins, minlength=len(inner) + 1)


def psi(baseline: np.ndarray, live: np.ndarray) -> float:
    """Return the population stability index of two histograms over the same bins.

    PSI = sum of (q - p) ln(q / p) for the shares p and q of the bins. By convention, below 0.1 is
    no change and above 0.25 a large one. Half a count is added to every bin so that an empty one
    stays finite.

    Without any drift it is not 0, as both histograms are samples: see `psi_by_chance`.
    """
    p = _shares(baseline)
    q = _shares(live)
    return float(((q - p) * np.log(q / p)).sum())


def psi_by_chance(bins: int, baseline_images: float, live_images: float) -> float:
    """Return the index that 99 % of samples of one and the same distribution don't exceed.

    Without drift, PSI is distributed as (1/n + 1/m) times chi-squared with bins - 1 degrees of
    freedom, for n and m images: Yurdakul, "Statistical properties of population stability index",
    2018. Its quantile is approximated as in Wilson and Hilferty, "The distribution of
    chi-square", 1931.
    """
    degrees = bins - 1
    if degrees < 1:
        return 0.0
    variance = 2 / (9 * degrees)
    quantile = degrees * (1 - variance + NORMAL_QUANTILE * variance**0.5) ** 3
    return (1 / baseline_images + 1 / live_images) * quantile


def drift_index(baseline: np.ndarray, live: np.ndarray) -> float:
    """Return by how much PSI exceeds what chance explains; 0 where it does not.

    Bins that are empty on both sides are ignored.
    """
    used = (baseline > 0) | (live > 0)
    chance = psi_by_chance(int(used.sum()), baseline.sum(), live.sum())
    return max(0.0, psi(baseline[used], live[used]) - chance)


def count_bins(baseline_images: int, live_images: int) -> int:
    """Return the largest number of bins for which both sides have enough images."""
    return max(MIN_BINS, min(baseline_images, live_images) // MIN_IMAGES_PER_BIN)


def merge_bins(
    edges: Sequence[float], counts: Sequence[int], max_bins: int
) -> tuple[list[float], list[int]]:
    """Return the inner edges and the counts of a histogram with about `max_bins` bins at most.

    Neighbouring bins are merged to bins of about the same count; a bin that holds more than that
    stays alone. An empty bin at either end stays as well: it counts what the baseline has not, such
    as another image size, and adds no noise.
    """
    first = 1 if counts[0] == 0 else 0
    last = len(counts) - 1 if counts[-1] == 0 else len(counts)
    inner = np.array(counts[first:last])
    if len(inner) <= max_bins:
        return list(edges[1:-1]), list(counts)

    # The position of each bin's middle in the cumulative counts, 0..1, says which merged bin it
    # joins.
    middle = (inner.cumsum() - inner / 2) / max(1, inner.sum())
    merged = np.minimum(middle * max_bins, max_bins - 1).astype(int)
    starts = first + np.flatnonzero(np.diff(merged, prepend=-1))
    if first:
        starts = np.insert(starts, 0, 0)
    if last < len(counts):
        starts = np.append(starts, last)
    return [edges[i] for i in starts[1:]], np.add.reduceat(np.array(counts), starts).tolist()


def _shares(counts: np.ndarray) -> np.ndarray:
    smoothed = np.asarray(counts) + 0.5
    return smoothed / smoothed.sum()
