"""LitData sets, on disk or in an object store.

index.json says how each field of an element is stored. Some of the ways run code that the data set
brings: pickled objects, and containers that name a Python function. Such sets are refused.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from models.image.files import IMAGE_SUFFIXES
from train.data.cache import replace_text
from train.data.source import (
    IMAGE_FIELDS,
    LABEL_FIELDS,
    PARTS,
    DataError,
    LabelledImages,
    expand_home,
    fingerprint_files,
    first_present,
    import_optional,
    last_component,
    number_classes,
    to_item,
)

# Serializers whose values are text, numbers, arrays or Pillow images.
VALUE_SERIALIZERS = (
    *("str", "text", "bool", "int", "float", "json", "pil"),
    *("numpy", "no_header_numpy", "tensor", "no_header_tensor"),
)
# Serializers of files. These stay bytes: `models.image` decodes them.
FILE_SERIALIZERS = ("bytes", "file", "image", "jpeg", "tifffile")
SAFE_SERIALIZERS = frozenset((*VALUE_SERIALIZERS, *FILE_SERIALIZERS))
UNPICKLING_SERIALIZERS = ("pickle", "graph")
# Containers of an element's fields. Others name a Python module to import.
SAFE_CONTAINERS = frozenset(
    ("builtins.dict", "builtins.list", "builtins.tuple", "collections.OrderedDict")
)
IMAGE_ENDINGS = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


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
    return LabelledImages(last_component(location), classes, items, numbers, parts)


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
    except DataError:
        raise
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
        index = json.loads(_read_index(self._open()))
        self.size = sum(chunk["chunk_size"] for chunk in index["chunks"])
        self._chunks = [chunk["filename"] for chunk in index["chunks"]]

    @property
    def fork_safe(self) -> bool:
        """False for object stores, whose downloader runs threads."""
        return "://" not in self.location

    def _open(self) -> Any:
        """Return this process's litdata.StreamingDataset. Raises DataError for an unsafe one."""
        if self._process_id != os.getpid():
            from litdata import StreamingDataset

            dataset = StreamingDataset(self.location, serializers=_build_serializers())
            # Nothing is deserialized before this check, not even the index.
            _check_index(self.location, _read_index(dataset))
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

        image_field = first_present(IMAGE_FIELDS, element)
        label_field = first_present(LABEL_FIELDS, element)
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

    def fingerprint(self) -> str:
        """Hash the location, its index and, on a disk, the state of the files."""
        digest = hashlib.sha256(self.location.encode() + _read_index(self._open()))
        if "://" not in self.location:
            digest.update(fingerprint_files(Path(self.location), self._chunks).encode())
        return digest.hexdigest()


class RefusedSerializer:
    """Stands in for serializers that unpickle, whatever an index says."""

    def setup(self, metadata: object) -> None:
        """Accept any description."""

    def deserialize(self, data: bytes) -> object:
        """Raise DataError."""
        raise DataError("the litdata set holds pickled objects, which are not read")


def _build_serializers() -> dict[str, Any]:
    """Return the serializers that replace LitData's own."""
    from litdata.streaming.serializers import BytesSerializer

    files = {name: BytesSerializer() for name in FILE_SERIALIZERS}
    return {**files, **{name: RefusedSerializer() for name in UNPICKLING_SERIALIZERS}}


def _read_index(dataset: Any) -> bytes:
    """Read index.json: how elements are stored, and each chunk's name and number of elements."""
    return (Path(dataset.input_dir.path) / "index.json").read_bytes()


def _check_index(location: str, content: bytes) -> None:
    """Raise DataError where an index is damaged, or where reading its elements would run code."""
    try:
        config = json.loads(content)["config"]
        formats = [str(name) for name in config["data_format"]]
        spec = config["data_spec"]
        containers = _list_containers(json.loads(spec)[1]) if spec else set()
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{location}: index.json is not that of images and labels written by litdata.optimize"
        ) from error

    unsafe = [name for name in formats if not _is_safe_format(name)]
    unsafe += sorted(containers - SAFE_CONTAINERS)
    if unsafe:
        raise DataError(
            f"{location}: index.json stores {unsafe[0]!r}, and reading it could run code of the "
            "data set; write the set again with images as bytes or arrays and labels as numbers "
            "or text"
        )


def _is_safe_format(name: str) -> bool:
    """Whether a format such as "int", "image:png" or "no_header_numpy:3" runs no code.

    LitData takes the detail after the colon for the serializer where there is one of that name.
    """
    serializer, _, detail = name.partition(":")
    is_plain_detail = detail == "" or detail.isdecimal() or detail in IMAGE_ENDINGS
    return serializer in SAFE_SERIALIZERS and (is_plain_detail or detail in SAFE_SERIALIZERS)


def _list_containers(spec: dict[str, Any]) -> set[str]:
    """Return the types of all containers in a tree; leaves have the type None."""
    containers = set()
    pending = [spec]
    while pending:
        node = pending.pop()
        if node["type"] is not None:
            containers.add(str(node["type"]))
        pending += node["children_spec"]
    return containers


def _label_text(value: Any) -> str | None:
    """Return a label, which may be a tensor or array of one element, as text."""
    if value is None:
        return None
    return str(value.item() if hasattr(value, "item") else value)


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
