"""What every source of images becomes: one list of items, their labels, and the part that each belongs to."""

import hashlib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

PARTS = ("train", "val", "test")
ALIASES = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "testing": "test",
    "evaluation": "test",
}
CHANNELS = (1, 3, 4)  # of gray, RGB and RGBA
NONE = -1  # the label of an image that has none; no part may hold one


class DataError(ValueError):
    """Data that can't be used. The message is one line that names the file or the setting and says what to do."""


def cache_home() -> Path:
    """$XDG_CACHE_HOME/imago, by default ~/.cache/imago."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imago"


@rank_zero_only
def say(line: str) -> None:
    """One line for the person who started the job, from the first process only."""
    print(f"data: {line}", file=sys.stderr, flush=True)


class Items(Protocol):
    """Images by number, as they are stored. Reading must be safe from several processes at once.

    `fork_safe`, where an implementation says False, makes worker processes start anew instead of as forks.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> bytes | np.ndarray:
        """The bytes of an image file, or uint8 [H, W] or [H, W, C] of a source that stores pixels: gray, RGB or RGBA.

        Raises OSError where the item can't be read.
        """
        ...

    def name(self, i: int) -> str:
        """What a person would call the image: a path relative to the source, or a number."""
        ...

    def fingerprint(self) -> str:
        """Hex digits that change when the data does, found without reading it all."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """A data set as found, before any split or decoding."""

    name: str
    classes: list[str]
    items: Items
    labels: np.ndarray  # int64 [N], 0..K-1
    parts: np.ndarray  # [N] of "train", "val" or "test"; only "train" is sure to occur
    root: Path | None = None  # where the files lie, for sources made of files

    def index(self, part: str) -> np.ndarray:
        """Positions of a part's images, int64, rising."""
        return np.flatnonzero(self.parts == part)


@dataclass(frozen=True, slots=True)
class Arrays:
    """Images that a source keeps as pixels: uint8 [N, H, W, C]."""

    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.array[i]

    def name(self, i: int) -> str:
        return f"{i:06d}.png"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.array.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Files:
    """Image files below a root."""

    root: Path
    paths: list[str]  # relative to the root, with forward slashes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> bytes:
        return (self.root / self.paths[i]).read_bytes()

    def name(self, i: int) -> str:
        return as_text(self.paths[i])

    def fingerprint(self) -> str:
        """From path, size and time of change of each file."""
        digest = hashlib.sha256(os.fsencode(self.root.resolve()))
        for path in self.paths:
            try:
                status = os.stat(self.root / path)
                state = f"{status.st_size}\0{status.st_mtime_ns}"
            except OSError as error:
                state = str(error.errno)
            digest.update(os.fsencode(f"{path}\0{state}\0"))
        return digest.hexdigest()


def as_text(name: str) -> str:
    """A file's name, which may be any bytes, as what can be written anywhere: a byte that is no UTF-8 becomes \\xe9."""
    return os.fsencode(name).decode(errors="backslashreplace")


def part_name(name: str) -> str | None:
    """train, val or test, from what people call these; None for anything else."""
    name = name.strip().lower()
    return ALIASES.get(name, name if name in PARTS else None)


def needs(package: str, extra: str) -> ModuleType:
    """An optional package. Raises DataError that names the extra to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(f"{extra}: {error}; pip install 'imago[{extra}]'") from error


def as_item(value: object) -> bytes | np.ndarray:
    """What a source of any kind holds for an image, as an item: bytes as they are, pixels as uint8 [H, W, C].

    Takes bytes, PIL images, and arrays or tensors uint8, gray, RGB or RGBA, with channels first or last. Raises OSError
    for others.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image) and not value.mode.startswith(
        ("I", "F")
    ):  # more bits, which PIL would clip
        value = value.convert(
            "RGBA" if value.has_transparency_data else "L" if value.mode == "L" else "RGB"
        )
    found = np.asarray(value)
    pixels = found[:, :, None] if found.ndim == 2 else found
    if pixels.ndim == 3 and pixels.shape[2] not in CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    if (
        found.dtype != np.uint8
        or pixels.ndim != 3
        or pixels.shape[2] not in CHANNELS
        or not found.size
    ):
        raise OSError(f"{type(value).__name__} of {found.dtype} {found.shape} is no image")
    return np.ascontiguousarray(pixels)


def numbered(labels: Sequence[str | None]) -> tuple[list[str], np.ndarray]:
    """Class names, sorted (as numbers where all are), and for each label its class, int64 [N]; NONE for None."""
    names = sorted({name for name in labels if name is not None})
    if all(name.isdecimal() for name in names):
        names.sort(key=int)  # in a stable order: "01" stays before "1"
    number: dict[str | None, int] = {name: k for k, name in enumerate(names)}
    return names, np.array([number.get(name, NONE) for name in labels], np.int64)


def concatenate(
    chunks: dict[str, tuple[np.ndarray, np.ndarray]],
) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Part -> (pixels, labels) to one Arrays, labels int64 and parts."""
    pixels = np.concatenate([_with_channel(p) for p, _ in chunks.values()])
    labels = np.concatenate([np.asarray(y, np.int64) for _, y in chunks.values()])
    parts = np.repeat(list(chunks), [len(y) for _, y in chunks.values()])
    return Arrays(np.ascontiguousarray(pixels)), labels, parts


def _with_channel(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., None] if pixels.ndim == 3 else pixels
