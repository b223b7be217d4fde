"""Data sets by name: scikit-learn's digits, and CIFAR and MNIST from torchvision."""

from pathlib import Path

import numpy as np

from train.data.source import DataError, LabelledImages, cache_home, expand_home, join_parts

# name -> class in torchvision.datasets
TORCHVISION_CLASSES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
}

# name -> what `root` holds, where that is not <class>/raw
CIFAR_DIRECTORIES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}

DIGITS_LEVELS = 16  # largest value of a pixel in scikit-learn's digits


def load_digits() -> LabelledImages:
    """Load the 1,797 handwritten digits of scikit-learn: 8x8, values scaled to 0..255.

    They have no test part, so one is split off as for a folder.
    """
    from sklearn.datasets import load_digits as load

    data = load()
    pixels = np.round(data.images * (255 / DIGITS_LEVELS)).astype(np.uint8)
    items, labels, parts = join_parts({"train": (pixels, data.target)})
    return LabelledImages("digits", [str(k) for k in range(10)], items, labels, parts)


def load_torchvision(name: str, root: str | None) -> LabelledImages:
    """Load a torchvision data set from `root`, or download it once to the user's cache."""
    from torchvision import datasets

    dataset_class = getattr(datasets, TORCHVISION_CLASSES[name])
    directory = expand_home(root) if root else cache_home() / "torchvision"
    arrays = {}
    for part, train in (("train", True), ("test", False)):
        try:
            data = dataset_class(directory, train=train, download=root is None)
        except (OSError, RuntimeError) as error:
            raise DataError(_describe_failure(name, directory, root, error)) from error
        arrays[part] = (np.asarray(data.data), np.asarray(data.targets))

    items, labels, parts = join_parts(arrays)
    return LabelledImages(name, list(data.classes), items, labels, parts)


def _describe_failure(name: str, directory: Path, root: str | None, error: Exception) -> str:
    expected = CIFAR_DIRECTORIES.get(name, f"{TORCHVISION_CLASSES[name]}/raw")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if root:
        return (
            f"{directory}: no {name} there: {reason}; ROOT must be the folder that holds {expected}"
        )
    return (
        f"{name}: the download failed: {reason}; download it on a machine with a network and give "
        f"the folder that holds {expected} as ROOT"
    )
