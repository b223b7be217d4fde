"""Leave only what makes pixels in an image, and bound the work of decoding it.

A decoder sees no text, colour profile or animation: libpng inflates up to 1,000 chunks of text to
8 MB each and keeps them, and an animation costs several canvases. What remains can't take much
longer than its pixels need.

One function a format takes what the decoder gets out of a file: JPEG, PNG, GIF, WebP and TIFF; of
an AVIF the module `avif` does it. BMP stays as it is: its decoder skips what is no pixel. `header`
bounds the scans of a JPEG.
"""

import struct
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from models.image import deflate, tiff
from models.image.errors import UndecodableImage
from models.image.header import (
    DAMAGED,
    Header,
    count_png_row_bytes,
    iterate_jpeg_segments,
    iterate_png_chunks,
    iterate_webp_chunks,
)

MAX_EXIF_BYTES = 1 << 20
"""Larger EXIF blocks are left out. In a JPEG a block has less than 64 KiB."""


Frame = tuple[int, int, int, int]
"""Left, top, width and height, in pixels."""


def sanitize(data: bytes, header: Header) -> bytes | bytearray:
    """Return the file without what makes no pixels; the same object where all of it does.

    Raises UndecodableImage where the file is damaged, or decoding would take much longer than a
    picture of its size needs.
    """
    function = _FUNCTIONS.get(header.format)
    if function is None:
        return data
    try:
        return function(data, header)
    except (struct.error, IndexError, KeyError) as error:
        raise UndecodableImage(DAMAGED) from error


def read_first_frame(data: bytes | bytearray, header: Header) -> Frame | None:
    """Return the frame of a sanitized GIF or animated WebP; it may be smaller than the picture."""
    if header.format == "gif":
        return _read_gif_frame(data)
    if header.format == "webp" and data[12:16] == b"VP8X" and data[20] & _WEBP_ANIMATION:
        return _read_webp_frame(data)
    return None


# ---------------------------------------------------------------------------------------------
# JPEG

_JPEG_MAX_HEAD_BYTES = 1 << 18
"""Before the first scan. In a longer head libjpeg would keep as many bytes of profiles and EXIF."""

_JPEG_APPLICATIONS = range(0xE1, 0xF0)
_JPEG_ADOBE = 0xEE  # tells how colours are stored
_JPEG_COMMENT = 0xFE


def _sanitize_jpeg(data: bytes, header: Header) -> bytes:
    """Leave the segments of applications and comments out of a head that is long."""
    if header.frame is None or header.frame.first_scan <= _JPEG_MAX_HEAD_BYTES:
        return data
    first_scan = header.frame.first_scan
    parts = [data[:2]]
    scan_start = 2
    for marker, start, end in iterate_jpeg_segments(data, first_scan):
        is_application = marker in _JPEG_APPLICATIONS and marker != _JPEG_ADOBE
        if not is_application and marker != _JPEG_COMMENT:
            parts.append(data[start:end])
        scan_start = end
    parts.append(data[scan_start:])
    return b"".join(parts)


# ---------------------------------------------------------------------------------------------
# PNG

_PNG_PIXEL_CHUNKS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_PNG_CRITICAL = 0x20  # bit of the first letter; clear in chunks that a decoder must know
# Encoders that compress badly, or flush often, write a little more than the rows.
_PNG_MAX_EXPANSION = 2
_PNG_MAX_OVERHEAD_BYTES = 1 << 16


def _sanitize_png(data: bytes, header: Header) -> bytes:
    """Keep the chunks of pixels and EXIF; of an animation, the default image."""
    parts = [data[:8]]
    kept_bytes = 8
    pixel_bytes = 0
    pixel_parts: list[slice] = []
    has_exif = False

    for chunk_type, start, end in iterate_png_chunks(data):
        if chunk_type == b"IDAT":
            pixel_bytes += end - start
            pixel_parts.append(slice(start + 8, end - 4))
        elif chunk_type == b"eXIf" and not has_exif and end - start <= MAX_EXIF_BYTES:
            has_exif = True
        elif chunk_type not in _PNG_PIXEL_CHUNKS:
            if not chunk_type[0] & _PNG_CRITICAL:
                raise UndecodableImage("the png has a chunk that is needed and not supported")
            continue
        parts.append(data[start:end])
        kept_bytes += end - start

    row_bytes = count_png_row_bytes(data)
    if pixel_bytes > _PNG_MAX_EXPANSION * row_bytes + _PNG_MAX_OVERHEAD_BYTES:
        raise UndecodableImage("the png has more compressed data than a picture of its size needs")
    deflate.check_blocks(data, [pixel_parts], row_bytes)
    if kept_bytes == len(data):
        return data
    return b"".join(parts)


# ---------------------------------------------------------------------------------------------
# GIF

_GIF_EXTENSION = 0x21
_GIF_GRAPHIC_CONTROL = 0xF9
_GIF_CONTROL_BYTES = 8
_GIF_IMAGE = 0x2C
_GIF_TRAILER = b";"
_GIF_HAS_PALETTE = 0x80
_GIF_MAX_BLOCKS = 300_000  # of up to 255 bytes
_GIF_MAX_CODE_BITS = 12
_GIF_TABLE_CODES = 1 << _GIF_MAX_CODE_BITS
# OpenCV builds its table again after each. Encoders reset when the table is full, or after 126
# codes where they do not compress.
_GIF_MAX_RESETS = 20_000
_GIF_MIN_RESETS = 1000  # allowed for any size
_GIF_RESET_PIXELS = 64
_GIF_MIN_WALKED_CODES = 64


def _sanitize_gif(data: bytes, header: Header) -> bytes:
    """Keep the first frame and the transparent colour, without comments and further frames."""
    position = 13 + _count_gif_palette_bytes(data[10])
    screen = data[:position]
    control = b""

    blocks = 0
    while data[position] == _GIF_EXTENSION:
        end, blocks = _skip_gif_blocks(data, position + 2, blocks)
        if data[position + 1] == _GIF_GRAPHIC_CONTROL:
            control = _without_disposal(data[position:end])
        position = end
    if data[position] != _GIF_IMAGE:
        raise UndecodableImage(DAMAGED)

    codes = position + 10 + _count_gif_palette_bytes(data[position + 9])
    end, _ = _skip_gif_blocks(data, codes + 1, blocks)
    _check_gif_resets(data[codes], data[codes + 1 : end], header.width * header.height)
    return b"".join((screen, control, data[position:end], _GIF_TRAILER))


def _read_gif_frame(data: bytes | bytearray) -> Frame:
    position = 13 + _count_gif_palette_bytes(data[10])
    if data[position] == _GIF_EXTENSION:
        position += _GIF_CONTROL_BYTES
    return struct.unpack_from("<4H", data, position + 1)


def _count_gif_palette_bytes(flags: int) -> int:
    if not flags & _GIF_HAS_PALETTE:
        return 0
    return 3 * (2 << (flags & 7))


def _skip_gif_blocks(data: bytes, position: int, blocks: int) -> tuple[int, int]:
    """Return the position after the blocks that start at `position`, and the count of blocks."""
    while data[position]:
        position += 1 + data[position]
        blocks += 1
        if blocks > _GIF_MAX_BLOCKS:
            raise UndecodableImage(f"the gif has more than {_GIF_MAX_BLOCKS} blocks")
    return position + 1, blocks


def _without_disposal(control: bytes) -> bytes:
    """Clear the disposal method of a graphic control extension; it costs a copy of the frame."""
    if len(control) != _GIF_CONTROL_BYTES:
        raise UndecodableImage(DAMAGED)
    return control[:3] + bytes((control[3] & 1,)) + control[4:]


def _check_gif_resets(min_code_bits: int, blocks: bytes, pixels: int) -> None:
    """Walk the codes of a frame and raise UndecodableImage where they reset the table too often.

    The width of a code follows from the number of codes since the last reset, so that many codes
    are read at once.
    """
    if not 2 <= min_code_bits < _GIF_MAX_CODE_BITS:
        raise UndecodableImage(DAMAGED)
    clear = 1 << min_code_bits
    most_resets = min(_GIF_MAX_RESETS, _GIF_MIN_RESETS + pixels // _GIF_RESET_PIXELS)
    offsets, widths = _gif_code_positions(min_code_bits)
    stream = np.frombuffer(_join_gif_blocks(blocks) + bytes(3), np.uint8)
    stream_bits = 8 * (len(stream) - 3)

    position = 0
    codes_since_reset = 0
    resets = 0
    codes = 0
    count = _GIF_TABLE_CODES
    while codes <= pixels:
        chunk = slice(codes_since_reset, codes_since_reset + count)
        starts = offsets[chunk] + (position - offsets[codes_since_reset])
        starts = starts[: np.searchsorted(starts + widths[chunk], stream_bits, side="right")]
        if not len(starts):
            return

        chunk_widths = widths[chunk][: len(starts)]
        values = _read_bits(stream, starts, chunk_widths)
        is_reset = (values | 1) == (clear | 1)  # the code after `clear` ends the frame
        first = int(is_reset.argmax())
        if not is_reset[first]:
            codes += len(starts)
            codes_since_reset = min(codes_since_reset + len(starts), _GIF_TABLE_CODES)
            position = int(starts[-1]) + int(chunk_widths[-1])
            continue

        resets += 1
        if resets > most_resets:
            raise UndecodableImage(f"the gif has more than {most_resets} clear codes")
        codes += first
        position = int(starts[first]) + int(chunk_widths[first])
        count = min(max(2 * (codes_since_reset + first), _GIF_MIN_WALKED_CODES), _GIF_TABLE_CODES)
        codes_since_reset = 0


@lru_cache
def _gif_code_positions(min_code_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the position in bits and the width of each code after a reset.

    Codes grow by a bit when the table reaches a power of two, and stay at 12 bits.
    """
    clear = 1 << min_code_bits
    table_sizes = np.arange(clear + 1, clear + 1 + 2 * _GIF_TABLE_CODES)
    _, bit_lengths = np.frexp(table_sizes)
    widths = np.minimum(bit_lengths, _GIF_MAX_CODE_BITS).astype(np.int64)
    offsets = np.cumsum(widths) - widths
    return offsets, widths


def _join_gif_blocks(blocks: bytes) -> bytes:
    parts: list[bytes] = []
    position = 0
    while blocks[position]:
        end = position + 1 + blocks[position]
        parts.append(blocks[position + 1 : end])
        position = end
    return b"".join(parts)


def _read_bits(stream: np.ndarray, starts: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return numbers of up to 16 bits, least significant bit first."""
    first = starts >> 3
    three_bytes = stream[first].astype(np.int64)
    three_bytes |= stream[first + 1].astype(np.int64) << 8
    three_bytes |= stream[first + 2].astype(np.int64) << 16
    return three_bytes >> (starts & 7) & ((1 << widths) - 1)


# ---------------------------------------------------------------------------------------------
# WebP (RFC 9649)

_WEBP_ANIMATION = 0x02  # flag of VP8X
_WEBP_ALPHA_EXIF_ANIMATION = 0x10 | 0x08 | 0x02  # flags of VP8X
_WEBP_PIXEL_CHUNKS = frozenset((b"VP8X", b"ANIM", b"ALPH", b"VP8 ", b"VP8L"))


def _sanitize_webp(data: bytes, header: Header) -> bytes:
    """Keep the chunks of pixels and EXIF; of an animation, the first frame."""
    is_extended = data[12:16] == b"VP8X"
    parts: list[bytes] = []
    has_frame = False
    has_exif = False

    for chunk_type, start, end in iterate_webp_chunks(data):
        if chunk_type == b"ANMF" and not has_frame:
            has_frame = True
        elif chunk_type == b"EXIF" and not has_exif and end - start <= MAX_EXIF_BYTES:
            has_exif = True
        elif chunk_type not in _WEBP_PIXEL_CHUNKS:
            continue
        parts.append(data[start:end])
        if not is_extended:
            break

    if 12 + sum(map(len, parts)) == len(data):
        return data
    if is_extended:
        flags = parts[0][8] & _WEBP_ALPHA_EXIF_ANIMATION
        parts[0] = parts[0][:8] + bytes((flags,)) + parts[0][9:]
    chunks = b"".join(parts)
    return b"".join((b"RIFF", struct.pack("<I", 4 + len(chunks)), b"WEBP", chunks))


def _read_webp_frame(data: bytes | bytearray) -> Frame | None:
    """Read the position, in units of two pixels, and the size, less one, of the first frame."""
    position = 12
    while position + 20 <= len(data):
        chunk_type, length = struct.unpack_from("<4sI", data, position)
        if chunk_type == b"ANMF":
            numbers = (data[position + i : position + i + 3] for i in (8, 11, 14, 17))
            left, top, width, height = (int.from_bytes(number, "little") for number in numbers)
            return 2 * left, 2 * top, width + 1, height + 1
        position += 8 + length + (length & 1)
    return None


# ---------------------------------------------------------------------------------------------
# TIFF 6.0

_TIFF_TYPE_BYTES = {
    1: 1,  # BYTE
    2: 1,  # ASCII
    3: 2,  # SHORT
    4: 4,  # LONG
    5: 8,  # RATIONAL
    6: 1,  # SBYTE
    7: 1,  # UNDEFINED
    8: 2,  # SSHORT
    9: 4,  # SLONG
    10: 8,  # SRATIONAL
    11: 4,  # FLOAT
    12: 8,  # DOUBLE
    13: 4,  # IFD
}
_TIFF_COUNT_TYPES = {3: "u2", 4: "u4"}
_TIFF_BYTE_COUNTS = frozenset((tiff.STRIP_BYTE_COUNTS, tiff.TILE_BYTE_COUNTS))
_TIFF_BLOCK_TAGS = (
    (tiff.STRIP_OFFSETS, tiff.STRIP_BYTE_COUNTS),
    (tiff.TILE_OFFSETS, tiff.TILE_BYTE_COUNTS),
)
_TIFF_DEFLATE = frozenset((8, 32946))
_TIFF_MAX_TAGS = 1000


def _sanitize_tiff(data: bytes, header: Header) -> bytes | bytearray:
    """Check that no bytes are read twice, and end the file after its first directory.

    libtiff keeps the values of all tags, and follows the chain of directories to count the pages.
    """
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (tag_count,) = struct.unpack_from(order + "H", data, directory)
    if tag_count > _TIFF_MAX_TAGS:
        raise UndecodableImage(f"the tiff has more than {_TIFF_MAX_TAGS} tags")

    value_bytes = 0
    entries: dict[int, int] = {}
    for i in range(tag_count):
        entry = directory + 2 + 12 * i
        tag, type_number, count = struct.unpack_from(order + "HHI", data, entry)
        value_bytes += count * _TIFF_TYPE_BYTES.get(type_number, 0)
        entries[tag] = entry
        if tag in _TIFF_BYTE_COUNTS and count > 1:
            _check_tiff_byte_counts(data, order, entry)
    if value_bytes > len(data):
        raise UndecodableImage("the values of the tiff's tags overlap")
    if len(data) > deflate.UNCHECKED_BYTES:
        _check_tiff_deflate(data, order, entries, header)

    next_directory = directory + 2 + 12 * tag_count
    if data[next_directory : next_directory + 4] == bytes(4):
        return data
    first_page = bytearray(data)
    first_page[next_directory : next_directory + 4] = bytes(4)
    return first_page


def _check_tiff_byte_counts(data: bytes, order: str, entry: int) -> None:
    """Raise UndecodableImage where strips or tiles have more bytes together than the file."""
    byte_counts = _read_tiff_numbers(data, order, entry)
    if byte_counts.sum(dtype=np.uint64) > len(data):
        raise UndecodableImage("the strips or tiles of the tiff overlap")


def _check_tiff_deflate(data: bytes, order: str, entries: dict[int, int], header: Header) -> None:
    """Raise UndecodableImage where compressed strips or tiles have too many blocks of codes."""
    tags = header.page.tags if header.page is not None else {}
    if tags.get(tiff.COMPRESSION) not in _TIFF_DEFLATE:
        return

    streams: list[list[slice]] = []
    for offsets_tag, counts_tag in _TIFF_BLOCK_TAGS:
        if offsets_tag not in entries or counts_tag not in entries:
            continue
        offsets = _read_tiff_numbers(data, order, entries[offsets_tag]).tolist()
        byte_counts = _read_tiff_numbers(data, order, entries[counts_tag]).tolist()
        for offset, byte_count in zip(offsets, byte_counts, strict=False):
            start = min(offset, len(data))
            streams.append([slice(start, min(start + byte_count, len(data)))])

    pixel_bits = tags.get(tiff.SAMPLES_PER_PIXEL, 1) * tags.get(tiff.BITS_PER_SAMPLE, 1)
    deflate.check_blocks(data, streams, header.width * header.height * pixel_bits // 8)


def _read_tiff_numbers(data: bytes, order: str, entry: int) -> np.ndarray:
    """Return the values of a directory entry of the types SHORT or LONG."""
    _, type_number, count, offset = struct.unpack_from(order + "HHII", data, entry)
    number = np.dtype(order + _TIFF_COUNT_TYPES[type_number])
    if count * number.itemsize <= 4:
        offset = entry + 8
    if offset + count * number.itemsize > len(data):
        raise UndecodableImage(DAMAGED)
    return np.frombuffer(data, number, count, offset)


_FUNCTIONS: dict[str, Callable[[bytes, Header], bytes | bytearray]] = {
    "jpeg": _sanitize_jpeg,
    "png": _sanitize_png,
    "gif": _sanitize_gif,
    "webp": _sanitize_webp,
    "tiff": _sanitize_tiff,
}
