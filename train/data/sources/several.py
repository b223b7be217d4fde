"""Several sources in one: `photos,kept:DIR`, or a text file with one source a line."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.source import (
    KEPT,
    LIVE,
    AppliedCorrections,
    DataError,
    Items,
    LabelledImages,
    LeftOut,
    expand_home,
    locate_file,
    notify,
    number_classes,
)
from train.data.sources.remote import hide_secrets

KEPT_SCHEME = "kept:"
LIST_SUFFIX = ".txt"
SOURCE_START = re.compile(r"[a-z][a-z0-9]*:|[~/.]")  # a scheme, or a path


def split_sources(source: str) -> list[str]:
    """Return the sources that a text names: separated by commas, or the lines of a .txt file.

    A comma in a name or URL separates nothing: what follows must be a source. Lines that begin with
    `#` are comments, and paths in the file are relative to it. Raises DataError for a file that
    can't be read.
    """
    path = expand_home(source)
    if path.suffix.lower() == LIST_SUFFIX and path.is_file():
        return _read_list(path)
    if path.exists():
        return [source]

    first, *rest = source.split(",")
    sources = [first]
    for piece in rest:
        if SOURCE_START.match(piece) or (piece and Path(piece).exists()):
            sources.append(piece)
        else:
            sources[-1] += f",{piece}"
    return sources


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as a list of sources: {error}") from error

    sources: list[str] = []
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            sources.append(_resolve(text, path.parent))
    if not sources:
        raise DataError(f"{path}: lists no source; write one a line: a folder, a URL, kept:DIR")
    return sources


def _resolve(source: str, folder: Path) -> str:
    """Return a source with its path, if it is a relative one, below the folder of the list."""
    scheme = KEPT_SCHEME if source.startswith(KEPT_SCHEME) else ""
    location = source.removeprefix(scheme)
    if "://" in location or (not scheme and SOURCE_START.match(location) and ":" in location):
        return source
    beside = folder / os.path.expanduser(location)
    return f"{scheme}{beside}" if scheme or beside.exists() else source


def hide_all_secrets(source: str) -> str:
    """Return sources for messages and manifests, each without passwords; see `hide_secrets`."""
    if expand_home(source).suffix.lower() == LIST_SUFFIX:
        return source
    return ",".join(hide_secrets(each) for each in split_sources(source))


def join_sources(datasets: Sequence[LabelledImages], sources: Sequence[str]) -> LabelledImages:
    """Return the images of all sources, with the classes of all.

    Kept images join the training part after the split, so that they change no other part. Live
    test images of a class that no other image has are left out. Raises DataError where all sources
    are kept images.
    """
    is_kept = [source.startswith(KEPT_SCHEME) for source in sources]
    if all(is_kept):
        raise DataError(
            f"{','.join(sources)}: kept images only; give the data that they join, too: "
            "DATA=photos,kept:DIR"
        )
    names: list[str] = []
    parts: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    left_out: list[LeftOut] = []
    for dataset, kept in zip(datasets, is_kept, strict=True):
        names += [dataset.classes[label] for label in dataset.labels.tolist()]
        left_out += dataset.left_out
        parts.append(np.where(kept & (dataset.parts == "train"), KEPT, dataset.parts))
        live_weights = dataset.live_weights
        weights.append(np.zeros(len(dataset.labels)) if live_weights is None else live_weights)

    all_parts = np.concatenate(parts)
    all_parts, trained = _leave_out_unknown(names, all_parts)
    classes, labels = number_classes([name if name in trained else None for name in names])
    labels = np.where(labels < 0, 0, labels)  # in no part
    _report_new_classes(datasets, is_kept, trained)
    return LabelledImages(
        name=datasets[0].name,
        classes=classes,
        items=JoinedItems([dataset.items for dataset in datasets]),
        labels=labels,
        parts=all_parts,
        left_out=left_out,
        corrections=_join_corrections(datasets, classes, labels),
        live_weights=np.concatenate(weights),
    )


def _leave_out_unknown(names: Sequence[str], parts: np.ndarray) -> tuple[np.ndarray, set[str]]:
    """Return the parts without live images of other classes than the rest, and its classes."""
    is_live = parts == LIVE
    trained = {name for name, live in zip(names, is_live.tolist(), strict=True) if not live}
    is_unknown = is_live & ~np.array([name in trained for name in names])
    if is_unknown.any():
        notify(
            f"{int(is_unknown.sum())} live test images are left out: no other image has their class"
        )
    return np.where(is_unknown, "", parts), trained


def _join_corrections(
    datasets: Sequence[LabelledImages], classes: list[str], labels: np.ndarray
) -> AppliedCorrections | None:
    """Return the corrections of all sources; None where there are none.

    `labels`: int64 [N], after the corrections.
    """
    files = [dataset.corrections.file for dataset in datasets if dataset.corrections is not None]
    if not files:
        return None
    numbers = {name: k for k, name in enumerate(classes)}
    names: list[str] = []
    for dataset in datasets:
        names += [dataset.classes[label] for label in dataset.source_labels.tolist()]
    source_labels = labels.copy()
    for i, name in enumerate(names):
        source_labels[i] = numbers.get(name, labels[i])
    return AppliedCorrections(
        file=files[0],
        source_labels=source_labels,
        excluded=np.concatenate([dataset.excluded for dataset in datasets]),
        reviewed=np.concatenate([dataset.reviewed for dataset in datasets]),
    )


def _report_new_classes(
    datasets: Sequence[LabelledImages], is_kept: Sequence[bool], trained: set[str]
) -> None:
    """Print the classes that only kept images have."""
    known: set[str] = set()
    for dataset, kept in zip(datasets, is_kept, strict=True):
        if not kept:
            known.update(dataset.classes)
    added = sorted(trained - known)
    if added:
        notify(f"classes that only kept images have: {', '.join(added)}")


class JoinedItems:
    """The items of several sources, one after the other."""

    def __init__(self, sources: Sequence[Items]):
        self.sources = sources
        lengths = [len(items) for items in sources]
        self._ends = np.cumsum(lengths)

    @property
    def fork_safe(self) -> bool:
        """Whether forked worker processes can read all sources."""
        return all(items.fork_safe for items in self.sources)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> bytes | np.ndarray:
        number, position = self._locate(i)
        return self.sources[number][position]

    def _locate(self, i: int) -> tuple[int, int]:
        """Return the number of an image's source, and the position there."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return number, i - start

    def name(self, i: int) -> str:
        """Return the name in the source; those of the second source begin with 2/, and so on."""
        number, position = self._locate(i)
        name = self.sources[number].name(position)
        return f"{number + 1}/{name}" if number else name

    def path(self, i: int) -> Path | None:
        """Return the path of an image; None for an image that is not a file."""
        number, position = self._locate(i)
        return locate_file(self.sources[number], position)

    def fingerprint(self) -> str:
        """Hash the fingerprints of all sources."""
        digest = hashlib.sha256()
        for items in self.sources:
            digest.update(items.fingerprint().encode())
        return digest.hexdigest()
