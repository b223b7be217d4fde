"""What the first bytes of an image say, read before any decoder sees them: format, size, and how alpha is to be taken.

The parsers are stricter than the decoders behind them: where the two could read one file differently (a size hidden
from us and seen by the decoder), the file is refused.
"""

import struct
from dataclasses import dataclass
from typing import Literal


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


@dataclass(frozen=True, slots=True)
class Header:
    """Size in pixels before EXIF orientation. `alpha`: how a fourth channel is to be read, should there be one.

    `transparent`: the gray value that a PNG without alpha channel declares as see-through. `pixel_bytes`: what decoding
    holds for each pixel, at most. `several_scans`: of a JPEG, which then is held whole before any of it can be seen.
    """

    format: Literal["jpeg", "png", "webp", "bmp", "gif", "tiff"]
    width: int
    height: int
    alpha: Literal["straight", "premultiplied", "ignored"] = "straight"
    transparent: int | None = None
    pixel_bytes: int = 4
    several_scans: bool = False


def read_header(data: bytes) -> Header:
    """Read format and size from the header alone.

    Raises UnsupportedFormat for another magic number, UndecodableImage where the header is cut short, senseless, or
    asks for something that the decoders behind it would get wrong.
    """
    if not data:
        raise UndecodableImage("the image is empty")
    try:
        found = _header(data)
    except (struct.error, IndexError, KeyError) as error:
        raise UndecodableImage("the image header is cut short or damaged") from error
    if found.width <= 0 or found.height <= 0:
        raise UndecodableImage("the image header states no size")
    return found


def _header(data: bytes) -> Header:
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return Header("gif", *struct.unpack_from("<HH", data, 6))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Header("webp", *_webp_size(data))
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff(data)
    if data[:2] == b"BM":
        return _bmp(data)
    raise UnsupportedFormat("not a JPEG, PNG, WebP, BMP, GIF or TIFF image")


_NO_SIZE = frozenset(
    (0x00, 0xD8, 0xD9, 0xDA)
)  # stuffing, a second start, the end, or a scan before any frame
_NO_FRAME = frozenset((0xC4, 0xC8, 0xCC))  # of the markers from C0 to CF
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_MOST_SCANS = 100  # progressive encoders write about ten; each costs a pass over the whole picture


def _jpeg(data: bytes) -> Header:
    """Walk the marker segments over the start of frame to the first scan (ITU T.81, annex B).

    There may be more scans where the frame is progressive or the first one leaves components out; else decoders stop.
    """
    at, frame = 2, 0  # where the start of frame is
    while True:
        if data[at] != 0xFF:
            raise IndexError
        while data[at] == 0xFF:  # fill bytes may stand before a marker
            at += 1
        marker = data[at]
        at += 1
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # stand-alone markers have no length
            continue
        length = data[at] << 8 | data[at + 1]
        if marker == 0xDA and frame:
            break
        is_frame = 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME
        if marker in _NO_SIZE or length < 2 or (is_frame and frame):
            raise IndexError
        if is_frame:
            frame = at
        at += length
    height, width, components = struct.unpack_from(">HHB", data, frame + 3)
    several = data[frame - 1] in _PROGRESSIVE or data[at + 2] < components
    if several and data.count(b"\xff\xda", at) >= _MOST_SCANS:
        raise UndecodableImage(f"the jpeg has more than {_MOST_SCANS} scans")
    return Header("jpeg", width, height, several_scans=several)


_PNG_SAMPLES = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type, where there may be 16 bits of each


def _deep(samples: int) -> int:
    """Bytes a pixel of 16 bits a sample; gray with alpha becomes colour with alpha."""
    return {1: 4, 3: 6}.get(samples, 8)


def _png(data: bytes) -> Header:
    """The IHDR chunk, which must be first, and for gray pictures the tRNS chunk, which OpenCV leaves out."""
    length, kind, width, height, depth, colour = struct.unpack_from(">I4sIIBB", data, 8)
    if kind != b"IHDR" or length != 13:
        raise KeyError(kind)
    transparent = None
    if colour == 0:
        at = 8
        while kind != b"IDAT":
            length, kind = struct.unpack_from(">I4s", data, at)
            if kind == b"tRNS":
                (transparent,) = struct.unpack_from(">H", data, at + 8)
                if depth < 8:  # decoders spread few bits over 0..255
                    transparent = transparent * 255 // (2**depth - 1)
            at += 12 + length
    return Header(
        "png",
        width,
        height,
        transparent=transparent,
        pixel_bytes=_deep(_PNG_SAMPLES[colour]) if depth == 16 else 4,
    )


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
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return (low_w | high_w << 16) + 1, (low_h | high_h << 16) + 1
    raise KeyError(chunk)


def _bmp(data: bytes) -> Header:
    """OS/2 (12 bytes) and Windows headers. Only version 4 and later may declare an alpha channel that means it."""
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return Header("bmp", width, height, "ignored")
    width, height = struct.unpack_from("<ii", data, 18)
    declared = size >= 108 and struct.unpack_from("<I", data, 66)[0] != 0
    return Header(
        "bmp", width, abs(height), "straight" if declared else "ignored"
    )  # negative: top-down rows


WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION = 256, 257, 258, 259, 262, 274
SAMPLES, PLANAR, TILE_WIDTH, TILE_HEIGHT, EXTRA, SAMPLE_FORMAT = 277, 284, 322, 323, 338, 339
_COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946}  # none, CCITT, LZW, JPEG, Deflate, PackBits
_LARGEST_TILE = 1 << 24


def _tiff(data: bytes) -> Header:
    """The first directory (TIFF 6.0), checked tag by tag: the format has room for far more than is read well."""
    tags = tiff_tags(data)
    bits, samples = tags.get(BITS, 1), tags.get(SAMPLES, 1)
    photometric, deep = tags[PHOTOMETRIC], bits == 16
    known = (
        tags.get(COMPRESSION, 1) in _COMPRESSIONS
        and bits in (1, 2, 4, 8, 16)
        and samples <= 4
        and tags.get(SAMPLE_FORMAT, 1) == 1
        and photometric in (0, 1, 2, 3, 5, 6)
    )
    if not known or (deep and (photometric not in (1, 2) or tags.get(PLANAR, 1) != 1)):
        raise UndecodableImage(
            f"this kind of tiff is not supported ({bits} bits, photometric {photometric}, "
            f"compression {tags.get(COMPRESSION, 1)})"
        )
    if tags.get(TILE_WIDTH, 1) * tags.get(TILE_HEIGHT, 1) > _LARGEST_TILE:
        raise UndecodableImage("the tiff has senseless tiles")
    straight = (
        deep and tags.get(EXTRA, 2) == 2
    )  # libtiff multiplies 8-bit colours with alpha, 16-bit ones stay
    return Header(
        "tiff",
        tags[WIDTH],
        tags[HEIGHT],
        "straight" if straight else "premultiplied",
        pixel_bytes=_deep(samples) if deep else 4,
    )


def tiff_tags(data: bytes) -> dict[int, int]:
    """First value of each byte, short or long tag in the first directory; also reads EXIF, which is a TIFF inside.

    Raises struct.error, KeyError or IndexError where the bytes are not so, or give a tag twice.
    """
    order = {b"II": "<", b"MM": ">"}[bytes(data[:2])]
    (at,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, at)
    tags: dict[int, int] = {}
    for entry in range(at + 2, at + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", data, entry)
        code, size = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4)}.get(kind, ("", 0))
        if not size:
            continue
        if tag in tags:
            raise KeyError(tag)
        place = entry + 8
        if count * size > 4:
            (place,) = struct.unpack_from(order + "I", data, place)
        (tags[tag],) = struct.unpack_from(order + code, data, place)
    return tags
