"""Drift signals: what both sides measure on an image or an answer, and how two distributions are compared.

Training takes the histograms of validation data; the server takes the same ones of live traffic and reports the
population stability index between the two.
"""

from typing import NamedTuple

import cv2
import numpy as np


class ImageSignals(NamedTuple):
    """Measured on the pixels the network sees."""

    brightness: float  # mean of gray, 0..255
    contrast: float  # standard deviation of gray, 0..127.5
    sharpness: float  # log(1 + variance of the Laplacian), 0 for a flat image


def image_signals(pixels: np.ndarray) -> ImageSignals:
    """Signals of one image, uint8 [H, W, C], RGB or gray.

    Sharpness is the focus measure of Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000), on a
    log scale because it spans decades.
    """
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if pixels.shape[2] == 3 else pixels[:, :, 0]
    mean, deviation = cv2.meanStdDev(gray)
    _, edges = cv2.meanStdDev(cv2.Laplacian(gray, cv2.CV_16S))
    return ImageSignals(
        float(mean[0, 0]), float(deviation[0, 0]), float(np.log1p(edges[0, 0] ** 2))
    )


def bin_edges(values: np.ndarray, bins: int = 10) -> np.ndarray:
    """Edges for `histogram` that suit the values of a baseline: bins of equal mass.

    Values that take at most `bins` levels (sizes of images, often just one) get a bin a level and one empty bin on
    either side, so that a level never seen before shows.
    """
    levels = np.unique(np.asarray(values, np.float64))
    if len(levels) <= bins:
        between = (levels[1:] + levels[:-1]) / 2
        step = min(1.0, np.diff(levels).min()) / 2 if len(levels) > 1 else 0.5
        low, high = levels[0] - step, levels[-1] + step
        return np.concatenate([[low - step, low], between, [high, high + step]])
    return np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)))


def class_edges(classes: int) -> np.ndarray:
    """Edges that give every class index 0..classes-1 its own bin."""
    return np.arange(classes + 1) - 0.5


def histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Counts, int64 [len(edges) - 1]; the outer bins are open, so every value counts somewhere."""
    inner = np.asarray(edges, np.float64)[1:-1]
    return np.bincount(np.searchsorted(inner, values, side="right"), minlength=len(inner) + 1)


def psi(baseline: np.ndarray, live: np.ndarray) -> float:
    """Population stability index of two rows of counts over the same bins: sum of (q - p) ln(q / p).

    Below 0.1 nothing moved, above 0.25 much did, says custom. Half a count is added to every bin so that an empty one
    stays finite. Without any drift its mean is about (bins - 1)(1/n + 1/m) for n and m samples (Yurdakul, "Statistical
    properties of population stability index", 2018): compare only when both are many times the number of bins.
    """
    p, q = (
        counts / counts.sum() for counts in (np.asarray(baseline) + 0.5, np.asarray(live) + 0.5)
    )
    return float(((q - p) * np.log(q / p)).sum())
