"""Image bytes to uint8 pixels: header, sanitizing, decode and resize; the only such code in the project."""

from models.image.decode import MAX_PIXELS, InputSpec, decode, fit, pixels
from models.image.header import (
    Header,
    ImageError,
    ImageTooLarge,
    UndecodableImage,
    UnsupportedFormat,
    header,
)

__all__ = [
    "MAX_PIXELS",
    "Header",
    "ImageError",
    "ImageTooLarge",
    "InputSpec",
    "UndecodableImage",
    "UnsupportedFormat",
    "decode",
    "fit",
    "header",
    "pixels",
]
