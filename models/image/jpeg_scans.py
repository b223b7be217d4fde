"""Tell whether a JPEG holds all of its pixels.

A decoder fills pixels that are missing with gray. libjpeg only warns of them, and OpenCV does not
pass its warnings on. They are found this way: a decoder skips bytes between the last pixel of a
scan and the next marker, but reads them as pixels where the scan is incomplete. So bytes are
inserted at the end of each scan (`insert_bytes`), and a file whose pixels change is incomplete.
No complete file changes.

This costs two more passes of decoding, so `needs_check` and `ends_in_gray` select the files that
may be incomplete. Not found is damage that leaves enough bits for all pixels: bytes that changed
in the middle of the scan and hold no marker, or a cut in the last block; neither is a progressive
file whose last scan is cut short, which lacks the finest detail only, nor a file in arithmetic
coding that has an end marker.
"""

import re
from typing import NamedTuple

import numpy as np

from models.image.errors import UndecodableImage

INCOMPLETE_JPEG = "the jpeg is cut short or damaged: a part of its pixels is missing"

END_OF_IMAGE = b"\xff\xd9"
_NEXT_IMAGE = END_OF_IMAGE + b"\xff\xd8\xff"
_START_OF_SCAN = b"\xda"
_RESTART_MARKERS = tuple(bytes((0xFF, marker)) for marker in range(0xD0, 0xD8))
# 0xFF is part of a pixel where 0 follows, and precedes a marker where 0xFF follows.
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_MARKER_BUT_RESTART = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_SEGMENT = re.compile(rb"\xff+([^\xff])")
_MAX_SEGMENTS = 1000  # between the first scan and the end

_LAST_COEFFICIENT = 63
_GRAY = 128
# Free of markers, and unlike the zeros that decoders take for missing bits.
_INSERTED_BYTES = bytes((37 * i + 181) % 255 for i in range(64))


class JpegFrame(NamedTuple):
    """The kind of a JPEG, and where its pixels begin."""

    components: int
    """1 for gray, 3 for colour, 4 for CMYK."""

    is_progressive: bool

    has_several_scans: bool

    has_restarts: bool
    """Whether restart markers may divide the first scan."""

    first_scan: int
    """Position of the length field of the first start of scan."""

    has_index: bool
    """Whether the file says that it holds several pictures (CIPA DC-007, multi-picture format)."""


class Scan(NamedTuple):
    """One pass over some components of the picture."""

    components: bytes
    first_coefficient: int
    last_coefficient: int
    lowest_bit: int
    end: int
    """Position of the marker that ends the scan, or the end of the file."""


def has_end_marker(data: bytes, frame: JpegFrame) -> bool:
    """Whether a file has an end marker, at its end or before other bytes."""
    return data.endswith(END_OF_IMAGE) or data.find(END_OF_IMAGE, frame.first_scan) >= 0


def find_following_image(data: bytes, frame: JpegFrame) -> int | None:
    """Return where another JPEG starts that follows the first without a gap."""
    end = data.find(_NEXT_IMAGE, frame.first_scan)
    return None if end < 0 else end + len(END_OF_IMAGE)


def needs_check(data: bytes, frame: JpegFrame) -> bool:
    """Whether a file that has an end marker may be incomplete, by its scans.

    A single scan shows by its last pixel whether it may be: see `ends_in_gray`.
    """
    if not frame.has_several_scans:
        return frame.components == 4  # missing pixels have another colour than gray
    if not frame.is_progressive:
        return True
    return not _holds_all_coefficients(read_scans(data, frame), frame)


def check_all_scans(data: bytes, frame: JpegFrame) -> None:
    """Raise UndecodableImage where a scan that the picture needs is missing."""
    if not _holds_all_coefficients(read_scans(data, frame), frame):
        raise UndecodableImage(INCOMPLETE_JPEG)


def ends_in_gray(pixels: np.ndarray) -> bool:
    """Whether the last pixel of uint8 [H, W, C] or [H, W] has the colour of missing ones."""
    # One sample decides nearly always, at a tenth of the cost.
    return pixels.item(-1) == _GRAY and bool((pixels[-1, -1] == _GRAY).all())


def read_scans(data: bytes, frame: JpegFrame) -> list[Scan]:
    """Return the scans, up to the marker that ends them.

    Raises UndecodableImage where the header of a scan, or a segment between scans, is cut short.
    """
    try:
        return _walk_scans(data, frame)
    except (IndexError, ValueError) as error:
        raise UndecodableImage(INCOMPLETE_JPEG) from error


def _walk_scans(data: bytes, frame: JpegFrame) -> list[Scan]:
    """Return the scans. IndexError and ValueError mean that the file is cut short."""
    scans: list[Scan] = []
    allows_restarts = frame.has_restarts or frame.has_several_scans
    next_marker = _MARKER_BUT_RESTART if allows_restarts else _MARKER
    position = frame.first_scan
    for _ in range(_MAX_SEGMENTS):
        header_end = position + _read_length(data, position)
        marker = next_marker.search(data, header_end)
        end = marker.start() if marker else len(data)
        end = len(data[:end].rstrip(b"\xff"))  # 0xFF may precede a marker any number of times
        scans.append(_parse_scan(data[position + 2 : header_end], end))

        next_scan = _find_next_scan(data, end) if frame.has_several_scans else None
        if next_scan is None:
            return scans
        position = next_scan
    raise ValueError("too many scans")


def insert_bytes(data: bytes, scans: list[Scan]) -> tuple[bytes, bytes]:
    """Return the file up to the end of its scans, and the same with bytes inserted after each."""
    parts: list[bytes] = []
    start = 0
    for scan in scans:
        parts += (data[start : scan.end], _bytes_to_insert(data[start : scan.end]))
        start = scan.end
    parts.append(END_OF_IMAGE)
    return data[: scans[-1].end] + END_OF_IMAGE, b"".join(parts)


def _bytes_to_insert(scan: bytes) -> bytes:
    """Return bytes that continue a scan, also one that lacks all after a restart marker."""
    positions = [scan.rfind(marker) for marker in _RESTART_MARKERS]
    last = max(range(len(positions)), key=positions.__getitem__)
    following = (last + 1) % len(_RESTART_MARKERS) if positions[last] >= 0 else 0
    return _INSERTED_BYTES + _RESTART_MARKERS[following] + _INSERTED_BYTES


def _find_next_scan(data: bytes, position: int) -> int | None:
    """Return the position of the next scan's length field, None at the end of the picture.

    `position` is that of the marker which ends a scan.
    """
    for _ in range(_MAX_SEGMENTS):
        marker = _SEGMENT.match(data, position)
        if marker is None or marker[1] == END_OF_IMAGE[1:]:
            return None
        position = marker.end()
        if marker[1] == _START_OF_SCAN:
            return position
        position += _read_length(data, position)
    return None


def _read_length(data: bytes, position: int) -> int:
    return data[position] << 8 | data[position + 1]


def _parse_scan(header: bytes, end: int) -> Scan:
    """Parse the content of a start of scan: a count, components, coefficients, bits."""
    component_bytes = 2 * header[0]
    first, last, bits = header[1 + component_bytes : 4 + component_bytes]
    return Scan(header[1 : 1 + component_bytes : 2], first, last, bits & 15, end)


def _holds_all_coefficients(scans: list[Scan], frame: JpegFrame) -> bool:
    """Whether scans of all components reach all coefficients in full precision."""
    complete: dict[int, set[int]] = {}
    for scan in scans:
        if scan.lowest_bit:
            continue
        coefficients = range(scan.first_coefficient, scan.last_coefficient + 1)
        for component in scan.components:
            complete.setdefault(component, set()).update(coefficients)

    if len(complete) < frame.components:
        return False
    return all(len(found) > _LAST_COEFFICIENT for found in complete.values())
