"""Hugging Face data sets on disk."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.data.source import NONE, DataError, Source, needs, numbered, part_name, say

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = ("label", "labels", "class", "fine_label", "coarse_label")


def huggingface(place: str) -> Source:
    """A data set that `save_to_disk` wrote: one with parts, or a single one.

    The images are its column of type Image, the labels its column of type ClassLabel, or one called label.
    """
    datasets = needs("datasets", "huggingface")
    path = Path(place).expanduser()
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a data set that Hugging Face's save_to_disk wrote: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        found = {"train": found}
    parts = {name: part_name(name) for name in found if part_name(name)}
    if "train" not in parts.values():
        raise DataError(f"{path}: no part called train; it has {', '.join(found)}")
    first = found[next(name for name, part in parts.items() if part == "train")]
    image = _column(
        path,
        first,
        [c for c, f in first.features.items() if isinstance(f, datasets.Image)],
        "image",
    )
    label = _column(
        path,
        first,
        [c for c, f in first.features.items() if isinstance(f, datasets.ClassLabel)]
        + [c for c in LABELS if c in first.features],
        "label",
    )
    for name in [
        name for name, part in parts.items() if part == "test" and _unlabelled(found[name][label])
    ]:
        say(
            f"{path}: the part {name} has no labels, so it is left out, and a test part is split off the others"
        )
        del parts[name]
    values = [value for name in parts for value in found[name][label]]
    feature = first.features[label]
    if isinstance(feature, datasets.ClassLabel):
        classes, labels = (
            list(feature.names),
            np.array([NONE if v is None else v for v in values], np.int64),
        )
    else:
        classes, labels = numbered([None if value is None else str(value) for value in values])
    raw = [
        found[name].cast_column(image, datasets.Image(decode=False)).select_columns([image])
        for name in parts
    ]
    sizes = [len(part) for part in raw]
    digest = hashlib.sha256(
        "".join(part._fingerprint for part in raw).encode() + labels.tobytes()
    ).hexdigest()
    return Source(
        path.name,
        classes,
        Rows(datasets.concatenate_datasets(raw), image, digest),
        labels,
        np.repeat(list(parts.values()), sizes),
    )


def _column(path: Path, dataset: "Dataset", candidates: list[str], what: str) -> str:
    if not candidates:
        raise DataError(
            f"{path}: no {what} column; its columns are {', '.join(dataset.column_names)}"
        )
    return candidates[0]


def _unlabelled(values: Iterable[object]) -> bool:
    """Whether the labels were kept back, as for the test part of ImageNet."""
    return all(value is None or value == NONE for value in values)


class Rows:
    """The image column of an Arrow table on disk: files' bytes, or paths of files."""

    def __init__(self, dataset: "Dataset", column: str, digest: str):
        self.dataset, self.column, self.digest = dataset, column, digest

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> bytes:
        found = self.dataset[i][self.column] or {}
        if found.get("bytes") is not None:
            return found["bytes"]
        if not found.get("path"):
            raise OSError("the row has no image")
        return Path(found["path"]).read_bytes()

    def name(self, i: int) -> str:
        return f"{i:06d}"

    def fingerprint(self) -> str:
        return self.digest
