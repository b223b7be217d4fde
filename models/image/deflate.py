"""Count the blocks of deflate data (RFC 1951), each of which may cost a decoder new code tables.

A block may hold next to no data: a file of a few megabytes has room for hundreds of thousands of
them, which take seconds. Python's module `zlib` does not tell where blocks end, so that zlib itself
is called. OpenCV is linked to the same library.
"""

import ctypes
import ctypes.util
import sys
from collections.abc import Sequence

from models.image.errors import UndecodableImage

UNCHECKED_BYTES = 4 << 20
"""Data of this size is not checked: its blocks take at most half a second, whatever they are."""

_MIN_ALLOWED_BLOCKS = 1000
_BYTES_PER_BLOCK = 512
"""Inflated, on average. Encoders begin a block after some 16 KiB, or after each row of pixels."""

_STOPS_PER_STREAM = 2
"""zlib stops after the head of a stream as after a block; each stream has at least one block."""

_OUTPUT_BYTES = 1 << 16
_OK = 0
_STOP_AT_BLOCK = 5  # Z_BLOCK
_ENDS_BLOCK = 128  # bit of data_type


class _Stream(ctypes.Structure):
    """z_stream of zlib.h."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


def _load_zlib() -> ctypes.CDLL | None:
    """Return zlib, or None where the system has none that can be loaded."""
    name = "libz.so.1" if sys.platform == "linux" else ctypes.util.find_library("z")
    if name is None:
        return None
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    library.zlibVersion.restype = ctypes.c_char_p
    return library


_zlib = _load_zlib()


def check_blocks(data: bytes, streams: Sequence[Sequence[slice]], inflated_bytes: int) -> None:
    """Raise UndecodableImage where zlib streams have more blocks than their content needs.

    Each of the `streams` lies in the given parts of `data`; together they hold `inflated_bytes`.
    Damaged streams are left to the decoder. The last UNCHECKED_BYTES are not looked at; nothing is
    where zlib can't be loaded.
    """
    unread_bytes = -UNCHECKED_BYTES
    for parts in streams:
        unread_bytes += sum(part.stop - part.start for part in parts)
    if _zlib is None or unread_bytes <= 0:
        return

    allowed_blocks = _MIN_ALLOWED_BLOCKS + inflated_bytes // _BYTES_PER_BLOCK
    allowed_blocks += _STOPS_PER_STREAM * len(streams)
    for parts in streams:
        read_parts = _take_first_bytes(parts, unread_bytes)
        unread_bytes -= sum(part.stop - part.start for part in read_parts)
        allowed_blocks -= _count_blocks(_zlib, data, read_parts, allowed_blocks)
        if allowed_blocks < 0:
            raise UndecodableImage("the compressed data has more blocks than its pixels need")


def _take_first_bytes(parts: Sequence[slice], limit: int) -> list[slice]:
    """Return the parts that hold the first `limit` bytes."""
    taken: list[slice] = []
    for part in parts:
        stop = min(part.stop, part.start + limit)
        if stop > part.start:
            taken.append(slice(part.start, stop))
            limit -= stop - part.start
    return taken


def _count_blocks(library: ctypes.CDLL, data: bytes, parts: Sequence[slice], limit: int) -> int:
    """Return the blocks of one zlib stream; the count stops above `limit`."""
    stream = _Stream()
    version = library.zlibVersion()
    if library.inflateInit_(ctypes.byref(stream), version, ctypes.sizeof(stream)) != _OK:
        raise MemoryError("zlib can't allocate its state")
    try:
        return _walk_blocks(library, stream, data, parts, limit)
    finally:
        library.inflateEnd(ctypes.byref(stream))


def _walk_blocks(
    library: ctypes.CDLL, stream: _Stream, data: bytes, parts: Sequence[slice], limit: int
) -> int:
    address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
    output = ctypes.create_string_buffer(_OUTPUT_BYTES)
    blocks = 0
    for part in parts:
        stream.next_in = address + part.start
        stream.avail_in = part.stop - part.start
        while stream.avail_in:
            stream.next_out = ctypes.addressof(output)
            stream.avail_out = _OUTPUT_BYTES
            if library.inflate(ctypes.byref(stream), _STOP_AT_BLOCK) != _OK:
                return blocks
            if stream.data_type & _ENDS_BLOCK:
                blocks += 1
            if blocks > limit:
                return blocks
    return blocks
