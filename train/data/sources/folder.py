"""A folder of class folders, or of train/, val/ and test/ with class folders each.

Data sets are unpacked in many shapes: training_set/training_set/<class>, seg_train/seg_train/…,
test/ without class folders. A shape is read where it is plain, and refused otherwise: parts must
never become classes.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.image.files import (
    FORMATS,
    FoundFiles,
    find_files,
    has_image_suffix,
    is_hidden,
    is_image_file,
)
from train.data.source import (
    CORRECTIONS_FILE,
    DataError,
    FileItems,
    LabelledImages,
    LeftOut,
    normalize_name,
    notify,
    number_classes,
    parse_part,
    printable_name,
)

LISTED_NAMES = 5  # folders that a message names
LISTED_SUFFIXES = 3  # endings that a message names
# Words in the names of part folders that say nothing: training_set, test_images.
GENERIC_WORDS = frozenset(("set", "data", "dataset", "images", "image", "imgs", "img"))
# 2023, 2023-05, 2023-05-01: folders that sort the images of a class, and no classes.
DATE = re.compile(r"(19|20)\d\d([-_. ]?\d\d){0,2}")


class ClassFolder(NamedTuple):
    """The images of one class in one part."""

    part: str
    label: str
    path: Path


class Layout(NamedTuple):
    """Where the class folders are, and what is in no class folder."""

    class_folders: list[ClassFolder]
    left_out: list[LeftOut]


def read_folder(root: Path) -> LabelledImages:
    """Read a folder of class folders, or of parts (train/, val/, test/) with class folders each.

    Class folders are searched to any depth, as `models.image.files` does. A class may be named like
    a part: train/ is a class where it holds images and has neighbours of other names. What is left
    out is printed in one line. Raises DataError.
    """
    _check_listable(root)

    layout = _read_layout(root)
    left_out = list(layout.left_out)
    parts = []
    labels = []
    paths = []
    found_files = find_files([class_folder.path for class_folder in layout.class_folders])
    for class_folder, found in zip(layout.class_folders, found_files, strict=True):
        folder = class_folder.path.relative_to(root).as_posix()
        start = len(os.fspath(class_folder.path))
        images, others = _separate_images(found)
        for path in images:
            parts.append(class_folder.part)
            labels.append(class_folder.label)
            paths.append(folder + path[start:])
        left_out += _describe_left_out(printable_name(folder), found, len(images), others)

    if not paths:
        raise DataError(_describe_empty(root, left_out))
    _check_depth(root, layout.class_folders, set(labels))
    _check_training_classes(root, parts, labels)
    if left_out:
        notify(f"{root}: left out: {_join_left_out(left_out)}")

    classes, numbers = number_classes(labels)
    return LabelledImages(
        root.name,
        classes,
        FileItems(root, paths),
        numbers,
        np.array(parts),
        root,
        left_out,
        corrections_file=root / CORRECTIONS_FILE,
    )


def _check_listable(root: Path) -> None:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    try:
        os.listdir(root)
    except OSError as error:
        raise DataError(f"{root}: can't be listed: {error.strerror}") from error


# Layout: which folders are classes


def _read_layout(root: Path) -> Layout:
    """Find the class folders. Raises DataError where parts could be taken for classes."""
    folders = _subfolders(root)
    part_folders = _find_part_folders(folders)
    if not part_folders:
        _check_unnamed_parts(root, folders)
        return _list_class_folders(root, "train", root)

    layout = Layout([], [])
    for part, folder in part_folders:
        inner = _skip_doubled_folders(folder)
        class_folders, left_out = _list_class_folders(inner, part, root)
        if class_folders or part == "train":
            layout.left_out.extend(left_out)
        elif images := _count_images(inner):
            layout.left_out.append(
                LeftOut(
                    _relative_name(inner, root),
                    images,
                    f"{_noun('image', images)} without class folders",
                )
            )
        if part == "train" and not class_folders:
            raise DataError(_describe_flat_part(root, inner))
        layout.class_folders.extend(class_folders)

    named = {folder for _, folder in part_folders}
    others = [folder for folder in folders if folder not in named]
    for folder, found in zip(others, find_files(others), strict=True):
        images = sum(has_image_suffix(path) for path in found.files)
        if images:
            layout.left_out.append(
                LeftOut(printable_name(folder.name), images, f"{_noun('image', images)} in no part")
            )
    return layout


def _find_part_folders(folders: list[Path]) -> list[tuple[str, Path]]:
    """Return (part, folder) of the folders that are parts; empty where the folders are classes.

    Parts share the rest of their names: seg_train and seg_test do, train_station and test_tube do
    not.
    """
    groups: dict[str, list[tuple[str, Path]]] = {}
    for folder in folders:
        name = _parse_part_name(folder.name)
        if name is not None:
            part, rest = name
            groups.setdefault(rest, []).append((part, folder))

    for rest in sorted(groups):
        group = groups[rest]
        parts = {part for part, _ in group}
        if "train" not in parts:
            continue
        if len(group) == len(folders) and (rest == "" or len(parts) > 1):
            return group
        are_plain_names = all(parse_part(folder.name) for _, folder in group)
        if not are_plain_names and len(parts) > 1:
            return group
        training = [_skip_doubled_folders(folder) for part, folder in group if part == "train"]
        if rest == "" and any(_holds_class_folders(folder) for folder in training):
            return group
    return []


def _parse_part_name(name: str) -> tuple[str, str] | None:
    """Return the part that a folder's name contains, and the other words of the name.

    `TrainingSet` and `train_images` are ("train", ""), `seg_pred` is None.
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
    parts = []
    rest = []
    for word in words:
        part = parse_part(word) or parse_part(word.removesuffix("set"))
        if part is not None:
            parts.append(part)
        elif word not in GENERIC_WORDS:
            rest.append(word)
    return (parts[0], " ".join(rest)) if len(parts) == 1 else None


def _skip_doubled_folders(folder: Path) -> Path:
    """Return the inner one of training_set/training_set, which archives often hold."""
    while True:
        inner = _subfolders(folder)
        is_doubled = len(inner) == 1 and inner[0].name.lower() == folder.name.lower()
        if not is_doubled or _count_images(folder):
            return folder
        folder = inner[0]


def _holds_class_folders(folder: Path) -> bool:
    """Whether a folder holds others, which are not just the years of one class."""
    names = _subfolder_names(folder)
    return bool(names) and not all(DATE.fullmatch(name) for name in names)


def _list_class_folders(folder: Path, part: str, root: Path) -> Layout:
    """Return the class folders of a part, and what lies next to them."""
    class_folders = []
    left_out = []
    for subfolder in _subfolders(folder, hidden=True):
        if is_hidden(subfolder.name):
            left_out += _describe_hidden(subfolder, root)
            continue
        label = normalize_name(printable_name(subfolder.name))
        class_folders.append(ClassFolder(part, label, subfolder))

    images = _count_images(folder)
    if images and class_folders:
        name = _relative_name(folder, root)
        left_out.append(
            LeftOut(name, images, f"{_noun('image', images)} outside the class folders")
        )
    return Layout(class_folders, left_out)


def _describe_hidden(folder: Path, root: Path) -> list[LeftOut]:
    images = _count_images(folder)
    if images == 0:
        return []
    return [
        LeftOut(
            _relative_name(folder, root), images, f"{_noun('image', images)} in a hidden folder"
        )
    ]


def _check_unnamed_parts(root: Path, folders: list[Path]) -> None:
    """Raise DataError where folders look like parts under unknown names, not like classes.

    They do where two of them hold the same folders and no images directly. Folders named by date
    are the images of a class by date.
    """
    if folders and all(parse_part(folder.name) for folder in folders):
        listed = _join_names(folder.name for folder in folders)
        raise DataError(
            f"{root}: {listed} but no training part; name the folder with the training images train"
        )

    names = {folder.name for folder in folders}
    seen: list[tuple[Path, set[str]]] = []
    for folder in folders:
        inner = {name for name in _subfolder_names(folder) if not DATE.fullmatch(name)}
        if len(inner) < 2 or _count_images(folder):
            continue
        if len(inner & names) >= 2:
            raise DataError(
                f"{folder}: holds folders of the same names as its neighbours "
                f"({_join_names(sorted(inner & names))}); move it out of {root}"
            )
        for other, other_inner in seen:
            if len(inner & other_inner) >= 2:
                raise DataError(
                    f"{root}: {_join_names((other.name, folder.name))} hold the same folders "
                    f"({_join_names(sorted(inner & other_inner))}) and no images of their own; "
                    "rename them to train, val and test if they are parts, or name the classes in "
                    "a CSV file"
                )
        seen.append((folder, inner))


def _check_depth(root: Path, class_folders: list[ClassFolder], labels: set[str]) -> None:
    """Raise DataError where the only class is a folder around the class folders."""
    if len(labels) != 1:
        return
    outer = next(entry.path for entry in class_folders if entry.label in labels)
    folder = outer
    while not _count_images(folder) and len(_subfolders(folder)) == 1:
        (folder,) = _subfolders(folder)
    inner = [name for name in _subfolder_names(folder) if not DATE.fullmatch(name)]
    if len(inner) < 2 or _count_images(folder):
        return

    listed = _join_names(inner)
    if outer.parent == root:
        raise DataError(
            f"{root}: its only folder is {printable_name(outer.name)}, whose folders look like the "
            f"classes or parts ({listed}); give {folder} instead"
        )
    raise DataError(
        f"{outer.parent}: its only folder is {printable_name(outer.name)}, whose folders look like "
        f"the classes ({listed}); move them from {folder} to {outer.parent}"
    )


def _check_training_classes(root: Path, parts: list[str], labels: list[str]) -> None:
    """Raise DataError where a class is not in the training part."""
    pairs = set(zip(parts, labels, strict=True))
    classes = {label for part, label in pairs if part == "train"}
    unknown = sorted(label for _, label in pairs if label not in classes)
    if unknown:
        raise DataError(
            f"{root}: class {unknown[0]!r} is not in the training part; add images or remove its "
            "folder"
        )


def _subfolders(folder: Path, hidden: bool = False) -> list[Path]:
    """Return the folders in a folder, sorted; those that are hidden only where asked for.

    A folder that can't be listed has none here; `find_files` reports it.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []
    return sorted(folder / name for name in names if hidden or not is_hidden(name))


def _subfolder_names(folder: Path) -> list[str]:
    return [subfolder.name for subfolder in _subfolders(folder)]


def _count_images(folder: Path) -> int:
    """Count the files directly in a folder that are named like images."""
    count = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                is_image = has_image_suffix(entry.name) and not is_hidden(entry.name)
                count += is_image and not entry.is_dir()
    except OSError:
        return 0  # `find_files` reports it
    return count


# Files that are left out


def _separate_images(found: FoundFiles) -> tuple[list[str], list[str]]:
    """Return the paths of images, and of other files."""
    images: list[str] = []
    others: list[str] = []
    for path in found.files:
        kind = images if is_image_file(path) else others
        kind.append(path)
    return images, others


def _describe_left_out(
    name: str, found: FoundFiles, images: int, others: list[str]
) -> list[LeftOut]:
    """Describe what is left out of one class folder, and that it has no images."""
    left_out = []
    if others:
        suffixes = Counter(os.path.splitext(path)[1].lower() or "no ending" for path in others)
        usual = [suffix for suffix, _ in suffixes.most_common(LISTED_SUFFIXES)]
        listed = printable_name(", ".join(usual))
        left_out.append(
            LeftOut(name, len(others), f"{_noun('file', len(others))} not {FORMATS} ({listed})")
        )
    for reason, count in Counter(reason for _, reason in found.skipped).items():
        left_out.append(LeftOut(name, count, reason))
    for reason, count in Counter(str(error.strerror) for error in found.errors).items():
        left_out.append(
            LeftOut(name, count, f"{_noun('folder', count)} that can't be listed ({reason})")
        )
    if images == 0 and not left_out:
        left_out.append(LeftOut(name, 0, "images"))
    return left_out


def _noun(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _join_left_out(left_out: list[LeftOut]) -> str:
    lines = [f"{entry.folder} {entry.count} {entry.reason}" for entry in left_out[:LISTED_NAMES]]
    if len(left_out) > LISTED_NAMES:
        lines.append(f"and {len(left_out) - LISTED_NAMES} more, which the audit lists")
    return "; ".join(lines)


def _describe_empty(root: Path, left_out: list[LeftOut]) -> str:
    if _count_images(root):
        return (
            f"{root}: images, but no class folders; put each class in a folder of its name, or "
            "list path and label in a CSV file"
        )
    line = (
        f"{root}: no images; it must hold one folder a class, or train/ and test/ with class "
        "folders"
    )
    return f"{line}; it has {_join_left_out(left_out)}" if left_out else line


def _describe_flat_part(root: Path, folder: Path) -> str:
    name = _relative_name(folder, root)
    images = _count_images(folder)
    return (
        f"{root}: {name} holds {images} images, but no class folders; put each class in a folder "
        f"of its name ({name}/<class>), or list path and label in a CSV file; train/ and test/ "
        "with class folders are read as parts"
    )


def _relative_name(folder: Path, root: Path) -> str:
    return root.name if folder == root else printable_name(folder.relative_to(root).as_posix())


def _join_names(names: Iterable[str]) -> str:
    listed = [printable_name(name) for name in names]
    if len(listed) > LISTED_NAMES:
        listed = [*listed[:LISTED_NAMES], "…"]
    return ", ".join(listed)
