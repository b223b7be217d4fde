"""Image bytes to uint8 pixels: header, sanitizing, decode and resize; the only such code in the project."""

from models.image.decode import MAX_PIXELS, InputSpec, decode, decode_full_size, resize_to_input
from models.image.header import (
    Header,
    ImageError,
    ImageTooLarge,
    UndecodableImage,
    UnsupportedFormat,
    read_header,
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
    "decode_full_size",
    "read_header",
    "resize_to_input",
]
