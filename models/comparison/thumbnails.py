"""Images for HTML pages, as data URLs."""

import base64

import cv2
import numpy as np

SIDE_PIXELS = 144  # the longer side of an image in a page


def encode_data_url(pixels: np.ndarray) -> str:
    """Return uint8 [H,W,C] as a data URL, enlarged or shrunk to the page's size.

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
