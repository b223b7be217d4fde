"""Items to pixels: every image decoded once, in parallel, to one uint8 array."""
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from models import image
from models.image import InputSpec
from train.data.source import Items


@dataclass
class Decoded:
    pixels: np.ndarray  # uint8 [N, H, W, C]; zeros where unreadable
    unreadable: dict[int, str]  # position -> why


def encoded(item: bytes | np.ndarray) -> bytes:
    """An image's bytes: as stored, or as PNG where the source keeps pixels (uint8 [H, W, C], RGB or gray)."""
    if isinstance(item, bytes):
        return item
    bgr = item[..., ::-1] if item.ndim == 3 and item.shape[2] == 3 else item
    return cv2.imencode(".png", bgr)[1].tobytes()


def to_pixels(item: bytes | np.ndarray, spec: InputSpec) -> np.ndarray:
    """uint8 [height, width, channels] of `spec`, by the code that the service uses. Raises image.ImageError."""
    if isinstance(item, np.ndarray) and item.shape == (spec.height, spec.width, spec.channels):
        return item
    return image.decode(encoded(item), spec)


def decode_all(items: Items, spec: InputSpec) -> Decoded:
    """Every item decoded and fitted, by as many threads as there are cores (cv2 lets go of the lock)."""
    array = getattr(items, "array", None)
    if array is not None and array.shape[1:] == (spec.height, spec.width, spec.channels):
        return Decoded(array, {})
    out = np.zeros((len(items), spec.height, spec.width, spec.channels), np.uint8)

    def one(i: int) -> str | None:
        try:
            out[i] = to_pixels(items[i], spec)
        except (OSError, image.ImageError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) as pool:
        problems = pool.map(one, range(len(items)))
        return Decoded(out, {i: problem for i, problem in enumerate(problems) if problem})
