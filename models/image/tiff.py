"""Read the directories of TIFF files and of EXIF blocks, which are TIFF inside.

Layout (TIFF 6.0, section 2): byte order mark "II" or "MM", the number 42, the offset of the first
directory. A directory is a count, that many entries of 12 bytes, and the offset of the next
directory or 0:

    offset  size  content
    0       2     tag
    2       2     type
    4       4     number of values
    8       4     the values, or their offset where they take more than 4 bytes

A directory describes one page. `build_page_file` makes a file of one page, with the tags that
concern its pixels only.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

# Tags, with the names of TIFF 6.0.
NEW_SUBFILE_TYPE = 254
SUBFILE_TYPE = 255
IMAGE_WIDTH = 256
IMAGE_LENGTH = 257
BITS_PER_SAMPLE = 258
COMPRESSION = 259
PHOTOMETRIC_INTERPRETATION = 262
STRIP_OFFSETS = 273
ORIENTATION = 274
SAMPLES_PER_PIXEL = 277
ROWS_PER_STRIP = 278
STRIP_BYTE_COUNTS = 279
PLANAR_CONFIGURATION = 284
PREDICTOR = 317
TILE_WIDTH = 322
TILE_LENGTH = 323
TILE_OFFSETS = 324
TILE_BYTE_COUNTS = 325
SUB_IFDS = 330
EXTRA_SAMPLES = 338
SAMPLE_FORMAT = 339

# Values of tags
WHITE_IS_ZERO = 0
BLACK_IS_ZERO = 1
ASSOCIATED_ALPHA = 1  # of ExtraSamples: colours are multiplied by alpha
HORIZONTAL_DIFFERENCES = 2  # of Predictor

PIXEL_TAGS = frozenset(
    (
        IMAGE_WIDTH,
        IMAGE_LENGTH,
        BITS_PER_SAMPLE,
        COMPRESSION,
        PHOTOMETRIC_INTERPRETATION,
        266,  # FillOrder
        STRIP_OFFSETS,
        SAMPLES_PER_PIXEL,
        ROWS_PER_STRIP,
        STRIP_BYTE_COUNTS,
        PLANAR_CONFIGURATION,
        292,  # T4Options
        293,  # T6Options
        PREDICTOR,
        320,  # ColorMap
        TILE_WIDTH,
        TILE_LENGTH,
        TILE_OFFSETS,
        TILE_BYTE_COUNTS,
        EXTRA_SAMPLES,
        SAMPLE_FORMAT,
        347,  # JPEGTables
        529,  # YCbCrCoefficients
        530,  # YCbCrSubSampling
        531,  # YCbCrPositioning
        532,  # ReferenceBlackWhite
    )
)
"""What a decoder needs to know. The orientation is not among them: `decode` applies it."""

_OTHER_TYPE_TAGS = frozenset((347, 529, 532))  # of PIXEL_TAGS, those that are no integers

_REDUCED_IMAGE = 1  # bit of NewSubfileType: a smaller version of another page
_TRANSPARENCY_MASK = 4  # bit of NewSubfileType
_OLD_REDUCED_IMAGE = 2  # value of SubfileType

_MAX_DIRECTORIES = 64  # pages that are searched for the picture
_MAX_ENTRIES = 1024  # of a directory; TIFF and EXIF together define fewer tags
_FIRST_OFFSET = 4  # position of the offset of the first directory
_ENTRY_BYTES = 12
_UNCHANGED = -1
_SHORT = 3
_LONG = 4
_MAX_SHORT = 0xFFFF
_BYTE_ORDERS = {b"II": "<", b"MM": ">"}
# Type number -> struct code. Tags of other types (text, fractions) are not read.
_INTEGER_TYPES = {
    1: "B",  # BYTE
    _SHORT: "H",
    _LONG: "I",
    13: "I",  # IFD
}


class Entry(NamedTuple):
    """One entry of a directory."""

    tag: int
    type_number: int
    value_count: int
    position: int
    """Of the entry in the file."""


@dataclass(frozen=True, slots=True)
class Directory:
    """The tags of one page."""

    order: str
    """Byte order of the file, as struct writes it."""

    offset: int
    """In the file."""

    entries: tuple[Entry, ...]

    tags: dict[int, int]
    """The first value of each tag of an integer type."""

    next_offset: int
    """Offset of the next directory, or 0."""

    @property
    def width(self) -> int:
        """Pixels."""
        return self.tags[IMAGE_WIDTH]

    @property
    def height(self) -> int:
        """Pixels."""
        return self.tags[IMAGE_LENGTH]

    @property
    def is_picture(self) -> bool:
        """Whether the page is neither a thumbnail nor a smaller version nor a mask."""
        kind = self.tags.get(NEW_SUBFILE_TYPE, 0)
        if kind & (_REDUCED_IMAGE | _TRANSPARENCY_MASK):
            return False
        return self.tags.get(SUBFILE_TYPE) != _OLD_REDUCED_IMAGE


def read_pages(data: bytes) -> list[Directory]:
    """Return the pages of a file in their order, those inside another page after it.

    A damaged page ends the list. Raises struct.error, KeyError or IndexError where the first page
    is damaged, or one of its tags appears twice: decoders differ in which of the two they take.
    """
    order = _BYTE_ORDERS[bytes(data[:2])]
    (first_offset,) = struct.unpack_from(order + "I", data, _FIRST_OFFSET)

    pages: list[Directory] = []
    offsets = [first_offset]
    seen: set[int] = set()
    while offsets and len(pages) < _MAX_DIRECTORIES:
        offset = offsets.pop(0)
        if offset == 0 or offset in seen:
            continue
        seen.add(offset)

        try:
            page = _read_page(data, order, offset)
            inner_offsets = _read_inner_offsets(data, page)
        except (struct.error, KeyError, IndexError):
            if not pages:
                raise
            continue
        pages.append(page)
        offsets = [*inner_offsets, *offsets, page.next_offset]

    if not pages:
        raise KeyError(first_offset)
    return pages


def choose_page(pages: list[Directory]) -> Directory:
    """Return the first page that is neither a mask nor a smaller version of another page."""
    pictures = [page for page in pages if page.is_picture] or pages
    for page in pictures:
        if not any(_is_enlargement(other, page) for other in pictures):
            return page
    return pictures[0]


def _is_enlargement(page: Directory, of: Directory) -> bool:
    """Whether a page is at least twice as wide and has the same shape, up to one pixel."""
    if page.width < 2 * of.width:
        return False
    return abs(page.width * of.height - page.height * of.width) <= page.width


def build_page_file(data: bytes, page: Directory, changes: dict[int, int | None]) -> bytes:
    """Return a file of one page: its pixels, and the tags that concern them.

    `changes` holds other values of tags that the page has; None leaves a tag out. The directory is
    replaced in its place, so a file that is cut short stays so.
    """
    entries: list[bytes] = []
    for entry in page.entries:
        value = changes.get(entry.tag, _UNCHANGED)
        if entry.tag not in PIXEL_TAGS or value is None:
            continue
        if value == _UNCHANGED:
            entries.append(data[entry.position : entry.position + _ENTRY_BYTES])
        else:
            entries.append(_pack_entry(page.order, entry.tag, value))

    no_next_directory = bytes(4)
    directory = struct.pack(page.order + "H", len(entries)) + b"".join(entries) + no_next_directory
    file = bytearray(data)
    file[page.offset : page.offset + len(directory)] = directory
    struct.pack_into(page.order + "I", file, _FIRST_OFFSET, page.offset)
    return bytes(file)


def _pack_entry(order: str, tag: int, value: int) -> bytes:
    if value <= _MAX_SHORT:
        return struct.pack(order + "HHIHH", tag, _SHORT, 1, value, 0)
    return struct.pack(order + "HHII", tag, _LONG, 1, value)


def read_orientation(exif: bytes) -> int:
    """Return the orientation of an EXIF block, 1 to 8; 1 where it states none.

    No other tag is read, so damage to others does not matter.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    try:
        order = _BYTE_ORDERS[exif[:2]]
        (offset,) = struct.unpack_from(order + "I", exif, 4)
        for entry in _iterate_entries(exif, order, offset):
            if entry.tag == ORIENTATION and entry.type_number in _INTEGER_TYPES:
                orientation = _read_first_value(exif, order, entry)
                return orientation if 1 <= orientation <= 8 else 1
    except (struct.error, KeyError):
        pass
    return 1


def _read_page(data: bytes, order: str, offset: int) -> Directory:
    """Read the directory at `offset`, which must state a size."""
    entries = tuple(_iterate_entries(data, order, offset))
    tags: dict[int, int] = {}
    for entry in entries:
        if entry.type_number not in _INTEGER_TYPES:
            if entry.tag in PIXEL_TAGS - _OTHER_TYPE_TAGS:  # decoders may read what is skipped here
                raise KeyError(entry.tag)
            continue
        if entry.tag in tags:
            raise KeyError(entry.tag)
        tags[entry.tag] = _read_first_value(data, order, entry)

    for tag in (IMAGE_WIDTH, IMAGE_LENGTH):
        if tag not in tags:
            raise KeyError(tag)

    end = offset + 2 + _ENTRY_BYTES * len(entries)
    next_offset = 0
    if end + 4 <= len(data):
        (next_offset,) = struct.unpack_from(order + "I", data, end)
    return Directory(order, offset, entries, tags, next_offset)


def _iterate_entries(data: bytes, order: str, offset: int) -> Iterator[Entry]:
    """Yield the entries of the directory at `offset`. Raises KeyError where there are too many."""
    (entry_count,) = struct.unpack_from(order + "H", data, offset)
    if entry_count > _MAX_ENTRIES:
        raise KeyError(offset)

    first = offset + 2
    for position in range(first, first + _ENTRY_BYTES * entry_count, _ENTRY_BYTES):
        tag, type_number, value_count = struct.unpack_from(order + "HHI", data, position)
        yield Entry(tag, type_number, value_count, position)


def _read_first_value(data: bytes, order: str, entry: Entry) -> int:
    """Return the first value of an entry of an integer type."""
    (value,) = struct.unpack_from(
        order + _INTEGER_TYPES[entry.type_number], data, _locate_values(data, order, entry)
    )
    return value


def _locate_values(data: bytes, order: str, entry: Entry) -> int:
    position = entry.position + 8
    value_bytes = struct.calcsize(_INTEGER_TYPES[entry.type_number])
    if entry.value_count * value_bytes > 4:
        (position,) = struct.unpack_from(order + "I", data, position)
    return position


def _read_inner_offsets(data: bytes, page: Directory) -> list[int]:
    """Return the offsets of the pages inside a page: raw files keep the picture there."""
    for entry in page.entries:
        if entry.tag == SUB_IFDS and entry.type_number in _INTEGER_TYPES:
            count = min(entry.value_count, _MAX_DIRECTORIES)
            code = page.order + str(count) + _INTEGER_TYPES[entry.type_number]
            position = _locate_values(data, page.order, entry)
            return list(struct.unpack_from(code, data, position))
    return []
