"""Holes in images, and images mixed with their neighbour in the batch (which is shuffled, so any other will do)."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def cutout(images: Tensor, side: int, fill: Tensor, draw: np.random.Generator) -> Tensor:
    """A square of `side` pixels around a random point takes the colour `fill`; it may stick out.

    `fill` uint8 [1, C, 1, 1] is on the images' device, as in `erase`.
    """
    b, _, h, w = images.shape
    top, left = draw.integers(0, h, b) - side // 2, draw.integers(0, w, b) - side // 2
    return torch.where(_boxes(images, top, left, np.full(b, side), np.full(b, side)), fill, images)


def erase(images: Tensor, chance: float, fill: Tensor, draw: np.random.Generator) -> Tensor:
    """With `chance`, a rectangle of 2 to 33 % of the area, sides as 3:10 to 10:3, takes the colour `fill`."""
    b, _, h, w = images.shape
    area, ratio = (
        draw.uniform(0.02, 0.33, b) * h * w,
        np.exp(draw.uniform(math.log(0.3), math.log(10 / 3), b)),
    )
    height = np.minimum(h, np.rint(np.sqrt(area * ratio))) * (draw.random(b) < chance)
    width = np.minimum(w, np.rint(np.sqrt(area / ratio)))
    top, left = (
        np.floor(draw.random(b) * (h - height + 1)),
        np.floor(draw.random(b) * (w - width + 1)),
    )
    return torch.where(_boxes(images, top, left, height, width), fill, images)


def _boxes(
    images: Tensor, top: np.ndarray, left: np.ndarray, height: np.ndarray, width: np.ndarray
) -> Tensor:
    """bool [B, 1, H, W]: inside of one rectangle an image; what lies outside of the image is cut off."""
    edges = np.stack([top, top + height, left, left + width]).astype(np.int32)
    top, bottom, left, right = torch.from_numpy(edges).to(images.device, non_blocking=True)[
        ..., None
    ]
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return rows[:, None, :, None] & columns[:, None, None, :]


def mixup(images: Tensor, alpha: float, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Each image blended with the one before it; also the share of its own, float32 [B]."""
    share = torch.from_numpy(draw.beta(alpha, alpha, len(images)).astype(np.float32))
    share = share.to(images.device, non_blocking=True)
    other = images.roll(1, 0).float()
    mixed = torch.lerp(other, images.float(), share.view(-1, 1, 1, 1))
    return mixed.round_().to(torch.uint8), share


def cutmix(images: Tensor, alpha: float, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A rectangle of the image before it put into each image; also the share of area left to its own, float32 [B]."""
    b, _, h, w = images.shape
    cut = np.sqrt(1 - draw.beta(alpha, alpha, b))
    height, width = np.rint(cut * h), np.rint(cut * w)
    top, left = draw.integers(0, h, b) - height // 2, draw.integers(0, w, b) - width // 2
    boxes = _boxes(images, top, left, height, width)
    return torch.where(boxes, images.roll(1, 0), images), 1 - boxes.float().mean((1, 2, 3))


def shares(labels: Tensor, share: Tensor, classes: int) -> Tensor:
    """float32 [B, K]: each image's own class with its share, and the class of the one before it with the rest."""
    own = F.one_hot(labels, classes).float()
    return torch.lerp(own.roll(1, 0), own, share[:, None])
