"""Hostile and broken images: each raises an ImageError with a 4xx status, in bounded memory."""

import gzip
import io
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.image import (
    ImageError,
    ImageTooLarge,
    InputSpec,
    UndecodableImage,
    UnsupportedFormat,
    decode,
    decode_full_size,
    read_header,
)
from models.image.sanitize import sanitize
from support import jpeg_builder, webp_builder
from support.webp_builder import webp

SPEC = InputSpec(height=32, width=32)


def save(kind: str, size=(60, 40), mode="RGB", **options) -> bytes:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


FILES = {
    "jpeg": save("JPEG"),
    "jpeg progressive": save("JPEG", progressive=True),
    "png": save("PNG"),
    "png gray": save("PNG", mode="L"),
    "webp": save("WEBP"),
    "webp lossless": save("WEBP", lossless=True),
    "avif": save("AVIF"),
    "avif with alpha": save("AVIF", mode="RGBA"),
    "gif": save("GIF", mode="P"),
    "bmp": save("BMP"),
    "tiff": save("TIFF"),
    "tiff lzw": save("TIFF", compression="tiff_lzw"),
    "tiff jpeg": save("TIFF", compression="jpeg"),
}


MAGIC = [
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"RIFF\x90\0\0\0WEBP",
    b"\0\0\0\x14ftypavif\0\0\0\0avif",
    b"II*\0",
    b"MM\0*",
    b"BM",
]
ALLOWED = ((32, 32, 3), 413, 415, 422)  # the shape of pixels, or the status of an error


def decode_or_status(data: bytes) -> tuple[int, ...] | int:
    """Shape of the decoded image, or the status of its error."""
    try:
        return decode(data, SPEC, max_pixels=1_000_000).shape
    except ImageError as error:
        return error.status


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"\0" * 100,
        b"<svg xmlns='http://www.w3.org/2000/svg'><circle r='9'/></svg>",
        b"<html></html>",
        b"%PDF-1.7\n",
        zipped(),
        gzip.compress(bytes(1 << 20)),
        b"\0\0\0\x1cftypheic" + bytes(90),
        b"II+\0" + bytes(90),
        b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90),
        b"v/1\x01" + bytes(90),
        b"P6 2 2 255\n" + bytes(12),
        b"#?RADIANCE\n",
    ],
    ids=[
        "text",
        "zeros",
        "svg",
        "html",
        "pdf",
        "zip",
        "gzip",
        "heic",
        "bigtiff",
        "jpeg2000",
        "exr",
        "ppm",
        "hdr",
    ],
)
def test_other_formats_are_refused(data):
    with pytest.raises(UnsupportedFormat) as caught:
        decode(data, SPEC)
    assert caught.value.status == 415


def test_empty_data_is_undecodable():
    with pytest.raises(UndecodableImage, match="empty"):
        decode(b"", SPEC)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_image_is_an_error_and_not_a_gray_picture(name):
    data = FILES[name]
    cuts = {4, 9, 20, 30, len(data) // 4, len(data) // 2, len(data) * 9 // 10, len(data) - 12}
    for cut in sorted(cuts):
        with pytest.raises(ImageError) as caught:
            decode(data[:cut], SPEC)
        assert 400 <= caught.value.status < 500


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=12)
)
def test_damaged_bytes_give_pixels_or_an_image_error(name, flips):
    data = bytearray(FILES[name])
    for at, value in flips:
        data[at % len(data)] = value
    assert decode_or_status(bytes(data)) in ALLOWED


@settings(max_examples=200, deadline=None, derandomize=True)
@given(magic=st.sampled_from(MAGIC), rest=st.binary(max_size=400))
def test_noise_after_a_magic_number_gives_pixels_or_an_image_error(magic, rest):
    assert decode_or_status(magic + rest) in ALLOWED


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def zeros_png(width: int, height: int, depth: int = 8, samples: int = 1) -> bytes:
    """A valid PNG of zeros; 20,000 x 20,000 gray pixels are 400 MB in 400 KB."""
    colour_type = {1: 0, 3: 2, 4: 6}[samples]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    row = bytes(1 + width * samples * depth // 8)  # the first byte names the filter
    compressor = zlib.compressobj(1)
    parts = [compressor.compress(row) for _ in range(height)]
    parts.append(compressor.flush())
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", b"".join(parts))
        + png_chunk(b"IEND", b"")
    )


SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_START = SIGNATURE + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
PNG_END = png_chunk(b"IDAT", zlib.compress(bytes(2))) + png_chunk(b"IEND", b"")


def gif(codes: list[int], width: int, height: int, color_bits: int = 2, extensions=b"") -> bytes:
    """A GIF with these LZW codes and a palette of grays: color `i` is the gray `i`."""
    clear = 1 << color_bits
    palette = b"".join(bytes((i, i, i)) for i in range(clear))
    flags = 0x80 | (color_bits - 1)
    return b"".join(
        (
            b"GIF89a" + struct.pack("<HHBBB", width, height, flags, 0, 0) + palette,
            extensions,
            b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0),
            bytes([color_bits]) + gif_blocks(pack_codes(codes, clear)) + b"\0;",
        )
    )


def pack_codes(codes: list[int], clear: int) -> bytes:
    """Pack LZW codes; their width grows with the count of codes since the last reset."""
    parts: list[str] = []
    table_size = clear + 1
    for code in codes:
        width = min(12, table_size.bit_length())
        parts.append(f"{code:0{width}b}")
        table_size = clear + 1 if code in (clear, clear + 1) else table_size + 1
    bits = "".join(reversed(parts))  # the first code has the least significant bits
    return int(bits, 2).to_bytes((len(bits) + 7) // 8, "little")


def gif_blocks(data: bytes) -> bytes:
    blocks = [data[i : i + 255] for i in range(0, len(data), 255)]
    return b"".join(bytes([len(block)]) + block for block in blocks)


def tiff(*tags: tuple[int, int, int], rest: bytes = bytes(64), next_directory: int = 0) -> bytes:
    """A little-endian TIFF with these (tag, type, value), and `rest` after its directory.

    A value that is a tuple is (count, offset).
    """
    body = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    for tag, kind, value in tags:
        count, value = value if isinstance(value, tuple) else (1, value)
        body += struct.pack("<HHII", tag, kind, count, value)
    return body + struct.pack("<I", next_directory) + rest


def gray_tiff(width: int, height: int, rest: bytes = bytes(64), **more: int | tuple) -> bytes:
    names = {
        "offsets": 273,
        "rows": 278,
        "counts": 279,
        "tile_width": 322,
        "tile_height": 323,
        "samples": 277,
        "compression": 259,
        "bits": 258,
        "color_map": 320,
    }
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height, 279: 64}
    tags |= {names[name]: value for name, value in more.items()}
    entries = [(tag, 4, value) for tag, value in sorted(tags.items())]
    return tiff(*entries, rest=rest)


def many_strips_tiff(rows: int, width: int = 1) -> bytes:
    """A strip for each row, all at the same place of the file."""
    arrays = 8 + 2 + 12 * 9 + 4
    place = arrays + 8 * rows
    numbers = struct.pack("<I", place) * rows + struct.pack("<I", width) * rows
    return gray_tiff(
        width,
        rows,
        rows=1,
        offsets=(rows, arrays),
        counts=(rows, arrays + 4 * rows),
        rest=numbers + bytes(width),
    )


def deflate_with_empty_blocks(content: bytes, blocks: int) -> bytes:
    """A zlib stream of the content behind so many blocks of no data; they take 5 bytes each."""
    stream = zlib.compress(content)
    return stream[:2] + b"\0\0\0\xff\xff" * blocks + stream[2:]


def flushed_rows_png(rows: np.ndarray) -> bytes:
    """A PNG of gray rows [H, W]; the encoder ends a block after each."""
    compressor = zlib.compressobj(1)
    parts: list[bytes] = []
    for row in rows:
        parts.append(compressor.compress(b"\0" + row.tobytes()))
        parts.append(compressor.flush(zlib.Z_SYNC_FLUSH))
    parts.append(compressor.flush())
    return png_of_pixels(rows.shape[1], rows.shape[0], b"".join(parts))


def png_of_pixels(width: int, height: int, compressed: bytes) -> bytes:
    """A gray PNG of this compressed data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = png_chunk(b"IDAT", compressed)
    return SIGNATURE + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


def deflate_tiff(width: int, height: int, compressed: bytes) -> bytes:
    """A gray TIFF of one strip of this compressed data."""
    start = 8 + 2 + 12 * 9 + 4
    return gray_tiff(
        width, height, compressed, compression=8, offsets=start, counts=len(compressed)
    )


def with_size(kind: str, width: int, height: int) -> bytes:
    """A valid file whose header is changed to another size."""
    data = bytearray(FILES[kind])
    if kind == "jpeg":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif kind == "png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "gif":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "bmp":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "webp":
        data[26:30] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    return bytes(data)


BOMBS = {
    kind: with_size(kind, 16_000, 16_000) for kind in ("jpeg", "png", "gif", "bmp", "webp")
} | {"tiff": gray_tiff(60_000, 60_000), "bmp from the top": with_size("bmp", 60_000, -60_000)}


@pytest.mark.parametrize("name", BOMBS)
def test_too_many_pixels_are_refused_from_the_header(name):
    with pytest.raises(ImageTooLarge) as caught:
        decode(BOMBS[name], SPEC)
    assert caught.value.status == 413


HOSTILE = {
    "tiff with huge tiles": gray_tiff(64, 64, tile_width=1 << 20, tile_height=1 << 20),
    "tiff with one huge strip": gray_tiff(7000, 7000, rows=2**32 - 1),
    "tiff with 60000 samples": gray_tiff(8, 8, samples=60_000),
    "tiff with 32-bit samples": gray_tiff(8, 8, bits=32),
    "tiff with another codec inside": gray_tiff(8, 8, compression=34712),
    "tiff with two widths": tiff((256, 4, 8), (256, 4, 60_000), (257, 4, 8), (262, 4, 1)),
    "tiff with a directory nowhere": b"II*\0\xff\xff\xff\xff" + bytes(50),
    "jpeg with a size hidden by stuffing": b"\xff\xd8\xff\x00\x00\x10"
    + bytes(14)
    + FILES["jpeg"][2:],
    "jpeg with a segment of no length": b"\xff\xd8\xff\xe0\x00\x00" + FILES["jpeg"][2:],
    "jpeg of markers only": b"\xff\xd8" + b"\xff" * 100_000,
    "png that starts with another chunk": b"\x89PNG\r\n\x1a\n"
    + png_chunk(b"tEXt", b"a\0b")
    + FILES["png"][8:],
    "gif frame beyond its canvas": with_size("gif", 8, 8),
    "tiff with overlapping strips": many_strips_tiff(5000, width=100),
    "tiff with a million strips": many_strips_tiff(1_000_000),
    "tiff with large tiles for a narrow picture": gray_tiff(
        1, 1_000_000, tile_width=4096, tile_height=4096
    ),
    "tiff with tags that overlap": gray_tiff(8, 8, color_map=(300, 0)),
    "jpeg of a million segments": b"\xff\xd8" + b"\xff\xe0\0\2" * 1_000_000 + FILES["jpeg"][2:],
    "jpeg of a million fill bytes": b"\xff\xd8" + b"\xff" * 1_000_000 + FILES["jpeg"][3:],
    "png of a million chunks": PNG_START + png_chunk(b"tIME", b"") * 1_000_000 + PNG_END,
    "png of zero bits with a transparent gray": SIGNATURE
    + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 0, 0, 0, 0, 0))
    + png_chunk(b"tRNS", bytes(2))
    + PNG_END,
    "png with more data than pixels": PNG_START
    + png_chunk(b"IDAT", zlib.compress(bytes(2)) + bytes(100_000))
    + PNG_END,
    "png with an unknown chunk that is needed": PNG_START + png_chunk(b"NEED", b"") + PNG_END,
    "webp of many chunks": webp((b"VP8X", bytes(10)), *[(b"NONE", b"")] * 20_000),
    "gif of a million blocks": gif([4, 1], 1, 1, extensions=b"!\xfe" + b"\1a" * 1_000_000 + b"\0"),
    "gif of clear codes": gif([4] * 40_000, 8, 8),
    "gif of clear codes after many pixels": gif([256, *[1] * 6000, *[256] * 40_000], 100, 90, 8),
    "png of a million empty blocks": png_of_pixels(
        2000, 1500, deflate_with_empty_blocks(bytes(2001 * 1500), 1_000_000)
    ),
    "tiff of a million empty blocks": deflate_tiff(
        2000, 1500, deflate_with_empty_blocks(bytes(2000 * 1500), 1_000_000)
    ),
    "gif that ends again and again": gif([5] * 40_000, 8, 8),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_contradictory_files_are_refused(name):
    with pytest.raises(UndecodableImage):
        decode_full_size(HOSTILE[name], 3)


def test_a_progressive_jpeg_of_a_thousand_scans_is_refused():
    data = FILES["jpeg progressive"]
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    with pytest.raises(UndecodableImage, match="scans"):
        decode(data[:-2] + scan * 1000 + b"\xff\xd9", SPEC)


def test_fewer_scans_are_allowed_of_a_large_picture():
    """A scan of 49 million pixels takes 50 ms."""
    with pytest.raises(UndecodableImage, match="30 scans"):
        decode(jpeg_builder.green_jpeg([[i % 3] for i in range(30)], 7000, 0xC2), SPEC)
    decode(jpeg_builder.green_jpeg([[i % 3] for i in range(30)], 70, 0xC2), SPEC)


@pytest.mark.parametrize("frame", [0xC9, 0xCA])
def test_few_scans_are_allowed_of_a_large_picture_in_arithmetic_coding(frame):
    """A scan takes several times as long as in Huffman coding."""
    with pytest.raises(UndecodableImage, match="6 scans"):
        decode(jpeg_builder.green_jpeg([[i % 3] for i in range(6)], 7000, frame), SPEC)


def test_a_picture_of_too_much_avif_data_is_refused():
    """The decoder takes 0.15 s a megabyte."""
    data = bytearray(FILES["avif"] + bytes(13 << 20))
    length_position = data.index(b"iloc") + 22
    struct.pack_into(">I", data, length_position, 13 << 20)
    with pytest.raises(UndecodableImage, match="convert it to JPEG"):
        decode(bytes(data), SPEC)


@pytest.mark.parametrize("blocks_end", ["rows", "strips"])
def test_large_files_of_many_small_blocks_are_decoded(blocks_end):
    """Some encoders end a block after each row; a TIFF may have a strip for each."""
    pixels = np.random.default_rng(3).integers(0, 256, (4500, 1000), np.uint8)
    if blocks_end == "rows":
        data = flushed_rows_png(pixels)
    else:
        buffer = io.BytesIO()
        options = {"compression": "tiff_adobe_deflate", "strip_size": 1000}
        Image.fromarray(pixels).save(buffer, "TIFF", **options)
        data = buffer.getvalue()
    assert np.array_equal(decode_full_size(data, 1)[:, :, 0], pixels)


@pytest.mark.parametrize("frame", [0xC0, 0xC1, 0xC2, 0xC9, 0xCA])
def test_a_thousand_scans_are_refused_of_every_kind(frame):
    with pytest.raises(UndecodableImage, match="scans"):
        decode(jpeg_builder.green_jpeg([[i % 3] for i in range(1000)], 7000, frame), SPEC)


def test_a_second_frame_is_refused():
    data = jpeg_builder.green_jpeg([[0, 1, 2]])
    at = data.index(b"\xff\xc0")
    for more in (
        data[at : at + 19],
        data[at : at + 5] + struct.pack(">HH", 7000, 7000) + data[at + 9 : at + 19],
    ):
        with pytest.raises(UndecodableImage):
            decode(data[:at] + more + data[at:], SPEC)


NOISE = np.random.default_rng(2).integers(0, 256, (20, 30, 4), np.uint8)
TEXT = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(7_900_000), 9))
PROFILE = png_chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(3_000_000), 9))


def insert(data: bytes, at: int, more: bytes) -> bytes:
    return data[:at] + more + data[at:]


def encode(suffix: str, *options: int) -> bytes:
    return cv2.imencode(suffix, NOISE, options)[1].tobytes()


def frame_control(number: int) -> bytes:
    size = (NOISE.shape[1], NOISE.shape[0])
    return png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, *size, 0, 0, 1, 10, 0, 0))


PLAIN_PNG = encode(".png")
AFTER_HEADER = 8 + 25
BEFORE_END = len(PLAIN_PNG) - 12
PIXELS_AT = PLAIN_PNG.index(b"IDAT") - 4
ANIMATION = png_chunk(b"acTL", struct.pack(">II", 2, 0)) + frame_control(0)
BURDENED_PNG = {
    "text before the pixels": insert(PLAIN_PNG, AFTER_HEADER, TEXT * 40),
    "text behind the pixels": insert(PLAIN_PNG, BEFORE_END, TEXT * 40),
    "a colour profile": insert(PLAIN_PNG, AFTER_HEADER, PROFILE),
    "a broken colour profile": insert(PLAIN_PNG, AFTER_HEADER, png_chunk(b"iCCP", b"bad")),
    "invalid chunks": insert(PLAIN_PNG, AFTER_HEADER, png_chunk(b"tIME", b"") * 5000),
    "a large EXIF block": insert(PLAIN_PNG, AFTER_HEADER, png_chunk(b"eXIf", bytes(5_000_000))),
    "an animation": insert(PLAIN_PNG, PIXELS_AT, ANIMATION),
    "a broken animation": insert(
        insert(PLAIN_PNG, BEFORE_END, frame_control(1) + png_chunk(b"fdAT", bytes(9))),
        PIXELS_AT,
        ANIMATION,
    ),
}


@pytest.mark.parametrize("name", BURDENED_PNG)
def test_png_chunks_that_make_no_pixels_are_left_out(name, capfd):
    expected = decode_full_size(PLAIN_PNG, 3)
    assert np.array_equal(decode_full_size(BURDENED_PNG[name], 3), expected)
    assert capfd.readouterr() == ("", "")


PLAIN_WEBP = encode(".webp", cv2.IMWRITE_WEBP_QUALITY, 101)


@pytest.mark.parametrize(
    "extra", [[(b"ICCP", bytes(99))], [(b"XMP ", bytes(99))], [(b"NONE", b"")] * 2000]
)
def test_webp_chunks_that_make_no_pixels_are_left_out(extra):
    height, width, _ = NOISE.shape
    flags = struct.pack("<I", 0x10 | 0x20 | 0x04)
    sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    pixels = PLAIN_WEBP[PLAIN_WEBP.index(b"VP8L") + 8 :]
    data = webp((b"VP8X", flags + sizes), *extra, (b"VP8L", pixels), *extra)
    assert np.array_equal(decode_full_size(data, 3), decode_full_size(PLAIN_PNG, 3))


BURDENED_JPEG = {
    "comments": b"".join([jpeg_builder.segment(0xFE, bytes(60_000))] * 400),
    "exif": b"".join([jpeg_builder.segment(0xE1, b"Exif\0\0" + bytes(60_000))] * 400),
    "profile": b"".join(
        [
            jpeg_builder.segment(0xE2, b"ICC_PROFILE\0" + bytes((i, 255)) + bytes(60_000))
            for i in range(1, 256)
        ]
    ),
}


@pytest.mark.parametrize("name", BURDENED_JPEG)
def test_jpeg_segments_that_make_no_pixels_are_left_out(name, capfd):
    """libjpeg would keep those of profiles and EXIF in memory."""
    plain = save("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
    burdened = insert(plain, plain.index(b"\xff\xdb"), BURDENED_JPEG[name])
    expected = decode_full_size(plain, 3)
    assert np.array_equal(decode_full_size(burdened, 3), expected)
    assert expected.shape == (60, 40, 3)  # turned
    assert capfd.readouterr() == ("", "")

    small = sanitize(burdened, read_header(burdened))
    assert len(small) < len(plain) + 100


def test_only_the_first_directory_of_a_tiff_is_read():
    """A chain of 100,000 empty directories follows it."""
    plain = save("TIFF")
    chain = b"".join(struct.pack("<HI", 0, len(plain) + 6 * (i + 1)) for i in range(100_000))
    (directory,) = struct.unpack_from("<I", plain, 4)
    (tags,) = struct.unpack_from("<H", plain, directory)
    link = directory + 2 + 12 * tags
    data = plain[:link] + struct.pack("<I", len(plain)) + plain[link + 4 :] + chain
    assert np.array_equal(decode_full_size(data, 3), decode_full_size(plain, 3))


def test_a_gif_without_compression_is_decoded():
    """Encoders that avoid LZW reset the table before its codes grow."""
    pixels = np.random.default_rng(3).integers(0, 256, 200 * 150).tolist()
    codes: list[int] = []
    for i in range(0, len(pixels), 126):
        codes += [256, *pixels[i : i + 126]]
    decoded = decode_full_size(gif([*codes, 257], 200, 150, 8), 1)
    assert decoded.reshape(-1).tolist() == pixels


def test_a_gif_of_long_codes_is_decoded():
    """Codes of 12 bits without a reset, then a reset and codes of 3 bits."""
    pixels = [i % 4 for i in range(6000)]
    decoded = decode_full_size(gif([4, *pixels[:5000], 4, *pixels[5000:], 5], 100, 60), 1)
    assert decoded.reshape(-1).tolist() == pixels


BROKEN = {
    "png with a wrong checksum": PLAIN_PNG[:-20] + bytes(4) + PLAIN_PNG[-16:],
    "png that does not inflate": PNG_START
    + png_chunk(b"IDAT", b"\x78\x9c" + b"\xff" * 40)
    + PNG_END,
    "jpeg of noise": FILES["jpeg"][:700] + bytes(range(255)) + FILES["jpeg"][900:],
    "tiff of noise": FILES["tiff lzw"][:200] + bytes(100) + FILES["tiff lzw"][300:],
    "webp of noise": FILES["webp"][:200] + bytes(100) + FILES["webp"][300:],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_leave_nothing_on_stderr(name, capfd):
    decode_or_status(BROKEN[name])
    assert capfd.readouterr() == ("", "")


MEMORY = """
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from models.allocator import return_large_blocks
from models.image import ImageError, InputSpec, decode

return_large_blocks()  # as the workers of the server do

def decode_outcome(data):
    try:
        decode(data, InputSpec(height=32, width=32))
    except ImageError as error:
        return str(error.status)
    return "decoded"

def read_status(key):  # KiB of this process; getrusage includes its parent's before the fork
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1])

images, threads = pickle.load(sys.stdin.buffer)
with ThreadPoolExecutor(threads) as pool:
    for data in images:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is measured from here
        before = read_status("VmRSS")
        (outcome,) = set(pool.map(decode_outcome, [data] * threads))
        print(outcome, read_status("VmHWM") - before)
"""


def measure_peaks(images: list[bytes], threads: int = 1) -> list[tuple[str, float]]:
    """The outcome of decoding each image in a new process, and the MiB that it takes at its peak.

    Each is decoded on all threads at once. A small image comes first, for what is loaded lazily.
    """
    command = [sys.executable, "-c", MEMORY]
    given = pickle.dumps(([FILES["png"], *images], threads))
    output = subprocess.run(command, input=given, capture_output=True, check=True).stdout.decode()
    peaks = []
    for line in output.splitlines()[1:]:
        outcome, kib = line.split()
        peaks.append((outcome, int(kib) / 1024))
    return peaks


def test_refused_images_take_little_memory():
    images = {
        "8000 x 8000 zeros": zeros_png(8000, 8000),
        "a strip of 36 million": zeros_png(900_000, 40),
        **BOMBS,
        **HOSTILE,
    }
    for name, (outcome, mib) in zip(images, measure_peaks([*images.values()]), strict=True):
        assert mib < 200, (name, outcome, mib)


def test_text_of_a_png_is_not_inflated():
    """40 chunks of text take 330 MiB."""
    ((outcome, mib),) = measure_peaks([BURDENED_PNG["text before the pixels"]])
    assert outcome == "decoded"
    assert mib < 20


SIDE = 2000
FLAT = Image.new("RGB", (SIDE, SIDE), "red")


def encode_flat(kind: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    FLAT.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def encode_flat_avif(depth: int, channels: int) -> bytes:
    pixels = np.full((SIDE, SIDE, channels), 100, np.uint8 if depth == 8 else np.uint16)
    return cv2.imencode(".avif", pixels, [cv2.IMWRITE_AVIF_DEPTH, depth])[1].tobytes()


def partial_animation() -> bytes:
    """A WebP whose first frame, of one pixel, lies on a large canvas."""
    size = struct.pack("<I", SIDE - 1)[:3]
    pixel = cv2.imencode(".webp", NOISE[:1, :1], [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    frame = bytes(12) + b"\x64\0\0\0" + pixel[pixel.index(b"VP8L") :]
    return webp(
        (b"VP8X", b"\x12\0\0\0" + size + size),
        (b"ANIM", bytes(6)),
        (b"ANMF", frame),
        (b"ANMF", frame),
    )


NEXT = [Image.new("RGB", (SIDE, SIDE), "blue")]
ANIMATED = {"save_all": True, "append_images": NEXT}
PICTURES = {
    "png of colour and alpha": encode_flat("PNG", "RGBA"),
    "png of gray": encode_flat("PNG", "L"),
    "png of gray and alpha": encode_flat("PNG", "LA"),
    "png of 16 bits": zeros_png(SIDE, SIDE, 16, 4),
    "png of 16 bits gray": zeros_png(SIDE, SIDE, 16, 1),
    "png animated": encode_flat("PNG", "RGBA", **ANIMATED),
    "gif": encode_flat("GIF"),
    "gif animated": encode_flat("GIF", disposal=3, **ANIMATED),
    "webp": encode_flat("WEBP"),
    "webp of colour and alpha": encode_flat("WEBP", "RGBA", lossless=True),
    "webp animated": encode_flat("WEBP", lossless=True, **ANIMATED),
    "webp animated in a corner": partial_animation(),
    "avif": encode_flat("AVIF", subsampling="4:4:4"),
    "avif of colour and alpha": encode_flat("AVIF", "RGBA"),
    "avif of gray": encode_flat_avif(8, 1),
    "avif of 12 bits": encode_flat_avif(12, 4),
    "jpeg": encode_flat("JPEG"),
    "jpeg progressive": encode_flat("JPEG", progressive=True, subsampling=0),
    "jpeg of four colours in three scans": jpeg_builder.green_jpeg([[0], [1], [2, 3]], SIDE),
    "bmp": encode_flat("BMP"),
    "tiff in one strip": encode_flat("TIFF", strip_size=1 << 30),
    "tiff of gray in one strip": encode_flat("TIFF", "L", strip_size=1 << 30),
    "tiff of jpeg": encode_flat("TIFF", compression="jpeg"),
}


def test_decoding_takes_no_more_memory_than_the_header_says():
    peaks = measure_peaks([*PICTURES.values()])
    for (name, data), (outcome, mib) in zip(PICTURES.items(), peaks, strict=True):
        header = read_header(data)
        most_bytes = SIDE * SIDE * header.pixel_bytes + header.extra_bytes + len(data)
        assert outcome == "decoded", name
        assert mib < 4 + most_bytes / (1 << 20), name


@pytest.mark.parametrize("samples", [3, 4])
def test_fewer_pixels_are_allowed_at_16_bits_a_colour(samples):
    colour_type = {3: 2, 4: 6}[samples]
    size = struct.pack(">IIBBBBB", 7000, 7000, 16, colour_type, 0, 0, 0)
    with pytest.raises(ImageTooLarge, match="8 bits a colour"):
        decode(SIGNATURE + png_chunk(b"IHDR", size), SPEC)


def test_the_largest_allowed_picture_fits_into_a_small_container():
    """49 million pixels in at most 400 KB. OpenCV itself holds the picture twice for a moment."""
    pictures = [zeros_png(7000, 7000, samples=4), zeros_png(7000, 7000, depth=16)]
    for outcome, mib in measure_peaks(pictures):
        assert outcome == "decoded"
        assert mib < 450


SHARED = {
    "png": (12, zeros_png(2800, 2800, samples=4)),
    "jpeg of three scans": (3, jpeg_builder.green_jpeg([[0], [1], [2]], 6000)),
    "webp of 65,536 sets of code tables": (2, webp_builder.build_table_bomb()),
}


@pytest.mark.parametrize("name", SHARED)
def test_threads_share_a_bound_on_memory(name):
    """Each alone is allowed; together they would take 700 MiB or more."""
    threads, data = SHARED[name]
    ((outcome, mib),) = measure_peaks([data], threads)
    assert outcome == "decoded"
    assert mib < 450


def test_a_large_lossless_webp_is_refused_from_its_header():
    """Its code tables may take as much as its pixels."""
    data = bytearray(webp_builder.build_table_bomb())
    data[21:25] = struct.pack("<I", 6999 | 6999 << 14)
    with pytest.raises(ImageTooLarge):
        decode(bytes(data), SPEC)


def test_a_very_long_strip_is_decoded():
    assert decode(zeros_png(900_000, 1), SPEC).shape == (32, 32, 3)
