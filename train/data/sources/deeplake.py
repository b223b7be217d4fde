"""Deep Lake data sets, on disk or in an object store."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.data.source import (
    IMAGE_FIELDS,
    LABEL_FIELDS,
    DataError,
    LabelledImages,
    expand_home,
    first_present,
    import_optional,
    last_component,
    number_classes,
    parse_part,
    to_item,
)


def read_deeplake(location: str) -> LabelledImages:
    """Read a Deep Lake 4 data set: a directory, or a URL of `deeplake.open` (s3://, gcs://, al://).

    The images are its column of type Image, or one named image; the labels its column of type
    ClassLabel, or one named label. A column named split holds each row's part. Raises DataError.
    """
    package = import_optional("deeplake", "deeplake")
    url = location if "://" in location else f"file://{expand_home(location).resolve()}"
    try:
        dataset = package.open_read_only(url)
    except Exception as error:  # the errors share no base class
        raise DataError(
            f"{location}: not readable by deeplake: {str(error).splitlines()[0]}"
        ) from error

    kinds = {column.name: column.dtype.kind for column in dataset.schema.columns}
    image_kind = package.types.TypeKind.Image
    label_kind = package.types.TypeKind.ClassLabel
    image_column = _find_column(location, kinds, image_kind, IMAGE_FIELDS, "image")
    label_column = _find_column(location, kinds, label_kind, LABEL_FIELDS, "label")

    values = np.asarray(dataset[label_column][:])
    class_names = dict(dataset[label_column].metadata).get("class_names")
    if class_names:
        classes = list(class_names)
        labels = values.astype(np.int64).reshape(-1)
    else:
        classes, labels = number_classes([str(value) for value in values.reshape(-1).tolist()])

    return LabelledImages(
        last_component(location),
        classes,
        DeepLakeItems(url, image_column, dataset.version),
        labels,
        _deeplake_parts(location, dataset, len(labels), "split" in kinds),
    )


def _find_column(
    location: str, kinds: dict[str, object], kind: object, names: Sequence[str], content: str
) -> str:
    """Return the first column of a kind, else the first of the names."""
    for column, column_kind in kinds.items():
        if column_kind == kind:
            return column
    named = first_present(names, kinds)
    if named is None:
        raise DataError(f"{location}: no {content} column; its columns are {', '.join(kinds)}")
    return named


def _deeplake_parts(location: str, dataset: Any, count: int, has_split: bool) -> np.ndarray:
    """Return the part of each row, [N]."""
    if not has_split:
        return np.full(count, "train")
    parts = np.array([parse_part(str(value)) or "" for value in dataset["split"][:]])
    if "" in parts:
        row = int(np.argmin(parts != ""))
        raise DataError(f"{location}: row {row}: its split is not one of train, val, test")
    return parts


class DeepLakeItems:
    """The image column of a Deep Lake data set. Each process opens the data set for itself."""

    fork_safe = True

    def __init__(self, url: str, column: str, version: str):
        self.url = url
        self.column = column
        self.version = version
        self._dataset: Any = None  # the column does not keep its data set alive
        self._rows: Any = None
        self._process_id = -1  # the process that opened `_dataset`
        self.size = len(self._open())

    def _open(self) -> Any:
        """Return this process's column of images."""
        if self._process_id != os.getpid():
            import deeplake

            self._dataset = deeplake.open_read_only(self.url)
            self._rows = self._dataset[self.column]
            self._process_id = os.getpid()
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open data set, which does not survive pickling."""
        return {**self.__dict__, "_dataset": None, "_rows": None, "_process_id": -1}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> bytes | np.ndarray:
        return to_item(self._open().get_bytes(int(i)))

    def name(self, i: int) -> str:
        """Return the position in six digits."""
        return f"{i:06d}"

    def fingerprint(self) -> str:
        """Hash location, column and version."""
        digest = hashlib.sha256(f"{self.url} {self.column} {self.version}".encode())
        return digest.hexdigest()
