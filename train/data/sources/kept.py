"""`kept:DIR` or `kept:s3://…`: images that the service kept and people labelled.

serve/README.md describes the directory. Half of the images of the random share are the live test
set: they are never trained on, by no version, and stand for the traffic by their weights. All other
labelled images are training images.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from models.kept import KeptError, KeptFolder, LabelledImage, Reason, Verdict, open_kept
from models.kept.files import LocalFiles
from train.data.source import (
    LIVE,
    DataError,
    FileItems,
    LabelledImages,
    LeftOut,
    notify,
    number_classes,
)

LIVE_SHARE = 0.5
"""Of the images of the random share. Another share would train on what was a live test image."""

FETCHES = 16  # at the same time, from a bucket
CLIENT = "feedback"
"""Who labels by /feedback. Clients correct mistakes: their labels are no sample of all images."""


def read_kept(location: str, cache: Path | None) -> LabelledImages:
    """Read the labelled images of a directory or bucket of kept images.

    Images of a bucket are copied to the cache, each once. Raises DataError where nothing can be
    read, or nothing is labelled.
    """
    try:
        folder = open_kept(location)
        entries = folder.read()
        labelled = [entry for entry in entries if _is_used(entry)]
        if not labelled:
            raise DataError(
                f"kept:{location}: {len(entries)} images, none of them labelled with a class; "
                "label them first: python -m serve label DIR"
            )
        items = _open_items(folder, labelled, cache)
    except (KeptError, OSError) as error:
        raise DataError(f"kept:{location}: {error}") from error

    classes, numbers = number_classes([_label_of(entry) for entry in labelled])
    is_live = np.array([_is_live(entry) for entry in labelled])
    _report(location, entries, labelled, is_live)
    return LabelledImages(
        name="kept",
        classes=classes,
        items=items,
        labels=numbers,
        parts=np.where(is_live, LIVE, "train"),
        root=items.root,
        left_out=_describe_left_out(entries),
        live_weights=np.array([entry.image.weight for entry in labelled]) * is_live,
    )


def _is_used(entry: LabelledImage) -> bool:
    """Whether an image is labelled with a class, for the live test set by a person."""
    if entry.label is None or entry.label.verdict is not Verdict.CLASS:
        return False
    return entry.label.who != CLIENT or not _is_live(entry)


def _label_of(entry: LabelledImage) -> str:
    assert entry.label is not None
    return entry.label.label


def _is_live(entry: LabelledImage) -> bool:
    """Whether an image belongs to the live test set once it is labelled.

    The digest decides, so that an image is in the same set for ever, in each copy of the directory.
    """
    if Reason.RANDOM not in entry.image.reasons or not entry.image.weight:
        return False
    return int(entry.image.digest[-8:], 16) < LIVE_SHARE * 2**32


def _open_items(folder: KeptFolder, labelled: list[LabelledImage], cache: Path | None) -> FileItems:
    """Return the image files; those of a bucket are fetched into the cache first."""
    if isinstance(folder.files, LocalFiles):
        return FileItems(folder.files.root, [entry.image.file for entry in labelled])
    if cache is None:
        raise DataError(
            f"kept:{folder.location}: images of a bucket are copied to the cache; set --data.cache"
        )

    root = cache / "kept"

    def fetch(entry: LabelledImage) -> str:
        image = entry.image
        target = root / f"{image.digest}{Path(image.file).suffix}"
        if not target.exists():
            LocalFiles(root).write(target.name, folder.read_file(image))
        return target.name

    with ThreadPoolExecutor(FETCHES) as executor:
        return FileItems(root, list(executor.map(fetch, labelled)))


def _report(
    location: str,
    entries: list[LabelledImage],
    labelled: list[LabelledImage],
    is_live: np.ndarray,
) -> None:
    """Print how many images are used, and whether the live test set may be biased."""
    notify(
        f"kept:{location}: {len(labelled)} of {len(entries)} images are labelled; "
        f"{int(is_live.sum())} of them are the live test set"
    )
    random = [entry for entry in entries if Reason.RANDOM in entry.image.reasons]
    unlabelled = sum(entry.label is None for entry in random)
    if unlabelled and is_live.any():
        notify(
            f"kept:{location}: {unlabelled} of {len(random)} random images have no label; the live "
            "accuracy stands for all traffic only when all of them are labelled"
        )
    conflicts = sum(entry.has_conflict for entry in labelled)
    if conflicts:
        notify(f"kept:{location}: people disagree on {conflicts} images; the last label counts")


def _describe_left_out(entries: list[LabelledImage]) -> list[LeftOut]:
    """Return the images without a class by the reason."""
    reasons: Counter[str] = Counter()
    for entry in entries:
        if entry.label is None:
            reasons["without a label"] += 1
        elif entry.label.verdict is not Verdict.CLASS:
            reasons["labelled as of none of the classes, or as foreign"] += 1
        elif not _is_used(entry):
            reasons["of the live test set that only a client has labelled"] += 1
    return [LeftOut("kept", count, f"images {reason}") for reason, count in reasons.items()]
