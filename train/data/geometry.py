"""Moving pixels about: shifted windows, mirrors, and one resampling for all that turns or scales."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def shift(
    images: Tensor, size: tuple[int, int], padding: int, border: str, draw: np.random.Generator
) -> Tensor:
    """A window of `size` at a random place of each image, which is first widened by `padding` pixels on every side.

    The rows of all windows are gathered at once from overlapping views of the memory, so that whole rows are copied.
    """
    pixels = _widened(images.permute(0, 2, 3, 1), padding, border).contiguous()
    b, h, w, c = pixels.shape
    height, width = size
    y = torch.from_numpy(draw.integers(0, h - height + 1, b)).to(pixels.device, non_blocking=True)
    x = torch.from_numpy(draw.integers(0, w - width + 1, b)).to(pixels.device, non_blocking=True)
    first = torch.arange(b, device=pixels.device) * (h * w * c) + y * (w * c) + x * c
    starts = first[:, None] + torch.arange(height, device=pixels.device) * (w * c)
    rows = pixels.view(-1).as_strided((pixels.numel() - width * c + 1, width * c), (1, 1))
    return rows.index_select(0, starts.view(-1)).view(b, height, width, c).permute(0, 3, 1, 2)


def _widened(pixels: Tensor, padding: int, border: str) -> Tensor:
    """[B, H, W, C] with `padding` more on each side: mirrored without repeating the edge, or black."""
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


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left and right the images that `chosen` bool [B] marks."""
    return torch.where(
        chosen.to(images.device, non_blocking=True).view(-1, 1, 1, 1), images.flip(3), images
    )


def warp(
    images: Tensor,
    size: tuple[int, int],
    least: float,
    degrees: float,
    border: str,
    draw: np.random.Generator,
) -> Tensor:
    """A random part of each image, turned, resampled once (bilinear) to `size`.

    `least`: smallest share of the area, 0 for the whole image; sides are as 3:4 to 4:3 (Szegedy et al., 2015).
    """
    b, _, h, w = images.shape
    across = down = np.ones(b)
    right = below = np.zeros(b)
    if least:
        area = draw.uniform(least, 1, b)
        widest = np.minimum(
            math.log(4 / 3), -np.log(area)
        )  # a large part can't be long: it would stick out
        ratio = np.exp(draw.uniform(-widest, widest))
        across, down = np.sqrt(area * ratio), np.sqrt(area / ratio)
        right, below = draw.uniform(-1, 1, b) * (1 - across), draw.uniform(-1, 1, b) * (1 - down)
    angle = np.deg2rad(draw.uniform(-degrees, degrees, b)) if degrees else np.zeros(b)
    cos, sin = (
        np.cos(angle),
        np.sin(angle),
    )  # from output to input, both in -1..1 with the centre at 0
    matrix = np.stack(
        [across * cos, across * sin * (h / w), right, -down * sin * (w / h), down * cos, below], 1
    )
    theta = torch.from_numpy(matrix.reshape(b, 2, 3).astype(np.float32)).to(
        images.device, non_blocking=True
    )
    grid = F.affine_grid(theta, [b, images.shape[1], *size], align_corners=False)
    outside = "reflection" if border == "reflect" else "zeros"
    warped = F.grid_sample(images.float(), grid, "bilinear", outside, align_corners=False)
    return warped.round_().to(torch.uint8).contiguous(memory_format=torch.channels_last)
