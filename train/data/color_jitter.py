"""Color jitter as one 3x3 matrix an image."""

import math

import numpy as np
import torch
from torch import Tensor

LUMA = np.array([0.299, 0.587, 0.114])  # of R, G, B: ITU-R BT.601

# RGB to YIQ (NTSC). Hue is the angle in the I-Q plane.
RGB_TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def jitter(
    images: Tensor,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    rng: np.random.Generator,
) -> Tensor:
    """Change hue, saturation, brightness and contrast at random, in this order.

    For pixels x in RGB: x <- b * (s*I + (1-s)*L) * R(h) * x, where R(h) rotates hue in YIQ and L
    replaces a colour by its luma; then x <- m + c * (x - m), where m is the image's mean gray. The
    factors b, s and c are uniform in [1 - value, 1 + value], h in [-hue, hue] turns. YIQ is linear,
    unlike HSV, so all but the contrast is one matrix. Gray images change brightness and contrast
    only.

    The transforms are those of torchvision's ColorJitter, whose hue turns in HSV.

    Args:
        images: uint8 [B, C, H, W].
        brightness: 0..1.
        contrast: 0..1.
        saturation: 0..1.
        hue: 0..0.5, a share of the colour circle.
        rng: source of the factors.

    Returns uint8 [B, C, H, W].
    """
    count, channels, height, width = images.shape
    brightness_factors = rng.uniform(1 - brightness, 1 + brightness, count)
    contrast_factors = rng.uniform(1 - contrast, 1 + contrast, count)
    saturation_factors = rng.uniform(1 - saturation, 1 + saturation, count)

    matrices = np.ones((count, 1, 1))
    if channels == 3:
        rotations = _hue_rotations(rng.uniform(-hue, hue, count))
        matrices = _saturation_matrices(saturation_factors) @ rotations
    matrices = matrices * brightness_factors[:, None, None]

    pixels = images.permute(0, 2, 3, 1).reshape(count, height * width, channels).float()
    pixels = pixels @ _to_tensor(matrices, pixels.device).mT
    if contrast:
        factors = _to_tensor(contrast_factors, pixels.device).view(-1, 1, 1)
        mean_gray = pixels.mean(1, keepdim=True)
        if channels == 3:
            mean_gray = mean_gray @ _to_tensor(LUMA, pixels.device)[:, None]
        pixels = torch.lerp(mean_gray, pixels, factors)

    pixels = pixels.round_().clamp_(0, 255).to(torch.uint8)
    return pixels.view(count, height, width, channels).permute(0, 3, 1, 2)


def _to_tensor(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy to float32 on the device without waiting for it."""
    return torch.from_numpy(values.astype(np.float32)).to(device, non_blocking=True)


def _saturation_matrices(factors: np.ndarray) -> np.ndarray:
    """Return float64 [B, 3, 3], RGB to RGB: blends of an image (1) and its gray (0)."""
    gray = np.broadcast_to(LUMA, (3, 3))
    factors = factors[:, None, None]
    return factors * np.eye(3) + (1 - factors) * gray


def _hue_rotations(turns: np.ndarray) -> np.ndarray:
    """Return float64 [B, 3, 3], RGB to RGB: hue rotated by `turns` [B], shares of the circle."""
    cos = np.cos(2 * math.pi * turns)
    sin = np.sin(2 * math.pi * turns)
    rotation = np.zeros((len(turns), 3, 3))  # of (Y, I, Q)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = cos
    rotation[:, 1, 2] = -sin
    rotation[:, 2, 1] = sin
    rotation[:, 2, 2] = cos
    return np.linalg.inv(RGB_TO_YIQ) @ rotation @ RGB_TO_YIQ
