"""Geometric augmentation: random crops, flips, and one resampling to rotate and scale."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_ASPECT_RATIO = 4 / 3  # of a random resized crop; the smallest is its inverse


def random_crop(
    images: Tensor, size: tuple[int, int], padding: int, border: str, rng: np.random.Generator
) -> Tensor:
    """Crop a window of `size` at a random position of each image, padded on every side before.

    The padded random crop of He et al., "Deep Residual Learning for Image Recognition", 2016. The
    rows of all windows are gathered at once from overlapping views of the memory, so that whole
    rows are copied.

    Args:
        images: uint8 [B, C, H, W].
        size: height and width of the window in pixels.
        padding: pixels added on every side.
        border: what the padding holds: "reflect" or "zero".
        rng: source of the positions.

    Returns uint8 [B, C, *size].
    """
    pixels = _pad(images.permute(0, 2, 3, 1), padding, border).contiguous()
    count, padded_height, padded_width, channels = pixels.shape
    height, width = size
    tops = torch.from_numpy(rng.integers(0, padded_height - height + 1, count))
    tops = tops.to(pixels.device, non_blocking=True)
    lefts = torch.from_numpy(rng.integers(0, padded_width - width + 1, count))
    lefts = lefts.to(pixels.device, non_blocking=True)

    # Offsets in the flat memory: of each window's first pixel, then of each of its rows.
    row_length = padded_width * channels
    image_offsets = torch.arange(count, device=pixels.device) * (padded_height * row_length)
    window_offsets = image_offsets + tops * row_length + lefts * channels
    row_offsets = torch.arange(height, device=pixels.device) * row_length
    offsets = window_offsets[:, None] + row_offsets

    # A view whose row i is the window row that begins at offset i.
    copied = width * channels
    rows = pixels.view(-1).as_strided((pixels.numel() - copied + 1, copied), (1, 1))
    windows = rows.index_select(0, offsets.view(-1))
    return windows.view(count, height, width, channels).permute(0, 3, 1, 2)


def _pad(pixels: Tensor, padding: int, border: str) -> Tensor:
    """Pad [B, H, W, C] on each side: mirrored without repeating the edge, or with zeros."""
    if padding == 0:
        return pixels
    if border == "zero":
        return F.pad(pixels, (0, 0, padding, padding, padding, padding))
    for axis in (1, 2):
        side = pixels.shape[axis]
        before = pixels.narrow(axis, 1, padding).flip(axis)
        after = pixels.narrow(axis, side - 1 - padding, padding).flip(axis)
        pixels = torch.cat([before, pixels, after], axis)
    return pixels


def horizontal_flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror left and right the images [B, C, H, W] that `flipped` bool [B] selects."""
    mask = flipped.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(mask, images.flip(3), images)


def random_resized_crop_and_rotate(
    images: Tensor,
    size: tuple[int, int],
    min_area: float,
    max_degrees: float,
    border: str,
    rng: np.random.Generator,
) -> Tensor:
    """Crop a random part of each image, rotate it, and resample it once (bilinear) to `size`.

    The crop's share of the area is uniform in [min_area, 1]; the logarithm of its aspect ratio is
    uniform between those of 3:4 and 4:3 (the Inception crop: Szegedy et al., "Going Deeper with
    Convolutions", 2015). The angle is uniform in [-max_degrees, max_degrees].

    Args:
        images: uint8 [B, C, H, W].
        size: height and width of the result in pixels.
        min_area: smallest share of the area, 0..1; 0 takes the whole image.
        max_degrees: 0..180.
        border: what lies outside of the image: "reflect" or "zero".
        rng: source of crops and angles.

    Returns uint8 [B, C, *size] in channels-last layout.
    """
    count, channels, height, width = images.shape
    crop_width, crop_height, center_x, center_y = _random_crops(count, min_area, rng)
    angle = np.zeros(count)
    if max_degrees:
        angle = np.deg2rad(rng.uniform(-max_degrees, max_degrees, count))
    cos = np.cos(angle)
    sin = np.sin(angle)

    # From output to input coordinates, both in -1..1. The factors H/W and W/H keep the rotation of
    # images that are not square free of shear.
    row_x = [crop_width * cos, crop_width * sin * (height / width), center_x]
    row_y = [-crop_height * sin * (width / height), crop_height * cos, center_y]
    matrices = np.stack([*row_x, *row_y], 1).reshape(count, 2, 3)
    theta = torch.from_numpy(matrices.astype(np.float32)).to(images.device, non_blocking=True)

    grid = F.affine_grid(theta, [count, channels, *size], align_corners=False)
    padding_mode = "reflection" if border == "reflect" else "zeros"
    resampled = F.grid_sample(images.float(), grid, "bilinear", padding_mode, align_corners=False)
    return resampled.round_().to(torch.uint8).contiguous(memory_format=torch.channels_last)


def _random_crops(
    count: int, min_area: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw a crop of each image; with a `min_area` of 0 it is the whole image.

    Returns width and height as shares of the image's sides, and x and y of the centre in -1..1,
    where 0 is the centre of the image: float64 [count] each.
    """
    if min_area == 0:
        return np.ones(count), np.ones(count), np.zeros(count), np.zeros(count)

    area = rng.uniform(min_area, 1, count)
    # A crop of a large area can't be long: it would exceed the image.
    max_log_ratio = np.minimum(math.log(LARGEST_ASPECT_RATIO), -np.log(area))
    ratio = np.exp(rng.uniform(-max_log_ratio, max_log_ratio))
    width = np.sqrt(area * ratio)
    height = np.sqrt(area / ratio)
    center_x = rng.uniform(-1, 1, count) * (1 - width)
    center_y = rng.uniform(-1, 1, count) * (1 - height)
    return width, height, center_x, center_y
