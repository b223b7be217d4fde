"""Structure-aware mutations of image files: what no encoder writes, with valid framing.

A file is split into the pieces of its format (chunks, segments, blocks, directory entries), the
pieces are changed, and the file is put together again with right lengths and checksums, so that the
damage reaches the code behind them.
"""

import io
import random
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from support.jpeg_builder import green_jpeg
from support.tiff_builder import DEFLATE, Page, build_tiff

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
ADAM7_PASSES = (  # first column and row, and the steps to the next
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
EXTREME_INTEGERS = (0, 1, 2, 7, 8, 15, 16, 127, 128, 255, 256, 32767, 32768, 65535, 1 << 16)
EXTREME_LONG_INTEGERS = (*EXTREME_INTEGERS, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
MAX_COPIES = 300
MAX_FILE_BYTES = 1 << 20

Pieces = list[bytes]


def write_seed_images() -> dict[str, list[bytes]]:
    """Return small valid files by format, in several of its modes."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, 32, 4), np.uint8)
    rgba = Image.fromarray(noise, "RGBA")
    rgb = rgba.convert("RGB")
    gray = rgba.convert("L")
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    sixteen_bit = Image.fromarray(rng.integers(0, 1 << 16, (24, 32), np.uint16))
    frames = [rgb, rgb.rotate(90), rgb.rotate(180)]
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    exif[0x010F] = "maker"

    return {
        "jpeg": [
            _save(rgb, "JPEG", exif=exif, comment=b"comment"),
            _save(rgb, "JPEG", progressive=True, icc_profile=bytes(300)),
            _save(gray, "JPEG", restart_marker_blocks=2),
            _save(rgb, "JPEG", subsampling=2, quality=20),
            _save(rgb.convert("CMYK"), "JPEG"),
            green_jpeg([[0], [1], [2]]),
            green_jpeg([[0], [1, 2]], frame=0xC2),
        ],
        "png": [
            _save(rgb, "PNG", exif=exif),
            _save(rgba, "PNG", icc_profile=bytes(300)),
            _save(palette, "PNG", transparency=0),
            _save(gray, "PNG"),
            _save(rgb.convert("1"), "PNG"),
            _save(sixteen_bit, "PNG"),
            _save(frames[0], "PNG", save_all=True, append_images=frames[1:]),
            _build_interlaced_png(noise[:, :, 0]),
        ],
        "gif": [
            _save(palette, "GIF", comment=b"comment"),
            _save(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0),
            _save(palette, "GIF", transparency=0, interlace=True),
        ],
        "webp": [
            _save(rgb, "WEBP", exif=exif),
            _save(rgba, "WEBP", lossless=True, icc_profile=bytes(300)),
            _save(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        ],
        "avif": [
            _save(rgb, "AVIF", exif=exif),
            _save(rgba, "AVIF", icc_profile=bytes(300)),
            cv2.imencode(".avif", noise[:, :, 0])[1].tobytes(),
            cv2.imencode(".avif", noise.astype(np.uint16) * 4, [cv2.IMWRITE_AVIF_DEPTH, 10])[
                1
            ].tobytes(),
            _save(frames[0], "AVIF", save_all=True, append_images=frames[1:]),
        ],
        "tiff": [
            _save(rgb, "TIFF"),
            _save(rgba, "TIFF", compression="tiff_lzw"),
            _save(rgb, "TIFF", compression="jpeg"),
            _save(gray, "TIFF", compression="tiff_adobe_deflate"),
            _save(rgb.convert("1"), "TIFF", compression="group4"),
            _save(sixteen_bit, "TIFF"),
            _save(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
            build_tiff(Page(noise[:, :, :3], {259: DEFLATE, 284: 2})),
            build_tiff(Page(noise.astype(np.uint16)[:, :, :3] * 9, {259: DEFLATE}), order=">"),
        ],
        "bmp": [_save(rgb, "BMP"), _save(palette, "BMP"), _save(rgba, "BMP")],
    }


def _save(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _build_interlaced_png(pixels: np.ndarray) -> bytes:
    """A PNG of gray pixels [H, W] in the seven passes of Adam7, which Pillow does not write."""
    height, width = pixels.shape
    rows = b""
    for x, y, step_x, step_y in ADAM7_PASSES:
        for row in pixels[y::step_y, x::step_x]:
            rows += b"\0" + row.tobytes()
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    return _join_png([header, b"IDAT" + zlib.compress(rows), b"IEND"])


def mutate_image(file_format: str, seeds: list[bytes], rng: random.Random) -> bytes:
    """Return one of the files of a format with one to four changes."""
    split, join = FORMATS[file_format]
    pieces = split(rng.choice(seeds))
    for _ in range(rng.randint(1, 4)):
        donor = split(rng.choice(seeds))
        _change_pieces(pieces, donor, file_format, rng)

    data = join(pieces)
    if rng.random() < 0.1:
        data = data[: rng.randint(0, len(data))]
    return data[:MAX_FILE_BYTES]


def _change_pieces(pieces: Pieces, donor: Pieces, file_format: str, rng: random.Random) -> None:
    """Change the list in place: one piece removed, repeated, moved, replaced or damaged."""
    if not pieces:
        return
    at = rng.randrange(len(pieces))
    kind = rng.randrange(8)
    if kind == 0:
        del pieces[at]
    elif kind == 1:
        copies = rng.choice((1, 2, 10, MAX_COPIES))
        pieces[at:at] = [pieces[at]] * copies
    elif kind == 2:
        pieces.insert(rng.randrange(len(pieces) + 1), pieces.pop(at))
    elif kind == 3:
        pieces.insert(at, rng.choice(donor))
    elif kind == 4 and EXTRA_PIECES[file_format]:
        pieces.insert(at, rng.choice(EXTRA_PIECES[file_format]))
    elif kind == 5 and file_format == "png":
        pieces[at] = _damage_compressed(pieces[at], rng)
    else:
        pieces[at] = damage_bytes(pieces[at], rng)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with a few of them replaced, an extreme integer written, or a part cut."""
    if not data:
        return data
    damaged = bytearray(data)
    at = rng.randrange(len(damaged))
    kind = rng.randrange(5)
    if kind == 0:
        damaged[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        order = rng.choice("<>")
        width, letter = rng.choice(((1, "B"), (2, "H"), (4, "I")))
        limit = (1 << 8 * width) - 1
        value = min(rng.choice(EXTREME_LONG_INTEGERS), limit)
        damaged[at : at + width] = struct.pack(order + letter, value)
    elif kind == 2:
        del damaged[at : at + rng.randint(1, 16)]
    elif kind == 3:
        damaged[at:at] = rng.randbytes(rng.randint(1, 16))
    else:
        for _ in range(rng.randint(1, 20)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def _damage_compressed(chunk: bytes, rng: random.Random) -> bytes:
    """Damage what a PNG's IDAT chunk inflates to; other chunks are damaged as they are."""
    kind = chunk[:4]
    try:
        content = zlib.decompress(chunk[4:])
    except zlib.error:
        return damage_bytes(chunk, rng)
    return kind + zlib.compress(damage_bytes(content, rng))


# Pieces of each format.


def _split_png(data: bytes) -> Pieces:
    """Chunks as type and content, without length and checksum."""
    pieces: Pieces = []
    at = len(PNG_MAGIC)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        pieces.append(data[at + 4 : at + 8 + length])
        at += 12 + length
    return pieces


def _join_png(pieces: Pieces) -> bytes:
    parts = [PNG_MAGIC]
    for piece in pieces:
        kind = piece[:4].ljust(4, b"x")
        content = piece[4:]
        checksum = zlib.crc32(kind + content)
        parts.append(struct.pack(">I", len(content)) + kind + content)
        parts.append(struct.pack(">I", checksum))
    return b"".join(parts)


def _split_jpeg(data: bytes) -> Pieces:
    """Segments with their marker and length, each scan's data as a piece."""
    pieces: Pieces = []
    at = 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xD9:
            break
        (length,) = struct.unpack_from(">H", data, at + 2)
        pieces.append(data[at : at + 2 + length])
        at += 2 + length
        if marker == 0xDA:
            end = _find_scan_end(data, at)
            pieces.append(data[at:end])
            at = end
    return pieces


def _find_scan_end(data: bytes, at: int) -> int:
    while at + 1 < len(data):
        is_marker = data[at] == 0xFF and data[at + 1] != 0 and not 0xD0 <= data[at + 1] <= 0xD7
        if is_marker:
            return at
        at += 1
    return len(data)


def _join_jpeg(pieces: Pieces) -> bytes:
    """Markers with a length get the right one."""
    parts = [b"\xff\xd8"]
    for piece in pieces:
        if len(piece) >= 4 and piece[0] == 0xFF:
            length = min(len(piece) - 2, 0xFFFF)
            piece = piece[:2] + struct.pack(">H", length) + piece[4 : 2 + length]
        parts.append(piece)
    return b"".join(parts) + b"\xff\xd9"


def _split_gif(data: bytes) -> Pieces:
    """The header with its palette, then each extension or image, then nothing of the trailer."""
    at = 13 + _palette_bytes(data[10])
    pieces = [data[:at]]
    while at < len(data) and data[at] != 0x3B:
        start = at
        if data[at] == 0x21:
            at += 2
        else:
            at += 10 + _palette_bytes(data[at + 9]) + 1
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
        pieces.append(data[start:at])
    return pieces


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _join_gif(pieces: Pieces) -> bytes:
    return b"".join(pieces) + b"\x3b"


def _split_webp(data: bytes) -> Pieces:
    """Chunks as type and content."""
    pieces: Pieces = []
    at = 12
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        pieces.append(data[at : at + 4] + data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    return pieces


def _join_webp(pieces: Pieces) -> bytes:
    body = b"WEBP"
    for piece in pieces:
        kind = piece[:4].ljust(4, b"x")
        content = piece[4:]
        body += kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


AVIF_LEVELS = b"TMAP"  # first byte of a piece: top level, in meta, in iprp, in ipco


def split_avif(data: bytes) -> Pieces:
    """Boxes as level, type and content; positions of data count from the start of mdat."""
    pieces: Pieces = []
    data_start = data.index(b"mdat") + 4
    for box in _iterate_avif_boxes(data):
        if box[:4] != b"meta":
            pieces.append(b"T" + box)
            continue
        for child in _iterate_avif_boxes(box[8:]):
            if child[:4] != b"iprp":
                pieces.append(b"M" + _move_avif_data(child, -data_start))
                continue
            for part in _iterate_avif_boxes(child[4:]):
                if part[:4] == b"ipco":
                    pieces += [b"P" + item for item in _iterate_avif_boxes(part[4:])]
                else:
                    pieces.append(b"A" + part)
    return pieces


def _iterate_avif_boxes(content: bytes) -> Pieces:
    boxes: Pieces = []
    at = 0
    while at + 8 <= len(content):
        (size,) = struct.unpack_from(">I", content, at)
        boxes.append(content[at + 4 : at + size])
        at += size
    return boxes


def _move_avif_data(box: bytes, distance: int) -> bytes:
    """Add to the positions in an iloc box; other boxes, and damaged ones, stay as they are."""
    if box[:10] != b"iloc\0\0\0\0\x44\0":
        return box
    moved = bytearray(box)
    for at in range(12, len(box) - 13, 14):
        position = struct.unpack_from(">I", box, at + 6)[0] + distance
        struct.pack_into(">I", moved, at + 6, position % (1 << 32))
    return bytes(moved)


def join_avif(pieces: Pieces) -> bytes:
    levels: dict[int, Pieces] = {level: [] for level in AVIF_LEVELS}
    for piece in pieces:
        levels.get(piece[0] if piece else 0, levels[AVIF_LEVELS[1]]).append(piece[1:])
    top, in_meta, in_properties, properties = levels.values()

    before = [box for box in top if box[:4] != b"mdat"]
    after = [box for box in top if box[:4] == b"mdat"]
    properties_box = b"ipco" + _join_avif_boxes(properties)
    in_meta.append(b"iprp" + _join_avif_boxes([properties_box, *in_properties]))
    start = len(_join_avif_boxes(before)) + 12 + len(_join_avif_boxes(in_meta)) + 8
    in_meta = [_move_avif_data(box, start) for box in in_meta]
    meta = b"meta" + bytes(4) + _join_avif_boxes(in_meta)
    return _join_avif_boxes([*before, meta, *after])


def _join_avif_boxes(boxes: Pieces) -> bytes:
    parts: Pieces = []
    for box in boxes:
        box = box.ljust(4, b"x")
        parts.append(struct.pack(">I", 4 + len(box)) + box)
    return b"".join(parts)


def _split_tiff(data: bytes) -> Pieces:
    """The header and pixels before the first directory, its entries, and what follows."""
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, directory)
    pieces = [data[: directory + 2]]
    for i in range(count):
        start = directory + 2 + 12 * i
        pieces.append(data[start : start + 12])
    pieces.append(data[directory + 2 + 12 * count :])
    return pieces


def _join_tiff(pieces: Pieces) -> bytes:
    return b"".join(pieces)


def _split_bmp(data: bytes) -> Pieces:
    """The file header, the fields of the image header, and the rest."""
    return [data[:14], *(data[i : i + 4] for i in range(14, 54, 4)), data[54:]]


def _join_bmp(pieces: Pieces) -> bytes:
    return b"".join(pieces)


FORMATS: dict[str, tuple[Callable[[bytes], Pieces], Callable[[Pieces], bytes]]] = {
    "jpeg": (_split_jpeg, _join_jpeg),
    "png": (_split_png, _join_png),
    "gif": (_split_gif, _join_gif),
    "webp": (_split_webp, _join_webp),
    "avif": (split_avif, join_avif),
    "tiff": (_split_tiff, _join_tiff),
    "bmp": (_split_bmp, _join_bmp),
}

_DEFLATED_LETTERS = zlib.compress(b"a" * 1_000_000, 9)
_EMPTY_BLOCKS = b"\x78\x9c" + b"\0\0\0\xff\xff" * 100_000
_FRAME_CONTROL = struct.pack(">IIIIIHHBB", 0, 32, 24, 0, 0, 1, 10, 0, 0)
# Pieces that the seeds lack: text and profiles that inflate, frames of animations, empty ones.
EXTRA_PIECES: dict[str, Pieces] = {
    "png": [
        b"zTXtk\0\0" + _DEFLATED_LETTERS,
        b"iTXtk\0\1\0\0\0" + _DEFLATED_LETTERS,
        b"iCCPk\0\0" + _DEFLATED_LETTERS,
        b"tEXtk\0" + b"a" * 1000,
        b"acTL" + struct.pack(">II", 2, 0),
        b"fcTL" + _FRAME_CONTROL,
        b"fdAT" + bytes(8),
        b"tIME",
        b"hIST\0",
        b"sPLTk\0\x08" + bytes(6),
        b"eXIfMM\0*" + bytes(4),
        b"IDAT",
        b"IDAT" + _EMPTY_BLOCKS,
        b"PLTE" + bytes(768),
        b"tRNS" + bytes(300),
    ],
    "jpeg": [
        b"\xff\xe1\0\0Exif\0\0" + bytes(200),
        b"\xff\xe2\0\0ICC_PROFILE\0\1\1" + bytes(200),
        b"\xff\xe0\0\0JFXX\0\x10" + bytes(20),
        b"\xff\xee\0\0Adobe\0d\0\0\0\0\x02",
        b"\xff\xfe\0\0" + b"a" * 60_000,
        b"\xff\xdd\0\0\0\1",
        b"\xff\xc4\0\0\0" + bytes([16] * 16) + bytes(256),
        b"\xff\xdb\0\0\0" + bytes(64),
        b"\xff\xd0",
        b"\xff\xd0" * 1000,
        b"\xff\xcc\0\0\0\x10",
        b"\xff\xdc\0\0\0\x18",
        b"\xff" * 1000,
    ],
    "gif": [
        b"\x21\xfe" + (b"\xff" + b"a" * 255) * 100 + b"\0",
        b"\x21\xfe" + b"\1a" * 1000 + b"\0",
        b"\x21\xff\x0bNETSCAPE2.0\x03\1\0\0\0",
        b"\x21\xf9\x04\x0c\0\0\0\0",
        b"\x2c" + struct.pack("<HHHHB", 0, 0, 32, 24, 0) + b"\x02" + b"\xff" + b"\x24\x49\x92" * 85,
        b"\0",
    ],
    "webp": [
        b"VP8X\x3e\0\0\0\x1f\0\0\x17\0\0",
        b"ANIM" + bytes(6),
        b"ANMF" + bytes(16) + b"VP8L",
        b"ALPH\1" + bytes(30),
        b"ICCP" + bytes(1000),
        b"EXIF" + bytes(1000),
        b"XMP " + bytes(1000),
    ],
    "avif": [
        b"Pirot\1",
        b"Pimir\1",
        b"Pclap" + bytes(32),
        b"Pa1op\1",
        b"Plsel\0\1",
        b"Pispe" + bytes(4) + struct.pack(">II", 40_000, 40_000),
        b"Aipma" + struct.pack(">II", 0, 255) + bytes(2000),
        b"Miref" + bytes(4) + struct.pack(">I4sHHH", 14, b"auxl", 1, 1, 1) * 300,
        b"Miinf" + bytes(4) + b"\xff\xff",
        b"Midat" + bytes(1000),
        b"Tfree" + bytes(1000),
        b"Tmdat" + bytes(100),
    ],
    "tiff": [
        struct.pack("<HHII", tag, 3, 1, value)
        for tag in (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 338, 339)
        for value in (0, 1, 5, 65535)
    ],
    "bmp": [struct.pack("<I", value) for value in EXTREME_LONG_INTEGERS],
}
