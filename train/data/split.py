"""Validation and test parts, split off by class and by seed."""

import numpy as np

from train.data.sampler import rng
from train.data.source import PARTS, DataError, Source


def split(
    source: Source, usable: np.ndarray, val_fraction: float, test_fraction: float, seed: int
) -> dict[str, np.ndarray]:
    """Positions of the train, val and test images, int64, rising, disjoint, less those that `usable` bool [N] excludes.

    Parts that the source brings are kept as they are. A missing test part is split off the training part first and a
    missing validation part then, both stratified: each class gives its share, and at least one image. The choice reads
    nothing but labels and seed. Raises DataError, naming the class, where a class has too few images.
    """
    parts = {name: np.flatnonzero((source.parts == name) & usable) for name in PARTS}
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        if name not in source.parts:
            parts["train"], parts[name] = _stratified(parts["train"], source, fraction, seed, name)
    counts = np.bincount(source.labels[parts["train"]], minlength=len(source.classes))
    if not counts.all():
        raise DataError(
            f"{source.name}: class {source.classes[counts.argmin()]!r} has no image to train on; add some "
            "or remove the class"
        )
    for name in PARTS:
        if len(parts[name]) == 0:
            raise DataError(f"{source.name}: the {name} part has no image that can be read")
    return parts


def _stratified(
    index: np.ndarray, source: Source, fraction: float, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """`index` less a share of each class, and that share."""
    draw = rng(
        f"split {name}", seed
    )  # a stream for each part: another test fraction leaves the way of splitting alone
    taken = []
    for k, label in enumerate(source.classes):
        members = index[source.labels[index] == k]
        count = max(1, round(fraction * len(members)))
        if len(members) <= count:
            raise DataError(
                f"{source.name}: class {label!r} has {len(members)} image{'s' * (len(members) != 1)}, too "
                f"few to split off a {name} part; add images or remove the class"
            )
        taken.append(draw.permutation(members)[:count])
    chosen = np.sort(np.concatenate(taken))
    return np.setdiff1d(index, chosen), chosen
