"""Image bytes to uint8 pixels: the only decode and resize code in the project, used to train and to serve.

Untrusted bytes reach a decoder only after their magic number names one of six formats and their header states an
allowed size. No other codec is reachable.
"""

import struct
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import cv2
import numpy as np
from pydantic import BaseModel, Field

from models.image.header import (
    ORIENTATION,
    Header,
    ImageError,
    ImageTooLarge,
    UndecodableImage,
    UnsupportedFormat,
    read_header,
    tiff_tags,
)

__all__ = [
    "MAX_PIXELS",
    "Header",
    "ImageError",
    "ImageTooLarge",
    "InputSpec",
    "UndecodableImage",
    "UnsupportedFormat",
    "decode",
    "decode_full_size",
    "read_header",
    "resize_to_input",
]

cv2.setNumThreads(1)  # callers run one decode a core; a second pool inside would only contend
# The sender hears what is wrong, not stderr. OpenCV obeys; libpng and libjpeg write there still.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

MAX_PIXELS = 50_000_000
LARGE = (
    64 << 20
)  # bytes; threads that all decoded more at once would need more memory than a container has
COEFFICIENT_BYTES = (
    8  # a pixel: of a JPEG in several scans two for each component are held, at any scale
)
STRIP = 1 << 18  # pixels that are flattened at once

_one_large, _any_small = threading.Lock(), nullcontext()


class InputSpec(BaseModel):
    """What a network is fed: uint8 [N, height, width, channels], RGB or gray.

    `resize`: how an image of another shape gets there.
    crop: the short side becomes `short_side`, then the centre is cut out. stretch: both sides scaled on their own.
    pad: the long side becomes the size, the rest is black.
    """

    height: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=4096)
    channels: Literal[1, 3] = 3
    resize: Literal["crop", "stretch", "pad"] = "crop"
    short_side: int | None = Field(
        default=None, gt=0, le=8192, description="for crop; by default the larger side"
    )


def decode(
    data: bytes,
    spec: InputSpec,
    max_pixels: int = MAX_PIXELS,
    begin: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Bytes of one image to what the network is fed: uint8 [height, width, channels] of `spec`.

    EXIF orientation is applied; transparent pixels lie on white; of an animation the first frame counts.
    `begin` is called when its turn has come: large images wait for each other.
    Raises UnsupportedFormat, ImageTooLarge (more than `max_pixels`, or than they have bytes in 8 bits) or
    UndecodableImage.
    """
    head = _checked(data, max_pixels)
    each = COEFFICIENT_BYTES if head.several_scans else head.pixel_bytes / _scale(head, spec) ** 2
    with _one_large if head.width * head.height * each > LARGE else _any_small:
        begin()
        return resize_to_input(_pixels(data, head, spec.channels, spec), spec)


def decode_full_size(
    data: bytes, channels: int, spec: InputSpec | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Bytes to uint8 [H, W, channels] in the image's own size, RGB or gray.

    With `spec`, a JPEG much larger than it is decoded at 1/2, 1/4 or 1/8 of its size: the inverse DCT then yields the
    smaller picture at a fraction of the cost. Raises as `decode`.
    """
    return _pixels(data, _checked(data, max_pixels), channels, spec)


def _checked(data: bytes, max_pixels: int) -> Header:
    head = read_header(data)
    if head.width * head.height > max_pixels:
        raise ImageTooLarge(
            f"{head.width}x{head.height} pixels is more than the {max_pixels} allowed"
        )
    if head.width * head.height * head.pixel_bytes > 4 * max_pixels:
        raise ImageTooLarge(
            f"{head.width}x{head.height} pixels of {head.pixel_bytes} bytes are more than the "
            f"{4 * max_pixels} bytes allowed; send 8 bits a colour"
        )
    return head


def _pixels(data: bytes, head: Header, channels: int, spec: InputSpec | None) -> np.ndarray:
    flag = _read_flag(head, channels, spec)
    buffer, exif = np.frombuffer(data, np.uint8), b""
    image: np.ndarray | None
    try:
        if head.format in (
            "png",
            "webp",
        ):  # as they are, because of alpha; then cv2 leaves orientation to us
            image, kinds, chunks = cv2.imdecodeWithMetadata(buffer, flag)
            exif = next(
                (
                    c.tobytes()
                    for k, c in zip(kinds, chunks, strict=True)
                    if k == cv2.IMAGE_METADATA_EXIF
                ),
                b"",
            )
        else:
            image = cv2.imdecode(buffer, flag)
    except cv2.error as error:
        raise UndecodableImage(f"the {head.format} data can't be decoded") from error
    if image is None:
        raise UndecodableImage(f"the {head.format} data can't be decoded")
    if flag == cv2.IMREAD_UNCHANGED:
        return _upright(_flatten(image, channels, head), exif)
    if channels == 3 and flag != cv2.IMREAD_COLOR_RGB:
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return image.reshape(*image.shape[:2], channels)


def _read_flag(head: Header, channels: int, spec: InputSpec | None) -> int:
    if head.format != "jpeg" and head.alpha != "ignored":
        return cv2.IMREAD_UNCHANGED  # may have alpha or 16 bits
    return (_GRAY if channels == 1 else _COLOR)[_scale(head, spec)]


def _scale(head: Header, spec: InputSpec | None) -> int:
    scale = 1
    if head.format == "jpeg" and spec is not None:
        target = max(spec.short_side or 0, spec.height, spec.width)
        while scale < 8 and min(head.width, head.height) >= 2 * scale * target:
            scale *= 2
    return scale


_GRAY = {
    1: cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_COLOR = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}  # there is no reduced flag in RGB order


def _flatten(image: np.ndarray, channels: int, head: Header) -> np.ndarray:
    """Any depth and channel count (gray, BGR, BGRA) to uint8 [H, W, channels] over white.

    It goes strip by strip, and what it makes takes the place of what it has read: a second picture of 50 million pixels
    beside the first is what a container has no memory for.
    """
    if image.dtype not in (np.uint8, np.uint16):
        raise UndecodableImage(f"samples of type {image.dtype} are not supported")
    height, width = image.shape[:2]
    if height * width <= STRIP:
        return _flat(image, channels, head)
    size = height * width * channels
    if image.nbytes < size:
        out = np.empty((height, width, channels), np.uint8)
    else:
        out = image.reshape(-1).view(np.uint8)[:size].reshape(height, width, channels)
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        out[top : top + rows] = _flat(image[top : top + rows], channels, head)
    return out


def _flat(image: np.ndarray, channels: int, head: Header) -> np.ndarray:
    clear = None if head.transparent is None or image.ndim != 2 else image == head.transparent
    if image.dtype == np.uint16:
        image = cv2.convertScaleAbs(image, alpha=1 / 257)
    if clear is not None:
        image[clear] = 255
    if image.ndim == 3 and image.shape[2] == 4:
        alpha = cv2.cvtColor(image[:, :, 3], cv2.COLOR_GRAY2BGR)
        image = cv2.cvtColor(image, cv2.COLOR_BGRA2BGR)
        if head.alpha == "straight":
            image = cv2.multiply(image, alpha, scale=1 / 255)
        image = cv2.add(image, cv2.bitwise_not(alpha))
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGR2GRAY)
    elif channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return image.reshape(*image.shape[:2], channels)


_FLIPS = {
    2: 1,
    3: -1,
    4: 0,
    6: 1,
    7: -1,
    8: 0,
}  # EXIF orientation -> cv2.flip code, after the transposition of 5..8


def _upright(image: np.ndarray, exif: bytes) -> np.ndarray:
    """uint8 [H, W, C] turned by the orientation tag of an EXIF block, if there is a sound one."""
    try:
        orientation = tiff_tags(exif.removeprefix(b"Exif\0\0")).get(ORIENTATION, 1)
    except (struct.error, IndexError, KeyError):
        return image
    channels = image.shape[2]
    if 5 <= orientation <= 8:
        image = cv2.transpose(image)
    if orientation in _FLIPS:
        cv2.flip(image, _FLIPS[orientation], dst=image)
    return image.reshape(*image.shape[:2], channels)


def resize_to_input(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """uint8 [H, W, C] to uint8 [spec.height, spec.width, C] by the policy of `spec`; contiguous."""
    height, width = image.shape[:2]
    if (height, width) == (spec.height, spec.width) and spec.short_side in (
        None,
        min(height, width),
    ):
        return np.ascontiguousarray(image)
    if spec.resize == "stretch":
        return _resize(image, spec.height, spec.width)
    if spec.resize == "pad":
        scale = min(spec.height / height, spec.width / width)
        inner = _resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
        out = np.zeros((spec.height, spec.width, image.shape[2]), np.uint8)
        y, x = (spec.height - inner.shape[0]) // 2, (spec.width - inner.shape[1]) // 2
        out[y : y + inner.shape[0], x : x + inner.shape[1]] = inner
        return out
    scale = max(spec.short_side or 0, spec.height, spec.width) / min(height, width)
    inner_h = min(
        height, max(1, round(spec.height / scale))
    )  # cut first: a strip of 1 x 50 million pixels stays small
    inner_w = min(width, max(1, round(spec.width / scale)))
    y, x = (height - inner_h) // 2, (width - inner_w) // 2
    return _resize(image[y : y + inner_h, x : x + inner_w], spec.height, spec.width)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area averaging where the image shrinks to less than half (linear would alias), linear otherwise."""
    shrinks = image.shape[0] > 2 * height or image.shape[1] > 2 * width
    out = cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return out.reshape(height, width, image.shape[2])  # cv2 drops a single channel
