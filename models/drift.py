"""Drift: signals measured on images and answers, and how two distributions are compared.

Training keeps histograms of the validation data in the manifest. The server takes the same
histograms of live traffic and reports the population stability index between the two.
"""

from typing import NamedTuple

import cv2
import numpy as np


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

    Without any drift the mean is about (bins - 1)(1/n + 1/m) for n and m samples (Yurdakul,
    "Statistical properties of population stability index", 2018): compare only when n and m are
    many times the number of bins.
    """
    p = _shares(baseline)
    q = _shares(live)
    return float(((q - p) * np.log(q / p)).sum())


def _shares(counts: np.ndarray) -> np.ndarray:
    smoothed = np.asarray(counts) + 0.5
    return smoothed / smoothed.sum()
