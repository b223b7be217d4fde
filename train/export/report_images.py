"""Pictures for the report: what was seen, and where the network looked."""

import base64

import cv2
import numpy as np

SIDE = 144  # pixels of a picture in the report


def png(pixels: np.ndarray) -> str:
    """uint8 [H,W,C] as a data URL, enlarged or shrunk to the report's size."""
    sharp = max(pixels.shape[:2]) < SIDE
    side = SIDE / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * side)), max(1, round(pixels.shape[0] * side)))
    resized = cv2.resize(pixels, size, interpolation=cv2.INTER_NEAREST if sharp else cv2.INTER_AREA)
    bgr = resized[..., ::-1] if resized.ndim == 3 and resized.shape[2] == 3 else resized
    data = cv2.imencode(".png" if sharp else ".jpg", bgr)[1].tobytes()
    return f"data:image/{'png' if sharp else 'jpeg'};base64,{base64.b64encode(data).decode()}"


def overlay(pixels: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """uint8 [H,W,C] in RGB with the positive part of a class activation map, float [h,w], laid over it."""
    height, width = pixels.shape[:2]
    heat = cv2.resize(
        np.maximum(cam, 0).astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR
    )
    heat = (255 * heat / max(float(heat.max()), 1e-9)).astype(np.uint8)
    colour = cv2.applyColorMap(heat, cv2.COLORMAP_INFERNO)[..., ::-1]
    base = pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, 2)
    return np.ascontiguousarray((0.45 * base + 0.55 * colour).astype(np.uint8))
