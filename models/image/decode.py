"""Decode the bytes of one image to uint8 pixels with OpenCV.

Used by training (sources, samples of a bundle) and by the workers of the server. What decoding may
hold in memory is known from the header before it begins, and all threads share a bound on it.
"""

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import cv2
import numpy as np

from models.image import tiff
from models.image.avif import AvifImage, build_avif, build_avif_plane
from models.image.errors import ImageTooLarge, UndecodableImage
from models.image.header import Header, read_header
from models.image.input_spec import SIXTEEN_BITS, InputSpec
from models.image.jpeg_scans import (
    END_OF_IMAGE,
    INCOMPLETE_JPEG,
    JpegFrame,
    check_all_scans,
    ends_in_gray,
    find_following_image,
    has_end_marker,
    insert_bytes,
    needs_check,
    read_scans,
)
from models.image.native_messages import dropped_native_messages
from models.image.resize import resize_to_input
from models.image.sanitize import Frame, read_first_frame, sanitize

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
is decoded alone. So a container's memory suffices for any number of threads. Worker processes of
the server share one such bound."""

UNCOUNTED_BYTES = 4 << 20
"""Images that take less than this are decoded without asking how much the others hold."""

MAX_FULLY_CHECKED_PIXELS = 1 << 20
"""Larger JPEG files are checked for missing pixels at a fraction of their size."""

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


Reserve = Callable[[int], AbstractContextManager[None]]
"""Waits until so many bytes may be taken, and returns a context that holds them."""

_shared_memory = _SharedMemory(SHARED_BYTES)
_no_reservation = nullcontext()


def _do_nothing() -> None:
    pass


def decode(
    data: bytes,
    spec: InputSpec,
    max_pixels: int = MAX_PIXELS,
    on_start: Callable[[], object] = _do_nothing,
    reserve: Reserve = _shared_memory.reserve,
) -> np.ndarray:
    """Decode one image to the network's input: uint8 [height, width, channels] of `spec`.

    EXIF orientation is applied, transparent pixels are laid over white, and of an animation the
    first frame is taken. `on_start` is called when decoding begins, which may be later: a large
    image waits until others have freed their memory. `reserve` counts that memory; by default among
    the threads of this process.

    Raises UnsupportedFormat, ImageTooLarge (more than `max_pixels`, or more than MAX_PIXEL_BYTES
    for each of them) or UndecodableImage.
    """
    header = _read_allowed_header(data, max_pixels)
    reduction = _jpeg_reduction(header, spec)
    with _reserve_memory(data, header, reduction, max_pixels, reserve):
        on_start()
        pixels = _decode_pixels(data, header, spec.channels, reduction, spec.significant_bits)
        return resize_to_input(pixels, spec)


def decode_full_size(
    data: bytes,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    significant_bits: int = SIXTEEN_BITS,
) -> np.ndarray:
    """Decode one image to uint8 [H, W, channels] in its own size, RGB or gray.

    `significant_bits` is that of `InputSpec`.

    Raises as `decode` does.
    """
    header = _read_allowed_header(data, max_pixels)
    with _reserve_memory(data, header, 1, max_pixels):
        return _decode_pixels(data, header, channels, 1, significant_bits)


def read_largest_sample(data: bytes, max_pixels: int = MAX_PIXELS) -> int | None:
    """Return the largest gray or colour sample of a 16-bit image; None for images of 8 bits.

    Raises as `decode` does.
    """
    header = _read_allowed_header(data, max_pixels)
    if header.depth != 16:
        return None
    with _reserve_memory(data, header, 1, max_pixels):
        image, _ = _decode_stored(data, header, cv2.IMREAD_UNCHANGED, 1)
        return int(image.max() if image.ndim == 2 else image[:, :, :3].max())


def _read_allowed_header(data: bytes, max_pixels: int) -> Header:
    header = read_header(data)
    pixels = header.width * header.height
    if pixels > max_pixels:
        raise ImageTooLarge(
            f"{header.width}x{header.height} pixels are more than the {max_pixels} allowed; "
            "send a smaller image, or raise max_pixels"
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
    data: bytes,
    header: Header,
    reduction: int,
    max_pixels: int,
    reserve: Reserve = _shared_memory.reserve,
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

    most_bytes += len(data)  # the decoder gets a copy without metadata
    if most_bytes < UNCOUNTED_BYTES:
        return _no_reservation
    return reserve(most_bytes)


def _decode_pixels(
    data: bytes, header: Header, channels: int, reduction: int, significant_bits: int
) -> np.ndarray:
    """Decode to uint8 [H / reduction, W / reduction, channels], upright and over white."""
    flag = _imread_flag(header, channels, reduction)
    image, orientation = _decode_stored(data, header, flag, reduction)

    if flag == cv2.IMREAD_UNCHANGED:
        image = _flatten(image, channels, header, significant_bits)
    elif channels == 3 and flag != cv2.IMREAD_COLOR_RGB:
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return _apply_orientation(image.reshape(*image.shape[:2], channels), orientation)


def _decode_stored(
    data: bytes, header: Header, flag: int, reduction: int
) -> tuple[np.ndarray, int]:
    """Return the pixels as they are stored, and the orientation to turn them by."""
    if header.frame is not None:
        return _decode_jpeg(data, header, header.frame, flag, reduction), header.orientation
    if header.page is not None:
        return _decode_tiff(data, header, header.page, flag), header.orientation
    if header.avif is not None:
        return _decode_avif(header, header.avif, flag), header.orientation
    file = sanitize(data, header)
    image, exif = _run_decoder(file, header, flag)
    frame = read_first_frame(file, header)
    if frame is not None:
        _clear_outside(image, frame)
    return image, tiff.read_orientation(exif)


def _clear_outside(image: np.ndarray, frame: Frame) -> None:
    """Make the pixels outside the first frame white: viewers show what is behind it there."""
    left, top, width, height = frame
    image[:top] = 255
    image[top + height :] = 255
    image[:, :left] = 255
    image[:, left + width :] = 255


def _imread_flag(header: Header, channels: int, reduction: int) -> int:
    """Return the flag of OpenCV's decoders that needs the fewest conversions afterwards."""
    if header.format == "jpeg" or (header.format == "bmp" and header.alpha == "ignored"):
        flags = _GRAY_FLAGS if channels == 1 else _COLOUR_FLAGS
        return flags[reduction]
    return cv2.IMREAD_UNCHANGED  # the image may have alpha or 16 bits


def _decode_jpeg(
    data: bytes, header: Header, frame: JpegFrame, flag: int, reduction: int
) -> np.ndarray:
    """Decode a JPEG. Raises UndecodableImage where a part of its pixels is missing."""
    lacks_end = not has_end_marker(data, frame)
    if lacks_end:
        check_all_scans(data, frame)
        data += END_OF_IMAGE  # a file that lacks only the marker is complete
    _check_following_image(data, header, frame)

    if lacks_end or needs_check(data, frame):
        _check_complete(data, header, frame, reduction)
    image, _ = _run_decoder(data, header, flag)
    if not frame.has_several_scans and ends_in_gray(image):
        _check_complete(data, header, frame, reduction)
    return image


def _check_following_image(data: bytes, header: Header, frame: JpegFrame) -> None:
    """Raise UndecodableImage where a picture of the same size or a larger one follows a JPEG.

    Cameras append smaller previews, and multi-picture files have an index.
    """
    start = find_following_image(data, frame)
    if start is None or frame.has_index:
        return
    try:
        following = read_header(data[start:])
    except UndecodableImage:
        return
    if following.width * following.height >= header.width * header.height:
        raise UndecodableImage(
            "the file holds one jpeg image after another; save each as a file of its own"
        )


def _check_complete(data: bytes, header: Header, frame: JpegFrame, reduction: int) -> None:
    """Raise UndecodableImage where a scan of a JPEG ends before its last pixel.

    Large files are checked at the fraction of their size at which they are decoded, or at half
    their size if that is less, to take no more memory than decoding.
    """
    is_large = header.width * header.height > MAX_FULLY_CHECKED_PIXELS
    flag = _COLOUR_FLAGS[max(reduction, 2) if is_large else 1]
    checksums: list[int] = []
    for file in insert_bytes(data, read_scans(data, frame)):
        try:
            image, _ = _run_decoder(file, header, flag)
        except UndecodableImage as error:
            raise UndecodableImage(INCOMPLETE_JPEG) from error
        checksums.append(zlib.crc32(image.data))
    if checksums[0] != checksums[1]:
        raise UndecodableImage(INCOMPLETE_JPEG)


def _decode_tiff(data: bytes, header: Header, page: tiff.Directory, flag: int) -> np.ndarray:
    """Decode a page, not turned: gray, BGR or BGRA, whose alpha `header` describes."""
    samples = page.tags.get(tiff.SAMPLES_PER_PIXEL, 1)
    if samples == 2:
        return _decode_gray_with_alpha(data, header, page, flag)

    changes: dict[int, int | None] = {}
    if samples == 4 and tiff.EXTRA_SAMPLES in page.tags:
        # Otherwise libtiff multiplies colours of 8 bits by alpha, and rounds.
        changes[tiff.EXTRA_SAMPLES] = tiff.ASSOCIATED_ALPHA
    file = tiff.build_page_file(data, page, changes)
    image, _ = _run_decoder(sanitize(file, header), header, flag)
    return image


def _decode_gray_with_alpha(
    data: bytes, header: Header, page: tiff.Directory, flag: int
) -> np.ndarray:
    """Decode a TIFF of gray and alpha, which OpenCV does not read, to BGRA [H, W, 4].

    Both samples of a pixel are decoded as two pixels of a gray image that is twice as wide.
    """
    tags = page.tags
    changes: dict[int, int | None] = {
        tiff.IMAGE_WIDTH: 2 * header.width,
        tiff.BITS_PER_SAMPLE: header.depth,
        tiff.PHOTOMETRIC_INTERPRETATION: tiff.BLACK_IS_ZERO,
        tiff.SAMPLES_PER_PIXEL: 1,
        tiff.PREDICTOR: None,
        tiff.EXTRA_SAMPLES: None,
        tiff.SAMPLE_FORMAT: None,
    }
    block_width = header.width
    if tiff.TILE_WIDTH in tags:
        block_width = tags[tiff.TILE_WIDTH]
        changes[tiff.TILE_WIDTH] = 2 * block_width
    file = tiff.build_page_file(data, page, changes)
    image, _ = _run_decoder(sanitize(file, header), header, flag)
    samples = image.reshape(header.height, header.width, 2)

    if tags.get(tiff.PREDICTOR, 1) == tiff.HORIZONTAL_DIFFERENCES:
        for left in range(0, header.width, block_width):
            block = samples[:, left : left + block_width]
            np.cumsum(block, axis=1, dtype=block.dtype, out=block)

    bgra = np.empty((header.height, header.width, 4), samples.dtype)
    bgra[:, :, :3] = samples[:, :, :1]
    bgra[:, :, 3] = samples[:, :, 1]
    if tags[tiff.PHOTOMETRIC_INTERPRETATION] == tiff.WHITE_IS_ZERO:
        np.bitwise_not(bgra[:, :, :3], out=bgra[:, :, :3])
    return bgra


def _decode_avif(header: Header, avif: AvifImage, flag: int) -> np.ndarray:
    """Decode an AVIF, not turned: gray, BGR or BGRA."""
    if not avif.picture.colours.is_gray:
        image, _ = _run_decoder(build_avif(avif), header, flag)
        return image

    # OpenCV does not read gray with alpha, and not the range of gray.
    image, _ = _run_decoder(build_avif_plane(avif.picture), header, flag)
    if not avif.is_full_range:
        image = _expand_range(image, avif.picture.colours.bits)
    if avif.alpha is None:
        return image
    alpha, _ = _run_decoder(build_avif_plane(avif.alpha), header, flag)
    return cv2.merge([image, image, image, alpha])


def _expand_range(gray: np.ndarray, bits: int) -> np.ndarray:
    """Scale samples from 16 (black) to 235 (white), of 8 bits, to the full range."""
    samples = np.arange(1 << bits, dtype=np.float32)
    scaled = (samples - (16 << bits - 8)) * (255 / 219)
    table = np.clip(np.rint(scaled), 0, len(samples) - 1).astype(gray.dtype)
    return table[gray]


def _run_decoder(data: bytes | bytearray, header: Header, flag: int) -> tuple[np.ndarray, bytes]:
    """Return the decoded image, not turned, and the EXIF block of a PNG or WebP."""
    if header.format == "jpeg":
        data = sanitize(bytes(data), header)
    buffer = np.frombuffer(data, np.uint8)
    exif = b""
    image: np.ndarray | None
    try:
        with dropped_native_messages:
            if header.format in ("png", "webp"):
                image, kinds, chunks = cv2.imdecodeWithMetadata(buffer, flag)
                exif = _find_exif(kinds, chunks)
            else:
                image = cv2.imdecode(buffer, flag | cv2.IMREAD_IGNORE_ORIENTATION)
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


def _flatten(image: np.ndarray, channels: int, header: Header, significant_bits: int) -> np.ndarray:
    """Convert any depth and channel count (gray, BGR, BGRA) to uint8 [H, W, channels] over white.

    Works in strips, and writes the result over the pixels already read where it fits: a container
    has no memory for a second picture of 50 million pixels.
    """
    if image.dtype not in (np.uint8, np.uint16):
        raise UndecodableImage(f"samples of type {image.dtype} are not supported")

    height, width = image.shape[:2]
    if height * width <= STRIP_PIXELS:
        return _flatten_strip(image, channels, header, significant_bits)

    flat_bytes = height * width * channels
    if image.nbytes < flat_bytes:
        flat = np.empty((height, width, channels), np.uint8)
    else:
        flat = image.reshape(-1).view(np.uint8)[:flat_bytes].reshape(height, width, channels)

    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image[top : top + rows]
        flat[top : top + rows] = _flatten_strip(strip, channels, header, significant_bits)
    return flat


def _flatten_strip(
    image: np.ndarray, channels: int, header: Header, significant_bits: int
) -> np.ndarray:
    """Convert rows of an image as `_flatten` does."""
    is_gray = image.ndim == 2
    transparent_pixels = None
    if is_gray and header.transparent is not None:
        transparent_pixels = image == header.transparent

    if image.dtype == np.uint16:
        white = 2 ** (header.used_bits or significant_bits) - 1
        image = cv2.convertScaleAbs(image, alpha=255 / white)
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
    colour = cv2.cvtColor(image, cv2.COLOR_BGRA2BGR)
    if header.alpha == "ignored":
        return colour

    alpha = cv2.cvtColor(image[:, :, 3], cv2.COLOR_GRAY2BGR)
    if header.alpha == "straight":
        colour = cv2.multiply(colour, alpha, scale=1 / 255)
    return cv2.add(colour, cv2.bitwise_not(alpha))


def _apply_orientation(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn uint8 [H, W, C] by an EXIF orientation of 1 to 8; others leave it as it is."""
    channels = image.shape[2]
    if 5 <= orientation <= 8:
        image = cv2.transpose(image)
    if orientation in _ORIENTATION_FLIPS:
        cv2.flip(image, _ORIENTATION_FLIPS[orientation], dst=image)
    return image.reshape(*image.shape[:2], channels)
