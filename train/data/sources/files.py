"""Files on disk: a folder of class folders, or a CSV file of paths and labels."""

import csv
import os
from pathlib import Path

import numpy as np

from train.data.source import (
    DataError,
    FileItems,
    LabelledImages,
    number_classes,
    parse_part,
    printable_name,
)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
LISTED_NAMES = 5  # folders that a message names


def read_folder(root: Path) -> LabelledImages:
    """Read a folder of class folders, or of parts (train/, val/, test/) with class folders each.

    `parse_part` says which names parts may have. Hidden files and folders are skipped; class
    folders are searched to any depth. A class may be named like a part: train/ is a class where it
    holds images and has neighbours of other names. Raises DataError.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")

    class_folders = _find_class_folders(root)
    parts = []
    labels = []
    paths = []
    for part, folder in class_folders:
        for path in _image_paths(folder, root):
            parts.append(part)
            labels.append(printable_name(folder.name))
            paths.append(path)
    if not paths:
        raise DataError(_describe_empty(root))

    classes = sorted({label for part, label in zip(parts, labels, strict=True) if part == "train"})
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise DataError(
            f"{root}: class {unknown[0]!r} is not in the training part; add images or remove its "
            "folder"
        )
    numbers = {name: k for k, name in enumerate(classes)}
    return LabelledImages(
        root.name,
        classes,
        FileItems(root, paths),
        np.array([numbers[label] for label in labels], np.int64),
        np.array(parts),
        root,
    )


def _find_class_folders(root: Path) -> list[tuple[str, Path]]:
    """Return (part, class folder) for each class folder of each part."""
    folders = _subfolders(root)
    part_folders = []
    for folder in folders:
        part = parse_part(folder.name)
        if part is not None:
            part_folders.append((part, folder))

    if not _are_parts(folders, part_folders):
        _check_unnamed_parts(root, folders)
        part_folders = [("train", root)]
    class_folders = []
    for part, folder in part_folders:
        for class_folder in _subfolders(folder):
            class_folders.append((part, class_folder))
    return class_folders


def _are_parts(folders: list[Path], part_folders: list[tuple[str, Path]]) -> bool:
    """Whether the folders named like parts are parts, rather than classes with such names."""
    training = [folder for part, folder in part_folders if part == "train"]
    if not training:
        return False
    all_named = len(part_folders) == len(folders)
    return all_named or any(_subfolders(folder) for folder in training)


def _check_unnamed_parts(root: Path, folders: list[Path]) -> None:
    """Raise DataError where folders look like parts under unknown names.

    They do where all of them hold the same folders, and no images directly.
    """
    if len(folders) < 2:
        return
    first = _subfolder_names(folders[0])
    if len(first) < 2 or any(_subfolder_names(folder) != first for folder in folders):
        return
    if any(_holds_images(folder) for folder in folders):
        return

    outer = ", ".join(printable_name(folder.name) for folder in folders[:LISTED_NAMES])
    inner = ", ".join(printable_name(name) for name in first[:LISTED_NAMES])
    raise DataError(
        f"{root}: {outer} hold the same folders ({inner}) and no images of their own; rename them "
        "to train, val and test if they are parts, or name the classes in a CSV file"
    )


def _holds_images(folder: Path) -> bool:
    return any(_is_image_name(path.name) for path in folder.iterdir())


def _is_image_name(name: str) -> bool:
    if name.startswith("."):
        return False
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _subfolders(folder: Path) -> list[Path]:
    """Return the folders that are not hidden, sorted."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _subfolder_names(folder: Path) -> list[str]:
    return [subfolder.name for subfolder in _subfolders(folder)]


def _image_paths(folder: Path, root: Path) -> list[str]:
    """Return paths of image files at any depth, relative to `root`, sorted."""
    paths = []
    for directory, subdirectories, names in os.walk(folder, followlinks=True):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        for name in names:
            if _is_image_name(name):
                paths.append(Path(directory, name).relative_to(root).as_posix())
    return sorted(paths)


def _describe_empty(root: Path) -> str:
    if _holds_images(root):
        return f"{root}: images, but no class folders; put each class in a folder of its name"
    return (
        f"{root}: no images; it must hold one folder a class, or train/ and test/ with class "
        "folders"
    )


def read_csv(path: Path) -> LabelledImages:
    """Read a CSV file with the columns `path` and `label`, and optionally `split`.

    A split is train, val or test, or a common name of these. Paths are relative to the file's own
    folder. Missing images count as unreadable. Raises DataError.
    """
    rows = _read_rows(path)
    for number, row in enumerate(rows, 2):
        row["label"] = (row["label"] or "").strip()
        _check_row(f"{path}: line {number}", row)
    if not rows:
        raise DataError(f"{path}: no rows")

    classes, labels = number_classes([row["label"] for row in rows])
    parts = np.array([parse_part(row.get("split") or "train") for row in rows])
    items = FileItems(path.parent, [row["path"] for row in rows])
    return LabelledImages(path.stem, classes, items, labels, parts)


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as a CSV file: {error}") from error

    for column in ("path", "label"):
        if column not in columns:
            present = ", ".join(columns) or "nothing"
            raise DataError(f"{path}: no column {column!r} in the first line; it has {present}")
    return rows


def _check_row(line: str, row: dict[str, str]) -> None:
    """Raise DataError, beginning with `line`, where a row can't be used."""
    if not row["path"] or not row["label"]:
        raise DataError(f"{line} lacks a path or a label")
    if "\0" in row["path"]:
        raise DataError(f"{line}: a NUL byte in the path; write the file as UTF-8 text")
    if row.get("split") and not parse_part(row["split"]):
        raise DataError(f"{line}: split {row['split']!r} is not one of train, val, test")
