"""Hugging Face data sets: on disk, as `save_to_disk` writes them, and on the hub."""

import hashlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

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
from train.data.sources.archive import DISK_FULL_ERRORS

if TYPE_CHECKING:  # an optional package
    from datasets import Dataset

HUB_PREFIX = "//datasets/"
HUB_LOCATION = re.compile(
    r"(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<config>[^/]+))?/?"
)
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "coarse_label")


def read_huggingface(location: str, refresh: bool = True) -> LabelledImages:
    """Read a data set on disk that `save_to_disk` wrote, or one of the hub.

    On disk it is a dictionary of parts, or a single one. A data set of the hub is written
    //datasets/owner/name, the rest of hf://datasets/owner/name; `@revision` and one of its
    configurations, `/config`, may follow. The images are the column of type Image; the labels the
    column of type ClassLabel, or one named label. With `refresh` false, the hub is not asked for
    changes. Raises DataError.
    """
    datasets = import_optional("datasets", "huggingface")
    if location.startswith(HUB_PREFIX):
        name = f"hf:{location}"
        splits = _load_hub_splits(name, location.removeprefix(HUB_PREFIX), refresh)
        title = location.removeprefix(HUB_PREFIX).split("/")[1].partition("@")[0]
    else:
        path = expand_home(location)
        name = str(path)
        splits = _load_splits(path)
        title = path.name
    parts = _parse_parts(name, splits)
    first = splits[next(split for split, part in parts.items() if part == "train")]

    images = _columns_of_type(first, datasets.Image)
    image_column = _first_column(name, first, images, "image")
    labels = _columns_of_type(first, datasets.ClassLabel)
    labels += [column for column in LABEL_COLUMNS if column in first.features]
    label_column = _first_column(name, first, labels, "label")

    _drop_unlabelled_tests(name, splits, parts, label_column)
    classes, numbers = _read_labels([splits[split] for split in parts], label_column)

    undecoded = datasets.Image(decode=False)
    tables = [
        splits[split].cast_column(image_column, undecoded).select_columns([image_column])
        for split in parts
    ]
    fingerprints = "".join(table._fingerprint for table in tables)
    digest = hashlib.sha256(fingerprints.encode() + numbers.tobytes()).hexdigest()
    return LabelledImages(
        title,
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


def _load_hub_splits(name: str, location: str, refresh: bool) -> "dict[str, Dataset]":
    """Fetch a data set into the hub's cache, and load it. Raises DataError.

    The files are fetched in parallel and resumed. HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE
    apply.
    """
    datasets = import_optional("datasets", "huggingface")
    match = HUB_LOCATION.fullmatch(location)
    if match is None:
        raise DataError(
            f"{name}: write hf://datasets/owner/name, then perhaps @revision or /config"
        )
    if not sys.stderr.isatty():
        disable_progress_bars()
        datasets.disable_progress_bars()

    try:
        snapshot = snapshot_download(
            match["repository"],
            repo_type="dataset",
            revision=match["revision"],
            endpoint=os.environ.get("HF_ENDPOINT") or None,
            local_files_only=not refresh,
        )
    except Exception as error:  # the client raises errors of several libraries
        if getattr(error, "errno", None) in DISK_FULL_ERRORS:
            raise
        raise DataError(_describe_hub_error(name, error)) from error

    try:
        return dict(datasets.load_dataset(snapshot, match["config"]))
    except Exception as error:  # the readers of the files share no base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = reason.replace(snapshot, name)
        raise DataError(f"{name}: not readable as images: {reason}") from error


def _describe_hub_error(name: str, error: Exception) -> str:
    """Return one line: what is wrong, then what to do."""
    if isinstance(error, GatedRepoError):
        return f"{name}: access is limited; ask for it on its page, then run hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return f"{name}: no such data set; a private one needs HF_TOKEN, or hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return f"{name}: no such revision"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{name}: can't be fetched: {reason}; check the network and HF_ENDPOINT, or use hf:PATH "
        "with a data set on disk"
    )


def _parse_parts(source: str, splits: "dict[str, Dataset]") -> dict[str, str]:
    """Return split name -> train, val or test. Splits of other names are left out."""
    parts = {}
    for name in splits:
        part = parse_part(name)
        if part is not None:
            parts[name] = part
    if "train" not in parts.values():
        raise DataError(f"{source}: no part named train; it has {', '.join(splits)}")
    return parts


def _columns_of_type(dataset: "Dataset", feature_type: type) -> list[str]:
    return [name for name, kind in dataset.features.items() if isinstance(kind, feature_type)]


def _first_column(source: str, dataset: "Dataset", candidates: list[str], content: str) -> str:
    """Return the first candidate. Raises DataError that lists all columns where there is none."""
    if not candidates:
        columns = ", ".join(dataset.column_names)
        raise DataError(f"{source}: no {content} column; its columns are {columns}")
    return candidates[0]


def _drop_unlabelled_tests(
    source: str, splits: "dict[str, Dataset]", parts: dict[str, str], label_column: str
) -> None:
    """Remove test splits without labels from `parts`, such as that of ImageNet."""
    for name, part in list(parts.items()):
        if part == "test" and _is_unlabelled(splits[name][label_column]):
            notify(
                f"{source}: the part {name} has no labels, so it is left out, and a test part is "
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
