"""Occluding and mixing augmentation: cutout, random erasing, mixup and CutMix.

Images are mixed with the image before them in the batch, the first with the last: batches are
shuffled, so this is a random partner.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Random erasing: range of the rectangle's share of the area, and of its aspect ratio
ERASED_AREA = (0.02, 0.33)
ERASED_ASPECT_RATIO = (0.3, 10 / 3)


def cutout(images: Tensor, side: int, fill: Tensor, rng: np.random.Generator) -> Tensor:
    """Fill a square around a random point of each image.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
    2017. The point is uniform over the pixels, so the square may exceed the image.

    Args:
        images: uint8 [B, C, H, W].
        side: side of the square in pixels.
        fill: uint8 [1, C, 1, 1] on the images' device, the colour.
        rng: source of the positions.

    Returns uint8 [B, C, H, W].
    """
    count, _, height, width = images.shape
    tops = rng.integers(0, height, count) - side // 2
    lefts = rng.integers(0, width, count) - side // 2
    sides = np.full(count, side)
    return torch.where(_rectangle_masks(images, tops, lefts, sides, sides), fill, images)


def random_erasing(
    images: Tensor, probability: float, fill: Tensor, rng: np.random.Generator
) -> Tensor:
    """Fill a random rectangle inside of each image, with the given probability.

    Zhong et al., "Random Erasing Data Augmentation", 2017: the area is uniform between 2 % and 33 %
    of the image's, the aspect ratio between 3:10 and 10:3 (here uniform in its logarithm).

    Args:
        images: uint8 [B, C, H, W].
        probability: 0..1, for each image.
        fill: uint8 [1, C, 1, 1] on the images' device, the colour.
        rng: source of the rectangles.

    Returns uint8 [B, C, H, W].
    """
    count, _, height, width = images.shape
    area = rng.uniform(*ERASED_AREA, count) * height * width
    smallest, largest = ERASED_ASPECT_RATIO
    ratio = np.exp(rng.uniform(math.log(smallest), math.log(largest), count))

    heights = np.minimum(height, np.rint(np.sqrt(area * ratio)))
    heights = heights * (rng.random(count) < probability)  # a height of 0 erases nothing
    widths = np.minimum(width, np.rint(np.sqrt(area / ratio)))
    tops = np.floor(rng.random(count) * (height - heights + 1))
    lefts = np.floor(rng.random(count) * (width - widths + 1))
    return torch.where(_rectangle_masks(images, tops, lefts, heights, widths), fill, images)


def _rectangle_masks(
    images: Tensor, tops: np.ndarray, lefts: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> Tensor:
    """Return bool [B, 1, H, W]: inside of each image's rectangle, which may exceed the image."""
    edges = np.stack([tops, tops + heights, lefts, lefts + widths]).astype(np.int32)
    edges_on_device = torch.from_numpy(edges).to(images.device, non_blocking=True)
    top, bottom, left, right = edges_on_device[..., None]

    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows = (y >= top) & (y < bottom)
    columns = (x >= left) & (x < right)
    return rows[:, None, :, None] & columns[:, None, None, :]


def mixup(images: Tensor, alpha: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Blend each image x_i with the one before it: s * x_i + (1 - s) * x_{i-1}.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018. The share s is drawn for each
    image from Beta(alpha, alpha).

    Args:
        images: uint8 [B, C, H, W].
        alpha: of the Beta distribution, > 0; 0.2 is usual.
        rng: source of the shares.

    Returns uint8 [B, C, H, W] and the shares s, float32 [B].
    """
    share = torch.from_numpy(rng.beta(alpha, alpha, len(images)).astype(np.float32))
    share = share.to(images.device, non_blocking=True)
    previous = images.roll(1, 0).float()
    mixed = torch.lerp(previous, images.float(), share.view(-1, 1, 1, 1))
    return mixed.round_().to(torch.uint8), share


def cutmix(images: Tensor, alpha: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Replace a random rectangle of each image by the same rectangle of the image before it.

    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
    Features", 2019. For s from Beta(alpha, alpha), both sides of the rectangle are sqrt(1 - s) of
    the image's; its centre is uniform over the pixels, and the part outside of the image is cut
    off.

    Args:
        images: uint8 [B, C, H, W].
        alpha: of the Beta distribution, > 0; 1 is usual.
        rng: source of the rectangles.

    Returns uint8 [B, C, H, W] and the share of its area that each image keeps, float32 [B].
    """
    count, _, height, width = images.shape
    side_share = np.sqrt(1 - rng.beta(alpha, alpha, count))
    heights = np.rint(side_share * height)
    widths = np.rint(side_share * width)
    tops = rng.integers(0, height, count) - heights // 2
    lefts = rng.integers(0, width, count) - widths // 2
    masks = _rectangle_masks(images, tops, lefts, heights, widths)
    share = 1 - masks.float().mean((1, 2, 3))
    return torch.where(masks, images.roll(1, 0), images), share


def mix_labels(labels: Tensor, share: Tensor, classes: int) -> Tensor:
    """Return the labels of mixed images, float32 [B, K].

    The image's own class gets its share, the class of the image before it gets the rest.

    Args:
        labels: int64 [B].
        share: float32 [B], as `mixup` and `cutmix` return it.
        classes: K.
    """
    one_hot = F.one_hot(labels, classes).float()
    return torch.lerp(one_hot.roll(1, 0), one_hot, share[:, None])
