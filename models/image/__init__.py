"""Image bytes to uint8 pixels: the only decode and resize code, for training and serving.

    header = read_header(data)          # format and size, before any decoder sees the bytes
    pixels = decode(data, input_spec)   # uint8 [height, width, channels], as the network takes it

Untrusted bytes reach a decoder only after their magic number names one of seven formats and their
header states an allowed size, and without what makes no pixels. No other codec is reachable.
"""

from models.image.decode import (
    MAX_PIXELS,
    SHARED_BYTES,
    decode,
    decode_full_size,
    read_largest_sample,
)
from models.image.errors import (
    ImageError,
    ImageTooLarge,
    UndecodableImage,
    UnsupportedFormat,
)
from models.image.header import Header, read_header
from models.image.input_spec import InputSpec
from models.image.resize import array_to_input, resize_to_image, resize_to_input

__all__ = [
    "MAX_PIXELS",
    "SHARED_BYTES",
    "Header",
    "ImageError",
    "ImageTooLarge",
    "InputSpec",
    "UndecodableImage",
    "UnsupportedFormat",
    "array_to_input",
    "decode",
    "decode_full_size",
    "read_header",
    "read_largest_sample",
    "resize_to_image",
    "resize_to_input",
]
