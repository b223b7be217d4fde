"""Where images come from: `open_source` finds the reader for a name, a path or a scheme, and returns a Source."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from train.data.source import NONE, DataError, Source, as_text
from train.data.sources import bundled, files, huggingface, streams

READERS: dict[str, Callable[[str, Path | None], Source]] = {
    "folder": lambda place, cache: files.folder(Path(place).expanduser()),
    "csv": lambda place, cache: files.table(Path(place).expanduser()),
    "litdata": streams.litdata,
    "deeplake": lambda place, cache: streams.deeplake(place),
    "hf": lambda place, cache: huggingface.huggingface(place),
}


def open_source(source: str, root: str | None = None, cache: Path | None = None) -> Source:
    """Find the data.

    `source`: digits; cifar10, cifar100, mnist or fashion-mnist; the path of a folder or of a .csv file; or one of
    folder, csv, litdata, deeplake and hf with the place after a colon. `root`: where a torchvision data set lies on
    disk (then nothing is downloaded), or the place where `source` is a bare scheme. `cache`: where what takes long to
    find out is kept, if anywhere.
    Raises DataError where there is nothing, or nothing that can be used.
    """
    for place in (source, root or ""):
        if as_text(place) != place:
            raise DataError(
                f"{as_text(place)}: its name is not UTF-8, and a model's record could not hold it; rename "
                "it, or give a link to it"
            )
    found = _find(source, root, cache)
    wrong = np.flatnonzero((found.labels < 0) | (found.labels >= len(found.classes)))
    if len(wrong):
        label, part = int(found.labels[wrong[0]]), str(found.parts[wrong[0]])
        row = int((found.parts[: wrong[0]] == part).sum())
        raise DataError(
            f"{source}: row {row} of the {part} part has "
            + (
                "no label"
                if label == NONE
                else f"the label {label} of {len(found.classes)} classes"
            )
            + "; give it one, or take the row out"
        )
    return found


def _find(source: str, root: str | None, cache: Path | None) -> Source:
    if source == "digits":
        return bundled.digits()
    if source in bundled.TORCHVISION:
        return bundled.torchvision(source, root)
    scheme, colon, place = source.partition(":")
    where = place if colon else root
    if scheme in READERS and where:
        return READERS[scheme](where, cache)
    path = Path(source).expanduser()
    if path.is_dir():
        return files.folder(path)
    if path.suffix.lower() == ".csv":
        return files.table(path)
    known = ", ".join(["digits", *bundled.TORCHVISION])
    raise DataError(
        f"{source}: no such folder, and none of the data sets that Imago knows ({known}); other places are "
        f"written {', '.join(f'{name}:…' for name in READERS)}"
    )
