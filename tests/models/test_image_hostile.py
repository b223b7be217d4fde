"""Hostile and broken images: each raises an ImageError with a 4xx status, in bounded memory."""

import gzip
import io
import struct
import subprocess
import sys
import zipfile
import zlib

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
)
from support import jpeg_builder

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
        b"\0\0\0\x1cftypavif" + bytes(90),
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
        "avif",
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


def tiff(*tags: tuple[int, int, int]) -> bytes:
    """A little-endian TIFF with these (tag, type, value) and 64 bytes of pixels."""
    body = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    for tag, kind, value in tags:
        body += struct.pack("<HHII", tag, kind, 1, value)
    return body + bytes(4 + 64)


def gray_tiff(width: int, height: int, **more: int) -> bytes:
    names = {
        "rows": 278,
        "tile_width": 322,
        "tile_height": 323,
        "samples": 277,
        "compression": 259,
        "bits": 258,
    }
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height, 279: 64}
    tags |= {names[name]: value for name, value in more.items()}
    return tiff(*((tag, 4, value) for tag, value in sorted(tags.items())))


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


MEMORY = """
import sys
from concurrent.futures import ThreadPoolExecutor
from models.image import ImageError, InputSpec, decode

def outcome(data):
    try:
        decode(data, InputSpec(height=32, width=32))
    except ImageError as error:
        return error.status
    return "decoded"

def peak():  # of this process; getrusage includes its parent's before the fork
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1])

outcome(sys.stdin.buffer.read(int(sys.argv[1])))
before = peak()
data = sys.stdin.buffer.read()
threads = int(sys.argv[2])
with ThreadPoolExecutor(threads) as pool:
    (ended,) = set(pool.map(outcome, [data] * threads))
print(ended, peak() - before)
"""


def peak(data: bytes, threads: int = 1) -> tuple[str, float]:
    """Outcome, and MiB that decoding adds to the peak of a new process.

    The process decodes one small image first.
    """
    warm = FILES["png"]
    command = [sys.executable, "-c", MEMORY, str(len(warm)), str(threads)]
    out = subprocess.run(command, input=warm + data, capture_output=True, check=True)
    ended, kib = out.stdout.split()
    return ended.decode(), int(kib) / 1024


LARGE = {"20000 x 20000 zeros": (20_000, 20_000), "a strip of 36 million": (900_000, 40)}


@pytest.mark.parametrize("name", [*LARGE, *BOMBS, *HOSTILE])
def test_memory_stays_bounded(name):
    data = zeros_png(*LARGE[name]) if name in LARGE else (BOMBS | HOSTILE)[name]
    outcome, mib = peak(data)
    assert mib < 200, (outcome, mib)


DEEP = {
    "colour and alpha of 8 bits": (8, 4, "decoded"),
    "colour of 8 bits": (8, 3, "decoded"),
    "gray of 16 bits": (16, 1, "decoded"),
    "colour of 16 bits": (16, 3, "413"),
    "colour and alpha of 16 bits": (16, 4, "413"),
}


@pytest.mark.parametrize("name", DEEP)
def test_the_largest_allowed_picture_of_any_depth_fits_into_a_small_container(name):
    """49 million pixels in at most 400 KB. OpenCV itself holds the picture twice for a moment."""
    depth, samples, expected = DEEP[name]
    outcome, mib = peak(zeros_png(7000, 7000, depth, samples))
    assert outcome == expected
    assert mib < 450


@pytest.mark.parametrize(
    "data",
    [zeros_png(6000, 6000, samples=4), jpeg_builder.green_jpeg([[0], [1], [2]], 6000)],
    ids=["png", "jpeg of three scans"],
)
def test_large_pictures_are_decoded_one_at_a_time(data):
    """One of these takes up to 275 MiB."""
    outcome, mib = peak(data, threads=3)
    assert outcome == "decoded"
    assert mib < 450


def test_a_very_long_strip_is_decoded():
    assert decode(zeros_png(900_000, 1), SPEC).shape == (32, 32, 3)
