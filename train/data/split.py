"""Validation and test parts, split off by class and by seed."""
import numpy as np

from train.data.source import DataError, Source


def split(source: Source, val_fraction: float, test_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Positions of the train, val and test images, int64, rising, disjoint.

    Parts that the source brings are kept as they are. A missing test part is split off the training part first and a
    missing validation part then, both stratified: each class gives its share, and at least one image. Neither reads
    anything but labels and seed.
    """
    parts = {name: source.index(name) for name in ("train", "val", "test")}
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        if len(parts[name]) == 0:
            # a stream of its own each, so that another test fraction leaves the way of splitting alone
            rng = np.random.default_rng([seed, sum(name.encode())])
            parts["train"], parts[name] = _stratified(parts["train"], source, fraction, rng, name)
    return parts


def _stratified(index: np.ndarray, source: Source, fraction: float, rng: np.random.Generator,
                name: str) -> tuple[np.ndarray, np.ndarray]:
    """`index` less a share of each class, and that share. Raises DataError for a class with too few images."""
    taken = []
    for k, label in enumerate(source.classes):
        members = index[source.labels[index] == k]
        count = max(1, round(fraction * len(members)))
        if len(members) <= count:
            raise DataError(f"{source.name}: class {label!r} has {len(members)} image{'s' * (len(members) != 1)} to "
                            f"train on, too few to split off a {name} part; add images or remove the class")
        taken.append(rng.permutation(members)[:count])
    chosen = np.sort(np.concatenate(taken))
    return np.setdiff1d(index, chosen), chosen
