"""Decode the bytes of one image to uint8 pixels with OpenCV.

Used by training (sources, samples of a bundle) and by the workers of the server. What decoding may
hold in memory is known from the header before it begins, and all threads share a bound on it.
"""

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import cv2
import numpy as np

from models.image.errors import ImageTooLarge, UndecodableImage
from models.image.header import Header, read_header
from models.image.input_spec import InputSpec
from models.image.native_messages import dropped_native_messages
from models.image.resize import resize_to_input
from models.image.sanitize import sanitize
from models.image.tiff import ORIENTATION, read_tiff_tags

# Callers run one decode a core; a second pool of threads inside would only contend with them.
cv2.setNumThreads(1)
# The error is in the response, so a copy on stderr is not needed.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

MAX_PIXELS = 50_000_000
"""Largest image that is decoded, by default."""

MAX_PIXEL_BYTES = 10
"""An image may take this many bytes for each pixel that is allowed: 477 MiB by default."""

MAX_BYTES_WITH_TABLES = 560 << 20
"""The same for a lossless WebP, with the code tables that it may declare."""

SHARED_BYTES = 400 << 20
"""What all threads together may hold for images that are being decoded; one image that takes more
is decoded alone. So a container's memory suffices for any number of threads."""

UNCOUNTED_BYTES = 4 << 20
"""Images that take less than this are decoded without asking how much the others hold."""

STRIP_PIXELS = 1 << 18
"""Pixels that are flattened at once."""

JPEG_MAX_REDUCTION = 8
"""libjpeg's inverse DCT can yield the picture at 1/2, 1/4 or 1/8 of its size."""

_GRAY_FLAGS = {
    1: cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
# OpenCV has no reduced flag in RGB order: reduced images come in BGR order.
_COLOUR_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

_FLIP_BOTH = -1
_FLIP_ROWS = 0
_FLIP_COLUMNS = 1
# EXIF orientation -> code for cv2.flip, after the transposition of 5 to 8.
_ORIENTATION_FLIPS = {
    2: _FLIP_COLUMNS,
    3: _FLIP_BOTH,
    4: _FLIP_ROWS,
    6: _FLIP_COLUMNS,
    7: _FLIP_BOTH,
    8: _FLIP_ROWS,
}


class _SharedMemory:
    """Bounds what the threads of a process hold together, first come, first served."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self.changed = threading.Condition()
        self.turn = threading.Lock()

    @contextmanager
    def reserve(self, amount: int) -> Iterator[None]:
        """Wait until `amount` bytes are free, or all if that is more; hold them in the block."""
        amount = min(amount, self.total)
        with self.turn, self.changed:
            self.changed.wait_for(lambda: self.free >= amount)
            self.free -= amount
        try:
            yield
        finally:
            with self.changed:
                self.free += amount
                self.changed.notify()


_shared_memory = _SharedMemory(SHARED_BYTES)
_no_reservation = nullcontext()


def _do_nothing() -> None:
    pass


def decode(
    data: bytes,
    spec: InputSpec,
    max_pixels: int = MAX_PIXELS,
    on_start: Callable[[], object] = _do_nothing,
) -> np.ndarray:
    """Decode one image to the network's input: uint8 [height, width, channels] of `spec`.

    EXIF orientation is applied, transparent pixels are laid over white, and of an animation the
    first frame is taken. `on_start` is called when decoding begins, which may be later: a large
    image waits until others have freed their memory.

    Raises UnsupportedFormat, ImageTooLarge (more than `max_pixels`, or more than MAX_PIXEL_BYTES
    for each of them) or UndecodableImage.
    """
    header = _read_allowed_header(data, max_pixels)
    reduction = _jpeg_reduction(header, spec)
    with _reserve_memory(header, reduction, max_pixels):
        on_start()
        pixels = _decode_pixels(data, header, spec.channels, reduction)
        return resize_to_input(pixels, spec)


def decode_full_size(data: bytes, channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one image to uint8 [H, W, channels] in its own size, RGB or gray.

    Raises as `decode` does.
    """
    header = _read_allowed_header(data, max_pixels)
    with _reserve_memory(header, 1, max_pixels):
        return _decode_pixels(data, header, channels, reduction=1)


def _read_allowed_header(data: bytes, max_pixels: int) -> Header:
    header = read_header(data)
    pixels = header.width * header.height
    if pixels > max_pixels:
        raise ImageTooLarge(
            f"{header.width}x{header.height} pixels are more than the {max_pixels} allowed"
        )
    return header


def _jpeg_reduction(header: Header, spec: InputSpec) -> int:
    """Return 1, 2, 4 or 8: the part of its size at which a JPEG is decoded.

    A JPEG much larger than the input is decoded at a fraction of its size, which costs a fraction
    of the time.
    """
    if header.format != "jpeg":
        return 1
    short_side = min(header.width, header.height)
    reduction = 1
    while reduction < JPEG_MAX_REDUCTION and short_side >= 2 * reduction * spec.crop_short_side:
        reduction *= 2
    return reduction


def _reserve_memory(
    header: Header, reduction: int, max_pixels: int
) -> AbstractContextManager[None]:
    """Return a context that holds the memory that decoding takes; for small images a void one.

    Raises ImageTooLarge for more than MAX_PIXEL_BYTES for each pixel that is allowed.
    """
    pixels = header.width * header.height
    most_bytes = pixels * header.pixel_bytes // reduction**2 + header.extra_bytes
    allowed_bytes = MAX_PIXEL_BYTES * max_pixels
    if header.table_bytes and most_bytes <= allowed_bytes:
        most_bytes += header.table_bytes
        allowed_bytes = max(allowed_bytes, MAX_BYTES_WITH_TABLES)
    if most_bytes > allowed_bytes:
        raise ImageTooLarge(
            f"decoding {header.width}x{header.height} pixels of this kind takes {most_bytes} "
            f"bytes, more than the {allowed_bytes} allowed; send fewer pixels, or 8 bits a colour"
        )

    if most_bytes < UNCOUNTED_BYTES:
        return _no_reservation
    return _shared_memory.reserve(most_bytes)


def _decode_pixels(data: bytes, header: Header, channels: int, reduction: int) -> np.ndarray:
    """Decode to uint8 [H / reduction, W / reduction, channels], upright and over white."""
    flag = _imread_flag(header, channels, reduction)
    image, exif = _run_decoder(data, header, flag)

    if flag == cv2.IMREAD_UNCHANGED:
        flat = _flatten(image, channels, header)
        return _apply_orientation(flat, exif)

    if channels == 3 and flag != cv2.IMREAD_COLOR_RGB:
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return image.reshape(*image.shape[:2], channels)


def _imread_flag(header: Header, channels: int, reduction: int) -> int:
    """Return the flag of OpenCV's decoders that needs the fewest conversions afterwards."""
    if header.format != "jpeg" and header.alpha != "ignored":
        return cv2.IMREAD_UNCHANGED  # the image may have alpha or 16 bits
    flags = _GRAY_FLAGS if channels == 1 else _COLOUR_FLAGS
    return flags[reduction]


def _run_decoder(data: bytes, header: Header, flag: int) -> tuple[np.ndarray, bytes]:
    """Return the decoded image and its EXIF block, empty where OpenCV applies the orientation.

    OpenCV applies it to all formats but PNG and WebP read unchanged.
    """
    buffer = np.frombuffer(sanitize(data, header), np.uint8)
    exif = b""
    image: np.ndarray | None
    try:
        with dropped_native_messages:
            if header.format in ("png", "webp"):
                image, kinds, chunks = cv2.imdecodeWithMetadata(buffer, flag)
                exif = _find_exif(kinds, chunks)
            else:
                image = cv2.imdecode(buffer, flag)
    except cv2.error as error:
        raise UndecodableImage(f"the {header.format} data can't be decoded") from error
    if image is None:
        raise UndecodableImage(f"the {header.format} data can't be decoded")
    return image, exif


def _find_exif(kinds: Sequence[int], chunks: Sequence[np.ndarray]) -> bytes:
    for kind, chunk in zip(kinds, chunks, strict=True):
        if kind == cv2.IMAGE_METADATA_EXIF:
            return chunk.tobytes()
    return b""


def _flatten(image: np.ndarray, channels: int, header: Header) -> np.ndarray:
    """Convert any depth and channel count (gray, BGR, BGRA) to uint8 [H, W, channels] over white.

    Works in strips, and writes the result over the pixels already read where it fits: a container
    has no memory for a second picture of 50 million pixels.
    """
    if image.dtype not in (np.uint8, np.uint16):
        raise UndecodableImage(f"samples of type {image.dtype} are not supported")

    height, width = image.shape[:2]
    if height * width <= STRIP_PIXELS:
        return _flatten_strip(image, channels, header)

    flat_bytes = height * width * channels
    if image.nbytes < flat_bytes:
        flat = np.empty((height, width, channels), np.uint8)
    else:
        flat = image.reshape(-1).view(np.uint8)[:flat_bytes].reshape(height, width, channels)

    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image[top : top + rows]
        flat[top : top + rows] = _flatten_strip(strip, channels, header)
    return flat


def _flatten_strip(image: np.ndarray, channels: int, header: Header) -> np.ndarray:
    """Convert rows of an image as `_flatten` does."""
    is_gray = image.ndim == 2
    transparent_pixels = None
    if is_gray and header.transparent is not None:
        transparent_pixels = image == header.transparent

    if image.dtype == np.uint16:
        image = cv2.convertScaleAbs(image, alpha=1 / 257)
    if transparent_pixels is not None:
        image[transparent_pixels] = 255
    if image.ndim == 3 and image.shape[2] == 4:
        image = _blend_over_white(image, header)

    if not is_gray:
        code = cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGR2GRAY
        image = cv2.cvtColor(image, code)
    elif channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return image.reshape(*image.shape[:2], channels)


def _blend_over_white(image: np.ndarray, header: Header) -> np.ndarray:
    """Blend uint8 BGRA over white: colour * alpha + (1 - alpha) * 255."""
    alpha = cv2.cvtColor(image[:, :, 3], cv2.COLOR_GRAY2BGR)
    colour = cv2.cvtColor(image, cv2.COLOR_BGRA2BGR)
    if header.alpha == "straight":
        colour = cv2.multiply(colour, alpha, scale=1 / 255)
    return cv2.add(colour, cv2.bitwise_not(alpha))


def _apply_orientation(image: np.ndarray, exif: bytes) -> np.ndarray:
    """Turn uint8 [H, W, C] by the orientation tag of an EXIF block, if there is a valid one."""
    try:
        tags = read_tiff_tags(exif.removeprefix(b"Exif\0\0"))
    except (struct.error, IndexError, KeyError):
        return image

    channels = image.shape[2]
    orientation = tags.get(ORIENTATION, 1)
    if 5 <= orientation <= 8:
        image = cv2.transpose(image)
    if orientation in _ORIENTATION_FLIPS:
        cv2.flip(image, _ORIENTATION_FLIPS[orientation], dst=image)
    return image.reshape(*image.shape[:2], channels)
