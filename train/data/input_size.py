"""The network's input size and channels, from the settings and from the images themselves."""

import contextlib
from typing import Literal

import numpy as np

from models import image
from models.image import InputSpec
from models.image.input_spec import SIXTEEN_BITS
from models.networks.pretrained import Preprocessing
from train.data.pixels import count_sample_bits, to_image_bytes
from train.data.source import DataError, LabelledImages

SAMPLED_IMAGES = 64  # images whose size and colour decide, where the settings leave it open
LARGEST_NATIVE_SIDE = 96  # pixels; square images of one size up to this side keep it
DEFAULT_SIDE = 224  # pixels; the usual size of networks for photographs
THUMBNAIL_SIDE = 32  # pixels
SAMPLE_BITS = (8, 10, 12, 14, SIXTEEN_BITS)  # that cameras and scanners write into 16


def choose_input_spec(
    dataset: LabelledImages,
    size: int | None,
    channels: Literal[1, 3] | None,
    resize: Literal["crop", "stretch", "pad"] | None,
    short_side: int | None,
    significant_bits: int | None,
    max_pixels: int,
    preprocessing: Preprocessing | None = None,
) -> InputSpec:
    """Return what the network is fed; settings that are None follow the weights or the images.

    Without a size, size and short side are those of `preprocessing`, with which the weights were
    trained that the network starts from. Without both, images that are all squares of one small
    size keep theirs; others get 224. Without `resize`, it is that of `preprocessing`, else crop.
    Without channels, the result has 1 where all images are gray, else 3. Without significant bits,
    the result has the least of SAMPLE_BITS that hold all samples. Raises DataError where none of
    the sampled images can be read.
    """
    if preprocessing is not None:
        channels = channels or preprocessing.channels
        resize = resize or preprocessing.resize
        if size is None:
            size = preprocessing.size
            short_side = short_side or preprocessing.short_side
    if size is None or channels is None:
        images = _sample_images(dataset, max_pixels)
        size = size or _native_side(images) or DEFAULT_SIDE
        channels = channels or (1 if all(_is_gray(pixels) for pixels in images) else 3)
    if significant_bits is None:
        significant_bits = _choose_significant_bits(dataset, max_pixels)

    if short_side is not None and short_side < size:
        raise DataError(f"short_side: {short_side} is less than the size of {size}")
    return InputSpec(
        height=size,
        width=size,
        channels=channels,
        resize=resize or "crop",
        short_side=short_side,
        interpolation=preprocessing.interpolation if preprocessing else "linear",
        significant_bits=significant_bits,
    )


def _sample_images(dataset: LabelledImages, max_pixels: int) -> list[np.ndarray]:
    """Read training images, evenly spread over the part: uint8 [H, W, 3], not resized."""
    positions = _sample_positions(dataset)
    images = []
    problem = None
    for i in positions:
        try:
            content = to_image_bytes(dataset.items[i])
            images.append(image.decode_full_size(content, 3, max_pixels))
        except (OSError, image.ImageError) as error:
            problem = f"{dataset.items.name(i)}: {error}"
    if not images:
        raise DataError(
            f"{dataset.name}: not one of {len(positions)} images could be read; the last: {problem}"
        )
    return images


def _sample_positions(dataset: LabelledImages) -> list[int]:
    """Return positions of training images, evenly spread over the part."""
    index = dataset.index("train")
    count = min(SAMPLED_IMAGES, len(index))
    return index[np.linspace(0, len(index) - 1, count, dtype=np.int64)].tolist()


def _choose_significant_bits(dataset: LabelledImages, max_pixels: int) -> int:
    """Return the least of SAMPLE_BITS that hold the samples of the sampled 16-bit images."""
    needed = 0
    for i in _sample_positions(dataset):
        with contextlib.suppress(OSError, image.ImageError):
            needed = max(needed, count_sample_bits(dataset.items[i], max_pixels))
    if needed == 0:
        return SIXTEEN_BITS
    return next(bits for bits in SAMPLE_BITS if needed <= bits)


def _native_side(images: list[np.ndarray]) -> int | None:
    """Return the side that all images share where they are small squares, else None."""
    side = images[0].shape[0]
    sizes = {pixels.shape[:2] for pixels in images}
    if sizes == {(side, side)} and side <= LARGEST_NATIVE_SIDE:
        return side
    return None


def _is_gray(pixels: np.ndarray) -> bool:
    red = pixels[..., 0]
    green = pixels[..., 1]
    blue = pixels[..., 2]
    return bool((red == green).all() and (green == blue).all())


def training_spec(spec: InputSpec) -> InputSpec:
    """Return the size that training images are stored at.

    Where `short_side` leaves a margin around the network's input, the margin is kept to crop from.
    """
    if spec.resize == "crop" and spec.short_side:
        return spec.model_copy(
            update={"height": spec.short_side, "width": spec.short_side, "short_side": None}
        )
    return spec


def thumbnail_spec(spec: InputSpec) -> InputSpec:
    """Return the size kept of streamed images, for the audit to compare them with one another."""
    return InputSpec(
        height=THUMBNAIL_SIDE,
        width=THUMBNAIL_SIDE,
        channels=spec.channels,
        resize="stretch",
        significant_bits=spec.significant_bits,
    )
