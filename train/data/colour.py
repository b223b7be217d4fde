"""Colour jitter as one 3x3 matrix an image."""

import math

import numpy as np
import torch
from torch import Tensor

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
TO_YIQ = np.array(
    [LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
)  # NTSC; hue is the angle in the I-Q plane


def jitter(
    images: Tensor,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    draw: np.random.Generator,
) -> Tensor:
    """Random hue, saturation, brightness and contrast, in this order, of uint8 [B, C, H, W]; gray knows the last two.

    Hue turns in YIQ, which unlike HSV is linear, so that all but contrast is one matrix.
    """
    b, c, h, w = images.shape
    factors = {
        name: draw.uniform(1 - top, 1 + top, b)
        for name, top in (
            ("brightness", brightness),
            ("contrast", contrast),
            ("saturation", saturation),
        )
    }
    change = np.ones((b, 1, 1))
    if c == 3:
        gray = np.broadcast_to(LUMA, (3, 3))
        s = factors["saturation"][:, None, None]
        change = (s * np.eye(3) + (1 - s) * gray) @ _turn(draw.uniform(-hue, hue, b))
    pixels = images.permute(0, 2, 3, 1).reshape(b, h * w, c).float()
    pixels = pixels @ _beside(pixels, change * factors["brightness"][:, None, None]).mT
    if contrast:
        factor = _beside(pixels, factors["contrast"]).view(-1, 1, 1)
        level = pixels.mean(1, keepdim=True)
        if c == 3:
            level = level @ _beside(pixels, LUMA)[:, None]
        pixels = torch.lerp(level, pixels, factor)
    return pixels.round_().clamp_(0, 255).to(torch.uint8).view(b, h, w, c).permute(0, 3, 1, 2)


def _beside(pixels: Tensor, numbers: np.ndarray) -> Tensor:
    """float32 on the device of the pixels, without waiting for it."""
    return torch.from_numpy(numbers.astype(np.float32)).to(pixels.device, non_blocking=True)


def _turn(share: np.ndarray) -> np.ndarray:
    """[B, 3, 3]: RGB to RGB with the hue turned by a share [B] of the circle."""
    cos, sin = np.cos(2 * math.pi * share), np.sin(2 * math.pi * share)
    turn = np.zeros((len(share), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cos, -sin, sin, cos
    return np.linalg.inv(TO_YIQ) @ turn @ TO_YIQ
