"""Files on disk: a folder of class folders, or a table of paths and labels."""

import csv
import os
from pathlib import Path

import numpy as np

from train.data.source import DataError, Files, Source, as_text, numbered, part_name

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def folder(root: Path) -> Source:
    """A folder of class folders, or of train/, val/ (valid/) and test/ (or what else `part_name` knows) with class
    folders each.

    Hidden files and folders are passed over; a class folder is searched to any depth. A class may have the name of a
    part: train/ is one where it holds images, beside classes of other names.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    folders = _folders(root)
    parts = {d.name: part for d in folders if (part := part_name(d.name))}
    training = [d for d in folders if parts.get(d.name) == "train"]
    if not training or (len(parts) < len(folders) and not any(map(_folders, training))):
        parts = {"": "train"}
        _refuse_unknown_parts(root, folders)
    found = [
        (part, as_text(d.name), path)
        for name, part in parts.items()
        for d in _folders(root / name)
        for path in _files(d, root)
    ]
    if not found:
        raise DataError(_empty(root))
    trained = sorted({name for part, name, _ in found if part == "train"})
    if extra := sorted({name for _, name, _ in found} - set(trained)):
        raise DataError(
            f"{root}: class {extra[0]!r} is not in the training part; add images or remove its folder"
        )
    number = {name: k for k, name in enumerate(trained)}
    return Source(
        root.name,
        trained,
        Files(root, [path for _, _, path in found]),
        np.array([number[name] for _, name, _ in found], np.int64),
        np.array([part for part, _, _ in found]),
        root,
    )


def _refuse_unknown_parts(root: Path, folders: list[Path]) -> None:
    """Folders that hold the same folders and no image of their own are parts whose names say nothing, not classes."""
    inner = [[d.name for d in _folders(folder)] for folder in folders]
    if (
        len(folders) > 1
        and len(inner[0]) > 1
        and all(names == inner[0] for names in inner)
        and not any(map(_holds_images, folders))
    ):
        raise DataError(
            f"{root}: {', '.join(as_text(d.name) for d in folders[:5])} hold the same folders "
            f"({', '.join(map(as_text, inner[0][:5]))}) and no images of their own; rename them to train, "
            "val and test if they are parts, or name the classes in a CSV file"
        )


def _holds_images(path: Path) -> bool:
    return any(p.suffix.lower() in SUFFIXES for p in path.iterdir() if not p.name.startswith("."))


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(directory: Path, root: Path) -> list[str]:
    """Paths of image files at any depth, relative to `root`, sorted."""
    paths = []
    for place, inner, names in os.walk(directory, followlinks=True):
        inner[:] = [d for d in inner if not d.startswith(".")]
        paths += [
            os.path.join(place, n)
            for n in names
            if not n.startswith(".") and os.path.splitext(n)[1].lower() in SUFFIXES
        ]
    return sorted(Path(p).relative_to(root).as_posix() for p in paths)


def _empty(root: Path) -> str:
    if _holds_images(root):
        return f"{root}: images, but no class folders; put the images of each class in a folder named for it"
    return f"{root}: no images; it must hold one folder a class, or train/ and test/ with class folders"


def table(path: Path) -> Source:
    """A CSV file with the columns `path` and `label`, and `split` (train, val, test) if it likes.

    Paths are relative to the file's own folder. Images that don't exist count as unreadable.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as a CSV file: {error}") from error
    for column in ("path", "label"):
        if column not in columns:
            raise DataError(
                f"{path}: no column {column!r} in the first line; it has {', '.join(columns) or 'nothing'}"
            )
    for number, row in enumerate(rows, 2):
        row["label"] = (row["label"] or "").strip()  # "red " is no other class than "red"
        if not row["path"] or not row["label"]:
            raise DataError(f"{path}: line {number} lacks a path or a label")
        if "\0" in row["path"]:
            raise DataError(
                f"{path}: line {number}: a NUL byte in the path; write the file as UTF-8 text"
            )
        if row.get("split") and not part_name(row["split"]):
            raise DataError(
                f"{path}: line {number}: split {row['split']!r} is none of train, val, test"
            )
    if not rows:
        raise DataError(f"{path}: no rows")
    classes, labels = numbered([row["label"] for row in rows])
    parts = np.array([part_name(row.get("split") or "train") for row in rows])
    return Source(
        path.stem, classes, Files(path.parent, [row["path"] for row in rows]), labels, parts
    )
