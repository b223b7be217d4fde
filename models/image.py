"""Image bytes to uint8 pixels: the only decode and resize code in the project, used to train and to serve.

Untrusted bytes reach a decoder only after their magic number names one of six formats and their header states an
allowed size. No other codec is reachable.
"""
import struct
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from pydantic import BaseModel, Field

cv2.setNumThreads(1)  # callers run one decode a core; a second pool inside would only contend

MAX_PIXELS = 50_000_000


class ImageError(ValueError):
    """Bytes that can't become pixels. `status` is the HTTP status that tells the sender why."""

    status = 422


class UnsupportedFormat(ImageError):
    """The magic number is none of JPEG, PNG, WebP, BMP, GIF or TIFF."""

    status = 415


class ImageTooLarge(ImageError):
    """The header states more pixels than allowed."""

    status = 413


class UndecodableImage(ImageError):
    """The magic number is right and the rest is not."""

    status = 422


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
    short_side: int | None = Field(default=None, gt=0, le=8192, description="for crop; by default the larger side")


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes say, before any decoding. Sizes in pixels, before EXIF orientation."""

    format: Literal["jpeg", "png", "webp", "bmp", "gif", "tiff"]
    width: int
    height: int


def header(data: bytes) -> Header:
    """Read format and size from the header alone.

    Raises UnsupportedFormat for another magic number, UndecodableImage where the header is cut short or senseless.
    """
    try:
        found = _header(data)
    except (struct.error, IndexError, KeyError) as error:
        raise UndecodableImage("the image header is cut short or damaged") from error
    if found.width <= 0 or found.height <= 0:
        raise UndecodableImage("the image header states no size")
    return found


def _header(data: bytes) -> Header:
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return Header("png", *struct.unpack_from(">II", data, 16))
    if data[:3] == b"\xff\xd8\xff":
        return Header("jpeg", *_jpeg_size(data))
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return Header("gif", *struct.unpack_from("<HH", data, 6))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Header("webp", *_webp_size(data))
    if data[:4] in (b"II*\0", b"MM\0*"):
        return Header("tiff", *_tiff_size(data))
    if data[:2] == b"BM":
        width, height = struct.unpack_from("<ii", data, 18)
        return Header("bmp", width, abs(height))  # a negative height means top-down rows
    raise UnsupportedFormat("not a JPEG, PNG, WebP, BMP, GIF or TIFF image")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk the marker segments to the start of frame (ITU T.81, annex B)."""
    at = 2
    while True:
        if data[at] != 0xFF:
            raise IndexError
        while data[at] == 0xFF:  # fill bytes may stand before a marker
            at += 1
        marker = data[at]
        at += 1
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # stand-alone markers have no length
            continue
        if marker in (0xD9, 0xDA):  # image ends or scan starts before any frame
            raise IndexError
        (length,) = struct.unpack_from(">H", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        at += length


def _webp_size(data: bytes) -> tuple[int, int]:
    """Size from the first chunk: lossy VP8, lossless VP8L or extended VP8X (RFC 9649)."""
    chunk = data[12:16]
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        return width, height
    raise KeyError(chunk)


def _tiff_size(data: bytes) -> tuple[int, int]:
    """Size from tags 256 and 257 of the first directory (TIFF 6.0)."""
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, at)
    tags = {}
    for i in range(min(entries, 512)):
        tag, kind = struct.unpack_from(order + "HH", data, at + 2 + 12 * i)
        if tag in (256, 257):
            (tags[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + 10 + 12 * i)
    return tags[256], tags[257]


def decode(data: bytes, spec: InputSpec, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Bytes of one image to what the network is fed: uint8 [height, width, channels] of `spec`.

    EXIF orientation is applied; transparent pixels lie on white; of an animation the first frame counts.
    Raises UnsupportedFormat, ImageTooLarge (more than `max_pixels`) or UndecodableImage.
    """
    return fit(pixels(data, spec.channels, spec, max_pixels), spec)


def pixels(data: bytes, channels: int, spec: InputSpec | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Bytes to uint8 [H, W, channels] in the image's own size, RGB or gray.

    With `spec`, a JPEG much larger than it is decoded at 1/2, 1/4 or 1/8 of its size: the inverse DCT then yields the
    smaller picture at a fraction of the cost. Raises as `decode`.
    """
    head = header(data)
    if head.width * head.height > max_pixels:
        raise ImageTooLarge(f"{head.width}x{head.height} pixels is more than the {max_pixels} allowed")
    flag = _read_flag(head, channels, spec)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error as error:
        raise UndecodableImage(f"the {head.format} data can't be decoded") from error
    if image is None:
        raise UndecodableImage(f"the {head.format} data can't be decoded")
    if flag == cv2.IMREAD_UNCHANGED:
        return _flatten(image, channels)
    if channels == 3 and flag != cv2.IMREAD_COLOR_RGB:
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return image.reshape(*image.shape[:2], channels)


def _read_flag(head: Header, channels: int, spec: InputSpec | None) -> int:
    if head.format in ("png", "webp", "gif", "tiff"):
        return cv2.IMREAD_UNCHANGED  # may have alpha or 16 bits
    scale = 1
    if head.format == "jpeg" and spec is not None:
        target = max(spec.short_side or 0, spec.height, spec.width)
        while scale < 8 and min(head.width, head.height) >= 2 * scale * target:
            scale *= 2
    return (_GRAY if channels == 1 else _COLOR)[scale]


_GRAY = {1: cv2.IMREAD_GRAYSCALE, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
         8: cv2.IMREAD_REDUCED_GRAYSCALE_8}
_COLOR = {1: cv2.IMREAD_COLOR_RGB, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4,
          8: cv2.IMREAD_REDUCED_COLOR_8}  # there is no reduced flag in RGB order


def _flatten(image: np.ndarray, channels: int) -> np.ndarray:
    """Any depth and channel count (gray, gray+alpha, BGR, BGRA) to uint8 [H, W, channels] over white."""
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    elif image.dtype != np.uint8:
        raise UndecodableImage(f"samples of type {image.dtype} are not supported")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] in (2, 4):
        alpha = image[:, :, -1:].astype(np.uint16)
        colour = image[:, :, :-1]
        image = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    if image.shape[2] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGR2GRAY)
    elif channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return image.reshape(*image.shape[:2], channels)


def fit(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """uint8 [H, W, C] to uint8 [spec.height, spec.width, C] by the policy of `spec`; contiguous."""
    height, width = image.shape[:2]
    if (height, width) == (spec.height, spec.width) and spec.short_side in (None, min(height, width)):
        return np.ascontiguousarray(image)
    if spec.resize == "stretch":
        return _resize(image, spec.height, spec.width)
    if spec.resize == "pad":
        scale = min(spec.height / height, spec.width / width)
        inner = _resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
        out = np.zeros((spec.height, spec.width, image.shape[2]), np.uint8)
        y, x = (spec.height - inner.shape[0]) // 2, (spec.width - inner.shape[1]) // 2
        out[y:y + inner.shape[0], x:x + inner.shape[1]] = inner
        return out
    short = max(spec.short_side or 0, spec.height, spec.width)
    scale = short / min(height, width)
    image = _resize(image, max(spec.height, round(height * scale)), max(spec.width, round(width * scale)))
    y, x = (image.shape[0] - spec.height) // 2, (image.shape[1] - spec.width) // 2
    return np.ascontiguousarray(image[y:y + spec.height, x:x + spec.width])


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area averaging where the image shrinks to less than half (linear would alias), linear otherwise."""
    shrinks = image.shape[0] > 2 * height or image.shape[1] > 2 * width
    out = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return out.reshape(height, width, image.shape[2])  # cv2 drops a single channel
