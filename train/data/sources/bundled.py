"""Data sets that need no preparation: scikit-learn's digits and some of torchvision's."""

from pathlib import Path

import numpy as np

from train.data.source import DataError, Source, cache_home, concatenate

TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
}


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
    inside = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}.get(
        name, f"{TORCHVISION[name]}/raw"
    )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if root:
        return f"{place}: no {name} there: {reason}; ROOT must be the folder that holds {inside}"
    return (
        f"{name}: the download failed: {reason}; fetch it on a machine with a network and name the folder that "
        f"holds {inside} as ROOT"
    )
