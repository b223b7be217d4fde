"""Hugging Face data sets on disk, as `save_to_disk` writes them."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.image.files import read_regular_file
from train.data.source import (
    NO_LABEL,
    DataError,
    LabelledImages,
    expand_home,
    import_optional,
    notify,
    number_classes,
    parse_part,
)

if TYPE_CHECKING:  # an optional package
    from datasets import Dataset

LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "coarse_label")


def read_huggingface(location: str) -> LabelledImages:
    """Read a data set that `save_to_disk` wrote: a dictionary of parts, or a single one.

    The images are its column of type Image; the labels its column of type ClassLabel, or one named
    label. Raises DataError.
    """
    datasets = import_optional("datasets", "huggingface")
    path = expand_home(location)
    splits = _load_splits(path)
    parts = _parse_parts(path, splits)
    first = splits[next(name for name, part in parts.items() if part == "train")]

    images = _columns_of_type(first, datasets.Image)
    image_column = _first_column(path, first, images, "image")
    labels = _columns_of_type(first, datasets.ClassLabel)
    labels += [name for name in LABEL_COLUMNS if name in first.features]
    label_column = _first_column(path, first, labels, "label")

    _drop_unlabelled_tests(path, splits, parts, label_column)
    classes, numbers = _read_labels([splits[name] for name in parts], label_column)

    undecoded = datasets.Image(decode=False)
    tables = [
        splits[name].cast_column(image_column, undecoded).select_columns([image_column])
        for name in parts
    ]
    fingerprints = "".join(table._fingerprint for table in tables)
    digest = hashlib.sha256(fingerprints.encode() + numbers.tobytes()).hexdigest()
    return LabelledImages(
        path.name,
        classes,
        ArrowItems(datasets.concatenate_datasets(tables), image_column, digest),
        numbers,
        np.repeat(list(parts.values()), [len(table) for table in tables]),
    )


def _load_splits(path: Path) -> "dict[str, Dataset]":
    """Load the data set; a single one becomes the split "train"."""
    datasets = import_optional("datasets", "huggingface")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a data set that Hugging Face's save_to_disk wrote: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _parse_parts(path: Path, splits: "dict[str, Dataset]") -> dict[str, str]:
    """Return split name -> train, val or test. Splits of other names are left out."""
    parts = {}
    for name in splits:
        part = parse_part(name)
        if part is not None:
            parts[name] = part
    if "train" not in parts.values():
        raise DataError(f"{path}: no part named train; it has {', '.join(splits)}")
    return parts


def _columns_of_type(dataset: "Dataset", feature_type: type) -> list[str]:
    return [name for name, kind in dataset.features.items() if isinstance(kind, feature_type)]


def _first_column(path: Path, dataset: "Dataset", candidates: list[str], content: str) -> str:
    """Return the first candidate. Raises DataError that lists all columns where there is none."""
    if not candidates:
        columns = ", ".join(dataset.column_names)
        raise DataError(f"{path}: no {content} column; its columns are {columns}")
    return candidates[0]


def _drop_unlabelled_tests(
    path: Path, splits: "dict[str, Dataset]", parts: dict[str, str], label_column: str
) -> None:
    """Remove test splits without labels from `parts`, such as that of ImageNet."""
    for name, part in list(parts.items()):
        if part == "test" and _is_unlabelled(splits[name][label_column]):
            notify(
                f"{path}: the part {name} has no labels, so it is left out, and a test part is "
                "split off the others"
            )
            del parts[name]


def _read_labels(splits: "list[Dataset]", column: str) -> tuple[list[str], np.ndarray]:
    """Return the class names, and the class of each row of all splits, int64 [N]."""
    datasets = import_optional("datasets", "huggingface")
    values: list[object] = []
    for split in splits:
        values.extend(split[column])

    feature = splits[0].features[column]
    if isinstance(feature, datasets.ClassLabel):
        numbers = np.array([NO_LABEL if value is None else value for value in values], np.int64)
        return list(feature.names), numbers
    return number_classes([None if value is None else str(value) for value in values])


def _is_unlabelled(values: Iterable[object]) -> bool:
    return all(value is None or value == NO_LABEL for value in values)


class ArrowItems:
    """The image column of an Arrow table on disk: file bytes, or paths of files."""

    fork_safe = True

    def __init__(self, dataset: "Dataset", column: str, digest: str):
        self.dataset = dataset
        self.column = column
        self.digest = digest

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> bytes:
        image = self.dataset[i][self.column] or {}
        if image.get("bytes") is not None:
            return image["bytes"]
        if not image.get("path"):
            raise OSError("the row has no image")
        return read_regular_file(image["path"])

    def name(self, i: int) -> str:
        """Return the position in six digits."""
        return f"{i:06d}"

    def fingerprint(self) -> str:
        """Return the hash of Hugging Face's fingerprints and the labels."""
        return self.digest
