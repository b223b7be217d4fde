"""A data set before it is split or decoded: stored images, their labels and their parts.

Each reader in `train.data.sources` returns one `LabelledImages`. Its `items` give the images as
they are stored, by position; positions 0..N-1 identify an image everywhere else in the project. The
functions at the end of this file are what readers build one from.
"""

import contextlib
import hashlib
import importlib
import os
import sys
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Protocol

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from models.image.files import read_regular_file

PARTS = ("train", "val", "test")
KEPT = "kept"  # joins the training part after the split; see train/data/split.py
LIVE = "live"  # the live test set, which is in none of the parts
PART_ALIASES = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "testing": "test",
    "evaluation": "test",
}
CHANNEL_COUNTS = (1, 3, 4)  # gray, RGB, RGBA
# Names of the fields of an image and of its label, in the order of preference.
IMAGE_FIELDS = ("image", "images", "img", "jpeg", "jpg", "png")
LABEL_FIELDS = ("label", "labels", "class", "cls", "target")
NO_LABEL = -1  # stands for a missing label; `open_source` refuses data that holds one
CORRECTIONS_FILE = "corrections.csv"  # in the folder of the data
DEEP_MODES = ("I", "F")  # Pillow modes with more than 8 bits a channel


class DataError(ValueError):
    """Data that can't be used. The message is one line: the file or setting, and what to do."""


def expand_home(path: str | Path) -> Path:
    """Return a path with ~ replaced. Raises DataError where the user has no home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"{path}: this user has no home directory; set HOME, or give a path without ~"
        ) from error


def cache_home() -> Path:
    """Return $XDG_CACHE_HOME/imago, by default ~/.cache/imago.

    Raises DataError where the user has no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_home(base) / "imago"


@rank_zero_only
def notify(line: str) -> None:
    """Print one line about the data on stderr, in the first process only."""
    print(f"data: {line}", file=sys.stderr, flush=True)


class Items(Protocol):
    """Stored images by position. Several processes may read at once."""

    @property
    def fork_safe(self) -> bool:
        """Whether forked worker processes can read; otherwise workers are spawned."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> bytes | np.ndarray:
        """Return the bytes of an image file, or uint8 [H, W] or [H, W, C]: gray, RGB or RGBA.

        Raises OSError where the item can't be read.
        """
        ...

    def name(self, i: int) -> str:
        """Return a name for messages: a path relative to the source, or a number."""
        ...

    def fingerprint(self) -> str:
        """Return hex digits that change when the data changes, without reading all of it."""
        ...


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Files of a folder that are not among the images."""

    folder: str  # a class, or a part
    count: int
    reason: str  # in words that follow the count: "files that are not JPEG, …"


@dataclass(frozen=True, slots=True)
class AppliedCorrections:
    """The corrections that a data set holds; see train/data/corrections.py."""

    file: Path
    source_labels: np.ndarray  # int64 [N], before the corrections
    excluded: np.ndarray  # bool [N], images that are left out
    reviewed: np.ndarray  # bool [N], images with a correction of any kind


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """A data set before any split or decoding: as its source holds it, or corrected by its user."""

    name: str
    classes: list[str]
    items: Items
    labels: np.ndarray  # int64 [N], 0..K-1
    parts: np.ndarray  # [N] of PARTS, KEPT or LIVE; all but "train" may be absent
    root: Path | None = None  # directory of the files, for sources made of files
    left_out: Sequence[LeftOut] = ()
    corrections_file: Path | None = None  # default place of the corrections; it need not exist
    corrections: AppliedCorrections | None = None
    live_weights: np.ndarray | None = None  # float64 [N], images that each LIVE one stands for

    def index(self, part: str) -> np.ndarray:
        """Return the positions of a part's images, less the excluded ones: int64, ascending."""
        return np.flatnonzero((self.parts == part) & ~self.excluded)

    @property
    def excluded(self) -> np.ndarray:
        """Images that a correction leaves out, bool [N]."""
        if self.corrections is None:
            return np.zeros(len(self.labels), bool)
        return self.corrections.excluded

    @property
    def source_labels(self) -> np.ndarray:
        """Labels before the corrections, int64 [N]."""
        return self.labels if self.corrections is None else self.corrections.source_labels

    @property
    def reviewed(self) -> np.ndarray:
        """Images with a correction of any kind, bool [N]."""
        if self.corrections is None:
            return np.zeros(len(self.labels), bool)
        return self.corrections.reviewed

    def count_relabelled(self) -> int:
        """Count the images whose label a correction changes, without those that are left out."""
        return int(((self.labels != self.source_labels) & ~self.excluded).sum())

    def count_excluded(self) -> int:
        """Count the images that corrections leave out."""
        return int(self.excluded.sum())


@dataclass(frozen=True, slots=True)
class ArrayItems:
    """Images held in memory as uint8 [N, H, W, C]."""

    fork_safe: ClassVar[bool] = True

    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.array[i]

    def name(self, i: int) -> str:
        """Return a file name made of the position."""
        return f"{i:06d}.png"

    def fingerprint(self) -> str:
        """Hash the pixels."""
        return hashlib.sha256(self.array.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True, weakref_slot=True)
class FileItems:
    """Image files below a root directory."""

    fork_safe: ClassVar[bool] = True

    root: Path
    paths: list[str]  # relative to the root, with forward slashes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> bytes:
        return read_regular_file(self.root / self.paths[i])

    def name(self, i: int) -> str:
        """Return the path relative to the root."""
        return printable_name(self.paths[i])

    def fingerprint(self) -> str:
        """Hash the path, size and times of each file, and its content where times tell nothing."""
        return fingerprint_files(self.root, self.paths)


def fingerprint_files(root: Path, paths: Sequence[str]) -> str:
    """Return hex digits that change with the files below `root`.

    Path, size, modification time and change time of each file count. A change time can't be set, so
    it differs where an archive restores the modification time. Read-only images such as squashfs
    store one time for all files; there the contents count.
    """
    digest = hashlib.sha256(os.fsencode(root.resolve()))
    change_times = set()
    for path in paths:
        try:
            status = os.stat(root / path)
        except OSError as error:
            digest.update(os.fsencode(f"{path}\0{error.errno}\0"))
            continue
        change_times.add(status.st_ctime_ns)
        state = f"{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
        digest.update(os.fsencode(f"{path}\0{state}\0"))

    if len(change_times) == 1 and len(paths) > 1:
        for path in paths:
            with contextlib.suppress(OSError):
                digest.update(hashlib.sha256(read_regular_file(root / path)).digest())
    return digest.hexdigest()


def locate_file(items: Items, i: int) -> Path | None:
    """Return the path of an image; None for an image that is not a file."""
    if isinstance(items, FileItems):
        return items.root / items.paths[i]
    find_path = getattr(items, "path", None)  # of joined sources
    return find_path(i) if find_path is not None else None


# Helpers of the readers


def printable_name(name: str) -> str:
    """Return a file name that any file or terminal can hold: bytes outside UTF-8 become \\xe9."""
    return os.fsencode(name).decode(errors="backslashreplace")


def normalize_name(name: str) -> str:
    """Return a class name in one of the two forms that Unicode has for é: NFC, the composed one.

    macOS writes file names in the other one, NFD.
    """
    return unicodedata.normalize("NFC", name)


def parse_part(name: str) -> str | None:
    """Return train, val or test for a common name of a part ("Validation"), None for others."""
    name = name.strip().lower()
    if name in PARTS:
        return name
    return PART_ALIASES.get(name)


def import_optional(package: str, extra: str) -> ModuleType:
    """Import an optional package. Raises DataError that names the extra to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(f"{extra}: {error}; pip install 'imago[{extra}]'") from error


def first_present(names: Sequence[str], fields: Collection[str]) -> str | None:
    """Return the first of `names` that is among the fields; None where none is."""
    for name in names:
        if name in fields:
            return name
    return None


def last_component(location: str) -> str:
    """Return the last part of a path or URL, for the name of the data set."""
    return location.rstrip("/").rpartition("/")[2]


def to_item(value: object) -> bytes | np.ndarray:
    """Convert an image as a source stores it to an item: file bytes, or uint8 [H, W, C].

    Takes bytes, PIL images, and uint8 arrays or tensors: gray, RGB or RGBA, channels first or last.
    Raises OSError for anything else.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)

    # Pillow would clip deeper modes to 8 bits; they stay as they are and are refused below.
    if isinstance(value, Image.Image) and not value.mode.startswith(DEEP_MODES):
        value = value.convert(_mode_with_8_bits(value))

    array = np.asarray(value)
    pixels = array[:, :, None] if array.ndim == 2 else array
    if pixels.ndim == 3 and pixels.shape[2] not in CHANNEL_COUNTS:
        pixels = pixels.transpose(1, 2, 0)

    is_image = (
        array.dtype == np.uint8
        and pixels.ndim == 3
        and pixels.shape[2] in CHANNEL_COUNTS
        and array.size > 0
    )
    if not is_image:
        raise OSError(f"{type(value).__name__} of {array.dtype} {array.shape} is not an image")
    return np.ascontiguousarray(pixels)


def _mode_with_8_bits(picture: Image.Image) -> str:
    if picture.has_transparency_data:
        return "RGBA"
    return "L" if picture.mode == "L" else "RGB"


def number_classes(labels: Sequence[str | None]) -> tuple[list[str], np.ndarray]:
    """Return the sorted class names, and each label's class, int64 [N]; NO_LABEL for None.

    Names are sorted as numbers where all of them are. Names that differ in their Unicode form only
    are one class.
    """
    labels = [name if name is None else normalize_name(name) for name in labels]
    names = sorted({name for name in labels if name is not None})
    if all(name.isdecimal() for name in names):
        names.sort(key=int)  # stable: "01" stays before "1"

    numbers: dict[str | None, int] = {name: k for k, name in enumerate(names)}
    return names, np.array([numbers.get(name, NO_LABEL) for name in labels], np.int64)


def join_parts(
    arrays: dict[str, tuple[np.ndarray, np.ndarray]],
) -> tuple[ArrayItems, np.ndarray, np.ndarray]:
    """Join (pixels, labels) of each part.

    Returns items, labels int64 [N], and the part of each image [N].
    """
    pixels = np.concatenate([_with_channel_axis(part_pixels) for part_pixels, _ in arrays.values()])
    labels = np.concatenate(
        [np.asarray(part_labels, np.int64) for _, part_labels in arrays.values()]
    )
    parts = np.repeat(list(arrays), [len(part_labels) for _, part_labels in arrays.values()])
    return ArrayItems(np.ascontiguousarray(pixels)), labels, parts


def _with_channel_axis(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., None] if pixels.ndim == 3 else pixels
