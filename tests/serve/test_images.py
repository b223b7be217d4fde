"""Images of all formats, valid and broken: each gets its prediction or its 4xx."""

import io
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image

from support import jpeg_builder, tiny_bundle

SIDE = 40


def rgb(label: str) -> Image.Image:
    return Image.open(io.BytesIO(tiny_bundle.make_image(label, SIDE)))


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_transparent(label: str) -> Image.Image:
    """The upper half has the colour of the label. The lower half is red, but transparent."""
    over = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0))
    over.paste(rgb(label).convert("RGBA").crop((0, 0, SIDE, SIDE // 2)), (0, 0))
    return over


def turned(label: str, kind: str) -> bytes:
    """An image on its side, with the EXIF tag that says so.

    The centre crop has the colour of the label only in the upright image.
    """
    tall = Image.new("RGB", (SIDE, 3 * SIDE), "red")
    tall.paste(rgb(label), (0, SIDE))
    tags = Image.Exif()
    tags[0x112] = 6
    return save(tall.rotate(90, expand=True), kind, exif=tags)


def deep(label: str, suffix: str) -> bytes:
    pixels = np.asarray(rgb(label))[:, :, ::-1].astype(np.uint16) * 257
    return cv2.imencode(suffix, pixels)[1].tobytes()


GOOD = {
    "jpeg": save(rgb("green"), "JPEG"),
    "jpeg progressive": save(rgb("green"), "JPEG", progressive=True),
    "jpeg cmyk": save(rgb("green").convert("CMYK"), "JPEG"),
    "jpeg turned": turned("green", "JPEG"),
    "jpeg of three scans": jpeg_builder.green_jpeg([[0], [1], [2]]),
    "png": save(rgb("green"), "PNG"),
    "png palette": save(rgb("green").quantize(16), "PNG"),
    "png alpha": save(make_transparent("green"), "PNG"),
    "png 16": deep("green", ".png"),
    "png turned": turned("green", "PNG"),
    "webp": save(rgb("green"), "WEBP"),
    "webp alpha": save(make_transparent("green"), "WEBP"),
    "webp animated": save(rgb("green"), "WEBP", save_all=True, append_images=[rgb("red")] * 3),
    "gif animated": save(rgb("green"), "GIF", save_all=True, append_images=[rgb("red")] * 3),
    "bmp": save(rgb("green"), "BMP"),
    "tiff": save(rgb("green"), "TIFF"),
    "tiff lzw": save(rgb("green"), "TIFF", compression="tiff_lzw"),
    "tiff 16": deep("green", ".tiff"),
    "tiff cmyk": save(rgb("green").convert("CMYK"), "TIFF"),
    "tiff pages": save(rgb("green"), "TIFF", save_all=True, append_images=[rgb("red")]),
}
GRAY = {
    "png gray": save(rgb("blue").convert("L"), "PNG"),
    "jpeg gray": save(rgb("blue").convert("L"), "JPEG"),
    "png 1 bit": save(rgb("blue").convert("1"), "PNG"),
    "png gray 16": save(Image.fromarray(np.full((SIDE, SIDE), 30000, np.uint16)), "PNG"),
}


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10 << 20))
    return buffer.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A small PNG whose header states another size, with a right checksum."""
    data = bytearray(GOOD["png"])
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


BAD = {
    "empty": (b"", 400),
    "text": (b"hello", 415),
    "zip bomb": (zipped(), 415),
    "pdf": (b"%PDF-1.7 ...", 415),
    "svg": (
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        415,
    ),
    "avif": (b"\0\0\0\x1cftypavif" + bytes(64), 415),
    "jpeg cut short": (GOOD["jpeg"][: len(GOOD["jpeg"]) // 2], 422),
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
    "png bomb": (png_of(100_000, 100_000), 413),
    "png that lies": (png_of(2000, 2000), 422),
    "png of no size": (png_of(0, 7), 422),
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
    assert [choice["confidence"] for choice in prediction["top"]] == pytest.approx(
        [1 / 3] * 3, abs=0.01
    )


@pytest.mark.parametrize("name", BAD)
def test_broken_image_gets_its_4xx(server, name):
    data, status = BAD[name]
    answer = server.predict(data)
    assert answer.status_code == status
    detail = answer.json()["detail"]
    assert detail
    assert "/" not in detail.replace("image/", "").replace("form-data", "").replace(
        "multipart/", ""
    ), "no paths"


def test_broken_images_do_not_affect_others_of_their_batch(server):
    """Valid and broken images are sent at once, so that batches mix them."""
    jobs = [(GOOD["jpeg"], 200), *BAD.values()] * 12
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: server.predict(job[0]), jobs))
    for answer, (_, status) in zip(answers, jobs, strict=True):
        assert answer.status_code == status
        assert status != 200 or answer.json()["predictions"][0]["label"] == "green"
    assert server.is_ready()


def test_one_request_with_all_images(server):
    files = [("f", (name, data)) for name, data in GOOD.items()]
    files += [("f", (name, data)) for name, (data, _) in BAD.items() if data]
    predictions = server.http.post("/predict", files=files).json()["predictions"]
    statuses = [p["error"]["status"] if "error" in p else p["label"] for p in predictions]
    assert statuses == ["green"] * len(GOOD) + [status for data, status in BAD.values() if data]
