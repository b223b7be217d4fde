"""The test images of a bundle: a list in the bundle, and where their files are.

test_images.csv lists the images that no training of this bundle has seen:

    path,label,sha256,part,weight
    /photos/cat/07.jpg,cat,9f86…,test,1
    /kept/2026-11-30/2f1a….jpg,dog,2f1a…,live,20

`weight` is the number of images of the traffic that a live image stands for. Where the data is not
made of files, test_images.zip holds the images as PNG, and the paths are names in it.
"""

import csv
import hashlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from models.bundle import Bundle, BundleError, Manifest
from models.bundle.files import read_file
from models.comparison.results import LIVE, TEST, Part
from models.image.files import find_files, is_hidden, is_image_file, read_regular_file

LIST_FILE = "test_images.csv"
PACKED_FILE = "test_images.zip"
COLUMNS = ("path", "label", "sha256", "part", "weight")
PATH_BYTES = "surrogateescape"  # paths need not be UTF-8
MAX_LIST_BYTES = 1 << 30
MAX_PACKED_BYTES = 16 << 20
"""Of all images in test_images.zip; every server copies it with the bundle."""

# Raised by zipfile for a damaged or hostile archive. RuntimeError: encrypted, or an unknown method.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,
    ValueError,
)

PATH_COLUMNS = ("path", "file", "filename", "image")
TEST_FOLDERS = ("test", "testing")


@dataclass(frozen=True)
class TestImage:
    """One image with its true class."""

    __test__ = False  # for pytest: this is no test

    name: str
    label: str
    sha256: str  # hex digits of the file or pixels; empty where it is not known
    part: Part
    weight: float  # images that this one stands for; 1 in the test part
    read: Callable[[], bytes]  # raises OSError


def write_test_images(directory: Path, images: Sequence[TestImage], is_packed: bool) -> None:
    """Write the list of a bundle's test images, and the images themselves where they are packed.

    Where they are more than MAX_PACKED_BYTES, those with the smallest digests are packed. So two
    versions of a model keep the same images, as far as both have them.
    """
    if is_packed:
        images = _pack(directory / PACKED_FILE, images)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for image in images:
        weight = f"{image.weight:.6g}"
        writer.writerow((image.name, image.label, image.sha256, image.part, weight))
    (directory / LIST_FILE).write_bytes(text.getvalue().encode(errors=PATH_BYTES))


def _pack(path: Path, images: Sequence[TestImage]) -> list[TestImage]:
    """Write images to a .zip; return those that it holds."""
    packed: list[TestImage] = []
    total = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for image in sort_by_digest(images):
            content = image.read()
            total += len(content)
            if total > MAX_PACKED_BYTES:
                break
            # A fixed date: the same data gives the same file.
            archive.writestr(zipfile.ZipInfo(image.name), content)
            packed.append(image)
    return packed


def sort_by_digest(images: Iterable[TestImage]) -> list[TestImage]:
    """Return the images in the order of their digests, which is a random one."""
    return sorted(images, key=lambda image: image.sha256)


def limit_images(images: Sequence[TestImage], limit: int) -> list[TestImage]:
    """Return at most `limit` images of each part, those with the smallest digests; 0 for all."""
    if not limit:
        return list(images)
    limited: list[TestImage] = []
    for part in (TEST, LIVE):
        of_part = [image for image in images if image.part == part]
        limited += sort_by_digest(of_part)[:limit]
    return limited


# Reading


def read_test_images(bundle: Bundle, data: Path | None = None) -> list[TestImage]:
    """Return the images that a bundle lists; none for a bundle without a list.

    `data`: a folder in which the files are searched by name and digest, in place of the paths in
    the list. Raises BundleError for a list that can't be read.
    """
    path = bundle.path / LIST_FILE
    if not path.exists():
        return []
    content = read_file(path, MAX_LIST_BYTES)
    open_file = _open_packed(bundle.path / PACKED_FILE) or _open_paths(data)
    try:
        rows = list(
            csv.DictReader(io.StringIO(content.decode(errors=PATH_BYTES), newline=""), strict=True)
        )
        return [_parse_row(row, open_file) for row in rows]
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: not a list of test images: {error}") from error


Opener = Callable[[str, str], bytes]
"""Returns the contents of a path with a digest. Raises OSError."""


def _parse_row(row: dict[str, str], open_file: Opener) -> TestImage:
    if row["part"] not in (TEST, LIVE):
        raise ValueError(f"unknown part {row['part']!r}")
    weight = float(row["weight"])
    if not 0 < weight < math.inf:
        raise ValueError(f"weight {weight} is not a positive number")
    return TestImage(
        name=row["path"],
        label=row["label"],
        sha256=row["sha256"],
        part=cast(Part, row["part"]),
        weight=weight,
        read=partial(open_file, row["path"], row["sha256"]),
    )


def _open_packed(path: Path) -> Opener | None:
    """Return the reader of test_images.zip; None where a bundle has none."""
    if not path.exists():
        return None
    content = read_file(path, 2 * MAX_PACKED_BYTES)
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except ARCHIVE_ERRORS as error:
        raise BundleError(f"{path}: {error}") from error

    def read(name: str, sha256: str) -> bytes:
        try:
            if archive.getinfo(name).file_size > MAX_PACKED_BYTES:
                raise OSError(f"{name}: too large")
            return archive.read(name)
        except (KeyError, *ARCHIVE_ERRORS) as error:
            raise FileNotFoundError(f"{name}: not in {path}") from error

    return read


def _open_paths(data: Path | None) -> Opener:
    """Return the reader of files on disk, which checks that they have not changed."""
    paths_by_name: dict[str, list[Path]] = {}
    if data is not None:
        for path in _list_images(data):
            paths_by_name.setdefault(path.name, []).append(path)

    def read(name: str, sha256: str) -> bytes:
        candidates = [Path(name)] if data is None else paths_by_name.get(Path(name).name, [])
        for path in candidates:
            content = read_regular_file(path)
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
        raise FileNotFoundError(f"{name}: gone or changed")

    return read


def read_labelled_images(data: Path) -> list[TestImage]:
    """Return the images of a folder with one folder a class, or of a CSV file with path and label.

    Of a folder with a folder `test`, and of a CSV file with a column `split`, only the test part is
    taken. Raises BundleError where there are no images.
    """
    images = _read_csv(data) if data.suffix.lower() == ".csv" else _read_folder(data)
    if not images:
        raise BundleError(
            f"{data}: no images; give a folder with one folder a class, or a CSV file with the "
            "columns path and label"
        )
    return images


def _read_folder(root: Path) -> list[TestImage]:
    for name in TEST_FOLDERS:
        if (root / name).is_dir():
            root = root / name
            break
    images: list[TestImage] = []
    for folder in _list_folders(root):
        for path in _list_images(folder):
            images.append(_on_disk(path, folder.name))
    return images


def _list_folders(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        raise BundleError(f"{root}: can't be listed: {error.strerror}") from error
    return sorted(root / name for name in names if not is_hidden(name))


def _list_images(folder: Path) -> Iterator[Path]:
    (found,) = find_files([folder])
    for path in found.files:
        if is_image_file(path):
            yield Path(path)


def _read_csv(path: Path) -> list[TestImage]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BundleError(f"{path}: not readable as a CSV file: {error}") from error

    images: list[TestImage] = []
    for row in rows:
        values = {(name or "").strip().lower(): value for name, value in row.items()}
        file = next((values[name] for name in PATH_COLUMNS if values.get(name)), None)
        label = values.get("label")
        if not file or not label:
            raise BundleError(f"{path}: lacks a path or a label; name the columns path and label")
        if (values.get("split") or "test") in TEST_FOLDERS:
            images.append(_on_disk(path.parent / file, label))
    return images


def _on_disk(path: Path, label: str) -> TestImage:
    return TestImage(
        name=str(path),
        label=label,
        sha256="",
        part="test",
        weight=1.0,
        read=partial(read_regular_file, path),
    )


# Choosing


@dataclass(frozen=True)
class ChosenImages:
    """The images that two versions are compared on."""

    images: list[TestImage]
    notes: list[str]


def choose_images(
    old: Sequence[TestImage], new: Sequence[TestImage], old_version: Manifest, new_version: Manifest
) -> ChosenImages:
    """Return the test images of two versions that neither of them was trained on.

    Those are the test images of both, with the labels of the new version, and those of a class that
    the other version does not know. No version is trained on an image of a live test set. Where one
    version lists none, those of the other are taken, and a note says that the accuracy of the first
    may be too high.
    """
    if not old or not new:
        title = (old_version if not old else new_version).title
        note = (
            f"{title} does not list its test images; it may have been trained on some of the "
            "compared images"
        )
        images = [*old, *new]
        return ChosenImages(images, [note] if images else [])

    old_test = [image for image in old if image.part == TEST]
    new_test = [image for image in new if image.part == TEST]
    old_classes = set(old_version.classes)
    new_classes = set(new_version.classes)
    of_added = [image for image in new_test if image.label not in old_classes]
    of_removed = [image for image in old_test if image.label not in new_classes]

    old_digests = {image.sha256 for image in old_test}
    of_known = [image for image in new_test if image.label in old_classes]
    shared = [image for image in of_known if image.sha256 in old_digests]
    live = {image.sha256: image for image in [*old, *new] if image.part == LIVE}
    notes: list[str] = []
    if len(shared) < len(of_known):
        notes.append(
            f"compared on the {len(shared)} of {len(of_known)} test images that are test images of "
            f"both {old_version.title} and {new_version.title}"
        )
    return ChosenImages([*shared, *of_added, *of_removed, *live.values()], notes)


def choose_images_of_bundles(old: Bundle, new: Bundle, data: Path | None) -> ChosenImages:
    """Return the images to compare two bundles on.

    `data`: a folder or a CSV file. Where it holds listed test images, these are taken from it, and
    otherwise all of its images. Raises BundleError where there are none.
    """
    search = data if data is not None and data.is_dir() else None
    if data is None or search is not None:
        old_images = read_test_images(old, search)
        new_images = read_test_images(new, search)
        chosen = choose_images(old_images, new_images, old.manifest, new.manifest)
        if data is not None:
            readable = [image for image in chosen.images if _is_readable(image)]
            chosen = ChosenImages(readable, chosen.notes)
        if chosen.images:
            return chosen
    if data is not None:
        return ChosenImages(read_labelled_images(data), [])
    raise BundleError(
        f"{old.manifest.title} and {new.manifest.title} list no test image that both can be "
        "compared on; give labelled images that neither was trained on with --data DIR"
    )


def _is_readable(image: TestImage) -> bool:
    try:
        image.read()
    except OSError:
        return False
    return True
