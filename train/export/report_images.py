"""Images for the report: test images and class activation maps, as data URLs."""

import base64

import cv2
import numpy as np

SIDE_PIXELS = 144  # the longer side of an image in the report
CAM_OPACITY = 0.55


def encode_data_url(pixels: np.ndarray) -> str:
    """Return uint8 [H,W,C] as a data URL, enlarged or shrunk to the report's size.

    Small images stay sharp and lossless; large ones become JPEG files.
    """
    height, width = pixels.shape[:2]
    scale = SIDE_PIXELS / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))

    is_enlarged = scale > 1
    interpolation = cv2.INTER_NEAREST if is_enlarged else cv2.INTER_AREA
    resized = cv2.resize(pixels, size, interpolation=interpolation)
    if resized.ndim == 3 and resized.shape[2] == 3:
        resized = resized[..., ::-1]  # OpenCV encodes BGR

    extension = ".png" if is_enlarged else ".jpg"
    media_type = "image/png" if is_enlarged else "image/jpeg"
    content = cv2.imencode(extension, resized)[1].tobytes()
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


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
