"""Kinds of valid files that are easily read wrongly, and damaged ones that look complete."""

import dataclasses
import io
import itertools
import re
import struct

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from models.image import (
    ImageTooLarge,
    InputSpec,
    UndecodableImage,
    UnsupportedFormat,
    decode,
    decode_full_size,
    read_header,
    read_largest_sample,
)
from models.image.avif import build_avif
from support import image_mutations, jpeg_builder, webp_builder
from support.tiff_builder import DEFLATE, Page, build_tiff

H = 48
W = 80


def draw(channels: int, height: int = H, width: int = W, seed: int = 0) -> np.ndarray:
    """Smooth uint8 [H, W, channels]."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 5, channels), np.uint8)
    image = cv2.resize(low, (width, height), interpolation=cv2.INTER_CUBIC)
    return image.reshape(height, width, channels)


COLOUR = draw(3)
GRAY = draw(1, seed=1)
ALPHA = draw(1, seed=2)
GRAY_ALPHA = np.dstack([GRAY, ALPHA])
RGBA = np.dstack([COLOUR, ALPHA])


def to_sixteen_bits(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.uint16) * 257


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def largest_difference(data: bytes, expected: np.ndarray, channels: int = 3) -> int:
    actual = decode_full_size(data, channels)
    return int(np.abs(actual.astype(int) - expected).max())


# ---------------------------------------------------------------------------------------------
# TIFF

STRAIGHT = {338: 2}
PREMULTIPLIED = {338: 1}
UNSPECIFIED = {338: 0}
WHITE_IS_ZERO = {262: 0}
COMPRESSED = {259: DEFLATE, 317: 2}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(
    ("pixels", "tags"),
    [
        (GRAY_ALPHA, STRAIGHT),
        (GRAY_ALPHA, STRAIGHT | COMPRESSED),
        (GRAY_ALPHA, STRAIGHT | {274: 6}),
        (RGBA, STRAIGHT),
        (RGBA, {}),
        (RGBA, STRAIGHT | COMPRESSED),
    ],
    ids=["gray", "gray compressed", "gray turned", "rgb", "rgb untagged", "rgb compressed"],
)
def test_alpha_of_a_tiff_is_that_of_the_same_png(pixels, tags, depth, order, channels):
    stored = pixels if depth == 8 else to_sixteen_bits(pixels)
    tiff = build_tiff(Page(stored, tags), order=order)
    exif = Image.Exif()
    exif[274] = tags.get(274, 1)
    expected = decode_full_size(save(Image.fromarray(pixels), "PNG", exif=exif), channels)
    assert largest_difference(tiff, expected, channels) <= 1


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [COLOUR, GRAY], ids=["rgb", "gray"])
def test_a_band_of_unknown_meaning_is_not_alpha(colour, depth):
    pixels = np.dstack([colour, ALPHA])
    stored = pixels if depth == 8 else to_sixteen_bits(pixels)
    expected = np.broadcast_to(colour, COLOUR.shape)
    assert largest_difference(build_tiff(Page(stored, UNSPECIFIED)), expected) <= 1


@pytest.mark.parametrize("colour", [COLOUR, GRAY], ids=["rgb", "gray"])
def test_premultiplied_alpha_of_a_tiff(colour):
    multiplied = (colour.astype(int) * ALPHA // 255).astype(np.uint8)
    data = build_tiff(Page(np.dstack([multiplied, ALPHA]), PREMULTIPLIED))
    expected = np.broadcast_to(multiplied.astype(int) + 255 - ALPHA, COLOUR.shape)
    assert largest_difference(data, expected) <= 1


@pytest.mark.parametrize("depth", [8, 16])
def test_white_is_zero_with_alpha(depth):
    stored = GRAY_ALPHA if depth == 8 else to_sixteen_bits(GRAY_ALPHA)
    inverted = stored.copy()
    inverted[:, :, 0] = ~inverted[:, :, 0]
    expected = decode_full_size(build_tiff(Page(stored, STRAIGHT)), 3)
    actual = build_tiff(Page(inverted, STRAIGHT | WHITE_IS_ZERO))
    assert largest_difference(actual, expected) <= 1


THUMBNAIL = draw(3, H // 8, W // 8, seed=3)
BLUE = np.zeros((H, W, 3), np.uint8)


@pytest.mark.parametrize(
    "pages",
    [
        [Page(THUMBNAIL, {254: 1}), Page(COLOUR)],
        [Page(THUMBNAIL, {255: 2}), Page(COLOUR)],
        [Page(THUMBNAIL), Page(COLOUR)],
        [Page(THUMBNAIL, {254: 1}, inner=[Page(COLOUR)])],
        [Page(GRAY[:, :, 0], {254: 4}), Page(COLOUR)],
        [Page(COLOUR), Page(THUMBNAIL, {254: 1})],
        [Page(COLOUR), Page(BLUE)],
        [Page(COLOUR), Page(GRAY[:, :, 0])],
        [Page(COLOUR, {254: 1})],
    ],
    ids=[
        "thumbnail first",
        "thumbnail of old kind first",
        "thumbnail without tag first",
        "picture inside the thumbnail",
        "mask first",
        "thumbnail behind",
        "two pictures",
        "gray behind",
        "only a thumbnail",
    ],
)
def test_the_picture_of_a_tiff_of_several_pages_is_read(pages):
    assert largest_difference(build_tiff(*pages), COLOUR) == 0


@pytest.mark.parametrize("depth", [8, 16])
def test_a_tiff_of_several_channels_is_refused(depth):
    gray = GRAY[:, :, 0] if depth == 8 else to_sixteen_bits(GRAY[:, :, 0])
    with pytest.raises(UndecodableImage, match="3 gray pages"):
        decode_full_size(build_tiff(Page(gray), Page(gray), Page(gray)), 3)


def test_pages_that_form_a_circle_end():
    data = bytearray(build_tiff(Page(COLOUR), Page(BLUE)))
    first = data[4:8]
    data[-4:] = first
    assert largest_difference(bytes(data), COLOUR) == 0


@pytest.mark.parametrize(
    ("page", "cause"),
    [
        (Page(to_sixteen_bits(COLOUR), {284: 2}), "separate planes"),
        (Page(GRAY_ALPHA, STRAIGHT | {284: 2}), "separate planes"),
        (Page(to_sixteen_bits(GRAY[:, :, 0]), WHITE_IS_ZERO), "photometric interpretation 0"),
        (Page(to_sixteen_bits(GRAY[:, :, 0]), {262: 32803}), "camera's sensor"),
        (Page(to_sixteen_bits(GRAY[:, :, 0]), {339: 3}), "floating-point"),
        (Page(GRAY[:, :, 0], {258: 12}), "12 bits"),
        (Page(GRAY[:, :, 0], {259: 50000}), "compression 50000"),
        (Page(np.dstack([RGBA, ALPHA])), "5 samples"),
        (Page(RGBA, {262: 1}), "4 samples"),
    ],
)
def test_an_unsupported_tiff_is_refused_with_the_cause(page, cause):
    with pytest.raises(UndecodableImage, match=cause):
        decode_full_size(build_tiff(page), 3)


# ---------------------------------------------------------------------------------------------
# 16 bits a sample


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_significant_bits_become_the_whole_range(suffix, channels, bits):
    pixels = (draw(channels).astype(np.uint16) << 8 >> 16 - bits).squeeze()
    data = cv2.imencode(suffix, pixels)[1].tobytes()
    spec = InputSpec(height=H, width=W, channels=channels, significant_bits=bits)
    expected = pixels.reshape(H, W, channels)[:, :, ::-1] * 255.0 / (2**bits - 1)
    assert np.abs(decode(data, spec) - expected).max() <= 0.51
    assert read_largest_sample(data) == pixels.max()


def test_samples_above_the_significant_bits_are_white():
    data = cv2.imencode(".png", np.full((H, W), 5000, np.uint16))[1].tobytes()
    assert (decode_full_size(data, 1, significant_bits=12) == 255).all()
    assert read_largest_sample(save(Image.fromarray(COLOUR), "PNG")) is None


# ---------------------------------------------------------------------------------------------
# Orientation

TEXT = 2


def exif_with_bad_tag(order: str, orientation: int) -> bytes:
    """An EXIF block whose maker (text) points outside, before an orientation."""
    mark = b"II" if order == "<" else b"MM"
    return (
        struct.pack(order + "2sHIH", mark, 42, 8, 2)
        + struct.pack(order + "HHII", 271, TEXT, 50, 0xFFFF)
        + struct.pack(order + "HHIHH", 274, 3, 1, orientation, 0)
        + bytes(4)
    )


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_bad_exif_tag_does_not_hide_the_orientation(kind, order):
    image = Image.fromarray(COLOUR)
    plain = decode_full_size(save(image, kind, quality=95), 3)
    block = b"Exif\0\0" + exif_with_bad_tag(order, 6)
    turned = decode_full_size(save(image, kind, quality=95, exif=block), 3)
    assert np.array_equal(turned, np.rot90(plain, -1))


@pytest.mark.parametrize("length", [0, 5, 9, 20, 26])
def test_a_cut_exif_block_turns_nothing(length):
    block = b"Exif\0\0" + exif_with_bad_tag("<", 6)[:length]
    data = save(Image.fromarray(COLOUR), "JPEG", exif=block)
    assert decode_full_size(data, 3).shape == (H, W, 3)


# ---------------------------------------------------------------------------------------------
# JPEG files that lack pixels, or hold more than one picture

PHOTO = Image.fromarray(
    cv2.add(draw(3, 240, 320), np.random.default_rng(4).integers(0, 40, (240, 320, 3), np.uint8))
)
SCAN = b"\xff\xda"
END = b"\xff\xd9"
JPEGS = {
    "baseline": save(PHOTO, "JPEG"),
    "4:4:4": save(PHOTO, "JPEG", subsampling=0, quality=95),
    "gray": save(PHOTO.convert("L"), "JPEG"),
    "cmyk": save(PHOTO.convert("CMYK"), "JPEG"),
    "progressive": save(PHOTO, "JPEG", progressive=True),
    "restarts": save(PHOTO, "JPEG", restart_marker_blocks=7),
    "progressive restarts": save(PHOTO, "JPEG", progressive=True, restart_marker_rows=1),
}
BASELINE = ["baseline", "4:4:4", "gray", "cmyk", "restarts"]
SPECS = [InputSpec(height=32, width=32), InputSpec(height=240, width=320, channels=1)]


def cut(data: bytes, share: float) -> bytes:
    """The first part of the pixels, without an end marker."""
    start = data.index(SCAN)
    return data[: start + int((len(data) - start) * share)].removesuffix(b"\xff")


def assert_incomplete(data: bytes) -> None:
    for spec in SPECS:
        with pytest.raises(UndecodableImage, match="cut short"):
            decode(data, spec)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", BASELINE)
def test_a_part_of_a_jpeg_with_an_end_marker_is_refused(name, share):
    assert_incomplete(cut(JPEGS[name], share) + END)


def test_a_part_of_a_progressive_jpeg_with_an_end_marker_is_refused():
    """Only the last scan may be incomplete: it holds the finest detail."""
    data = JPEGS["progressive"]
    scans = [match.start() for match in re.finditer(SCAN, data)]
    for start, end in itertools.pairwise(scans):
        with pytest.raises(UndecodableImage):
            decode(data[: (start + end) // 2].removesuffix(b"\xff") + END, SPECS[0])


def test_a_jpeg_that_ends_at_a_restart_marker_is_refused():
    data = JPEGS["restarts"]
    position = data.index(b"\xff\xd3", len(data) // 2)
    assert_incomplete(data[:position] + END)
    assert_incomplete(data[: position + 2] + END)


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_without_end_marker(name):
    data = JPEGS[name].removesuffix(END)
    assert np.array_equal(decode_full_size(data, 3), decode_full_size(JPEGS[name], 3))
    assert_incomplete(cut(data, 0.5))
    assert_incomplete(cut(data, 0.9))


@pytest.mark.parametrize("name", BASELINE)
def test_random_bytes_in_the_middle_of_a_jpeg(name):
    data = bytearray(JPEGS[name])
    middle = (data.index(SCAN) + len(data)) // 2
    noise = np.random.default_rng(5).integers(0, 256, 1000, np.uint8).tobytes()
    data[middle : middle + len(noise)] = noise
    with pytest.raises(UndecodableImage):
        decode(bytes(data), SPECS[0])


def test_two_jpegs_in_one_file_are_refused():
    baseline = JPEGS["baseline"]
    with pytest.raises(UndecodableImage, match="one jpeg image after another"):
        decode(baseline + baseline, SPECS[0])
    assert_incomplete(cut(baseline, 0.5) + baseline)


def test_what_cameras_append_to_a_jpeg_is_ignored():
    baseline = JPEGS["baseline"]
    expected = decode_full_size(baseline, 3)
    index = jpeg_builder.segment(0xE2, b"MPF\0" + bytes(20))
    preview = save(PHOTO.resize((80, 60)), "JPEG")
    for data in (
        baseline + preview,
        baseline[:2] + index + baseline[2:] + baseline,
        baseline + bytes(1000),
        baseline + b"\0\0\1\n\x0e\0\0\0Image_UTC_Data1700000000000",
    ):
        assert np.array_equal(decode_full_size(data, 3), expected)


GRAYS = {
    "flat": np.full((H, W, 3), 128, np.uint8),
    "gray below": np.vstack([COLOUR, np.full((64, W, 3), 128, np.uint8)]),
    "gray border": cv2.copyMakeBorder(
        COLOUR, 32, 32, 32, 32, cv2.BORDER_CONSTANT, value=(128,) * 3
    ),
    "one pixel": np.full((1, 1, 3), 128, np.uint8),
}
OPTIONS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "4:4:4": {"subsampling": 0},
    "restarts": {"restart_marker_blocks": 1},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", GRAYS)
def test_a_complete_jpeg_that_ends_in_gray_is_read(name, options, mode):
    image = Image.fromarray(GRAYS[name]).convert(mode)
    data = save(image, "JPEG", **OPTIONS[options])
    for file in (data, data.removesuffix(END), data + b"\0\0"):
        assert decode_full_size(file, 3).shape == GRAYS[name].shape


# ---------------------------------------------------------------------------------------------
# Animations


def gif_with_small_frame(transparent: bool) -> bytes:
    """A screen of 20x24 with a green frame of 10x10 at (5, 5); red is the background."""
    clear, green, end = 4, 1, 5
    codes = [clear, green, green] * 50 + [end]
    number = sum(code << 3 * i for i, code in enumerate(codes))  # codes of 3 bits
    stream = number.to_bytes(-(-3 * len(codes) // 8), "little")
    frame = struct.pack("<BHHHHBBB", 0x2C, 5, 5, 10, 10, 0, 2, len(stream)) + stream
    control = b"\x21\xf9\x04\x01\0\0\2\0" if transparent else b""
    palette = bytes((255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255))
    screen = struct.pack("<6sHHBBB", b"GIF89a", 20, 24, 0x81, 0, 0)
    return screen + palette + control + frame + b"\0;"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("transparent", [False, True])
def test_a_gif_frame_smaller_than_its_screen_lies_on_white(transparent, channels):
    pixels = decode_full_size(gif_with_small_frame(transparent), channels)
    assert pixels.shape == (24, 20, channels)
    inside = pixels[5:15, 5:15].copy()
    pixels[5:15, 5:15] = 255
    assert (pixels == 255).all()
    if channels == 3:
        assert (inside == (0, 255, 0)).all()


@pytest.mark.parametrize("flags", [0x02, 0x12], ids=["opaque", "alpha"])
@pytest.mark.parametrize("background", [bytes(4), b"\0\0\xff\xff"], ids=["clear", "red"])
def test_a_webp_frame_smaller_than_its_canvas_lies_on_white(background, flags):
    green = save(Image.new("RGB", (10, 12), (0, 255, 0)), "WEBP", lossless=True)
    place = b"".join(struct.pack("<I", number)[:3] for number in (4, 3, 9, 11, 100)) + b"\0"
    side = struct.pack("<I", 39)[:3]
    data = webp_builder.webp(
        (b"VP8X", bytes((flags, 0, 0, 0)) + side + side),
        (b"ANIM", background + b"\0\0"),
        (b"ANMF", place + green[12:]),
        (b"ANMF", place + green[12:]),
    )
    pixels = decode_full_size(data, 3)
    assert (pixels[6:18, 8:18] == (0, 255, 0)).all()
    pixels[6:18, 8:18] = 255
    assert (pixels == 255).all()


# ---------------------------------------------------------------------------------------------
# AVIF


def encode_avif(pixels: np.ndarray, depth: int = 8) -> bytes:
    """An AVIF of RGB or gray pixels, uint8 or uint16 of `depth` bits, almost without loss."""
    flags = [cv2.IMWRITE_AVIF_DEPTH, depth, cv2.IMWRITE_AVIF_QUALITY, 98]
    bgr = np.ascontiguousarray(pixels[:, :, ::-1])
    return cv2.imencode(".avif", bgr, flags)[1].tobytes()


def replace_in_avif(data: bytes, old: bytes, new: bytes) -> bytes:
    """Replace the piece that begins with `old` by the piece `new`."""
    pieces = image_mutations.split_avif(data)
    (index,) = (i for i, piece in enumerate(pieces) if piece.startswith(old))
    pieces[index] = new
    return image_mutations.join_avif(pieces)


AVIF = save(Image.fromarray(COLOUR), "AVIF", quality=95, subsampling="4:4:4")
OTHER_SIZE = b"Pispe" + bytes(4) + struct.pack(">II", W, H + 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_turned_and_mirrored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": "4:4:4"}
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(save_turned(orientation))))
    data = save(Image.fromarray(COLOUR), "AVIF", exif=exif, **options)
    assert largest_difference(data, np.asarray(upright)) < 20


def save_turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(Image.fromarray(COLOUR), "PNG", exif=exif)


@pytest.mark.parametrize("depth", [8, 10, 12])
def test_an_avif_of_more_bits_is_reduced_to_8(depth):
    shift = depth - 8
    pixels = COLOUR if depth == 8 else COLOUR.astype(np.uint16) << shift
    data = encode_avif(pixels, depth)
    assert largest_difference(data, COLOUR) < 12
    assert read_largest_sample(data) is None


@pytest.mark.parametrize("depth", [8, 10])
@pytest.mark.parametrize("is_full_range", [True, False])
def test_an_avif_of_gray(depth, is_full_range):
    samples = GRAY.astype(np.uint16) << depth - 8 if depth > 8 else GRAY
    data = encode_avif(samples, depth)
    expected = GRAY.astype(float)
    if not is_full_range:
        data = set_limited_range(data)
        expected = np.clip((expected - 16) * 255 / 219, 0, 255)
    assert largest_difference(data, expected, channels=1) < 8
    assert largest_difference(data, np.repeat(expected, 3, 2)) < 8


def set_limited_range(data: bytes) -> bytes:
    """Clear the flag of the full range in the colour box."""
    position = data.index(b"colrnclx") + 14
    return data[:position] + b"\0" + data[position + 1 :]


def test_an_avif_of_gray_with_alpha():
    """No encoder at hand writes it: the colours of one file, and the alpha channel of another."""
    gray = read_header(encode_avif(GRAY)).avif
    alpha = read_header(encode_avif(ALPHA)).avif
    data = build_avif(dataclasses.replace(gray, alpha=alpha.picture))
    weight = ALPHA / 255
    over_white = GRAY * weight + 255 * (1 - weight)
    assert largest_difference(data, over_white, channels=1) < 12


def test_an_avif_with_alpha():
    weight = ALPHA / 255
    over_white = COLOUR * weight + 255 * (1 - weight)
    data = save(Image.fromarray(RGBA), "AVIF", quality=98, subsampling="4:4:4")
    assert largest_difference(data, over_white) < 12


def test_an_avif_with_premultiplied_alpha():
    alpha = np.full((H, W), 128, np.uint8)
    picture = Image.fromarray(np.dstack([COLOUR, alpha]))
    options = {"quality": 98, "subsampling": "4:4:4"}
    straight = save(picture, "AVIF", **options)
    premultiplied = save(picture, "AVIF", alpha_premultiplied=True, **options)
    assert b"prem" in premultiplied
    expected = COLOUR * (128 / 255) + 255 * (1 - 128 / 255)
    assert largest_difference(straight, expected) < 12
    assert largest_difference(premultiplied, expected) < 12


def test_an_avif_sequence_gives_its_first_picture():
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    options = {"quality": 95, "subsampling": "4:4:4"}
    data = save(frames[0], "AVIF", save_all=True, append_images=frames[1:], **options)
    assert data[8:12] == b"avis"
    assert largest_difference(data, COLOUR) < 20


def test_an_avif_whose_first_brand_is_another():
    """Of cameras and editors; the brands that follow say that the picture is AV1."""
    data = AVIF.replace(b"ftypavif", b"ftypmif1", 1)
    assert largest_difference(data, COLOUR) < 20


def test_metadata_of_an_avif_does_not_reach_the_decoder():
    exif = Image.Exif()
    exif[0x010F] = "maker"
    data = save(Image.fromarray(COLOUR), "AVIF", exif=exif, icc_profile=b"profile" * 50)
    file = build_avif(read_header(data).avif)
    assert b"maker" in data
    assert b"profile" in data
    assert not {name for name in (b"maker", b"profile", b"Exif", b"colrprof") if name in file}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (replace_in_avif(AVIF, b"Pispe", OTHER_SIZE), "states 80x49 pixels"),
        (replace_in_avif(AVIF, b"Pispe", b"Pclap" + bytes(32)), "needs the property 'clap'"),
        (AVIF.replace(b"av01", b"grid", 1), "several pictures"),
    ],
    ids=["another size", "crop", "grid"],
)
def test_kinds_of_avif_that_are_not_supported_are_named(data, words):
    with pytest.raises(UndecodableImage, match=words):
        decode(data, SPECS[0])


def test_a_picture_that_is_larger_than_the_avif_states_is_refused():
    """A decoder would allocate the size of the AV1 data, and scale it down."""
    large = save(Image.new("RGB", (4000, 3000)), "AVIF")
    size = b"Pispe" + bytes(4) + struct.pack(">II", 40, 30)
    data = replace_in_avif(large, b"Pispe", size)
    with pytest.raises(UndecodableImage, match="its picture has 4000x3000"):
        decode(data, SPECS[0])
    with pytest.raises(ImageTooLarge, match="4000x3000 pixels are more than the 1000000"):
        decode(large, SPECS[0], max_pixels=1_000_000)


def test_several_frames_in_one_picture_of_an_avif_are_refused():
    pieces = image_mutations.split_avif(AVIF)
    data_index = next(i for i, piece in enumerate(pieces) if piece.startswith(b"Tmdat"))
    picture = pieces[data_index][5:]
    pieces[data_index] += picture
    location_index = next(i for i, piece in enumerate(pieces) if piece.startswith(b"Miloc"))
    location = pieces[location_index]
    pieces[location_index] = location[:-4] + struct.pack(">I", 2 * len(picture))
    with pytest.raises(UndecodableImage, match="more than one frame"):
        decode(image_mutations.join_avif(pieces), SPECS[0])


# ---------------------------------------------------------------------------------------------
# Other formats


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x24ftypheic" + bytes(40), "HEIC image.*phones.*Most Compatible.*"),
        (b"\0\0\0\x24ftypmif1" + bytes(40), "HEIF image.*phones.*Most Compatible.*"),
        (b"\xff\x0a" + bytes(40), "JPEG XL image"),
        (b"II+\0\x08\0\0\0" + bytes(40), "BigTIFF"),
        (b"MM\0+\0\x08\0\0" + bytes(40), "BigTIFF"),
    ],
)
def test_another_format_is_named_with_what_to_do(data, name):
    with pytest.raises(UnsupportedFormat, match=f"{name}.*convert it to JPEG or PNG"):
        decode(data, SPECS[0])
