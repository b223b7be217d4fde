"""Items to pixels: what workers decode with, and the one pass over all images that finds out what they are."""

import hashlib
import io
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from models import image
from models.image import InputSpec
from train.data.source import DataError, Items

# What one look at an item tells; `problem` is empty where it can be used, `sha256` is 0 where it could not be read.
FACTS = np.dtype(
    [
        ("sha256", "u1", 32),
        ("width", "i4"),
        ("height", "i4"),
        ("format", "U8"),
        ("mode", "U8"),
        ("problem", "U160"),
    ]
)
CHUNK, CHUNK_BYTES = (
    256,
    2 << 20,
)  # images a task, at most: handing so many over costs nothing beside decoding


def encoded(item: bytes | np.ndarray) -> bytes:
    """An image's bytes: as stored, or as PNG where the source keeps pixels: uint8 [H, W], or [H, W, C] in RGB order."""
    if isinstance(item, bytes):
        return item
    if item.ndim == 3 and item.shape[2] > 1:
        item = item[..., [2, 1, 0, 3][: item.shape[2]]]  # cv2 writes BGR
    return cv2.imencode(".png", item)[1].tobytes()


def to_pixels(item: bytes | np.ndarray, spec: InputSpec) -> np.ndarray:
    """uint8 [height, width, channels] of `spec`, by the code that the service uses. Raises image.ImageError."""
    if isinstance(item, np.ndarray) and item.shape == (spec.height, spec.width, spec.channels):
        return item
    return image.decode(encoded(item), spec)


def pixels_of(items: Items, i: int, spec: InputSpec) -> np.ndarray:
    """`to_pixels` of an item that could be read when the data was looked through.

    Raises DataError, with the item's name, where it can't be any more: a file was moved, or a share went away.
    """
    try:
        return to_pixels(items[i], spec)
    except (OSError, image.ImageError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise DataError(f"{items.name(i)}: can't be read any more: {reason}") from error


class ByPosition(Dataset):
    """Dataset whose index is an array of positions among the items."""

    def __init__(self, items: Items, spec: InputSpec):
        self.items, self.spec = items, spec


class Decoded(ByPosition):
    """Its elements are pixels, uint8 [B, H, W, C]; or an error, to be raised in the process that trains: from a worker
    torch would hand on its whole traceback as the message."""

    def __getitem__(self, index: np.ndarray) -> Tensor | np.ndarray | DataError:
        try:
            return handed_over(
                np.stack([pixels_of(self.items, i, self.spec) for i in index.tolist()])
            )
        except DataError as error:
            return error


class Examined(ByPosition):
    """Its elements are pixels and FACTS [B]; an image that can't be decoded is black and says why."""

    def __getitem__(self, index: np.ndarray) -> tuple[Tensor | np.ndarray, np.ndarray]:
        out = np.zeros(
            (len(index), self.spec.height, self.spec.width, self.spec.channels), np.uint8
        )
        facts = np.zeros(len(index), FACTS)
        for row, i in enumerate(index.tolist()):
            try:
                item = self.items[i]
            except OSError as error:
                facts[row]["problem"] = str(error)
                continue
            try:
                _describe(item, facts[row])
                out[row] = to_pixels(item, self.spec)
            except (OSError, image.ImageError) as error:
                facts[row]["problem"] = f"cut short: {error}" if _cut_short(item) else str(error)
        return handed_over(out), facts


def handed_over(pixels: np.ndarray) -> Tensor | np.ndarray:
    """A worker's pixels as a tensor in shared memory, or as they are where that has no room: then they go through a
    pipe, which costs the process that trains some three times as much. A container's /dev/shm has 64 MB unless somebody
    asks for more, and where torch itself finds no room there, in a thread of its own, the batch is waited for for ever.
    """
    tensor = torch.from_numpy(pixels)
    if get_worker_info() is None:
        return tensor
    try:
        if (
            shutil.disk_usage("/dev/shm").free > 2 * pixels.nbytes
        ):  # others need some of it: locks, NCCL
            return tensor.share_memory_()
    except (OSError, RuntimeError):
        pass
    return pixels


def describe(array: np.ndarray) -> np.ndarray:
    """FACTS [N] of images that are kept as pixels."""
    facts = np.zeros(len(array), FACTS)
    for item, about in zip(array, facts, strict=True):
        _describe(item, about)
    return facts


def _describe(item: bytes | np.ndarray, facts: np.void) -> None:
    """Digest, size and mode. Pillow reads no more than the header here, and knows more modes than our own does."""
    if isinstance(item, np.ndarray):
        facts["sha256"] = np.frombuffer(hashlib.sha256(item.tobytes()).digest(), np.uint8)
        facts["height"], facts["width"] = item.shape[:2]
        facts["format"], facts["mode"] = (
            "pixels",
            {(3,): "RGB", (4,): "RGBA"}.get(item.shape[2:], "L"),
        )
        return
    facts["sha256"] = np.frombuffer(hashlib.sha256(item).digest(), np.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = Image.open(io.BytesIO(item))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return
    facts["width"], facts["height"] = opened.size
    facts["format"], facts["mode"] = (opened.format or "").lower(), opened.mode


_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82", b"GI": b"\x3b"}


def _cut_short(item: bytes | np.ndarray) -> bool:
    """Whether a JPEG, PNG or GIF lacks its end, a WebP or BMP is shorter than it says, or there are no bytes at all."""
    if not isinstance(item, bytes):
        return False
    if item[:4] == b"RIFF":
        return len(item) < 8 + int.from_bytes(item[4:8], "little")
    if item[:2] == b"BM":
        return len(item) < int.from_bytes(item[2:6], "little")
    end = _ENDS.get(item[:2])
    return not item or (end is not None and end not in item[-64:])


def examine(
    items: Items, index: np.ndarray, spec: InputSpec, workers: int, title: str
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Rows, pixels uint8 [B, H, W, C] and FACTS [B] of the images at `index`, in order, decoded by `workers`."""
    images = max(1, min(CHUNK, CHUNK_BYTES // (spec.height * spec.width * spec.channels)))
    chunks = np.array_split(index, max(1, -(-len(index) // images)))
    start = 0
    for pixels, facts in shown(loader(Examined(items, spec), chunks, workers), title, len(index)):
        yield slice(start, start + len(facts)), np.asarray(pixels), facts
        start += len(facts)


def loader(
    dataset: ByPosition, batches: Sequence[np.ndarray], workers: int, pin: bool = False
) -> DataLoader:
    """Workers that make one element of `dataset` for each array of positions, in order.

    They draw no random numbers, so they get a generator of their own: by default torch takes their seed from that of
    the training, once for each start of an epoch, and a run that is resumed has one start more.
    """
    safe = getattr(dataset.items, "fork_safe", True)
    context = None if safe or not workers else "spawn"
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_as_is,
        multiprocessing_context=context,
        persistent_workers=False,
        generator=torch.Generator(),
        worker_init_fn=_apart,
    )


def _apart(worker: int) -> None:
    """Out of the group of processes that a launcher or a terminal tells to end: whoever trains still wants batches, to
    come to the end of a step and save it, and ends its workers itself. They see for themselves that it has gone."""
    os.setpgid(0, 0)


def _as_is(element: object) -> object:
    return element


def shown(
    chunks: DataLoader, title: str, total: int
) -> Iterator[tuple[Tensor | np.ndarray, np.ndarray]]:
    """The chunks, with a progress bar on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=total)
        for pixels, facts in chunks:
            yield pixels, facts
            progress.advance(task, len(facts))
