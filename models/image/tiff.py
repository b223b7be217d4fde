"""Read the tags of a TIFF directory: of TIFF files, and of EXIF blocks, which are TIFF inside.

Layout (TIFF 6.0, section 2): byte order mark "II" or "MM", the number 42, the offset of the first
directory. A directory is a count and that many entries of 12 bytes:

    offset  size  content
    0       2     tag
    2       2     type
    4       4     number of values
    8       4     the values, or their offset where they take more than 4 bytes
"""

import struct

# Tags, with the names of TIFF 6.0.
IMAGE_WIDTH = 256
IMAGE_LENGTH = 257
BITS_PER_SAMPLE = 258
COMPRESSION = 259
PHOTOMETRIC_INTERPRETATION = 262
ORIENTATION = 274
SAMPLES_PER_PIXEL = 277
ROWS_PER_STRIP = 278
STRIP_BYTE_COUNTS = 279
PLANAR_CONFIGURATION = 284
TILE_WIDTH = 322
TILE_LENGTH = 323
TILE_BYTE_COUNTS = 325
EXTRA_SAMPLES = 338
SAMPLE_FORMAT = 339

_ENTRY_BYTES = 12
_BYTE_ORDERS = {b"II": "<", b"MM": ">"}
# Type number -> struct code. Tags of other types (text, fractions) are not read.
_INTEGER_TYPES = {
    1: "B",  # BYTE
    3: "H",  # SHORT
    4: "I",  # LONG
}


def read_tiff_tags(data: bytes) -> dict[int, int]:
    """Return the first value of each integer tag in the first directory.

    Raises struct.error, KeyError or IndexError where the bytes are no directory, or a tag appears
    twice: decoders differ in which of the two they take.
    """
    order = _BYTE_ORDERS[bytes(data[:2])]
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (entry_count,) = struct.unpack_from(order + "H", data, directory)

    tags: dict[int, int] = {}
    first_entry = directory + 2
    for entry in range(first_entry, first_entry + _ENTRY_BYTES * entry_count, _ENTRY_BYTES):
        tag, type_number, value_count = struct.unpack_from(order + "HHI", data, entry)
        code = _INTEGER_TYPES.get(type_number)
        if code is None:
            continue
        if tag in tags:
            raise KeyError(tag)

        offset = entry + 8
        if value_count * struct.calcsize(code) > 4:
            (offset,) = struct.unpack_from(order + "I", data, offset)
        (tags[tag],) = struct.unpack_from(order + code, data, offset)
    return tags
