"""Read an image's format, size and memory from its header, before any decoder sees the bytes.

The parsers are stricter than the decoders behind them: where a parser and a decoder could read the
same file differently, the file is refused. Otherwise a file could show a small size here and a huge
one to the decoder. Every loop over a header has a bound, as it holds the interpreter's lock.

One function a format reads its header: JPEG, PNG, GIF, WebP, AVIF, BMP and TIFF.
"""

import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple

from models.image import tiff
from models.image.avif import AvifImage, has_avif_brand, read_avif
from models.image.errors import UndecodableImage, UnsupportedFormat
from models.image.jpeg_scans import JpegFrame

DAMAGED = "the image header is cut short or damaged"


class Header(NamedTuple):
    """Format, size and memory of one image, as far as its header states them."""

    format: Literal["jpeg", "png", "webp", "avif", "bmp", "gif", "tiff"]

    width: int
    """Pixels, before orientation."""

    height: int
    """Pixels, before orientation."""

    alpha: Literal["straight", "premultiplied", "ignored"] = "straight"
    """How to read a fourth channel, if the decoder returns one."""

    orientation: int = 1
    """How to turn the decoded pixels, as EXIF counts it: 1 to 8; other values turn nothing."""

    depth: Literal[8, 16] = 8
    """Bits of a decoded sample."""

    transparent: int | None = None
    """Gray value that a PNG without alpha channel declares transparent."""

    pixel_bytes: int = 8
    """Most bytes that decoding holds for each decoded pixel. OpenCV holds a picture of up to four
    channels twice while it becomes an array."""

    extra_bytes: int = 0
    """Further bytes that decoding holds, at any scale: coefficients of a JPEG in several scans,
    strips of a TIFF."""

    frame: JpegFrame | None = None
    """Of a JPEG: its kind, and where its pixels begin."""

    page: tiff.Directory | None = None
    """Of a TIFF: the page to decode."""

    avif: AvifImage | None = None
    """Of an AVIF: the picture to decode."""

    used_bits: int | None = None
    """Bits that 16-bit samples use, where the file states it."""

    table_bytes: int = 0
    """Most bytes of code tables that a lossless WebP of this size may declare."""


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
    if has_avif_brand(data):
        return _parse_avif(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _parse_tiff(data)
    if data[:2] == b"BM":
        return _parse_bmp(data)
    raise UnsupportedFormat(_describe_other_format(data))


_PHONE_FORMAT = (
    "the format in which phones store photos (an iPhone stores JPEG with the setting Camera, "
    "Formats, Most Compatible)"
)
# Position, bytes there, and what such a file is.
_OTHER_FORMATS = (
    (4, b"ftyphei", f"a HEIC image, {_PHONE_FORMAT}"),
    (4, b"ftyphev", f"a HEIC image, {_PHONE_FORMAT}"),
    (4, b"ftypmif1", f"a HEIF image, {_PHONE_FORMAT}"),
    (4, b"ftypmsf1", f"a HEIF image, {_PHONE_FORMAT}"),
    (4, b"ftypcrx", "raw data of a camera"),
    (4, b"ftyp", "a video"),
    (0, b"FUJIFILM", "raw data of a camera"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (0, b"II+\0", "a BigTIFF image"),
    (0, b"MM\0+", "a BigTIFF image"),
    (0, b"8BPS", "a Photoshop image"),
    (0, b"%PDF", "a PDF document"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "an XML document, such as an SVG drawing"),
)


def _describe_other_format(data: bytes) -> str:
    """Say what a file of another format is, and what to do."""
    supported = "not a JPEG, PNG, WebP, AVIF, BMP, GIF or TIFF image"
    for position, magic, name in _OTHER_FORMATS:
        if data.startswith(magic, position):
            return f"{name}, {supported}; convert it to JPEG or PNG"
    return supported


def _count_pixel_bytes(is_gray: bool, depth: int) -> int:
    """Bytes that decoding holds for a pixel: two copies, or one and its conversion to RGB."""
    if is_gray:
        return 6 if depth == 16 else 4
    return 16 if depth == 16 else 8  # gray with alpha is decoded as colour with alpha


# ---------------------------------------------------------------------------------------------
# JPEG: ITU T.81, annex B. Markers by the names of its table B.1.

_STUFFING = 0x00
_TEM = 0x01  # stand-alone, for arithmetic coding
_SOF0 = 0xC0  # start of frame, baseline
_SOF2 = 0xC2  # progressive
_DHT = 0xC4  # Huffman tables
_SOF6 = 0xC6  # differential progressive
_JPG = 0xC8  # reserved
_SOF9 = 0xC9  # arithmetic coding
_SOF10 = 0xCA  # progressive, arithmetic coding
_DAC = 0xCC  # arithmetic coding conditions
_SOF14 = 0xCE  # differential progressive, arithmetic coding
_SOF15 = 0xCF
_RST0 = 0xD0  # restart markers, stand-alone
_RST7 = 0xD7
_SOI = 0xD8  # start of image
_EOI = 0xD9  # end of image
_SOS = 0xDA  # start of scan
_DRI = 0xDD  # restart interval
_APP1 = 0xE1  # EXIF, XMP
_APP2 = 0xE2  # colour profiles, the index of a multi-picture file
_EXIF = b"Exif\0"
_MULTI_PICTURE = b"MPF\0"

_PROGRESSIVE_FRAMES = frozenset((_SOF2, _SOF6, _SOF10, _SOF14))
_ARITHMETIC_FRAMES = frozenset(range(_SOF9, _SOF15 + 1)) - {_DAC}
_NOT_FRAMES = frozenset((_DHT, _JPG, _DAC))  # among the markers from SOF0 to SOF15
_STAND_ALONE = frozenset((_TEM, *range(_RST0, _RST7 + 1)))  # markers without a segment
_FRAMES = frozenset(range(_SOF0, _SOF15 + 1)) - _NOT_FRAMES
_INVALID_BEFORE_SCAN = frozenset((_STUFFING, _SOI, _EOI, _SOS))
_FRAME_SIZE = struct.Struct(">HHB")  # height, width, components
_MAX_SEGMENTS = 1000  # before the first scan; a colour profile takes up to 255
_MAX_FILL_BYTES = 1000
_MAX_SCANS = 100  # progressive encoders write about ten; each costs a pass over the picture
_MAX_SCAN_PIXELS = 1_000_000_000  # of all passes together
_ARITHMETIC_PASSES = 4  # that a scan in arithmetic coding takes as long as
_COEFFICIENT_BYTES = 2
_JPEG_PIXEL_BYTES = 6  # three channels, twice


def _parse_jpeg(data: bytes) -> Header:
    """Walk the marker segments from the start of image to the first scan."""
    position = 2
    frame = 0  # position of the length field of the start of frame, once it is seen
    exif = b""
    has_index = False
    has_restarts = False

    for _ in range(_MAX_SEGMENTS):
        marker, position = _read_jpeg_marker(data, position)
        if marker in _STAND_ALONE:
            continue
        length = data[position] << 8 | data[position + 1]
        if marker == _SOS and frame:
            break

        if marker in _INVALID_BEFORE_SCAN or length < 2:
            raise UndecodableImage(DAMAGED)
        if marker in _FRAMES:
            if frame:  # a second frame would hide the size of the first
                raise UndecodableImage(DAMAGED)
            frame = position
        elif marker == _APP1:
            if not exif and data.startswith(_EXIF, position + 2):
                exif = data[position + 2 : position + length]
        elif marker == _APP2:
            has_index = has_index or data.startswith(_MULTI_PICTURE, position + 2)
        elif marker == _DRI:
            has_restarts = True
        position += length
    else:
        raise UndecodableImage(f"the jpeg has more than {_MAX_SEGMENTS} segments before its pixels")

    height, width, frame_components = _FRAME_SIZE.unpack_from(data, frame + 3)
    scan_components = data[position + 2]
    is_progressive = data[frame - 1] in _PROGRESSIVE_FRAMES
    # Decoders stop after the first scan of any other frame.
    has_several_scans = is_progressive or scan_components < frame_components
    coefficient_bytes = 0
    if has_several_scans:
        pixels = width * height
        passes = _ARITHMETIC_PASSES if data[frame - 1] in _ARITHMETIC_FRAMES else 1
        _check_scans(data.count(bytes((0xFF, _SOS)), position) + 1, passes * pixels)
        samples = _count_samples(data[frame + 9 : frame + 9 + 3 * frame_components : 3])
        # All coefficients stay in memory until the last scan is read.
        coefficient_bytes = int(pixels * samples * _COEFFICIENT_BYTES)

    return Header(
        "jpeg",
        width,
        height,
        orientation=tiff.read_orientation(exif) if exif else 1,
        frame=JpegFrame(
            frame_components,
            is_progressive,
            has_several_scans,
            has_restarts,
            first_scan=position,
            has_index=has_index,
        ),
        pixel_bytes=_JPEG_PIXEL_BYTES,
        extra_bytes=coefficient_bytes,
    )


def iterate_jpeg_segments(data: bytes, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the marker, the start and the end of each segment of a parsed JPEG before `end`."""
    start = 2
    while start < end:
        marker, position = _read_jpeg_marker(data, start)
        if position >= end:
            return
        if marker not in _STAND_ALONE:
            position += data[position] << 8 | data[position + 1]
        yield marker, start, position
        start = position


def _check_scans(scans: int, pixels: int) -> None:
    """Raise UndecodableImage where so many scans of so many pixels take too long."""
    if scans > _MAX_SCANS:
        raise UndecodableImage(f"the jpeg has more than {_MAX_SCANS} scans")
    if scans * pixels > _MAX_SCAN_PIXELS:
        raise UndecodableImage(f"the jpeg has {scans} scans, which are too many for its size")


def _count_samples(sampling_factors: bytes) -> float:
    """Return the samples a pixel; each byte holds a component's factors, horizontal and vertical.

    Raises UndecodableImage for a factor of zero.
    """
    areas = [(factors >> 4) * (factors & 15) for factors in sampling_factors]
    if not areas or not all(areas):
        raise UndecodableImage(DAMAGED)
    return sum(areas) / max(areas)


def _read_jpeg_marker(data: bytes, position: int) -> tuple[int, int]:
    """Return the marker at `position` and the position after it; 0xFF fill bytes may precede it."""
    if data[position] != 0xFF:
        raise UndecodableImage(DAMAGED)
    marker = data[position + 1]
    position += 2
    for _ in range(_MAX_FILL_BYTES):
        if marker != 0xFF:
            return marker, position
        marker = data[position]
        position += 1
    raise UndecodableImage(DAMAGED)


# ---------------------------------------------------------------------------------------------
# PNG: a signature of 8 bytes, then chunks of length, type, body and checksum (ISO/IEC 15948).

_PNG_GRAY = 0
_PNG_DEPTHS = frozenset((1, 2, 4, 8, 16))  # bits a sample
# Colour type -> samples a pixel.
_PNG_SAMPLES = {
    0: 1,  # gray
    2: 3,  # RGB
    3: 1,  # palette
    4: 2,  # gray and alpha
    6: 4,  # RGB and alpha
}
_MAX_PNG_CHUNKS = 50_000  # encoders write pixels in chunks of 8 KiB or more


def _parse_png(data: bytes) -> Header:
    """Read the IHDR chunk, which must be first, and tRNS of gray pictures, which OpenCV ignores."""
    length, chunk_type, width, height, depth, colour_type = struct.unpack_from(">I4sIIBB", data, 8)
    if chunk_type != b"IHDR" or length != 13 or depth not in _PNG_DEPTHS:
        raise UndecodableImage(DAMAGED)

    is_gray = colour_type == _PNG_GRAY
    return Header(
        "png",
        width,
        height,
        depth=16 if depth == 16 else 8,
        transparent=_read_png_transparent_gray(data, depth) if is_gray else None,
        pixel_bytes=_count_pixel_bytes(is_gray, depth),
    )


def _read_png_transparent_gray(data: bytes, depth: int) -> int | None:
    """Return the gray value that the tRNS chunk declares transparent, scaled to 8 bits."""
    for chunk_type, position, _ in iterate_png_chunks(data):
        if chunk_type == b"IDAT":
            return None
        if chunk_type == b"tRNS":
            (transparent,) = struct.unpack_from(">H", data, position + 8)
            if depth < 8:  # decoders scale fewer bits to 0..255
                transparent = transparent * 255 // (2**depth - 1)
            return transparent
    return None


def iterate_png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type, the start and the end of each chunk up to IEND.

    Raises struct.error where the file ends before IEND, and UndecodableImage where it has more
    chunks than any encoder writes.
    """
    position = 8
    for _ in range(_MAX_PNG_CHUNKS):
        length, chunk_type = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        yield chunk_type, position, end
        if chunk_type == b"IEND":
            return
        position = end
    raise UndecodableImage(f"the png has more than {_MAX_PNG_CHUNKS} chunks")


def count_png_row_bytes(data: bytes) -> int:
    """Return the bytes of all uncompressed rows, each with the byte that names its filter."""
    width, height, depth, colour_type = struct.unpack_from(">IIBB", data, 16)
    return height * (1 + (width * _PNG_SAMPLES[colour_type] * depth + 7) // 8)


# ---------------------------------------------------------------------------------------------
# GIF, WebP (RFC 9649), AVIF and BMP


_GIF_PIXEL_BYTES = 10  # two pictures with alpha, palette indices, the decoder's table
_WEBP_MAX_CHUNKS = 10_000  # each frame of an animation is one
# Chunk type -> most bytes that decoding holds for a pixel.
_WEBP_PIXEL_BYTES = {
    b"VP8 ": 8,
    b"VP8L": 8,
    b"ALPH": 10,  # the alpha plane and what it is decoded from
    b"ANMF": 16,  # a frame of an animation: two canvases, the frame and the picture
}
# A lossless WebP may have its own set of five code tables for each block of 4x4 pixels.
_WEBP_MAX_TABLE_SETS = 1 << 16
_WEBP_TABLE_SET_BYTES = 6 << 10
_WEBP_TABLE_BLOCK_PIXELS = 16
_WEBP_TABLE_SET_MIN_BITS = 20  # in the file


def _parse_gif(data: bytes) -> Header:
    """Read the logical screen size, which follows the signature."""
    width, height = struct.unpack_from("<HH", data, 6)
    return Header("gif", width, height, pixel_bytes=_GIF_PIXEL_BYTES)


def _parse_webp(data: bytes) -> Header:
    """Read the size from the first chunk: lossy VP8, lossless VP8L or extended VP8X."""
    chunk_type = data[12:16]

    if chunk_type == b"VP8 ":  # 14 bits each; the upper two bits are a scaling hint
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", width & 0x3FFF, height & 0x3FFF)

    if chunk_type == b"VP8L":  # 14 bits each, less one
        (bits,) = struct.unpack_from("<I", data, 21)
        width = (bits & 0x3FFF) + 1
        height = (bits >> 14 & 0x3FFF) + 1
        table_bytes = _count_webp_table_bytes(data, width * height)
        return Header("webp", width, height, table_bytes=table_bytes)

    if chunk_type == b"VP8X":  # 24 bits each, less one
        width_low, width_high, height_low, height_high = struct.unpack_from("<HBHB", data, 24)
        width = (width_low | width_high << 16) + 1
        height = (height_low | height_high << 16) + 1
        pixels_type = _find_webp_pixels(data)
        is_lossy = pixels_type == b"VP8 "
        return Header(
            "webp",
            width,
            height,
            pixel_bytes=_WEBP_PIXEL_BYTES[pixels_type],
            table_bytes=0 if is_lossy else _count_webp_table_bytes(data, width * height),
        )

    raise UndecodableImage(DAMAGED)


def _find_webp_pixels(data: bytes) -> bytes:
    """Return the type of the first chunk that holds pixels, of an extended file."""
    for chunk_type, _, _ in iterate_webp_chunks(data):
        if chunk_type in _WEBP_PIXEL_BYTES:
            return chunk_type
    raise UndecodableImage(DAMAGED)


def iterate_webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type, the start and the end of each chunk; the last may be cut short.

    Raises UndecodableImage where the file has more chunks than any encoder writes.
    """
    (riff_bytes,) = struct.unpack_from("<I", data, 4)
    file_end = min(len(data), 8 + riff_bytes)

    position = 12
    for _ in range(_WEBP_MAX_CHUNKS):
        if position >= file_end:
            return
        chunk_type, length = struct.unpack_from("<4sI", data, position)
        end = min(position + 8 + length + (length & 1), len(data))
        yield chunk_type, position, end
        position = end
    raise UndecodableImage(f"the webp has more than {_WEBP_MAX_CHUNKS} chunks")


def _count_webp_table_bytes(data: bytes, pixels: int) -> int:
    """Return the most bytes of code tables that a lossless picture of this size may declare."""
    table_sets = min(
        _WEBP_MAX_TABLE_SETS,
        pixels // _WEBP_TABLE_BLOCK_PIXELS,
        len(data) * 8 // _WEBP_TABLE_SET_MIN_BITS,
    )
    return table_sets * _WEBP_TABLE_SET_BYTES


# Bytes a pixel, as measured with noise: planes, the decoder's copies of them and its coefficients,
# and two pictures with alpha.
_AVIF_SUBSAMPLED = 20
_AVIF_FULL_COLOUR = 24
_AVIF_MORE_BITS = 44


def _parse_avif(data: bytes) -> Header:
    """Read the primary picture: its size is that of the AV1 data."""
    image = read_avif(data)
    colours = image.picture.colours
    pixel_bytes = _AVIF_SUBSAMPLED if colours.is_subsampled else _AVIF_FULL_COLOUR
    if colours.bits > 8:
        pixel_bytes = _AVIF_MORE_BITS

    return Header(
        "avif",
        image.picture.width,
        image.picture.height,
        alpha="premultiplied" if image.is_premultiplied else "straight",
        orientation=image.orientation,
        pixel_bytes=pixel_bytes,
        avif=image,
        used_bits=colours.bits,
    )


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

_TIFF_JPEG = 7
_TIFF_COMPRESSIONS = frozenset(
    (
        1,  # none
        2,  # CCITT run length
        3,  # CCITT group 3
        4,  # CCITT group 4
        5,  # LZW
        _TIFF_JPEG,
        8,  # Deflate (Adobe)
        32773,  # PackBits
        32946,  # Deflate
    )
)
# Compressions of single bytes, whatever the samples are.
_TIFF_BYTE_COMPRESSIONS = frozenset((1, 5, 8, 32773, 32946))
# Photometric interpretation -> colours a pixel.
_TIFF_COLOURS = {
    0: 1,  # white is zero
    1: 1,  # black is zero
    2: 3,  # RGB
    3: 1,  # palette
    5: 4,  # separated (CMYK)
    6: 3,  # YCbCr
}
_TIFF_WITH_ALPHA = frozenset((0, 1, 2))
_TIFF_RAW_PHOTOMETRICS = frozenset((32803, 34892))
_TIFF_GRAY_PHOTOMETRICS = frozenset((0, 1))
_TIFF_SIXTEEN_BIT_PHOTOMETRICS = frozenset((1, 2))
_TIFF_BITS = frozenset((1, 2, 4, 8, 16))
_TIFF_MAX_SAMPLES = 4
_TIFF_MAX_TILE_PIXELS = 1 << 24
_TIFF_MAX_BLOCKS = 1 << 16
_TIFF_RGBA_BYTES = 4  # a pixel, in the buffer that libtiff fills with a strip or tile
_UNSIGNED_INTEGER = 1  # SampleFormat
_CHUNKY = 1  # PlanarConfiguration: the samples of a pixel lie together
_UNASSOCIATED_ALPHA = 2  # the value of ExtraSamples that is assumed where it is missing
_TIFF_ALPHA: dict[int, Literal["straight", "premultiplied"]] = {
    1: "premultiplied",
    _UNASSOCIATED_ALPHA: "straight",
}


def _parse_tiff(data: bytes) -> Header:
    """Choose the page to decode and check that its kind of TIFF is supported."""
    pages = tiff.read_pages(data)
    page = tiff.choose_page(pages)
    tags = page.tags
    _check_tiff_kind(tags)
    _check_tiff_channels(page, pages)

    bits = tags.get(tiff.BITS_PER_SAMPLE, 1)
    samples = tags.get(tiff.SAMPLES_PER_PIXEL, 1)
    pixel_bytes = _count_pixel_bytes(samples == 1 and not _has_colours(tags), bits)
    block_pixels = _count_tiff_block_pixels(tags, page.width, page.height)
    if samples == 2:  # decoded as a picture that is twice as wide
        block_pixels *= 2
    block_bytes = block_pixels * (_TIFF_RGBA_BYTES + (samples * bits + 7) // 8)
    if tags.get(tiff.COMPRESSION) == _TIFF_JPEG:
        block_bytes += block_pixels * samples * _COEFFICIENT_BYTES
        if data.count(bytes((0xFF, _SOS))) * block_pixels > _MAX_SCAN_PIXELS:
            raise UndecodableImage("the tiff has more scans than a picture of its size needs")

    return Header(
        "tiff",
        page.width,
        page.height,
        alpha=_TIFF_ALPHA.get(tags.get(tiff.EXTRA_SAMPLES, _UNASSOCIATED_ALPHA), "ignored"),
        orientation=tags.get(tiff.ORIENTATION, 1),
        depth=16 if bits == 16 else 8,
        page=page,
        pixel_bytes=pixel_bytes,
        # The block is freed before the picture is copied.
        extra_bytes=max(0, block_bytes - page.width * page.height * pixel_bytes // 2),
    )


def _has_colours(tags: dict[int, int]) -> bool:
    return tags[tiff.PHOTOMETRIC_INTERPRETATION] not in _TIFF_GRAY_PHOTOMETRICS


def _count_tiff_block_pixels(tags: dict[int, int], width: int, height: int) -> int:
    """Return the pixels of a strip or tile.

    Raises UndecodableImage where there are too many of them: each is decoded whole, also where only
    a part of it lies in the picture, and costs time of its own.
    """
    if width <= 0 or height <= 0:
        return 0

    if tiff.TILE_WIDTH in tags or tiff.TILE_LENGTH in tags:
        block_width = tags[tiff.TILE_WIDTH]
        block_height = tags[tiff.TILE_LENGTH]
        if block_width * block_height > _TIFF_MAX_TILE_PIXELS:
            raise UndecodableImage(
                f"the tiff has tiles of more than {_TIFF_MAX_TILE_PIXELS} pixels"
            )
    else:
        block_width = width
        block_height = min(height, tags.get(tiff.ROWS_PER_STRIP, height))
    if block_width <= 0 or block_height <= 0:
        raise UndecodableImage(DAMAGED)

    blocks = -(-width // block_width) * -(-height // block_height)
    if tags.get(tiff.PLANAR_CONFIGURATION, _CHUNKY) != _CHUNKY:
        blocks *= tags.get(tiff.SAMPLES_PER_PIXEL, 1)
    if blocks > _TIFF_MAX_BLOCKS:
        raise UndecodableImage(f"the tiff has more than {_TIFF_MAX_BLOCKS} strips or tiles")

    block_pixels = block_width * block_height
    if blocks * block_pixels > _TIFF_MAX_SAMPLES * 4 * width * height + _TIFF_MAX_TILE_PIXELS:
        raise UndecodableImage("the tiles of the tiff are much larger than its picture")
    return block_pixels


def _check_tiff_kind(tags: dict[int, int]) -> None:
    """Raise UndecodableImage, with the cause, where OpenCV would not read these tags correctly."""
    cause = _find_unsupported_kind(tags)
    if cause is not None:
        raise UndecodableImage(f"the tiff has {cause}, which is not supported; convert it to PNG")


def _find_unsupported_kind(tags: dict[int, int]) -> str | None:
    bits = tags.get(tiff.BITS_PER_SAMPLE, 1)
    samples = tags.get(tiff.SAMPLES_PER_PIXEL, 1)
    photometric = tags[tiff.PHOTOMETRIC_INTERPRETATION]
    compression = tags.get(tiff.COMPRESSION, 1)
    is_planar = tags.get(tiff.PLANAR_CONFIGURATION, _CHUNKY) != _CHUNKY

    if photometric in _TIFF_RAW_PHOTOMETRICS:
        return "the raw data of a camera's sensor"
    if photometric not in _TIFF_COLOURS:
        return f"photometric interpretation {photometric}"
    if compression not in _TIFF_COMPRESSIONS:
        return f"compression {compression}"
    if tags.get(tiff.SAMPLE_FORMAT, _UNSIGNED_INTEGER) != _UNSIGNED_INTEGER:
        return "signed or floating-point samples"
    if bits not in _TIFF_BITS:
        return f"{bits} bits a sample"

    extra_samples = samples - _TIFF_COLOURS[photometric]
    if extra_samples not in (0, 1) or (extra_samples and photometric not in _TIFF_WITH_ALPHA):
        return f"{samples} samples a pixel with photometric interpretation {photometric}"
    if samples == 2 and (bits < 8 or compression not in _TIFF_BYTE_COMPRESSIONS):
        return f"gray and alpha of {bits} bits in compression {compression}"
    if is_planar and (bits == 16 or samples == 2):
        return f"{samples} separate planes of {bits} bits (planar configuration 2)"
    if bits == 16 and samples != 2 and photometric not in _TIFF_SIXTEEN_BIT_PHOTOMETRICS:
        return f"16 bits a sample with photometric interpretation {photometric}"
    return None


def _check_tiff_channels(page: tiff.Directory, pages: list[tiff.Directory]) -> None:
    """Raise UndecodableImage where the page may be one channel, or one slice, of several."""
    channels = [other for other in pages if _is_channel(other, page)]
    if len(channels) > 1:
        raise UndecodableImage(
            f"the tiff has {len(channels)} gray pages of one size, which may be channels or slices "
            "of one picture; save the one to read as a file of its own"
        )


def _is_channel(page: tiff.Directory, of: tiff.Directory) -> bool:
    """Whether both pages are gray pictures of one size. Scanned text of 1 bit has no channels."""
    if not page.is_picture or (page.width, page.height) != (of.width, of.height):
        return False
    return all(
        tags.get(tiff.PHOTOMETRIC_INTERPRETATION) in _TIFF_GRAY_PHOTOMETRICS
        and tags.get(tiff.BITS_PER_SAMPLE, 1) >= 8
        for tags in (page.tags, of.tags)
    )
