"""The baseline for drift: what validation data looks like, and what the model says of it."""

import numpy as np

from models.bundle import Histogram
from models.drift import bin_edges, class_edges, histogram, image_signals
from train.export.calibrate import energy, softmax

MAX_IMAGES = 4096  # enough for deciles; sharpness of more large images would only take time


def baseline(
    logits: np.ndarray, temperature: float, images: np.ndarray, sizes: np.ndarray
) -> dict[str, Histogram]:
    """Histograms by signal: `class`, `confidence` and `energy` from logits [N,K]; `brightness`, `contrast` and
    `sharpness` from what the network saw, uint8 [M,H,W,C]; `width` and `height` from the files' own, [N,2]."""
    probabilities = softmax(logits, temperature)
    seen = np.array([image_signals(image) for image in images])
    values = {
        "confidence": probabilities.max(1),
        "energy": energy(logits),
        "brightness": seen[:, 0],
        "contrast": seen[:, 1],
        "sharpness": seen[:, 2],
        "width": sizes[:, 0],
        "height": sizes[:, 1],
    }
    chosen = {"class": (probabilities.argmax(1), class_edges(logits.shape[1]))}
    chosen |= {name: (value, bin_edges(value)) for name, value in values.items()}
    return {
        name: Histogram(edges=found.tolist(), counts=histogram(value, found).tolist())
        for name, (value, found) in chosen.items()
    }
