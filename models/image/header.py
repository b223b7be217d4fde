"""Read an image's format and size from its header, before any decoder sees the bytes.

The parsers are stricter than the decoders behind them: where a parser and a decoder could read the
same file differently, the file is refused. Otherwise a file could show a small size here and a huge
one to the decoder.

One function a format reads its header: JPEG, PNG, GIF, WebP, BMP and TIFF.
"""

import struct
from dataclasses import dataclass
from typing import Literal

from models.image import tiff
from models.image.errors import UndecodableImage, UnsupportedFormat

DAMAGED = "the image header is cut short or damaged"


@dataclass(frozen=True, slots=True)
class Header:
    """Format, size and memory of one image, as far as its header states them."""

    format: Literal["jpeg", "png", "webp", "bmp", "gif", "tiff"]

    width: int
    """Pixels, before EXIF orientation."""

    height: int
    """Pixels, before EXIF orientation."""

    alpha: Literal["straight", "premultiplied", "ignored"] = "straight"
    """How to read a fourth channel, if the decoder returns one."""

    transparent: int | None = None
    """Gray value that a PNG without alpha channel declares transparent."""

    pixel_bytes: int = 4
    """Most bytes that decoding holds for each pixel."""

    has_several_scans: bool = False
    """Of a JPEG: all its coefficients stay in memory until the last scan is read."""


def read_header(data: bytes) -> Header:
    """Read format and size from the header alone.

    Raises UnsupportedFormat for an unknown magic number. Raises UndecodableImage where the header
    is cut short or invalid, or uses a feature that the decoders read wrongly.
    """
    if not data:
        raise UndecodableImage("the image is empty")

    try:
        header = _parse_header(data)
    except (struct.error, IndexError, KeyError) as error:
        raise UndecodableImage(DAMAGED) from error

    if header.width <= 0 or header.height <= 0:
        raise UndecodableImage("the image header states no size")
    return header


def _parse_header(data: bytes) -> Header:
    """Parse by the magic number. struct.error, IndexError and KeyError mean a damaged header."""
    if data[:3] == b"\xff\xd8\xff":
        return _parse_jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _parse_png(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _parse_gif(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _parse_webp(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _parse_tiff(data)
    if data[:2] == b"BM":
        return _parse_bmp(data)
    raise UnsupportedFormat("not a JPEG, PNG, WebP, BMP, GIF or TIFF image")


def _sixteen_bit_pixel_bytes(samples: int) -> int:
    """Bytes that decoding holds for a pixel of 16 bits a sample."""
    if samples == 1:
        return 4
    if samples == 3:
        return 6
    return 8  # gray with alpha is decoded as colour with alpha


# ---------------------------------------------------------------------------------------------
# JPEG: ITU T.81, annex B. Markers by the names of its table B.1.

_STUFFING = 0x00
_TEM = 0x01  # stand-alone, for arithmetic coding
_SOF0 = 0xC0  # start of frame, baseline
_SOF2 = 0xC2  # progressive
_DHT = 0xC4  # Huffman tables
_SOF6 = 0xC6  # differential progressive
_JPG = 0xC8  # reserved
_SOF10 = 0xCA  # progressive, arithmetic coding
_DAC = 0xCC  # arithmetic coding conditions
_SOF14 = 0xCE  # differential progressive, arithmetic coding
_SOF15 = 0xCF
_RST0 = 0xD0  # restart markers, stand-alone
_RST7 = 0xD7
_SOI = 0xD8  # start of image
_EOI = 0xD9  # end of image
_SOS = 0xDA  # start of scan

_PROGRESSIVE_FRAMES = frozenset((_SOF2, _SOF6, _SOF10, _SOF14))
_NOT_FRAMES = frozenset((_DHT, _JPG, _DAC))  # among the markers from SOF0 to SOF15
_INVALID_BEFORE_SCAN = frozenset((_STUFFING, _SOI, _EOI, _SOS))
_MAX_SCANS = 100  # progressive encoders write about ten; each costs a pass over the picture


def _parse_jpeg(data: bytes) -> Header:
    """Walk the marker segments from the start of image to the first scan."""
    position = 2
    frame = 0  # position of the length field of the start of frame, once it is seen

    while True:
        marker, position = _read_jpeg_marker(data, position)
        if marker == _TEM or _RST0 <= marker <= _RST7:
            continue
        length = data[position] << 8 | data[position + 1]
        if marker == _SOS and frame:
            break

        is_frame = _SOF0 <= marker <= _SOF15 and marker not in _NOT_FRAMES
        if marker in _INVALID_BEFORE_SCAN or length < 2:
            raise UndecodableImage(DAMAGED)
        if is_frame and frame:  # a second frame would hide the size of the first
            raise UndecodableImage(DAMAGED)
        if is_frame:
            frame = position
        position += length

    height, width, frame_components = struct.unpack_from(">HHB", data, frame + 3)
    scan_components = data[position + 2]
    is_progressive = data[frame - 1] in _PROGRESSIVE_FRAMES
    # Decoders stop after the first scan of any other frame.
    has_several_scans = is_progressive or scan_components < frame_components
    if has_several_scans and data.count(bytes((0xFF, _SOS)), position) >= _MAX_SCANS:
        raise UndecodableImage(f"the jpeg has more than {_MAX_SCANS} scans")
    return Header("jpeg", width, height, has_several_scans=has_several_scans)


def _read_jpeg_marker(data: bytes, position: int) -> tuple[int, int]:
    """Return the marker at `position` and the position after it; 0xFF fill bytes may precede it."""
    if data[position] != 0xFF:
        raise UndecodableImage(DAMAGED)
    while data[position] == 0xFF:
        position += 1
    return data[position], position + 1


# ---------------------------------------------------------------------------------------------
# PNG: a signature of 8 bytes, then chunks of length, type, body and checksum (ISO/IEC 15948).

_PNG_GRAY = 0
# Colour type -> samples a pixel, of the types that may have 16 bits a sample.
_PNG_SAMPLES = {
    0: 1,  # gray
    2: 3,  # RGB
    4: 2,  # gray and alpha
    6: 4,  # RGB and alpha
}


def _parse_png(data: bytes) -> Header:
    """Read the IHDR chunk, which must be first, and tRNS of gray pictures, which OpenCV ignores."""
    length, chunk_type, width, height, depth, colour_type = struct.unpack_from(">I4sIIBB", data, 8)
    if chunk_type != b"IHDR" or length != 13:
        raise UndecodableImage(DAMAGED)

    pixel_bytes = 4
    if depth == 16:
        pixel_bytes = _sixteen_bit_pixel_bytes(_PNG_SAMPLES[colour_type])
    transparent = _read_png_transparent_gray(data, depth) if colour_type == _PNG_GRAY else None
    return Header("png", width, height, transparent=transparent, pixel_bytes=pixel_bytes)


def _read_png_transparent_gray(data: bytes, depth: int) -> int | None:
    """Return the gray value that the tRNS chunk declares transparent, scaled to 8 bits."""
    transparent = None
    position = 8
    chunk_type = b""
    while chunk_type != b"IDAT":
        length, chunk_type = struct.unpack_from(">I4s", data, position)
        if chunk_type == b"tRNS":
            (transparent,) = struct.unpack_from(">H", data, position + 8)
            if depth < 8:  # decoders scale fewer bits to 0..255
                transparent = transparent * 255 // (2**depth - 1)
        position += 12 + length
    return transparent


# ---------------------------------------------------------------------------------------------
# GIF, WebP (RFC 9649) and BMP


def _parse_gif(data: bytes) -> Header:
    """Read the logical screen size, which follows the signature."""
    width, height = struct.unpack_from("<HH", data, 6)
    return Header("gif", width, height)


def _parse_webp(data: bytes) -> Header:
    """Read the size from the first chunk: lossy VP8, lossless VP8L or extended VP8X."""
    chunk_type = data[12:16]

    if chunk_type == b"VP8 ":  # 14 bits each; the upper two bits are a scaling hint
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", width & 0x3FFF, height & 0x3FFF)

    if chunk_type == b"VP8L":  # 14 bits each, less one
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)

    if chunk_type == b"VP8X":  # 24 bits each, less one
        width_low, width_high, height_low, height_high = struct.unpack_from("<HBHB", data, 24)
        width = (width_low | width_high << 16) + 1
        height = (height_low | height_high << 16) + 1
        return Header("webp", width, height)

    raise UndecodableImage(DAMAGED)


_BMP_OS2_HEADER_BYTES = 12
_BMP_V4_HEADER_BYTES = 108  # the first version with an alpha mask that readers respect


def _parse_bmp(data: bytes) -> Header:
    """Read an OS/2 or Windows header. Only version 4 and later can declare an alpha channel."""
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == _BMP_OS2_HEADER_BYTES:
        width, height = struct.unpack_from("<HH", data, 18)
        return Header("bmp", width, height, alpha="ignored")

    width, height = struct.unpack_from("<ii", data, 18)
    height = abs(height)  # negative: rows from the top
    if header_bytes < _BMP_V4_HEADER_BYTES:
        return Header("bmp", width, height, alpha="ignored")

    (alpha_mask,) = struct.unpack_from("<I", data, 66)
    return Header("bmp", width, height, alpha="straight" if alpha_mask else "ignored")


# ---------------------------------------------------------------------------------------------
# TIFF 6.0: only what the decoder reads well, checked tag by tag.

_TIFF_COMPRESSIONS = frozenset(
    (
        1,  # none
        2,  # CCITT run length
        3,  # CCITT group 3
        4,  # CCITT group 4
        5,  # LZW
        7,  # JPEG
        8,  # Deflate (Adobe)
        32773,  # PackBits
        32946,  # Deflate
    )
)
_TIFF_PHOTOMETRICS = frozenset(
    (
        0,  # white is zero
        1,  # black is zero
        2,  # RGB
        3,  # palette
        5,  # separated (CMYK)
        6,  # YCbCr
    )
)
_TIFF_SIXTEEN_BIT_PHOTOMETRICS = frozenset((1, 2))
_TIFF_BITS = frozenset((1, 2, 4, 8, 16))
_TIFF_MAX_SAMPLES = 4
_TIFF_MAX_TILE_PIXELS = 1 << 24
_UNSIGNED_INTEGER = 1  # SampleFormat
_CHUNKY = 1  # PlanarConfiguration: the samples of a pixel lie together
_UNASSOCIATED_ALPHA = 2  # ExtraSamples: colours are not multiplied by alpha


def _parse_tiff(data: bytes) -> Header:
    """Read the first directory and check that its kind of TIFF is supported."""
    tags = tiff.read_tiff_tags(data)
    if not _is_supported_tiff(tags):
        raise UndecodableImage(
            f"this kind of tiff is not supported ({tags.get(tiff.BITS_PER_SAMPLE, 1)} bits, "
            f"photometric {tags[tiff.PHOTOMETRIC_INTERPRETATION]}, "
            f"compression {tags.get(tiff.COMPRESSION, 1)})"
        )

    tile_pixels = tags.get(tiff.TILE_WIDTH, 1) * tags.get(tiff.TILE_LENGTH, 1)
    if tile_pixels > _TIFF_MAX_TILE_PIXELS:
        raise UndecodableImage(f"the tiff has tiles of more than {_TIFF_MAX_TILE_PIXELS} pixels")

    width = tags[tiff.IMAGE_WIDTH]
    height = tags[tiff.IMAGE_LENGTH]
    if tags.get(tiff.BITS_PER_SAMPLE, 1) != 16:
        # libtiff returns 8-bit colours multiplied by alpha
        return Header("tiff", width, height, alpha="premultiplied")

    extra = tags.get(tiff.EXTRA_SAMPLES, _UNASSOCIATED_ALPHA)
    return Header(
        "tiff",
        width,
        height,
        alpha="straight" if extra == _UNASSOCIATED_ALPHA else "premultiplied",
        pixel_bytes=_sixteen_bit_pixel_bytes(tags.get(tiff.SAMPLES_PER_PIXEL, 1)),
    )


def _is_supported_tiff(tags: dict[int, int]) -> bool:
    """Whether OpenCV reads a TIFF with these tags correctly."""
    bits = tags.get(tiff.BITS_PER_SAMPLE, 1)
    photometric = tags[tiff.PHOTOMETRIC_INTERPRETATION]
    is_readable = (
        tags.get(tiff.COMPRESSION, 1) in _TIFF_COMPRESSIONS
        and bits in _TIFF_BITS
        and tags.get(tiff.SAMPLES_PER_PIXEL, 1) <= _TIFF_MAX_SAMPLES
        and tags.get(tiff.SAMPLE_FORMAT, _UNSIGNED_INTEGER) == _UNSIGNED_INTEGER
        and photometric in _TIFF_PHOTOMETRICS
    )
    if bits != 16:
        return is_readable

    is_chunky = tags.get(tiff.PLANAR_CONFIGURATION, _CHUNKY) == _CHUNKY
    return is_readable and is_chunky and photometric in _TIFF_SIXTEEN_BIT_PHOTOMETRICS
