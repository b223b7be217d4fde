"""Resize decoded pixels to a network's input, by the policy of its `InputSpec`."""

import cv2
import numpy as np

from models.image.input_spec import InputSpec


def resize_to_input(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Resize uint8 [H, W, C] to contiguous uint8 [spec.height, spec.width, C]."""
    height, width = image.shape[:2]
    same_size = (height, width) == (spec.height, spec.width)
    if same_size and spec.short_side in (None, min(height, width)):
        return np.ascontiguousarray(image)

    if spec.resize == "stretch":
        return _scale(image, spec.height, spec.width)
    if spec.resize == "pad":
        return _pad(image, spec)
    return _crop(image, spec)


def _pad(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Scale the whole image into the input and centre it on black."""
    height, width = image.shape[:2]
    scale = min(spec.height / height, spec.width / width)
    inner_height = max(1, round(height * scale))
    inner_width = max(1, round(width * scale))
    inner = _scale(image, inner_height, inner_width)

    top = (spec.height - inner_height) // 2
    left = (spec.width - inner_width) // 2
    padded = np.zeros((spec.height, spec.width, image.shape[2]), np.uint8)
    padded[top : top + inner_height, left : left + inner_width] = inner
    return padded


def _crop(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Cut the centre out of the image and scale it to the input.

    The cut comes before the scaling, so that no large intermediate image is made: scaling the
    short side of a strip of 1 x 50 million pixels first would make it wider still.
    """
    height, width = image.shape[:2]
    scale = spec.crop_short_side / min(height, width)
    crop_height = min(height, max(1, round(spec.height / scale)))
    crop_width = min(width, max(1, round(spec.width / scale)))

    top = (height - crop_height) // 2
    left = (width - crop_width) // 2
    centre = image[top : top + crop_height, left : left + crop_width]
    return _scale(centre, spec.height, spec.width)


def _scale(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale by area averaging below half the size, where linear interpolation would alias."""
    is_below_half = image.shape[0] > 2 * height or image.shape[1] > 2 * width
    interpolation = cv2.INTER_AREA if is_below_half else cv2.INTER_LINEAR
    scaled = cv2.resize(image, (width, height), interpolation=interpolation)
    return scaled.reshape(height, width, image.shape[2])  # cv2 drops a single channel
