"""Decoding, against Pillow in every format and mode; resize policies; orientation."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from models.image import InputSpec, decode, decode_full_size, resize_to_input

H = 48
W = 80


def picture(channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth uint8 [H, W, channels]; corners and channels differ, so that swapped ones show."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 5, channels), np.uint8)
    return cv2.resize(low, (W, H), interpolation=cv2.INTER_CUBIC).reshape(H, W, channels)


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RGB = Image.fromarray(picture())
RGBA = Image.fromarray(np.dstack([picture(), picture(1, seed=7)]))
GRAY16 = Image.fromarray(picture(1)[:, :, 0].astype(np.uint16) * 257)
NEXT = Image.fromarray(picture(seed=3))


def decode_with_pillow(data: bytes, channels: int) -> np.ndarray:
    """Decode with Pillow: first frame, upright, over white, uint8 [H, W, channels]."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    out = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return out.reshape(*out.shape[:2], channels)


def encode_sixteen_bit(image: np.ndarray, suffix: str) -> bytes:
    """16-bit colour, which Pillow can't write; `image` in RGB or RGBA order."""
    code = cv2.COLOR_RGB2BGR if image.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
    return cv2.imencode(suffix, cv2.cvtColor(image, code).astype(np.uint16) * 257)[1].tobytes()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


LOSSLESS = {
    "png rgb": save(RGB, "PNG"),
    "png gray": save(RGB.convert("L"), "PNG"),
    "png gray alpha": save(RGBA.convert("LA"), "PNG"),
    "png gray transparent": save(RGB.convert("L"), "PNG", transparency=100),
    "png 1 bit": save(RGB.convert("1"), "PNG"),
    "png 1 bit transparent": save(RGB.convert("1"), "PNG", transparency=0),
    "png palette": save(RGB.quantize(16), "PNG"),
    "png palette alpha": save(RGB.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "png rgb transparent": save(RGB, "PNG", transparency=tuple(picture()[0, 0].tolist())),
    "png rgba": save(RGBA, "PNG"),
    "png gray 16": save(GRAY16, "PNG"),
    "png animated": save(RGB, "PNG", save_all=True, append_images=[NEXT]),
    "webp lossless": save(RGB, "WEBP", lossless=True),
    "webp alpha": save(RGBA, "WEBP", lossless=True, exact=True),
    "webp animated": save(RGB, "WEBP", lossless=True, save_all=True, append_images=[NEXT]),
    "gif": save(RGB.quantize(64), "GIF"),
    "gif transparent": save(RGB.quantize(64), "GIF", transparency=5),
    "gif animated": save(RGB.quantize(64), "GIF", save_all=True, append_images=[NEXT.quantize(64)]),
    "bmp rgb": save(RGB, "BMP"),
    "bmp gray": save(RGB.convert("L"), "BMP"),
    "bmp palette": save(RGB.quantize(16), "BMP"),
    "bmp 1 bit": save(RGB.convert("1"), "BMP"),
    "tiff rgb": save(RGB, "TIFF"),
    "tiff lzw": save(RGB, "TIFF", compression="tiff_lzw"),
    "tiff deflate": save(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "tiff packbits": save(RGB, "TIFF", compression="packbits"),
    "tiff gray": save(RGB.convert("L"), "TIFF"),
    "tiff 1 bit": save(RGB.convert("1"), "TIFF"),
    "tiff fax": save(RGB.convert("1"), "TIFF", compression="group4"),
    "tiff palette": save(RGB.quantize(16), "TIFF"),
    "tiff rgba": save(RGBA, "TIFF"),
    "tiff gray 16": save(GRAY16, "TIFF"),
    "tiff pages": save(RGB, "TIFF", save_all=True, append_images=[NEXT.resize((200, 100))]),
}
LOSSY = {
    "jpeg": save(RGB, "JPEG", quality=95),
    "jpeg progressive": save(RGB, "JPEG", quality=95, progressive=True),
    "jpeg 4:4:4": save(RGB, "JPEG", quality=95, subsampling=0),
    "jpeg gray": save(RGB.convert("L"), "JPEG", quality=95),
    "jpeg cmyk": save(RGB.convert("CMYK"), "JPEG", quality=95),
    "webp": save(RGB, "WEBP", quality=95),
    "tiff jpeg": save(RGB, "TIFF", compression="jpeg", quality=95),
    "tiff cmyk": save(RGB.convert("CMYK"), "TIFF"),
}
ROTATED = {}
for kind, options in {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
}.items():
    for orientation in range(1, 9):
        file = save(RGB, kind, exif=exif(orientation), **options)
        ROTATED[f"{kind} of orientation {orientation}"] = file


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", LOSSLESS | LOSSY | ROTATED)
def test_agrees_with_pillow(name, channels):
    data = (LOSSLESS | LOSSY | ROTATED)[name]
    expected = decode_with_pillow(data, channels)
    actual = decode_full_size(data, channels)
    assert actual.shape == expected.shape
    assert actual.dtype == np.uint8
    difference = np.abs(actual.astype(int) - expected)
    lossy = name in LOSSY or name.startswith("JPEG")
    assert difference.max() <= (24 if lossy else 3)
    assert difference.mean() <= (2.0 if lossy else 1.0)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("mode", [RGB, RGBA], ids=["rgb", "rgba"])
def test_sixteen_bit_colour_is_reduced_to_eight(suffix, mode):
    expected = decode_with_pillow(save(mode, "PNG"), 3)
    actual = decode_full_size(encode_sixteen_bit(np.asarray(mode), suffix), 3)
    assert largest_difference(actual, expected) <= 1


def largest_difference(actual: np.ndarray, expected: np.ndarray) -> int:
    return np.abs(actual.astype(int) - expected).max()


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "LA", "L"])
def test_a_picture_of_many_strips_agrees_with_pillow(mode):
    large = RGBA.resize((997, 811), Image.Resampling.BICUBIC).convert(mode)
    data = save(large, "PNG", exif=exif(6))
    for channels in (3, 1):
        actual = decode_full_size(data, channels)
        assert largest_difference(actual, decode_with_pillow(data, channels)) <= 1
    if mode.startswith("RGB"):
        actual = decode_full_size(encode_sixteen_bit(np.asarray(large), ".png"), 3)
        assert largest_difference(actual, decode_with_pillow(save(large, "PNG"), 3)) <= 1


def test_transparent_pixels_are_laid_over_white():
    clear = Image.new("RGBA", (9, 7), (10, 200, 30, 0))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert (decode_full_size(save(clear, kind, **options), 3) == 255).all(), kind


def test_bmp_rows_from_the_top_and_os2_header():
    data = bytearray(save(RGB, "BMP"))
    data[22:26] = (-H).to_bytes(4, "little", signed=True)
    assert np.array_equal(decode_full_size(bytes(data), 3), np.asarray(RGB)[::-1])
    rows = np.asarray(RGB)[::-1, :, ::-1].tobytes()  # 80 * 3 bytes a row need no padding
    os2 = (
        b"BM"
        + (26 + len(rows)).to_bytes(4, "little")
        + bytes(4)
        + (26).to_bytes(4, "little")
        + (12).to_bytes(4, "little")
        + W.to_bytes(2, "little")
        + H.to_bytes(2, "little")
        + b"\1\0\x18\0"
        + rows
    )
    assert np.array_equal(decode_full_size(os2, 3), np.asarray(RGB))


def test_bmp_run_lengths():
    """RLE8: a count and a palette index, rows end with 0 0, the picture with 0 1."""
    palette = b"".join(bytes((i, 255 - i, i // 2, 0)) for i in range(256))
    body = b"".join(bytes((W, 3 * y, 0, 0)) for y in range(H)) + b"\0\1"
    head = (
        b"BM"
        + (1078 + len(body)).to_bytes(4, "little")
        + bytes(4)
        + (1078).to_bytes(4, "little")
        + (40).to_bytes(4, "little")
        + W.to_bytes(4, "little")
        + H.to_bytes(4, "little")
        + b"\1\0\x08\0"
        + (1).to_bytes(4, "little")
        + len(body).to_bytes(4, "little")
        + bytes(8)
        + (256).to_bytes(4, "little") * 2
    )
    data = head + palette + body
    assert np.array_equal(decode_full_size(data, 3), decode_with_pillow(data, 3))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("side", [900, 1800, 3600])
def test_a_jpeg_decoded_at_a_fraction_agrees_with_the_full_size(side, orientation):
    large = RGB.resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
    data = save(large, "JPEG", quality=92, exif=exif(orientation))
    spec = InputSpec(height=224, width=224, short_side=256)
    reduced = decode(data, spec)
    from_full_size = resize_to_input(decode_full_size(data, 3), spec)
    assert np.abs(reduced.astype(int) - from_full_size).mean() < 2


@pytest.mark.parametrize("policy", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (32, 32), (31, 500), (97, 64)])
def test_every_shape_is_resized(policy, size):
    for channels in (1, 3):
        spec = InputSpec(height=32, width=48, channels=channels, resize=policy)
        out = resize_to_input(np.full((*size, channels), 200, np.uint8), spec)
        assert out.shape == (32, 48, channels)
        assert out.flags.c_contiguous
        assert (out == 200).mean() > 0.001
        assert policy == "pad" or (out == 200).all()


def test_crop_keeps_the_centre_and_pad_the_whole():
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 100:200] = 255
    assert (resize_to_input(image, InputSpec(height=50, width=50)) == 255).all()
    padded = resize_to_input(image, InputSpec(height=60, width=60, resize="pad"))
    assert (padded[:20] == 0).all()
    assert (padded[40:] == 0).all()
    assert (padded[25:35, 25:35] == 255).all()
    assert (padded[25:35, 5:15] == 0).all()
    stretched = resize_to_input(image, InputSpec(height=60, width=60, resize="stretch"))
    assert (stretched[:, 25:35] == 255).all()
    assert (stretched[:, :15] == 0).all()


def test_a_short_side_larger_than_the_size_cuts_the_border():
    image = np.zeros((256, 256, 1), np.uint8)
    image[16:240, 16:240] = 255
    spec = InputSpec(height=224, width=224, channels=1, short_side=256)
    assert (resize_to_input(image, spec) == 255).all()


def linear_kernel(distance: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - distance)


def cubic_kernel(distance: np.ndarray) -> np.ndarray:
    """Keys, 1981, with the -0.75 of OpenCV and PyTorch."""
    a = -0.75
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


@pytest.mark.parametrize("policy", ["crop", "stretch", "pad"])
@pytest.mark.parametrize(
    ("interpolation", "kernel"), [("linear", linear_kernel), ("cubic", cubic_kernel)]
)
def test_pixels_are_interpolated_as_the_spec_says(policy, interpolation, kernel):
    row = np.random.default_rng(0).integers(60, 200, 8).astype(np.uint8)
    image = np.tile(row[None, :, None], (8, 1, 1))
    spec = InputSpec(height=16, width=16, channels=1, resize=policy, interpolation=interpolation)
    position = (np.arange(16) + 0.5) / 2 - 0.5
    neighbours = np.floor(position)[:, None] + np.arange(-1, 3)
    weights = kernel(np.abs(position[:, None] - neighbours))
    values = row[np.clip(neighbours, 0, 7).astype(int)]
    expected = (weights * values).sum(1).clip(0, 255)

    out = resize_to_input(image, spec)[:, :, 0]
    assert np.abs(out - expected).max() <= 1


def test_pixels_of_the_input_size_are_unchanged():
    spec = InputSpec(height=H, width=W)
    assert np.array_equal(decode(LOSSLESS["png rgb"], spec), np.asarray(RGB))
