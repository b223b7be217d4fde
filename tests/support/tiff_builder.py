"""TIFF files that no library writes: any tags, several pages, pages inside pages."""

import struct
import zlib
from dataclasses import dataclass, field

import numpy as np

DEFLATE = 8


@dataclass
class Page:
    """One page: pixels uint8 or uint16 [H, W] or [H, W, samples], and more tags or other values."""

    pixels: np.ndarray
    tags: dict[int, int] = field(default_factory=dict)
    inner: "list[Page]" = field(default_factory=list)


def build_tiff(*pages: Page, order: str = "<") -> bytes:
    """A file of these pages, one strip each; `order` is < or >, as struct writes it."""
    file = bytearray(struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 0))
    link = 4
    for page in pages:
        offset, next_link = _add_page(file, page, order)
        struct.pack_into(order + "I", file, link, offset)
        link = next_link
    return bytes(file)


def _add_page(file: bytearray, page: Page, order: str) -> tuple[int, int]:
    """Append a page; return the offset of its directory, and where that links to the next."""
    inner_offsets = [_add_page(file, inner, order)[0] for inner in page.inner]

    pixels = page.pixels
    height, width = pixels.shape[:2]
    samples = 1 if pixels.ndim == 2 else pixels.shape[2]
    if page.tags.get(284) == 2:  # planar
        pixels = np.moveaxis(pixels, 2, 0)
    if page.tags.get(317) == 2:  # horizontal differences
        pixels = np.concatenate([pixels[:, :1], np.diff(pixels, axis=1)], axis=1)
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    if page.tags.get(259) == DEFLATE:
        content = zlib.compress(content)

    plane_count = samples if page.tags.get(284) == 2 else 1
    plane_bytes = len(content) // plane_count
    first = _append(file, content)
    tags = {
        256: [width],
        257: [height],
        258: [8 * pixels.dtype.itemsize] * samples,
        259: [1],
        262: [2 if samples >= 3 else 1],
        273: [first + i * plane_bytes for i in range(plane_count)],
        277: [samples],
        278: [height],
        279: [plane_bytes] * plane_count,
    }
    tags |= {tag: [value] for tag, value in page.tags.items()}
    if inner_offsets:
        tags[330] = inner_offsets
    return _add_directory(file, tags, order)


def _add_directory(file: bytearray, tags: dict[int, list[int]], order: str) -> tuple[int, int]:
    body = struct.pack(order + "H", len(tags))
    for tag, values in sorted(tags.items()):
        code = "I" if max(values) > 0xFFFF or tag in (273, 279, 330) else "H"
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            packed = struct.pack(order + "I", _append(file, packed))
        body += struct.pack(order + "HHI", tag, 4 if code == "I" else 3, len(values))
        body += packed.ljust(4, b"\0")
    offset = _append(file, body + bytes(4))
    return offset, offset + len(body)


def _append(file: bytearray, content: bytes) -> int:
    """Append bytes at an even offset and return it."""
    file += bytes(len(file) % 2)
    offset = len(file)
    file += content
    return offset
