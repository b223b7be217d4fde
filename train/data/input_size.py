"""What the network is fed, from what is set and what the images are."""

from typing import Literal

import numpy as np

from models import image
from models.image import InputSpec
from train.data.pixels import encoded
from train.data.source import DataError, Source

LOOKED_AT = 64  # images whose size and colour decide, where the settings leave it open
SMALL = 96  # images that are all alike and no larger are taken as they are
USUAL = 224  # what the networks that come with weights were trained on


def input_spec(
    source: Source,
    size: int | None,
    channels: Literal[1, 3] | None,
    resize: Literal["crop", "stretch", "pad"],
    short_side: int | None,
) -> InputSpec:
    """Settings that are None follow the images: their own size where all are alike and small, 224 otherwise; one
    channel where all are gray. Raises DataError where not one of the images looked at can be read."""
    if size is None or channels is None:
        images = _look(source)
        sizes = {picture.shape[:2] for picture in images}
        side = images[0].shape[0]
        alike = sizes == {(side, side)} and side <= SMALL
        size = size or (side if alike else USUAL)
        channels = channels or (1 if all(_gray(picture) for picture in images) else 3)
    if short_side is not None and short_side < size:
        raise DataError(f"short_side: {short_side} is less than the size of {size}")
    return InputSpec(
        height=size, width=size, channels=channels, resize=resize, short_side=short_side
    )


def _look(source: Source) -> list[np.ndarray]:
    """Some training images, spread over all, in colour and in their own size."""
    index, images, problem = source.index("train"), [], None
    for i in index[
        np.linspace(0, len(index) - 1, min(LOOKED_AT, len(index)), dtype=np.int64)
    ].tolist():
        try:
            images.append(image.decode_full_size(encoded(source.items[i]), 3))
        except (OSError, image.ImageError) as error:
            problem = f"{source.items.name(i)}: {error}"
    if not images:
        raise DataError(
            f"{source.name}: not one of {min(LOOKED_AT, len(index))} images could be read; the last: "
            f"{problem}"
        )
    return images


def _gray(picture: np.ndarray) -> bool:
    return bool(
        (picture[..., 0] == picture[..., 1]).all() and (picture[..., 1] == picture[..., 2]).all()
    )


def kept_spec(spec: InputSpec) -> InputSpec:
    """How training images are kept: where `short_side` leaves a margin around the size, with it, to crop from."""
    if spec.resize == "crop" and spec.short_side:
        return spec.model_copy(
            update={"height": spec.short_side, "width": spec.short_side, "short_side": None}
        )
    return spec


def thumbnail_spec(spec: InputSpec) -> InputSpec:
    """What is kept of images that are streamed, to compare them with one another."""
    return InputSpec(height=32, width=32, channels=spec.channels, resize="stretch")
