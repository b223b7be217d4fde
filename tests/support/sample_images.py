"""Small pictures that a test can write: each class has its own colour, each picture its own pattern."""

from pathlib import Path

import cv2
import numpy as np

CLASSES = ["blue", "green", "red"]


def make_pixels(label: int, seed: int, size: int = 32) -> np.ndarray:
    """BGR uint8 [size, size, 3], smooth random patterns over the colour of the class."""
    rng = np.random.default_rng([label, seed])
    pattern = cv2.GaussianBlur(rng.integers(0, 256, (size, size, 3), np.uint8), (0, 0), 1.5).astype(
        int
    )
    pixels = (pattern - 128) * 2 + 100
    pixels[:, :, label] += 70
    return np.clip(pixels, 0, 255).astype(np.uint8)


def make_png(label: int, seed: int, size: int = 32) -> bytes:
    return cv2.imencode(".png", make_pixels(label, seed, size))[1].tobytes()


def write_image_folder(root: Path, count: int = 12, size: int = 32, first: int = 0) -> Path:
    """A folder of class folders with `count` PNG files each."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03d}.png").write_bytes(make_png(label, first + i, size))
    return root


def classify_by_colour(images: np.ndarray) -> np.ndarray:
    """The class of each of uint8 [B, 3, H, W] RGB images, by its colour."""
    return 2 - images.mean((2, 3)).argmax(1)
