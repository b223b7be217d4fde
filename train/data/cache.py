"""Decoded pixels on disk: each data set is decoded once for each input size.

    <cache>/pixels/<digest>-<suffix>/        pixels.npy and facts.npy of images of this digest
    <cache>/pixels/<fingerprint>-<suffix>.key    names the entry of files of this fingerprint

The fingerprint (paths, sizes, times) is cheap to compute; the digest needs all bytes. The suffix
stands for the input size and the decoder's version. A data set that grows or changes gets a new
entry, for which images of the latest entries with this suffix are copied instead of decoded.

An entry is written under a hidden name and renamed when it is complete. A lock makes a second job,
or a second process of a job, wait for the first and read what it wrote.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from filelock import FileLock

from models.image import MAX_PIXELS, InputSpec
from train.data.pixels import METADATA_DTYPE, KnownPixels, decode_all, read_array_metadata
from train.data.source import ArrayItems, Items, notify

LAYOUT_VERSION = 3  # of the entries; increase it when decoding changes
DECODER_VERSION = f"{LAYOUT_VERSION} {cv2.__version__}"
"""Changes where the same file may give other pixels."""

COPIED_ENTRIES = 8  # the latest ones, whose images are not decoded again


@dataclass(frozen=True)
class DecodedImages:
    """All images of a source at one size. Rows follow the positions in the source."""

    pixels: np.ndarray  # uint8 [N, H, W, C]; black where the metadata name a problem
    metadata: np.ndarray  # METADATA_DTYPE [N]


@dataclass(frozen=True)
class DecodingJob:
    """What is decoded, and how."""

    items: Items
    spec: InputSpec
    workers: int
    title: str  # of the progress bar
    max_pixels: int  # of one image

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of all decoded pixels."""
        return len(self.items), self.spec.height, self.spec.width, self.spec.channels

    def decode_into(
        self, pixels: np.ndarray, metadata: np.ndarray, known: KnownPixels | None = None
    ) -> None:
        """Decode all items but the known ones into arrays of `shape` and [N]."""
        chunks = decode_all(
            self.items,
            self.spec,
            self.workers,
            self.title,
            self.max_pixels,
            known or KnownPixels(),
        )
        for rows, chunk, records in chunks:
            pixels[rows] = chunk
            metadata[rows] = records

    def decode_in_memory(self) -> DecodedImages:
        """Decode all items into new arrays."""
        pixels = np.zeros(self.shape, np.uint8)
        metadata = np.zeros(len(self.items), METADATA_DTYPE)
        self.decode_into(pixels, metadata)
        return DecodedImages(pixels, metadata)


def load_decoded_images(
    items: Items,
    spec: InputSpec,
    cache: Path | None,
    workers: int,
    title: str,
    max_pixels: int = MAX_PIXELS,
) -> DecodedImages:
    """Return pixels and metadata of all items, from the cache or by decoding them.

    Without `cache`, or where it can't be written, they are held in memory only.
    """
    job = DecodingJob(items, spec, workers, title, max_pixels)
    if isinstance(items, ArrayItems) and items.array.shape == job.shape:
        return DecodedImages(items.array, read_array_metadata(items.array))
    if cache is None:
        return job.decode_in_memory()

    directory = cache / "pixels"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return _load_or_decode(directory, job)
    except OSError as error:
        notify(
            f"{directory}: decoded pixels can't be kept there ({error.strerror or error}), so they "
            "stay in memory only"
        )
        return job.decode_in_memory()


def _load_or_decode(directory: Path, job: DecodingJob) -> DecodedImages:
    """Load the entry of these items, or decode them to a new one. Raises OSError."""
    version = f"{DECODER_VERSION} {job.spec.model_dump_json()} {job.max_pixels}"
    suffix = hashlib.sha256(version.encode()).hexdigest()[:16]
    key = directory / f"{job.items.fingerprint()[:32]}-{suffix}.key"
    with FileLock(f"{key}.lock"):
        decoded = _load_entry(key, job)
        if decoded is None or _has_newly_readable(job.items, decoded.metadata):
            _write_entry(key, suffix, job)
            decoded = _load_entry(key, job)
    if decoded is None:
        raise OSError("the written entry can't be read back")
    return decoded


def _load_entry(key: Path, job: DecodingJob) -> DecodedImages | None:
    """Load the entry that the key names; None where it is missing or damaged."""
    try:
        entry = key.parent / key.read_text()
        # Copy-on-write pages: jobs share them until one writes.
        pixels = np.load(entry / "pixels.npy", mmap_mode="c")
        metadata = np.load(entry / "facts.npy")
    except (OSError, ValueError):
        return None

    complete = (
        pixels.shape == job.shape
        and metadata.shape == (len(job.items),)
        and metadata.dtype == METADATA_DTYPE
    )
    return DecodedImages(pixels, metadata) if complete else None


def _has_newly_readable(items: Items, metadata: np.ndarray) -> bool:
    """Whether one of the items that could not be read can be read now.

    Permissions and mounted disks may change, which no fingerprint shows.
    """
    for i in np.flatnonzero(~metadata["sha256"].any(1)).tolist():
        with contextlib.suppress(OSError):
            items[i]
            return True
    return False


def _write_entry(key: Path, suffix: str, job: DecodingJob) -> None:
    """Decode into a hidden directory, then publish it under the digest of the images read."""
    # The lock belongs to the key, so directories of this prefix are leftovers of killed jobs.
    prefix = f".staging-{key.name}-"
    for leftover in key.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)

    staged = Path(tempfile.mkdtemp(prefix=prefix, dir=key.parent))
    try:
        pixels = _create_array_file(staged / "pixels.npy", job.shape)
        metadata = np.zeros(len(job.items), METADATA_DTYPE)
        job.decode_into(pixels, metadata, _find_known_pixels(key.parent, suffix, job))
        pixels.flush()
        np.save(staged / "facts.npy", metadata)

        digest = hashlib.sha256(metadata["sha256"].tobytes()).hexdigest()[:32]
        entry = key.parent / f"{digest}-{suffix}"
        if not _is_readable(entry):
            shutil.rmtree(entry, ignore_errors=True)
            staged.rename(entry)

        replace_text(key, entry.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _find_known_pixels(directory: Path, suffix: str, job: DecodingJob) -> KnownPixels:
    """Return the images of the latest entries of this suffix, without unreadable entries."""
    entries: list[tuple[float, Path]] = []
    for path in directory.glob(f"*-{suffix}"):
        with contextlib.suppress(OSError):
            entries.append((path.stat().st_mtime, path))

    known = KnownPixels()
    for _, path in sorted(entries)[-COPIED_ENTRIES:]:
        try:
            pixels = np.load(path / "pixels.npy", mmap_mode="r")
            metadata = np.load(path / "facts.npy", mmap_mode="r")
        except (OSError, ValueError):
            continue
        if metadata.dtype == METADATA_DTYPE and pixels.shape == (len(metadata), *job.shape[1:]):
            known.add(path / "pixels.npy", path / "facts.npy", metadata["sha256"])
    return known


def replace_text(path: Path, text: str) -> None:
    """Write a file under a hidden name, then rename it, so that a reader never sees half of it."""
    staged = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        staged.write_text(text)
        staged.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise


def _create_array_file(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Create a .npy file of uint8 with all its blocks allocated. Raises OSError on a full disk."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def _is_readable(entry: Path) -> bool:
    try:
        pixels = np.load(entry / "pixels.npy", mmap_mode="r")
        metadata = np.load(entry / "facts.npy")
    except (OSError, ValueError):
        return False
    return len(pixels) == len(metadata)
