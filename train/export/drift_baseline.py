"""The drift baseline: histograms of validation images and of the model's predictions for them.

The server compares the images that it receives with these histograms.
"""

import numpy as np

from models.bundle import Histogram
from models.drift import bin_edges, class_edges, histogram, image_signals
from train.export.scores import energy, softmax

# Enough images for deciles; the sharpness of large images takes time.
MAX_BASELINE_IMAGES = 4096


def build_prediction_baseline(logits: np.ndarray, temperature: float) -> dict[str, Histogram]:
    """Return histograms of the signals `class`, `confidence` and `energy` of logits [N,K].

    They are those of the graph that computed the logits: int8 differs from fp32.
    """
    probabilities = softmax(logits, temperature)
    classes = logits.shape[1]
    confidence = probabilities.max(1)
    energies = energy(logits)
    return {
        "class": _build_histogram(probabilities.argmax(1), class_edges(classes)),
        "confidence": _build_histogram(confidence, bin_edges(confidence)),
        "energy": _build_histogram(energies, bin_edges(energies)),
    }


def build_image_baseline(images: np.ndarray, sizes: np.ndarray) -> dict[str, Histogram]:
    """Return histograms of the signals of images.

    `brightness`, `contrast` and `sharpness` come from the network's input, uint8 [M,H,W,C]; `width`
    and `height` from the sizes of the original files, [N,2].
    """
    signals = np.array([image_signals(image) for image in images])
    values_by_signal = {
        "brightness": signals[:, 0],
        "contrast": signals[:, 1],
        "sharpness": signals[:, 2],
        "width": sizes[:, 0],
        "height": sizes[:, 1],
    }
    histograms: dict[str, Histogram] = {}
    for signal, values in values_by_signal.items():
        histograms[signal] = _build_histogram(values, bin_edges(values))
    return histograms


def _build_histogram(values: np.ndarray, edges: np.ndarray) -> Histogram:
    counts = histogram(values, edges)
    return Histogram(edges=edges.tolist(), counts=counts.tolist())
