"""AVIF: read the still picture of a file, and write a file that holds nothing else.

An AVIF is a tree of boxes (ISO/IEC 14496-12, 23008-12; AV1 Image File Format). Its items are
pictures, parts of pictures, metadata. Two readers can disagree on what a box, an item or a size is,
so the decoder gets a file that is written here, of what was read: the primary picture, its alpha
channel and its colour space. The size is that of the AV1 data itself.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from models.image.av1 import Picture, read_picture
from models.image.errors import UndecodableImage

_MAX_BOXES = 1000  # in one box
_MAX_ITEMS = 300
_MAX_EXTENTS = 100  # of one item
_MAX_BRANDS = 64
# AV1 takes its decoder 0.15 s a megabyte. A photo of 50 million pixels has about 10 MB.
_MAX_PICTURE_BYTES = 12 << 20
_ALPHA_TYPES = (
    b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0",
    b"urn:mpeg:hevc:2015:auxid:1\0",
)
# Properties that this module applies, or that change no pixel.
_KNOWN_PROPERTIES = frozenset((b"ispe", b"av1C", b"pixi", b"colr", b"irot", b"imir", b"auxC"))
_ROTATION = b"irot"
_MIRRORING = b"imir"
_CROP = b"clap"
_CONFIGURATION = b"av1C"
_NCLX_BYTES = 11
_ESSENTIAL = 0x80  # bit of the number of a property

# Quarter turns against the clock, then which parts are exchanged (None: no mirroring; 0: top and
# bottom; 1: left and right) -> EXIF orientation.
_ORIENTATIONS = {
    (0, None): 1,
    (1, None): 8,
    (2, None): 3,
    (3, None): 6,
    (0, 0): 4,
    (1, 0): 5,
    (2, 0): 2,
    (3, 0): 7,
    (0, 1): 2,
    (1, 1): 7,
    (2, 1): 4,
    (3, 1): 5,
}

Properties: TypeAlias = dict[bytes, bytes]
"""Type -> content of an item's properties."""


@dataclass(frozen=True, slots=True)
class AvifImage:
    """The primary picture of an AVIF."""

    picture: Picture
    alpha: Picture | None
    is_premultiplied: bool  # the colours are multiplied by alpha
    orientation: int  # as EXIF counts it
    colour_space: bytes  # content of a colr box of type nclx, or empty

    @property
    def is_full_range(self) -> bool:
        """Whether 0 is black; the file takes precedence over the picture."""
        if self.colour_space:
            return bool(self.colour_space[_NCLX_BYTES - 1] & 0x80)
        return self.picture.colours.is_full_range


@dataclass(slots=True)
class _Item:
    """An item as the meta box describes it."""

    type: bytes = b""
    method: int = 0  # 0: extents are positions in the file; 1: in the idat box
    extents: list[tuple[int, int]] = field(default_factory=list)  # position, bytes
    properties: list[tuple[int, bool]] = field(default_factory=list)  # number from 1, is essential


@dataclass(slots=True)
class _Meta:
    """The content of the meta box."""

    primary: int = 0
    items: dict[int, _Item] = field(default_factory=dict)
    references: list[tuple[bytes, int, int]] = field(default_factory=list)  # type, from, to
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)  # type, content
    item_data: bytes = b""


class _Reader:
    """Reads big-endian numbers of one box. Raises struct.error at the end."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def read(self, size: int) -> int:
        return int.from_bytes(self.read_bytes(size), "big")

    def read_bytes(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.content):
            raise struct.error("the box is cut short")
        part = self.content[self.position : end]
        self.position = end
        return part


def has_avif_brand(data: bytes) -> bool:
    """Whether the first box of a file names AVIF among its brands."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), len(data), 16 + 4 * _MAX_BRANDS)
    brands = [data[8:12], *(data[i : i + 4] for i in range(16, end, 4))]
    return b"avif" in brands


def read_avif(data: bytes) -> AvifImage:
    """Read the primary picture.

    Raises UndecodableImage for a kind of AVIF that is not supported. struct.error, IndexError and
    KeyError mean a damaged file.
    """
    meta = _read_meta(_find_box(data, b"meta"))
    item = meta.items[meta.primary]
    if item.type != b"av01":
        raise UndecodableImage(
            "the avif is put together of several pictures, such as a grid of tiles, which is not "
            "supported; convert it to JPEG or PNG"
        )
    properties = _collect_properties(item, meta)
    picture = _read_item_picture(data, item, properties, meta)
    angle = properties[_ROTATION][0] & 3 if _ROTATION in properties else 0
    mirrored = properties[_MIRRORING][0] & 1 if _MIRRORING in properties else None
    colour_space = properties.get(b"colr", b"")

    alpha = None
    alpha_id = _find_alpha(meta)
    if alpha_id is not None:
        alpha_item = meta.items[alpha_id]
        alpha = _read_item_picture(data, alpha_item, _collect_properties(alpha_item, meta), meta)
        if (alpha.width, alpha.height) != (picture.width, picture.height):
            raise UndecodableImage("the alpha channel of the avif has another size")
        if alpha.colours.bits != picture.colours.bits or not alpha.colours.is_gray:
            raise UndecodableImage("the alpha channel of the avif has other bits than its colours")
    return AvifImage(
        picture,
        alpha,
        (b"prem", meta.primary, alpha_id) in meta.references,
        _ORIENTATIONS[angle, mirrored],
        colour_space,
    )


# ---------------------------------------------------------------------------------------------
# Reading boxes


def _iterate_boxes(content: bytes, position: int = 0) -> Iterator[tuple[bytes, bytes]]:
    """Yield the type and the content of each box."""
    for _ in range(_MAX_BOXES):
        if position >= len(content):
            return
        size, box_type = struct.unpack_from(">I4s", content, position)
        start = position + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", content, start)
            start += 8
        end = position + size if size else len(content)
        if end < start or end > len(content):
            raise struct.error("the box is cut short")
        yield box_type, content[start:end]
        position = end
    raise UndecodableImage(f"the avif has more than {_MAX_BOXES} boxes in one")


def _find_box(content: bytes, wanted: bytes) -> bytes:
    """Return the content of the first box of a type. Raises KeyError if there is none."""
    for box_type, box in _iterate_boxes(content):
        if box_type == wanted:
            return box
    raise KeyError(wanted)


def _read_meta(content: bytes) -> _Meta:
    meta = _Meta()
    boxes: dict[bytes, bytes] = {}
    for box_type, box in _iterate_boxes(content, 4):
        boxes.setdefault(box_type, box)

    primary = boxes[b"pitm"]
    meta.primary = int.from_bytes(primary[4:], "big")
    meta.item_data = boxes.get(b"idat", b"")
    _read_item_types(boxes[b"iinf"], meta)
    _read_locations(_Reader(boxes[b"iloc"]), meta)
    if b"iref" in boxes:
        _read_references(boxes[b"iref"], meta)
    _read_properties(boxes[b"iprp"], meta)
    return meta


def _read_item_types(content: bytes, meta: _Meta) -> None:
    """Read iinf: the type of each item."""
    count_bytes = 4 if content[0] else 2
    for box_type, box in _iterate_boxes(content, 4 + count_bytes):
        version = box[0]
        if box_type != b"infe" or version < 2:
            continue
        reader = _Reader(box[4:])
        item_id = reader.read(4 if version > 2 else 2)
        reader.read(2)  # item_protection_index
        meta.items[item_id] = _Item(reader.read_bytes(4))


def _read_locations(reader: _Reader, meta: _Meta) -> None:
    """Read iloc: where the data of each item lies."""
    version = reader.read(1)
    reader.read(3)
    sizes = reader.read(2)
    offset_bytes, length_bytes, base_bytes = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_bytes = sizes & 15 if version else 0

    count = reader.read(4 if version > 1 else 2)
    if count > _MAX_ITEMS:
        raise UndecodableImage(f"the avif has more than {_MAX_ITEMS} items")
    for _ in range(count):
        item = meta.items.setdefault(reader.read(4 if version > 1 else 2), _Item())
        item.method = reader.read(2) & 15 if version else 0
        reader.read(2)  # data_reference_index
        base = reader.read(base_bytes)
        extents = reader.read(2)
        if extents > _MAX_EXTENTS:
            raise UndecodableImage(f"the avif has an item in more than {_MAX_EXTENTS} parts")
        item.extents = []
        for _ in range(extents):
            reader.read(index_bytes)
            position = base + reader.read(offset_bytes)
            item.extents.append((position, reader.read(length_bytes)))


def _read_references(content: bytes, meta: _Meta) -> None:
    """Read iref: which items belong to which."""
    id_bytes = 4 if content[0] else 2
    for box_type, box in _iterate_boxes(content, 4):
        reader = _Reader(box)
        source = reader.read(id_bytes)
        for _ in range(reader.read(2)):
            meta.references.append((box_type, source, reader.read(id_bytes)))
            if len(meta.references) > _MAX_ITEMS:
                raise UndecodableImage(f"the avif has more than {_MAX_ITEMS} references")


def _read_properties(content: bytes, meta: _Meta) -> None:
    """Read iprp: a list of properties, and their numbers for each item."""
    meta.properties = list(_iterate_boxes(_find_box(content, b"ipco")))
    reader = _Reader(_find_box(content, b"ipma"))
    version = reader.read(1)
    has_large_numbers = reader.read(3) & 1
    number_bytes = 2 if has_large_numbers else 1
    essential_bit = 1 << 8 * number_bytes - 1

    count = reader.read(4)
    if count > _MAX_ITEMS:
        raise UndecodableImage(f"the avif has more than {_MAX_ITEMS} items")
    for _ in range(count):
        item = meta.items.setdefault(reader.read(4 if version else 2), _Item())
        for _ in range(reader.read(1)):
            association = reader.read(number_bytes)
            is_essential = bool(association & essential_bit)
            item.properties.append((association & essential_bit - 1, is_essential))


def _collect_properties(item: _Item, meta: _Meta) -> Properties:
    """Return the properties of an item.

    Raises UndecodableImage for one that changes pixels and is not supported.
    """
    properties: Properties = {}
    for number, is_essential in item.properties:
        if number == 0:
            continue
        property_type, content = meta.properties[number - 1]
        if property_type == _CROP or (is_essential and property_type not in _KNOWN_PROPERTIES):
            name = property_type.decode("latin-1")
            raise UndecodableImage(
                f"the avif needs the property {name!r}, which is not supported; convert it to JPEG "
                "or PNG"
            )
        # Of colr there may be one with an ICC profile and one with numbers.
        if property_type == b"colr" and (content[:4] != b"nclx" or len(content) < _NCLX_BYTES):
            continue
        properties.setdefault(property_type, content)
    return properties


def _find_alpha(meta: _Meta) -> int | None:
    """Return the id of the item that is the alpha channel of the primary picture."""
    for reference_type, source, target in meta.references:
        if reference_type != b"auxl" or target != meta.primary or source == meta.primary:
            continue
        item = meta.items[source]
        properties = _collect_properties(item, meta)
        if item.type == b"av01" and properties.get(b"auxC", b"")[4:].startswith(_ALPHA_TYPES):
            return source
    return None


def _read_item_picture(data: bytes, item: _Item, properties: Properties, meta: _Meta) -> Picture:
    """Read the AV1 data of an item, whose size must be that of its property."""
    picture = read_picture(_read_item_data(data, item, meta))
    size = struct.unpack_from(">II", properties[b"ispe"], 4)
    if size != (picture.width, picture.height):
        raise UndecodableImage(
            f"the avif states {size[0]}x{size[1]} pixels, but its picture has "
            f"{picture.width}x{picture.height}"
        )
    if _CONFIGURATION not in properties:
        raise KeyError(_CONFIGURATION)
    return picture


def _read_item_data(data: bytes, item: _Item, meta: _Meta) -> bytes:
    if item.method not in (0, 1):
        raise UndecodableImage("the avif stores its picture in another item")
    source = data if item.method == 0 else meta.item_data
    parts: list[bytes] = []
    total = 0
    for position, length in item.extents:
        length = length or len(source) - position  # 0: to the end
        total += length
        if position + length > len(source) or total > len(source) or length <= 0:
            raise struct.error("the data of the item is cut short")
        if total > _MAX_PICTURE_BYTES:
            raise UndecodableImage(
                f"the avif has more than {_MAX_PICTURE_BYTES} bytes in one picture; send a smaller "
                "one, or convert it to JPEG"
            )
        parts.append(source[position : position + length])
    return b"".join(parts)


# ---------------------------------------------------------------------------------------------
# Writing


def build_avif(image: AvifImage) -> bytes:
    """Return a file with the picture and the alpha channel, not turned, and without metadata."""
    pictures = [image.picture]
    if image.alpha is not None:
        pictures.append(image.alpha)
    return _build_file(pictures, image.colour_space)


def build_avif_plane(picture: Picture) -> bytes:
    """Return a file with one gray picture, such as an alpha channel."""
    return _build_file([picture], b"")


def _build_file(pictures: list[Picture], colour_space: bytes) -> bytes:
    """Return a file with a picture and, where there is a second one, its alpha channel."""
    brands = b"avif" + bytes(4) + b"avif" + b"mif1" + b"miaf"
    file_type = _build_box(b"ftyp", brands)

    meta_bytes = len(_build_meta(pictures, colour_space, 0))
    first_position = len(file_type) + meta_bytes + 8
    meta = _build_meta(pictures, colour_space, first_position)
    units = b"".join(picture.units for picture in pictures)
    return file_type + meta + _build_box(b"mdat", units)


def _build_box(box_type: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), box_type) + content


def _build_full_box(box_type: bytes, *parts: bytes, version: int = 0) -> bytes:
    return _build_box(box_type, bytes((version, 0, 0, 0)), *parts)


def _build_meta(pictures: list[Picture], colour_space: bytes, position: int) -> bytes:
    """Return the meta box for pictures that lie one after the other from `position` on."""
    count = struct.pack(">H", len(pictures))
    infos: list[bytes] = []
    locations: list[bytes] = []
    for item_id, picture in enumerate(pictures, 1):
        entry = struct.pack(">HH4sB", item_id, 0, b"av01", 0)
        infos.append(_build_full_box(b"infe", entry, version=2))
        locations.append(struct.pack(">HHHII", item_id, 0, 1, position, len(picture.units)))
        position += len(picture.units)

    boxes = [
        _build_full_box(b"hdlr", bytes(4), b"pict", bytes(13)),
        _build_full_box(b"pitm", struct.pack(">H", 1)),
        _build_full_box(b"iloc", bytes((0x44, 0)), count, *locations),
        _build_full_box(b"iinf", count, *infos),
    ]
    if len(pictures) == 2:
        reference = _build_box(b"auxl", struct.pack(">HHH", 2, 1, 1))
        boxes.append(_build_full_box(b"iref", reference))
    boxes.append(_build_properties(pictures, colour_space))
    return _build_full_box(b"meta", *boxes)


def _build_properties(pictures: list[Picture], colour_space: bytes) -> bytes:
    """Return iprp: the properties of each picture, and which picture they belong to."""
    properties: list[bytes] = []
    associations: list[bytes] = []
    for item_id, picture in enumerate(pictures, 1):
        channels = 1 if picture.colours.is_gray else 3
        own = [
            _build_full_box(b"ispe", struct.pack(">II", picture.width, picture.height)),
            _build_full_box(b"pixi", bytes((channels, *[picture.colours.bits] * channels))),
            _build_box(_CONFIGURATION, picture.configuration),
        ]
        if item_id == 2:
            own.append(_build_full_box(b"auxC", _ALPHA_TYPES[0]))
        elif colour_space:
            own.append(_build_box(b"colr", colour_space[:_NCLX_BYTES]))

        first = len(properties) + 1
        numbers = bytearray(range(first, first + len(own)))
        numbers[2] |= _ESSENTIAL  # a reader must know av1C
        associations.append(struct.pack(">HB", item_id, len(own)) + numbers)
        properties += own

    associated = _build_full_box(b"ipma", struct.pack(">I", len(pictures)), *associations)
    return _build_box(b"iprp", _build_box(b"ipco", *properties), associated)
