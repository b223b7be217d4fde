"""Stored items to pixels: the code of decoding workers, and one pass that decodes all images.

The decoder is `models.image`, the same that the service uses. Workers are processes of torch's
DataLoader; each of their tasks is an array of positions.
"""

import hashlib
import io
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

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

# One record an image. `problem` is empty where the image is usable; `sha256` is of the stored bytes
# or pixels, and 0 where the item could not be read. `sample_bits` says how many bits the largest
# sample of a 16-bit image takes, and is 0 for other images.
METADATA_DTYPE = np.dtype(
    [
        ("sha256", "u1", 32),
        ("width", "i4"),
        ("height", "i4"),
        ("format", "U8"),
        ("mode", "U8"),
        ("sample_bits", "u1"),
        ("problem", "U160"),
    ]
)

# Limits of one decoding task. Larger tasks don't lower the cost per image of passing results to the
# training process.
TASK_IMAGES = 256
TASK_BYTES = 2 << 20

CHANNELS_TO_MODE = {(3,): "RGB", (4,): "RGBA"}  # trailing shape of an array -> Pillow's mode
UNKNOWN_MODE = "unknown"
BGR_ORDER = [2, 1, 0, 3]  # channels of RGB or RGBA as OpenCV writes them

# First bytes of a format -> its last bytes.
END_MARKERS = {
    b"\xff\xd8": b"\xff\xd9",  # JPEG
    b"\x89P": b"IEND\xaeB`\x82",  # PNG
    b"GI": b"\x3b",  # GIF
}
END_WINDOW = 64  # bytes at the end of a file that are searched for the marker

Decoded = tuple[Tensor | np.ndarray, np.ndarray]  # uint8 [B, H, W, C], METADATA_DTYPE [B]


def to_image_bytes(item: bytes | np.ndarray) -> bytes:
    """Return an image file: as stored, or PNG of pixels uint8 [H, W] or [H, W, C] in RGB order."""
    if isinstance(item, bytes):
        return item
    if item.ndim == 3 and item.shape[2] > 1:
        item = item[..., BGR_ORDER[: item.shape[2]]]
    return cv2.imencode(".png", item)[1].tobytes()


def to_pixels(
    item: bytes | np.ndarray, spec: InputSpec, max_pixels: int = image.MAX_PIXELS
) -> np.ndarray:
    """Decode an item to uint8 [height, width, channels] of `spec`. Raises image.ImageError."""
    if isinstance(item, np.ndarray) and item.shape == (spec.height, spec.width, spec.channels):
        return item
    return image.decode(to_image_bytes(item), spec, max_pixels)


def read_pixels(
    items: Items, i: int, spec: InputSpec, max_pixels: int = image.MAX_PIXELS
) -> np.ndarray:
    """Read and decode an item that was readable during setup.

    Raises DataError with the item's name where it no longer is: a file was moved, or a share is
    gone.
    """
    try:
        return to_pixels(items[i], spec, max_pixels)
    except (OSError, image.ImageError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise DataError(f"{items.name(i)}: can't be read any more: {reason}") from error


class PositionDataset(Dataset):
    """A dataset whose index is an array of positions, int64 [B], so that one element is a batch."""

    def __init__(self, items: Items, spec: InputSpec, max_pixels: int):
        self.items = items
        self.spec = spec
        self.max_pixels = max_pixels


class PixelBatches(PositionDataset):
    """Elements are uint8 [B, H, W, C], or a DataError for the training process to raise.

    An error that a worker raises would reach the training process with the worker's traceback as
    its message.
    """

    def __getitem__(self, index: np.ndarray) -> Tensor | np.ndarray | DataError:
        try:
            pixels = [
                read_pixels(self.items, i, self.spec, self.max_pixels) for i in index.tolist()
            ]
        except DataError as error:
            return error
        return to_shared_memory(np.stack(pixels))


class KnownPixels:
    """Images that were decoded before by this version of the decoder, at the same size.

    They lie in arrays on disk, which are opened in the process that reads them.
    """

    def __init__(self) -> None:
        self._files: list[tuple[Path, Path]] = []  # of pixels, and of metadata
        self._places: dict[bytes, tuple[int, int]] = {}  # sha256 -> file and row
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, pixels: Path, metadata: Path, digests: np.ndarray) -> None:
        """Add arrays uint8 [N, H, W, C] and METADATA_DTYPE [N]; `digests` uint8 [N, 32]."""
        number = len(self._files)
        self._files.append((pixels, metadata))
        for row in np.flatnonzero(digests.any(1)).tolist():
            self._places[digests[row].tobytes()] = (number, row)

    def find(self, item: bytes) -> tuple[np.ndarray, np.void] | None:
        """Return pixels uint8 [H, W, C] and metadata of a file; None where it is not known."""
        if not self._places:
            return None
        place = self._places.get(hashlib.sha256(item).digest())
        if place is None:
            return None
        number, row = place
        if number not in self._arrays:
            pixels_file, metadata_file = self._files[number]
            try:
                pixels = np.load(pixels_file, mmap_mode="r")
                metadata = np.load(metadata_file, mmap_mode="r")
            except (OSError, ValueError):  # removed since
                return None
            self._arrays[number] = (pixels, metadata)
        pixels, metadata = self._arrays[number]
        return pixels[row], metadata[row]


class PixelsWithMetadata(PositionDataset):
    """Elements are pixels uint8 [B, H, W, C] and METADATA_DTYPE [B].

    An image that can't be decoded is black, and its metadata name the problem.
    """

    def __init__(self, items: Items, spec: InputSpec, max_pixels: int, known: KnownPixels):
        super().__init__(items, spec, max_pixels)
        self.known = known

    def __getitem__(self, index: np.ndarray) -> Decoded:
        shape = (len(index), self.spec.height, self.spec.width, self.spec.channels)
        pixels = np.zeros(shape, np.uint8)
        metadata = np.zeros(len(index), METADATA_DTYPE)
        for row, i in enumerate(index.tolist()):
            self._decode_into(pixels, metadata, row, i)
        return to_shared_memory(pixels), metadata

    def _decode_into(self, pixels: np.ndarray, metadata: np.ndarray, row: int, i: int) -> None:
        """Decode the item at position `i` into `row` of both arrays."""
        try:
            item = self.items[i]
        except OSError as error:
            metadata[row]["problem"] = str(error)
            return

        known = self.known.find(item) if isinstance(item, bytes) else None
        if known is not None:
            pixels[row], metadata[row] = known
            return

        try:
            _fill_metadata(item, metadata[row])
            pixels[row] = to_pixels(item, self.spec, self.max_pixels)
            metadata[row]["sample_bits"] = count_sample_bits(item, self.max_pixels)
        except (OSError, image.ImageError) as error:
            problem = f"cut short: {error}" if _is_truncated(item) else str(error)
            metadata[row]["problem"] = problem


def count_sample_bits(item: bytes | np.ndarray, max_pixels: int) -> int:
    """Return how many bits the largest sample of a 16-bit image takes; 0 for other images.

    Raises image.ImageError.
    """
    if isinstance(item, np.ndarray) and item.dtype == np.uint8:
        return 0
    largest = image.read_largest_sample(to_image_bytes(item), max_pixels)
    return 0 if largest is None else largest.bit_length()


def to_shared_memory(pixels: np.ndarray) -> Tensor | np.ndarray:
    """Move a worker's pixels to shared memory where it has room, else return them as they are.

    Pixels outside shared memory go through a pipe, which costs the training process about three
    times as much. A container's /dev/shm has 64 MB by default. If torch moved them, it would do so
    in a background thread, and when that finds no room, the batch never arrives.
    """
    tensor = torch.from_numpy(pixels)
    if get_worker_info() is None:
        return tensor
    try:
        # Leave half of it to other users: locks, NCCL.
        if shutil.disk_usage("/dev/shm").free > 2 * pixels.nbytes:
            return tensor.share_memory_()
    except (OSError, RuntimeError):
        pass
    return pixels


def read_array_metadata(array: np.ndarray) -> np.ndarray:
    """Return METADATA_DTYPE [N] of images held as pixels, uint8 [N, H, W, C]."""
    metadata = np.zeros(len(array), METADATA_DTYPE)
    for item, record in zip(array, metadata, strict=True):
        _fill_metadata(item, record)
    return metadata


def _fill_metadata(item: bytes | np.ndarray, record: np.void) -> None:
    """Fill in digest, size, format and mode of one image."""
    if isinstance(item, np.ndarray):
        record["sha256"] = _sha256(item.tobytes())
        record["height"] = item.shape[0]
        record["width"] = item.shape[1]
        record["format"] = "pixels"
        record["mode"] = CHANNELS_TO_MODE.get(item.shape[2:], "L")
        return

    record["sha256"] = _sha256(item)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Reads the header only; Pillow knows more modes than `models.image`.
            picture = Image.open(io.BytesIO(item))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        _fill_size(item, record)
        return
    record["width"] = picture.width
    record["height"] = picture.height
    record["format"] = (picture.format or "").lower()
    record["mode"] = picture.mode


def _fill_size(item: bytes, record: np.void) -> None:
    """Fill in size and format of an image that Pillow refuses, where its header can be read."""
    try:
        header = image.read_header(item)
    except image.ImageError:
        return
    record["width"] = header.width
    record["height"] = header.height
    record["format"] = header.format
    record["mode"] = UNKNOWN_MODE


def _sha256(content: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)


def _is_truncated(item: bytes | np.ndarray) -> bool:
    """Whether a file is empty, lacks its end marker, or is shorter than its header says."""
    if not isinstance(item, bytes):
        return False
    if not item:
        return True
    if item[:4] == b"RIFF":  # WebP
        return len(item) < 8 + int.from_bytes(item[4:8], "little")
    if item[:2] == b"BM":  # BMP
        return len(item) < int.from_bytes(item[2:6], "little")

    marker = END_MARKERS.get(item[:2])
    return marker is not None and marker not in item[-END_WINDOW:]


def decode_all(
    items: Items, spec: InputSpec, workers: int, title: str, max_pixels: int, known: KnownPixels
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Decode all items in order but those that are known, with a progress bar on a terminal.

    Yields the rows of each task's images, their pixels uint8 [B, H, W, C] and METADATA_DTYPE [B].
    """
    count = len(items)
    image_bytes = spec.height * spec.width * spec.channels
    task_images = max(1, min(TASK_IMAGES, TASK_BYTES // image_bytes))
    tasks = np.array_split(np.arange(count), max(1, -(-count // task_images)))
    dataset = PixelsWithMetadata(items, spec, max_pixels, known)
    loader = build_worker_loader(dataset, tasks, workers)

    start = 0
    for pixels, metadata in _with_progress_bar(loader, title, count):
        end = start + len(metadata)
        yield slice(start, end), np.asarray(pixels), metadata
        start = end


def build_worker_loader(
    dataset: PositionDataset,
    batches: Sequence[np.ndarray],
    workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Build a loader whose workers make one element of `dataset` for each array of positions.

    The workers draw no random numbers. The loader gets its own generator because torch otherwise
    draws from the global one at each start of an epoch, and a resumed run has one start more.
    """
    context = "spawn" if workers and not dataset.items.fork_safe else None
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_identity,
        multiprocessing_context=context,
        persistent_workers=False,
        generator=torch.Generator(),
        worker_init_fn=_leave_process_group,
    )


def _leave_process_group(worker: int) -> None:
    """Move a worker out of the process group that launchers and terminals send signals to.

    The training process needs batches until its step is finished and saved, then ends its workers
    itself. Workers notice when it is gone.
    """
    os.setpgid(0, 0)


def _identity(element: object) -> object:
    return element


def _with_progress_bar(chunks: Iterable[Decoded], title: str, total: int) -> Iterator[Decoded]:
    """Yield the chunks, with a progress bar of `total` images on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=total)
        for pixels, metadata in chunks:
            yield pixels, metadata
            progress.advance(task, len(metadata))
