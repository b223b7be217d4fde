"""Augmentation of whole batches on their device, CPU or GPU, without a loop over images.

All random numbers are drawn on the CPU, a few for each image, from the generator that is passed in,
so a batch comes out the same on each device. Images stay uint8 [B, C, H, W] in channels-last
layout.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from models.image import InputSpec
from train.data import color_jitter, geometric, mixing
from train.data.sampler import keyed_rng

# Largest value of each numeric setting; the smallest is 0.
UPPER_LIMITS = {
    "random_resized_crop": 1,
    "erasing": 1,
    "hue": 0.5,
    "brightness": 1,
    "contrast": 1,
    "saturation": 1,
    "rotation": 180,
    "crop_padding": 4096,
    "cutout": 4096,
    "mixup": 100,
    "cutmix": 100,
}


@dataclass
class Augmentation:
    """Augmentation of training images, applied in this order. All of it is off by default.

    Attributes:
        random_resized_crop: crop a random part with at least this share of the area (0: off); 0.08
            is usual for photographs trained from scratch, 0.35 and more for small images.
        rotation: rotate by up to this many degrees in either direction.
        crop_padding: shift by up to this many pixels in either direction.
        border: what comes in from outside of the image: reflect (mirrored) or zero (black).
        flip: random mirrors each image with probability 1/2; alternating mirrors each image in
            every other epoch, so that any two epochs show both sides (Jordan, "94% on CIFAR-10 in
            3.29 Seconds on a Single GPU", 2024). For data where left and right mean the same.
        brightness: factor from 1 - this to 1 + this.
        contrast: the same, relative to the mean gray of the image.
        saturation: the same, relative to gray.
        hue: rotate the colour circle by up to this share of it in either direction, at most 0.5.
        cutout: side in pixels of a square filled with the mean colour (DeVries and Taylor, 2017).
        erasing: probability that a rectangle of 2 to 33 % of the area is filled with the mean
            colour (random erasing: Zhong et al., 2017).
        mixup: alpha of the Beta distribution of the shares that two images are blended by (Zhang et
            al., 2018); 0.2 is usual.
        cutmix: alpha of the Beta distribution of the area that is pasted from another image (Yun et
            al., 2019); 1 is usual. With mixup and cutmix each batch gets one of the two. Labels
            become shares of the classes, [B, K].
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
        for name, limit in UPPER_LIMITS.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise ValueError(f"data.augment.{name}: {value} is not between 0 and {limit}")

    @property
    def changes_color(self) -> bool:
        """Whether any of the colour settings is on."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue)


class Augmenter:
    """Applies an Augmentation to batches, and crops images with a margin to the input size."""

    def __init__(
        self,
        settings: Augmentation,
        spec: InputSpec,
        mean: list[float],
        classes: int,
        images: int,
        seed: int,
    ):
        """Prepare what all batches share.

        Args:
            settings: what to apply.
            spec: size of the network's input.
            mean: mean of each channel in 0..255, the colour of cutout and random erasing.
            classes: number of classes.
            images: number of images in the data set.
            seed: of the sides that alternating flips begin with.
        """
        side = min(spec.height, spec.width)
        if settings.border == "reflect" and settings.crop_padding >= side:
            raise ValueError(
                f"data.augment.crop_padding: {settings.crop_padding} is not less than the image's "
                "side"
            )
        self.settings = settings
        self.size = (spec.height, spec.width)
        self.classes = classes
        # Alternating flips mirror these images in even epochs and the others in odd ones.
        self.first_flipped = torch.from_numpy(keyed_rng("flip", seed).random(images) < 0.5)
        self.fill = torch.tensor(mean).round().to(torch.uint8).view(1, -1, 1, 1)

    def __call__(
        self, images: Tensor, labels: Tensor, rows: Tensor, epoch: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Augment one batch.

        Args:
            images: uint8 [B, C, H, W] of the network's input size, or with a margin around it.
            labels: int64 [B].
            rows: int64 [B], positions of the images in the data set.
            epoch: the current one.
            rng: source of all random numbers but those of alternating flips.

        Returns uint8 [B, C, height, width] and the labels, float32 [B, K] where images are mixed.
        """
        images = self._resample_and_crop(images, rng)
        images = self._flip(images, rows, epoch, rng)
        images = self._jitter_color(images, rng)
        images = self._occlude(images, rng)
        return self._mix(images, labels, rng)

    def _resample_and_crop(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        settings = self.settings
        if settings.random_resized_crop or settings.rotation:
            # A random resized crop replaces the crop from the margin; a rotation alone keeps the
            # margin.
            unchanged = (images.shape[2], images.shape[3])
            images = geometric.random_resized_crop_and_rotate(
                images,
                self.size if settings.random_resized_crop else unchanged,
                settings.random_resized_crop,
                settings.rotation,
                settings.border,
                rng,
            )
        if settings.crop_padding or images.shape[2:] != self.size:
            images = geometric.random_crop(
                images, self.size, settings.crop_padding, settings.border, rng
            )
        return images

    def _flip(self, images: Tensor, rows: Tensor, epoch: int, rng: np.random.Generator) -> Tensor:
        if self.settings.flip == "random":
            flipped = torch.from_numpy(rng.random(len(images)) < 0.5)
            return geometric.horizontal_flip(images, flipped)

        if self.settings.flip == "alternating":
            self.first_flipped = self.first_flipped.to(rows.device)
            is_odd_epoch = epoch % 2 == 1
            return geometric.horizontal_flip(images, self.first_flipped[rows] ^ is_odd_epoch)
        return images

    def _jitter_color(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        settings = self.settings
        if not settings.changes_color:
            return images
        return color_jitter.jitter(
            images,
            settings.brightness,
            settings.contrast,
            settings.saturation,
            settings.hue,
            rng,
        )

    def _occlude(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        self.fill = self.fill.to(images.device)
        if self.settings.cutout:
            images = mixing.cutout(images, self.settings.cutout, self.fill, rng)
        if self.settings.erasing:
            images = mixing.random_erasing(images, self.settings.erasing, self.fill, rng)
        return images

    def _mix(
        self, images: Tensor, labels: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        settings = self.settings
        if not settings.mixup and not settings.cutmix:
            return images, labels

        use_mixup = settings.mixup > 0
        if settings.mixup and settings.cutmix:
            use_mixup = rng.random() < 0.5
        if use_mixup:
            images, share = mixing.mixup(images, settings.mixup, rng)
        else:
            images, share = mixing.cutmix(images, settings.cutmix, rng)
        return images, mixing.mix_labels(labels, share, self.classes)
