"""Data sets made for streaming, on disk or in an object store: LitData and Deep Lake."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data.cache import replace_text
from train.data.source import (
    PARTS,
    DataError,
    LabelledImages,
    expand_home,
    import_optional,
    number_classes,
    parse_part,
    to_item,
)

IMAGE_FIELDS = ("image", "images", "img", "jpeg", "jpg", "png")
LABEL_FIELDS = ("label", "labels", "class", "cls", "target")


def read_litdata(location: str, cache: Path | None) -> LabelledImages:
    """Read what `litdata.optimize` wrote: a directory or a URL such as s3://bucket/photos.

    The location may hold train/, val/ and test/. An element is a mapping with an image (bytes,
    array or PIL image) and a label (number or name), or a pair of the two.

    Object stores are accessed with the credentials of the environment (AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL, …). The labels are read once, which reads all elements once, and kept in
    `cache`. Raises DataError.
    """
    import_optional("litdata", "litdata")
    _allow_plain_http()
    is_url = "://" in location
    location = location.rstrip("/") if is_url else str(expand_home(location))

    datasets = _open_parts(location)
    labels: list[str | None] = []
    for dataset in datasets.values():
        labels += dataset.labels(cache)
    classes, numbers = number_classes(labels)
    parts = np.repeat(list(datasets), [len(dataset) for dataset in datasets.values()])
    items = ConcatenatedItems(list(datasets.values()))
    return LabelledImages(_last_component(location), classes, items, numbers, parts)


def _allow_plain_http() -> None:
    """Let LitData's downloader use an object store that is addressed by http://.

    Stores inside a cluster often are. The downloader has no public option for it.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if not endpoint.startswith("http:"):
        return
    from litdata.streaming import downloader

    getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", {})["allow_http"] = True


def _open_parts(location: str) -> "dict[str, LitDataItems]":
    """Open the data set of each part; a data set without parts is the training part."""
    datasets = {}
    for part in PARTS:
        dataset = _open_litdata(f"{location}/{part}")
        if dataset is not None and len(dataset) > 0:
            datasets[part] = dataset
    if "train" in datasets:
        return datasets

    whole = _open_litdata(location)
    if whole is None:
        raise DataError(
            f"{location}: no index.json there nor in its train/; litdata.optimize writes one"
        )
    return {"train": whole}


def _open_litdata(location: str) -> "LitDataItems | None":
    """Open the data set at a location; None where there is none."""
    if "://" not in location and not (Path(location) / "index.json").is_file():
        return None
    try:
        return LitDataItems(location)
    except Exception as error:  # the clients of the stores share no base class
        if "index" in str(error) or "Not Found" in str(error) or "404" in str(error):
            return None
        raise DataError(
            f"{location}: not readable by litdata: {str(error).splitlines()[0]}"
        ) from error


class LitDataItems:
    """One LitData data set.

    Each process opens the data set for itself: LitData reads with threads, which do not survive a
    fork.
    """

    def __init__(self, location: str):
        self.location = location
        self._dataset: Any = None
        self._process_id = -1  # the process that opened `_dataset`

        # len() of the data set is the share of one process.
        index = json.loads(self._read_index())
        self.size = sum(chunk["chunk_size"] for chunk in index["chunks"])

    @property
    def fork_safe(self) -> bool:
        """False for object stores, whose downloader runs threads."""
        return "://" not in self.location

    def _open(self) -> Any:
        """Return this process's litdata.StreamingDataset."""
        if self._process_id != os.getpid():
            from litdata import StreamingDataset
            from litdata.streaming.serializers import BytesSerializer

            # JPEG files stay bytes: `models.image` decodes them.
            dataset = StreamingDataset(self.location, serializers={"jpeg": BytesSerializer()})
            # After a slice, even an empty one, it downloads whole chunks and keeps them on disk.
            dataset[:0]
            self._dataset = dataset
            self._process_id = os.getpid()
        return self._dataset

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open data set, which does not survive pickling."""
        return {**self.__dict__, "_dataset": None, "_process_id": -1}

    def __len__(self) -> int:
        return self.size

    def _element(self, i: int) -> tuple[object, object]:
        """Return image and label as they were written."""
        element = self._open()[int(i)]
        if not isinstance(element, dict):
            return element[0], element[1]

        image_field = _first_present(IMAGE_FIELDS, element)
        label_field = _first_present(LABEL_FIELDS, element)
        if image_field is None or label_field is None:
            raise DataError(
                f"{self.location}: element {i} has {', '.join(element)}; name them image and label"
            )
        return element[image_field], element[label_field]

    def __getitem__(self, i: int) -> bytes | np.ndarray:
        image, _ = self._element(i)
        return to_item(image)

    def labels(self, cache: Path | None) -> list[str | None]:
        """Return the class name of each element, kept in `cache` by the content of index.json."""
        kept = cache / "labels" / f"{self.fingerprint()[:32]}.json" if cache else None
        if kept is not None:
            with contextlib.suppress(OSError, ValueError):
                labels = json.loads(kept.read_text())
                if isinstance(labels, list) and len(labels) == self.size:
                    return labels

        labels = [_label_text(self._element(i)[1]) for i in range(self.size)]
        if kept is not None:
            with contextlib.suppress(OSError):  # the cache only saves time
                kept.parent.mkdir(parents=True, exist_ok=True)
                replace_text(kept, json.dumps(labels))
        return labels

    def name(self, i: int) -> str:
        """Return the position in six digits."""
        return f"{i:06d}"

    def _read_index(self) -> bytes:
        """Read index.json: each chunk's size in bytes and number of elements."""
        return (Path(self._open().input_dir.path) / "index.json").read_bytes()

    def fingerprint(self) -> str:
        """Hash the location and its index."""
        return hashlib.sha256(self.location.encode() + self._read_index()).hexdigest()


def _first_present(names: Sequence[str], fields: Mapping[str, object]) -> str | None:
    for name in names:
        if name in fields:
            return name
    return None


def _label_text(value: Any) -> str | None:
    """Return a label, which may be a tensor or array of one element, as text."""
    if value is None:
        return None
    return str(value.item() if hasattr(value, "item") else value)


def _last_component(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2]


class ConcatenatedItems:
    """Several LitData sets, one after the other."""

    def __init__(self, datasets: list[LitDataItems]):
        self.datasets = datasets
        self.ends = np.cumsum([len(dataset) for dataset in datasets])
        self.fork_safe = all(dataset.fork_safe for dataset in datasets)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> bytes | np.ndarray:
        k = int(np.searchsorted(self.ends, i, "right"))
        start = int(self.ends[k - 1]) if k > 0 else 0
        return self.datasets[k][i - start]

    def name(self, i: int) -> str:
        """Return the position in six digits."""
        return f"{i:06d}"

    def fingerprint(self) -> str:
        """Hash the fingerprints of all sets."""
        fingerprints = "".join(dataset.fingerprint() for dataset in self.datasets)
        return hashlib.sha256(fingerprints.encode()).hexdigest()


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
        _last_component(location),
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
    named = _first_present(names, kinds)
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
