"""Errors for bytes that can't become pixels, each with the HTTP status of the answer."""


class ImageError(ValueError):
    """Base class: the bytes can't become pixels. `status` is the HTTP status of the answer."""

    status = 422


class UnsupportedFormat(ImageError):
    """The magic number is none of JPEG, PNG, WebP, AVIF, BMP, GIF or TIFF."""

    status = 415


class ImageTooLarge(ImageError):
    """The header states more pixels than allowed."""

    status = 413


class UndecodableImage(ImageError):
    """The magic number is valid, but the rest of the file is not."""

    status = 422
