"""Where images come from: `open_source` picks the reader for a name, a path or a scheme."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from train.data.source import NO_LABEL, DataError, LabelledImages, expand_home, printable_name
from train.data.sources import (
    bundled,
    csv_file,
    deeplake,
    folder,
    huggingface,
    kept,
    litdata,
    remote,
)
from train.data.sources.archive import has_archive_ending
from train.data.sources.several import KEPT_SCHEME

# scheme -> reader of (location, cache directory, refresh); see `open_source`
READERS: dict[str, Callable[[str, Path | None, bool], LabelledImages]] = {
    "folder": lambda location, cache, refresh: folder.read_folder(expand_home(location)),
    "csv": lambda location, cache, refresh: csv_file.read_csv(expand_home(location)),
    "litdata": lambda location, cache, refresh: litdata.read_litdata(location, cache),
    "deeplake": lambda location, cache, refresh: deeplake.read_deeplake(location),
    "hf": lambda location, cache, refresh: huggingface.read_huggingface(location, refresh),
    "kept": lambda location, cache, refresh: kept.read_kept(_expand_kept(location), cache),
}


def _expand_kept(location: str) -> str:
    """Return a directory of kept images with ~ replaced; the URL of a bucket as it is."""
    return location if "://" in location else str(expand_home(location))


def open_source(
    source: str, root: str | None = None, cache: Path | None = None, refresh: bool = True
) -> LabelledImages:
    """Open a data set and check its labels.

    Args:
        source: digits; cifar10, cifar100, mnist or fashion-mnist; the path of a folder, of a .csv
            file or of an archive; the URL of an archive, or of class folders in a bucket;
            hf://datasets/owner/name; or folder, csv, litdata, deeplake, hf or kept with the
            location after a colon.
        root: directory of a torchvision data set (nothing is downloaded then), or the location
            where `source` is a scheme without one.
        cache: directory that keeps fetched data, and labels that are slow to read; None for none.
        refresh: whether to ask the server if fetched data has changed. All processes of a run must
            read the same data, so one of them asks.

    Raises DataError where there is no data set, or where it can't be used; DownloadFailed where it
    can't be fetched now; OSError where the disk is full.
    """
    for path in (source, root or ""):
        if printable_name(path) != path:
            raise DataError(
                f"{printable_name(path)}: the name is not UTF-8, and the bundle's manifest could "
                "not hold it; rename it, or give a link to it"
            )
    dataset = _read_source(source, root, cache, refresh)
    source = remote.hide_secrets(source)
    _check_labels(source, dataset)
    is_kept = source.startswith(KEPT_SCHEME)
    if not is_kept and not (dataset.parts == "train").any():
        present = " and ".join(sorted(set(dataset.parts.tolist())))
        raise DataError(
            f"{source}: all images are in the part {present}, so nothing is left to train on; put "
            "some into the part train"
        )
    return dataset


def _read_source(
    source: str, root: str | None, cache: Path | None, refresh: bool
) -> LabelledImages:
    if source == "digits":
        return bundled.load_digits()
    if source in bundled.TORCHVISION_CLASSES:
        return bundled.load_torchvision(source, root)
    if remote.is_url(source):
        return remote.read_remote(source, cache, refresh)

    scheme, colon, location = source.partition(":")
    if not colon:
        location = root or ""
    if scheme in READERS and location:
        return READERS[scheme](location, cache, refresh)

    path = expand_home(source)
    if path.is_dir():
        return folder.read_folder(path)
    if path.suffix.lower() == ".csv":
        return csv_file.read_csv(path)
    if has_archive_ending(path.name) and path.is_file():
        return remote.read_remote(str(path.resolve()), cache, refresh)

    names = ", ".join(["digits", *bundled.TORCHVISION_CLASSES])
    schemes = ", ".join(f"{name}:…" for name in READERS)
    raise DataError(
        f"{source}: no such folder, and none of the known data sets ({names}); other "
        f"sources are written {schemes}, https://…, s3://…, gs://…, az://…"
    )


def _check_labels(source: str, dataset: LabelledImages) -> None:
    """Raise DataError that names the first row without a valid label."""
    invalid = np.flatnonzero((dataset.labels < 0) | (dataset.labels >= len(dataset.classes)))
    if len(invalid) == 0:
        return

    position = invalid[0]
    label = int(dataset.labels[position])
    part = str(dataset.parts[position])
    row = int((dataset.parts[:position] == part).sum())
    problem = f"the label {label} of {len(dataset.classes)} classes"
    if label == NO_LABEL:
        problem = "no label"
    raise DataError(
        f"{source}: row {row} of the {part} part has {problem}; correct it or remove the row"
    )
