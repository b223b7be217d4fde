"""Class activation maps for the report."""

import cv2
import numpy as np

CAM_OPACITY = 0.55


def overlay_activation_map(pixels: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """Return RGB uint8 [H,W,3] with the positive part of a class activation map on top.

    `pixels` uint8 [H,W,C] in gray or RGB; `cam` float [h,w].
    """
    height, width = pixels.shape[:2]
    positive = np.maximum(cam, 0).astype(np.float32)
    heat = cv2.resize(positive, (width, height), interpolation=cv2.INTER_LINEAR)
    heat = (255 * heat / max(float(heat.max()), 1e-9)).astype(np.uint8)
    colors = cv2.applyColorMap(heat, cv2.COLORMAP_INFERNO)[..., ::-1]

    base = pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, 2)
    mixed = (1 - CAM_OPACITY) * base + CAM_OPACITY * colors
    return np.ascontiguousarray(mixed.astype(np.uint8))
