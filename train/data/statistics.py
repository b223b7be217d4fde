"""Statistics of a data set: mean and standard deviation of the pixels, and its digest."""

import hashlib
from collections.abc import Iterable

import numpy as np

LEVELS = 256  # of a uint8 pixel


def data_digest(
    image_digests: np.ndarray, labels: np.ndarray, classes: list[str], excluded: np.ndarray
) -> str:
    """Return the sha256, in hex, over images' digests uint8 [N, 32], labels and classes.

    `excluded` bool [N] marks the images that are left out; it counts where there are some.
    """
    digest = hashlib.sha256(image_digests.tobytes())
    digest.update(labels.tobytes())
    digest.update("\0".join(classes).encode())
    if excluded.any():
        digest.update(b"\0excluded\0" + np.packbits(excluded).tobytes())
    return digest.hexdigest()


def channel_mean_std(chunks: Iterable[np.ndarray]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of uint8 [M, H, W, C] chunks, in 0..255.

    A channel of one constant value gets the standard deviation 1, so that it can be divided by.
    """
    histograms = np.zeros((1, LEVELS), np.int64)  # [C, LEVELS] after the first chunk
    for chunk in chunks:
        histograms = histograms + _channel_histograms(chunk)

    levels = np.arange(float(LEVELS))
    pixels = histograms[0].sum()
    mean = histograms @ levels / pixels
    variance = histograms @ levels**2 / pixels - mean**2

    # Not by the variance, which a rounding error keeps from 0.
    is_constant = (histograms > 0).sum(1) == 1
    std = np.where(is_constant, 1.0, np.sqrt(variance.clip(0)))
    return mean.tolist(), std.tolist()


def _channel_histograms(chunk: np.ndarray) -> np.ndarray:
    """Return int64 [C, LEVELS]: how often each level occurs in each channel."""
    channels = np.moveaxis(chunk, 3, 0)
    return np.stack([np.bincount(plane.reshape(-1), minlength=LEVELS) for plane in channels])
