"""Where images come from: `open_source(name or path)` finds the reader and returns a Source."""
import os
from pathlib import Path

import numpy as np

from train.data.source import DataError, Files, Source, concatenate

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
PART_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


def open_source(source: str, root: str | None = None) -> Source:
    """Find the data.

    `source`: digits; cifar10, cifar100, mnist or fashion-mnist; or the path of a folder. `root`: where a torchvision
    data set lies on disk (then nothing is downloaded), or the folder where `source` is "folder".
    Raises DataError where there is nothing, or nothing that can be used.
    """
    if source == "digits":
        return digits()
    if source in TORCHVISION:
        return torchvision(source, root)
    path = Path(root if source == "folder" and root else source).expanduser()
    if path.is_dir():
        return folder(path)
    raise DataError(f"{source}: neither a data set that Imago knows (digits, {', '.join(TORCHVISION)}) nor a folder")


def digits() -> Source:
    """The 1,797 hand-written digits that come with scikit-learn: 8x8, values 0..16, scaled to 0..255.

    They have no test part of their own, so one is split off like for a folder.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    items, labels, parts = concatenate({"train": (pixels, data.target)})
    return Source("digits", [str(k) for k in range(10)], items, labels, parts)


def torchvision(name: str, root: str | None) -> Source:
    """One of torchvision's data sets, from `root`, or downloaded once to the user's cache."""
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION[name])
    place = Path(root).expanduser() if root else cache_home() / "torchvision"
    chunks = {}
    for part, train in (("train", True), ("test", False)):
        try:
            data = kind(place, train=train, download=root is None)
        except (OSError, RuntimeError) as error:
            raise DataError(_not_found(name, place, root, error)) from error
        chunks[part] = (np.asarray(data.data), np.asarray(data.targets))
    items, labels, parts = concatenate(chunks)
    return Source(name, list(data.classes), items, labels, parts)


def _not_found(name: str, place: Path, root: str | None, error: Exception) -> str:
    inside = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}.get(name, f"{TORCHVISION[name]}/raw")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if root:
        return f"{place}: no {name} there: {reason}; ROOT must be the folder that holds {inside}"
    return (f"{name}: the download failed: {reason}; fetch it on a machine with a network and name the folder that "
            f"holds {inside} as ROOT")


def cache_home() -> Path:
    """$XDG_CACHE_HOME/imago, by default ~/.cache/imago."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imago"


def folder(root: Path) -> Source:
    """A folder of class folders, or of train/, val/ (valid/) and test/ with class folders each.

    Hidden files and folders are passed over; a class folder is searched to any depth.
    """
    parts = {d.name: PART_FOLDERS[d.name.lower()] for d in _folders(root) if d.name.lower() in PART_FOLDERS}
    if "train" not in parts.values():
        parts = {"": "train"}
    found = [(part, d.name, path) for name, part in parts.items() for d in _folders(root / name)
             for path in _files(d, root)]
    if not found:
        raise DataError(_empty(root))
    trained = sorted({name for part, name, _ in found if part == "train"})
    if extra := sorted({name for _, name, _ in found} - set(trained)):
        raise DataError(f"{root}: class {extra[0]!r} is not in the training part; add images or remove its folder")
    number = {name: k for k, name in enumerate(trained)}
    return Source(root.name, trained, Files(root, [path for _, _, path in found]),
                  np.array([number[name] for _, name, _ in found], np.int64),
                  np.array([part for part, _, _ in found]), root)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(directory: Path, root: Path) -> list[str]:
    """Paths of image files at any depth, relative to `root`, sorted."""
    paths = []
    for place, inner, names in os.walk(directory, followlinks=True):
        inner[:] = [d for d in inner if not d.startswith(".")]
        paths += [os.path.join(place, n) for n in names
                  if not n.startswith(".") and os.path.splitext(n)[1].lower() in SUFFIXES]
    return sorted(Path(p).relative_to(root).as_posix() for p in paths)


def _empty(root: Path) -> str:
    loose = any(p.is_file() and p.suffix.lower() in SUFFIXES for p in root.iterdir())
    if loose:
        return f"{root}: images, but no class folders; put the images of each class in a folder named for it"
    return f"{root}: no images; it must hold one folder a class, or train/ and test/ with class folders"
