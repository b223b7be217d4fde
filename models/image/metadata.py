"""Take out of an image file what describes it: EXIF with the place, XMP, comments, previews.

The orientation stays, and the pixels are those of the original, bit by bit.
"""

import struct
import zlib

import cv2
import numpy as np

from models.image import tiff
from models.image.decode import MAX_PIXELS, decode, decode_full_size
from models.image.errors import ImageError, UndecodableImage
from models.image.header import Header, iterate_png_chunks, iterate_webp_chunks, read_header
from models.image.input_spec import InputSpec
from models.image.jpeg_scans import END_OF_IMAGE
from models.image.sanitize import sanitize

_EXIF = b"Exif\0\0"
_APP0 = 0xE0  # JFIF
_APP14 = 0xEE  # Adobe's, which tells how colours are stored
_LAST_APP = 0xEF
_COMMENT = 0xFE
_SOS = 0xDA
_ORIENTATION_EXIF = struct.Struct(">2sHIHHHIHHI")
_SHORT = 3


def strip_metadata(data: bytes, spec: InputSpec, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return the file without metadata; the same object where it has none.

    A file whose metadata can't be taken out is stored again as PNG. The result decodes to the same
    pixels of the network's input `spec`. Raises ImageError where that is not possible.
    """
    header = read_header(data)
    stripped = _strip(data, header)
    if stripped is data:
        return data

    original = decode(data, spec, max_pixels)
    if stripped is not None and _decodes_to(stripped, original, spec, max_pixels):
        return stripped
    pixels = decode_full_size(data, spec.channels, max_pixels, spec.significant_bits)
    if spec.channels == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    png = cv2.imencode(".png", pixels)[1].tobytes()
    if not _decodes_to(png, original, spec, max_pixels):
        raise UndecodableImage("its metadata can't be taken out without a change of its pixels")
    return png


def _strip(data: bytes, header: Header) -> bytes | None:
    """Return the file without metadata; None for formats that can't be written without it."""
    try:
        if header.format == "jpeg":
            return _strip_jpeg(data, header)
        if header.format == "bmp":
            return data
        if header.format == "gif":
            stripped = bytes(sanitize(data, header))
            return data if stripped == data else stripped
        if header.format == "png":
            return _strip_png(bytes(sanitize(data, header)), data)
        if header.format == "webp":
            return _strip_webp(bytes(sanitize(data, header)), data)
    except (struct.error, IndexError, UndecodableImage):
        pass
    return None


def _decodes_to(data: bytes, pixels: np.ndarray, spec: InputSpec, max_pixels: int) -> bool:
    try:
        return np.array_equal(decode(data, spec, max_pixels), pixels)
    except ImageError:
        return False


def _build_exif(orientation: int) -> bytes:
    """Return an EXIF block that holds an orientation only."""
    return _ORIENTATION_EXIF.pack(b"MM", 42, 8, 1, tiff.ORIENTATION, _SHORT, 1, orientation, 0, 0)


def _strip_jpeg(data: bytes, header: Header) -> bytes:
    """Leave out the segments of applications and comments, and what follows the picture."""
    parts = [data[:2]]
    if header.orientation != 1:
        exif = _EXIF + _build_exif(header.orientation)
        parts.append(struct.pack(">HH", 0xFFE1, 2 + len(exif)) + exif)

    position = 2
    while True:
        while data[position + 1] == 0xFF:  # fill bytes
            position += 1
        marker = data[position + 1]
        if marker == _SOS:
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        end = position + 2 + length
        is_metadata = _APP0 < marker <= _LAST_APP and marker != _APP14
        if not is_metadata and marker != _COMMENT:
            parts.append(data[position:end])
        position = end

    picture_end = data.find(END_OF_IMAGE, position)
    parts.append(data[position:] if picture_end < 0 else data[position : picture_end + 2])
    stripped = b"".join(parts)
    return data if stripped == data else stripped


def _strip_png(sanitized: bytes, data: bytes) -> bytes:
    """Reduce the EXIF block of a sanitized PNG to its orientation."""
    parts = [sanitized[:8]]
    for chunk_type, start, end in iterate_png_chunks(sanitized):
        if chunk_type != b"eXIf":
            parts.append(sanitized[start:end])
            continue
        orientation = tiff.read_orientation(sanitized[start + 8 : end - 4])
        if orientation != 1:
            body = chunk_type + _build_exif(orientation)
            parts.append(struct.pack(">I", len(body) - 4) + body)
            parts.append(struct.pack(">I", zlib.crc32(body)))
    stripped = b"".join(parts)
    return data if stripped == data else stripped


def _strip_webp(sanitized: bytes, data: bytes) -> bytes:
    """Reduce the EXIF block of a sanitized WebP to its orientation."""
    parts: list[bytes] = []
    for chunk_type, start, end in iterate_webp_chunks(sanitized):
        if chunk_type != b"EXIF":
            parts.append(sanitized[start:end])
            continue
        exif = _build_exif(tiff.read_orientation(sanitized[start + 8 : end]))
        parts.append(chunk_type + struct.pack("<I", len(exif)) + exif)
    chunks = b"".join(parts)
    stripped = b"".join((b"RIFF", struct.pack("<I", 4 + len(chunks)), b"WEBP", chunks))
    return data if stripped == data else stripped
