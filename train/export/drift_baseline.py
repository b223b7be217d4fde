"""The drift baseline: histograms of validation images and of the model's predictions for them.

The server compares the images that it receives with these histograms.
"""

import numpy as np

from models.bundle import Histogram
from models.drift import bin_edges, class_edges, histogram, image_signals
from train.export.scores import energy, softmax

# Enough images for deciles; the sharpness of large images takes time.
MAX_BASELINE_IMAGES = 4096


def build_drift_baseline(
    logits: np.ndarray, temperature: float, images: np.ndarray, sizes: np.ndarray
) -> dict[str, Histogram]:
    """Return histograms by signal.

    `class`, `confidence` and `energy` come from logits [N,K]; `brightness`, `contrast` and
    `sharpness` from the network's input, uint8 [M,H,W,C]; `width` and `height` from the sizes of
    the original files, [N,2].
    """
    probabilities = softmax(logits, temperature)
    signals = np.array([image_signals(image) for image in images])
    values_by_signal = {
        "confidence": probabilities.max(1),
        "energy": energy(logits),
        "brightness": signals[:, 0],
        "contrast": signals[:, 1],
        "sharpness": signals[:, 2],
        "width": sizes[:, 0],
        "height": sizes[:, 1],
    }

    classes = logits.shape[1]
    histograms = {"class": _build_histogram(probabilities.argmax(1), class_edges(classes))}
    for signal, values in values_by_signal.items():
        histograms[signal] = _build_histogram(values, bin_edges(values))
    return histograms


def _build_histogram(values: np.ndarray, edges: np.ndarray) -> Histogram:
    counts = histogram(values, edges)
    return Histogram(edges=edges.tolist(), counts=counts.tolist())
