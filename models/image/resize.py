"""Resize decoded pixels to a network's input, by the policy of its `InputSpec`, and back.

pixels = resize_to_input(image, spec)                      # what the network sees
pixels = array_to_input(array, spec)                       # the same for a caller's array
values = resize_to_image(values, image.shape[:2], spec)    # a map over the input, on the image
"""

from typing import NamedTuple

import cv2
import numpy as np

from models.image.input_spec import InputSpec

INTERPOLATIONS = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}


class _Box(NamedTuple):
    """A rectangle, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def slices(self) -> tuple[slice, slice]:
        """Return the index of the rectangle in an array [H, W, ...]."""
        rows = slice(self.top, self.top + self.height)
        columns = slice(self.left, self.left + self.width)
        return rows, columns


def resize_to_input(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Resize uint8 [H, W, C] to contiguous uint8 [spec.height, spec.width, C]."""
    height, width = image.shape[:2]
    if _is_input_size(height, width, spec):
        return np.ascontiguousarray(image)

    if spec.resize == "stretch":
        return _scale(image, spec.height, spec.width, spec.interpolation)
    if spec.resize == "pad":
        return _pad(image, spec)
    return _crop(image, spec)


def _pad(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Scale the whole image into the input and centre it on black."""
    height, width = image.shape[:2]
    box = _padded_box(height, width, spec)
    padded = np.zeros((spec.height, spec.width, image.shape[2]), np.uint8)
    padded[box.slices()] = _scale(image, box.height, box.width, spec.interpolation)
    return padded


def _crop(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Cut the centre out of the image and scale it to the input.

    The cut comes before the scaling, so that no large intermediate image is made: scaling the
    short side of a strip of 1 x 50 million pixels first would make it wider still.
    """
    height, width = image.shape[:2]
    box = _crop_box(height, width, spec)
    return _scale(image[box.slices()], spec.height, spec.width, spec.interpolation)


def _is_input_size(height: int, width: int, spec: InputSpec) -> bool:
    """Whether an image of this size is the input as it is."""
    is_same = (height, width) == (spec.height, spec.width)
    return is_same and spec.short_side in (None, min(height, width))


def _padded_box(height: int, width: int, spec: InputSpec) -> _Box:
    """Return where an image of this size lies in the input, for the policy pad."""
    scale = min(spec.height / height, spec.width / width)
    inner_height = max(1, round(height * scale))
    inner_width = max(1, round(width * scale))
    top = (spec.height - inner_height) // 2
    left = (spec.width - inner_width) // 2
    return _Box(top, left, inner_height, inner_width)


def _crop_box(height: int, width: int, spec: InputSpec) -> _Box:
    """Return the part of an image of this size that becomes the input, for the policy crop."""
    scale = spec.crop_short_side / min(height, width)
    crop_height = min(height, max(1, round(spec.height / scale)))
    crop_width = min(width, max(1, round(spec.width / scale)))
    top = (height - crop_height) // 2
    left = (width - crop_width) // 2
    return _Box(top, left, crop_height, crop_width)


def _scale(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Scale by area averaging below half the size, where interpolation would alias."""
    is_below_half = image.shape[0] > 2 * height or image.shape[1] > 2 * width
    method = cv2.INTER_AREA if is_below_half else INTERPOLATIONS[interpolation]
    scaled = cv2.resize(image, (width, height), interpolation=method)
    return scaled.reshape(height, width, image.shape[2])  # cv2 drops a single channel


def array_to_input(array: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Convert a caller's pixels, uint8 [H, W], [H, W, 1] or [H, W, 3] in RGB, to the input.

    Raises ValueError for another type or shape.
    """
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise ValueError(
            f"an array of {array.dtype} {list(array.shape)} is no image; give uint8 [H, W] for "
            "gray or [H, W, 3] for RGB"
        )

    pixels = np.ascontiguousarray(array).reshape(*array.shape[:2], -1)
    if pixels.shape[2] != spec.channels:
        code = cv2.COLOR_GRAY2RGB if spec.channels == 3 else cv2.COLOR_RGB2GRAY
        pixels = cv2.cvtColor(pixels, code).reshape(*array.shape[:2], spec.channels)
    return resize_to_input(pixels, spec)


def resize_to_image(values: np.ndarray, shape: tuple[int, int], spec: InputSpec) -> np.ndarray:
    """Scale values over the network's input, float32 [h, w], to the image, float32 [H, W].

    `shape` is that of the image. Values are 0 where the image is not part of the input.
    """
    height, width = shape
    if spec.resize == "stretch" or _is_input_size(height, width, spec):
        return _scale_linearly(values, height, width)

    if spec.resize == "pad":
        over_input = _scale_linearly(values, spec.height, spec.width)
        box = _padded_box(height, width, spec)
        return _scale_linearly(over_input[box.slices()], height, width)

    box = _crop_box(height, width, spec)
    over_image = np.zeros(shape, np.float32)
    over_image[box.slices()] = _scale_linearly(values, box.height, box.width)
    return over_image


def _scale_linearly(values: np.ndarray, height: int, width: int) -> np.ndarray:
    return cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR)
