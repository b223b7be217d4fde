"""Images of all formats, valid and broken: each gets its prediction or its 4xx."""

import io
import re
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from support import jpeg_builder, tiny_bundle

SIDE = 40  # pixels
ORIENTATION_TAG = 0x112  # of EXIF
ROTATE_RIGHT = 6  # its value for an image that must be rotated by 90 degrees to be upright


def make_rgb(label: str) -> Image.Image:
    return Image.open(io.BytesIO(tiny_bundle.make_image(label, SIDE)))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the image as a file of this format; `options` are those of Image.save."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_transparent(label: str) -> Image.Image:
    """The upper half has the colour of the label. The lower half is red, but transparent."""
    image = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0))
    upper_half = make_rgb(label).convert("RGBA").crop((0, 0, SIDE, SIDE // 2))
    image.paste(upper_half, (0, 0))
    return image


def make_rotated_file(label: str, kind: str) -> bytes:
    """An image that is rotated by 90 degrees, with the EXIF tag that says so.

    The centre crop has the colour of the label only in the upright image.
    """
    upright = Image.new("RGB", (SIDE, 3 * SIDE), "red")
    upright.paste(make_rgb(label), (0, SIDE))
    tags = Image.Exif()
    tags[ORIENTATION_TAG] = ROTATE_RIGHT
    return encode(upright.rotate(90, expand=True), kind, exif=tags)


def make_16_bit_file(label: str, suffix: str) -> bytes:
    pixels = np.asarray(make_rgb(label))[:, :, ::-1].astype(np.uint16) * 257
    return cv2.imencode(suffix, pixels)[1].tobytes()


GOOD = {
    "jpeg": encode(make_rgb("green"), "JPEG"),
    "jpeg progressive": encode(make_rgb("green"), "JPEG", progressive=True),
    "jpeg cmyk": encode(make_rgb("green").convert("CMYK"), "JPEG"),
    "jpeg rotated": make_rotated_file("green", "JPEG"),
    "jpeg of three scans": jpeg_builder.green_jpeg([[0], [1], [2]]),
    "png": encode(make_rgb("green"), "PNG"),
    "png palette": encode(make_rgb("green").quantize(16), "PNG"),
    "png alpha": encode(make_transparent("green"), "PNG"),
    "png 16": make_16_bit_file("green", ".png"),
    "png rotated": make_rotated_file("green", "PNG"),
    "webp": encode(make_rgb("green"), "WEBP"),
    "webp alpha": encode(make_transparent("green"), "WEBP"),
    "webp animated": encode(
        make_rgb("green"), "WEBP", save_all=True, append_images=[make_rgb("red")] * 3
    ),
    "avif": encode(make_rgb("green"), "AVIF"),
    "avif alpha": encode(make_transparent("green"), "AVIF"),
    "avif rotated": make_rotated_file("green", "AVIF"),
    "gif animated": encode(
        make_rgb("green"), "GIF", save_all=True, append_images=[make_rgb("red")] * 3
    ),
    "bmp": encode(make_rgb("green"), "BMP"),
    "tiff": encode(make_rgb("green"), "TIFF"),
    "tiff lzw": encode(make_rgb("green"), "TIFF", compression="tiff_lzw"),
    "tiff 16": make_16_bit_file("green", ".tiff"),
    "tiff cmyk": encode(make_rgb("green").convert("CMYK"), "TIFF"),
    "tiff pages": encode(make_rgb("green"), "TIFF", save_all=True, append_images=[make_rgb("red")]),
}
GRAY = {
    "png gray": encode(make_rgb("blue").convert("L"), "PNG"),
    "jpeg gray": encode(make_rgb("blue").convert("L"), "JPEG"),
    "png 1 bit": encode(make_rgb("blue").convert("1"), "PNG"),
    "png gray 16": encode(Image.fromarray(np.full((SIDE, SIDE), 30000, np.uint16)), "PNG"),
}


def make_zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10 << 20))
    return buffer.getvalue()


def make_photo() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return encode(Image.fromarray(noise), "JPEG")


PHOTO = make_photo()


def make_png_with_size(width: int, height: int) -> bytes:
    """A small PNG whose header states another size, with a valid checksum."""
    data = bytearray(GOOD["png"])
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


BAD = {
    "empty": (b"", 400),
    "text": (b"hello", 415),
    "zip bomb": (make_zip_bomb(), 415),
    "pdf": (b"%PDF-1.7 ...", 415),
    "svg": (
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        415,
    ),
    "avif without boxes": (b"\0\0\0\x1cftypavif" + bytes(64), 422),
    "avif cut short": (GOOD["avif"][:-100], 422),
    "heic": (b"\0\0\0\x24ftypheic" + bytes(64), 415),
    "jpeg cut short": (GOOD["jpeg"][: len(GOOD["jpeg"]) // 2], 422),
    "jpeg cut short, with an end marker": (PHOTO[: len(PHOTO) * 2 // 3] + b"\xff\xd9", 422),
    "jpeg start only": (b"\xff\xd8\xff\xe0", 422),
    "jpeg of a thousand scans": (
        jpeg_builder.green_jpeg([[i % 3] for i in range(1000)], 7000),
        422,
    ),
    "png cut short": (GOOD["png"][:-200], 422),
    "webp cut short": (GOOD["webp"][:-20], 422),
    "gif cut short": (GOOD["gif animated"][:60], 422),
    "bmp cut short": (GOOD["bmp"][:-500], 422),
    "tiff cut short": (GOOD["tiff"][:-2000], 422),
    "png bomb": (make_png_with_size(100_000, 100_000), 413),
    "png with a wrong size": (make_png_with_size(2000, 2000), 422),
    "png without width": (make_png_with_size(0, 7), 422),
}


@pytest.mark.parametrize("name", GOOD)
def test_image_of_each_format_is_classified(server, name):
    answer = server.predict(GOOD[name])
    assert answer.status_code == 200, answer.text
    (prediction,) = answer.json()["predictions"]
    assert prediction["label"] == "green"
    assert prediction["confidence"] > 0.6


@pytest.mark.parametrize("name", GRAY)
def test_gray_image_has_equal_probabilities(server, name):
    (prediction,) = server.predict(GRAY[name]).json()["predictions"]
    confidences = [choice["confidence"] for choice in prediction["top"]]
    assert confidences == pytest.approx([1 / 3] * 3, abs=0.01)


@pytest.mark.parametrize("name", BAD)
def test_broken_image_gets_its_4xx(server, name):
    data, status = BAD[name]
    answer = server.predict(data)
    assert answer.status_code == status
    detail = answer.json()["detail"]
    assert detail
    assert "/" not in re.sub("(image|multipart)/", "", detail), "the detail contains a path"


def test_broken_images_do_not_affect_others_of_their_batch(server):
    """Valid and broken images are sent at once, so that batches mix them."""
    jobs = [(GOOD["jpeg"], 200), *BAD.values()] * 12
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: server.predict(job[0]), jobs))
    for answer, (_, status) in zip(answers, jobs, strict=True):
        assert answer.status_code == status
        if status == 200:
            assert answer.json()["predictions"][0]["label"] == "green"
    assert server.is_ready()


def test_one_request_with_all_images(server):
    files: list[tuple[str, tuple[str, bytes]]] = []
    expected: list[str | int] = []
    for name, data in GOOD.items():
        files.append(("f", (name, data)))
        expected.append("green")
    for name, (data, status) in BAD.items():
        if data:
            files.append(("f", (name, data)))
            expected.append(status)

    outcomes: list[str | int] = []
    for prediction in server.http.post("/predict", files=files).json()["predictions"]:
        is_error = "error" in prediction
        outcomes.append(prediction["error"]["status"] if is_error else prediction["label"])
    assert outcomes == expected
