"""Augmentation of whole batches on their device, CPU or GPU, without a loop over images.

Every random choice is drawn on the CPU from the generator that is handed in, a few numbers an image, so that a batch
comes out the same on every device. Images stay uint8 [B, C, H, W] in channels-last layout from end to end.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from models.image import InputSpec
from train.data import colour, geometry, mixing
from train.data.sampler import rng


@dataclass
class Augmentation:
    """What is done to training images, in this order. Everything is off by default.

    Attributes:
        random_resized_crop: cut out a part of random shape with at least this share of the area (0: off); 0.08 is usual
            for photographs from scratch, 0.35 and more for small images.
        rotation: turn by up to this many degrees either way.
        crop_padding: move by up to this many pixels either way.
        border: what comes in from outside: reflect (the image mirrored) or zero (black).
        flip: random mirrors each image with chance 1/2; alternating mirrors each in every other epoch, so that two
            epochs always show both sides (Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024); for data with no left and
            right.
        brightness: factor from 1 - this to 1 + this.
        contrast: the same, away from the mean gray of the image.
        saturation: the same, away from gray.
        hue: turn of the colour circle by up to this share of it either way, at most 0.5.
        cutout: side in pixels of a square of the mean colour (DeVries and Taylor, 2017).
        erasing: chance that a rectangle of 2 to 33 % of the area takes the mean colour (Zhong et al., 2017).
        mixup: alpha of the Beta distribution that two images are blended by (Zhang et al., 2018); 0.2 is usual.
        cutmix: alpha of the Beta distribution for the area that is cut from another image (Yun et al., 2019); 1 is
            usual. With mixup and cutmix each batch gets one of the two. Labels become [B, K] of shares.
    """

    random_resized_crop: float = 0.0
    rotation: float = 0.0
    crop_padding: int = 0
    border: Literal["reflect", "zero"] = "reflect"
    flip: Literal["none", "random", "alternating"] = "none"
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    cutout: int = 0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name, top in (
            ("random_resized_crop", 1),
            ("erasing", 1),
            ("hue", 0.5),
            ("brightness", 1),
            ("contrast", 1),
            ("saturation", 1),
            ("rotation", 180),
            ("crop_padding", 4096),
            ("cutout", 4096),
            ("mixup", 100),
            ("cutmix", 100),
        ):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(
                    f"data.augment.{name}: {getattr(self, name)} is not between 0 and {top}"
                )


class Augmenter:
    """Applies an Augmentation to batches; also cuts images that are kept with a margin to the size of the network."""

    def __init__(
        self,
        chosen: Augmentation,
        spec: InputSpec,
        mean: list[float],
        classes: int,
        images: int,
        seed: int,
    ):
        """`mean`: the colour of holes, in 0..255; `images`: how many the data set has."""
        if chosen.border == "reflect" and chosen.crop_padding >= min(spec.height, spec.width):
            raise ValueError(
                f"data.augment.crop_padding: {chosen.crop_padding} is not less than the image's side"
            )
        self.chosen, self.spec, self.classes = chosen, spec, classes
        # A coin for each image that is thrown once: which side alternating flips show in even epochs
        self.sides = torch.from_numpy(rng("flip", seed).random(images) < 0.5)
        self.fill = torch.tensor(mean).round().to(torch.uint8).view(1, -1, 1, 1)

    def __call__(
        self, images: Tensor, labels: Tensor, rows: Tensor, epoch: int, draw: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """`images` uint8 [B, C, H, W], `labels` int64 [B], `rows` int64 [B]: the images' numbers in the data set.

        Gives uint8 [B, C, height, width] and the labels, float32 [B, K] where images are mixed.
        """
        chosen, size = self.chosen, (self.spec.height, self.spec.width)
        if chosen.random_resized_crop or chosen.rotation:
            # A random-resized crop takes the place of the crop from the margin; a mere turn leaves scale and margin be
            target = size if chosen.random_resized_crop else (images.shape[2], images.shape[3])
            images = geometry.warp(
                images, target, chosen.random_resized_crop, chosen.rotation, chosen.border, draw
            )
        if chosen.crop_padding or images.shape[2:] != size:
            images = geometry.shift(images, size, chosen.crop_padding, chosen.border, draw)
        if chosen.flip == "random":
            images = geometry.flip(images, torch.from_numpy(draw.random(len(images)) < 0.5))
        elif chosen.flip == "alternating":
            self.sides = self.sides.to(rows.device)
            images = geometry.flip(images, self.sides[rows] ^ (epoch % 2 == 1))
        if chosen.brightness or chosen.contrast or chosen.saturation or chosen.hue:
            images = colour.jitter(
                images, chosen.brightness, chosen.contrast, chosen.saturation, chosen.hue, draw
            )
        self.fill = self.fill.to(images.device)
        if chosen.cutout:
            images = mixing.cutout(images, chosen.cutout, self.fill, draw)
        if chosen.erasing:
            images = mixing.erase(images, chosen.erasing, self.fill, draw)
        return self._mixed(images, labels, draw)

    def _mixed(
        self, images: Tensor, labels: Tensor, draw: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        chosen = self.chosen
        if not (chosen.mixup or chosen.cutmix):
            return images, labels
        mixup = chosen.mixup and (not chosen.cutmix or draw.random() < 0.5)
        mix, alpha = (mixing.mixup, chosen.mixup) if mixup else (mixing.cutmix, chosen.cutmix)
        images, share = mix(images, alpha, draw)
        return images, mixing.shares(labels, share, self.classes)
