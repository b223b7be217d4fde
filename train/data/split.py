"""Validation and test parts, split off by class, by the digests of the images and a seed."""

import numpy as np

from train.data.sampler import keyed_rng
from train.data.source import KEPT, PARTS, DataError, LabelledImages


def split(
    dataset: LabelledImages,
    digests: np.ndarray,
    usable: np.ndarray,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """Return the positions of the train, val and test images: int64, ascending, disjoint.

    Images that `usable` bool [N] excludes are in no part. Parts that the source brings are kept. A
    missing test part is split off the training part first, then a missing validation part. Images
    of the part KEPT join the training part after that, so that they do not change the others; those
    of the part LIVE are in none.

    Both splits are stratified: each class gives its share, and at least one image. Those whose
    SHA-256, a row of `digests` uint8 [N, 32], is nearest to a random number of the seed are chosen.
    So nearly all images stay in their parts where others or whole classes are added, and versions
    of a model can be compared on the same test images. Corrections do not change the choice: a
    relabelled image stays in its part, and where images are left out, all others stay in theirs.
    Raises DataError that names the class where a class has too few images.
    """
    parts = {name: np.flatnonzero((dataset.parts == name) & usable) for name in PARTS}
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        if name not in dataset.parts:
            # Each part has its own: another test fraction does not change how "val" is chosen.
            key = keyed_rng(f"split {name}", seed).integers(2**64, dtype=np.uint64)
            ranks = np.ascontiguousarray(digests[:, :8]).view("<u8")[:, 0] ^ key
            rest, chosen = _stratified_split(parts["train"], dataset, ranks, fraction, name)
            parts["train"] = rest
            parts[name] = chosen

    joining = np.flatnonzero((dataset.parts == KEPT) & usable)
    parts["train"] = np.sort(np.concatenate([parts["train"], joining]))
    is_included = ~dataset.excluded
    parts = {name: index[is_included[index]] for name, index in parts.items()}

    counts = np.bincount(dataset.labels[parts["train"]], minlength=len(dataset.classes))
    if not counts.all():
        empty_class = dataset.classes[counts.argmin()]
        raise DataError(
            f"{dataset.name}: class {empty_class!r} has no image to train on; add some or remove "
            "the class"
        )
    for name in PARTS:
        if len(parts[name]) == 0:
            raise DataError(f"{dataset.name}: the {name} part has no image that can be read")
    return parts


def _stratified_split(
    index: np.ndarray, dataset: LabelledImages, ranks: np.ndarray, fraction: float, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions that remain, and `fraction` of each class, taken out of `index`.

    The images of a class with the lowest of `ranks` uint64 [N] are taken.
    The classes are those before corrections. One that is too small for that gives no image where
    corrections or kept images add some to it.
    """
    taken = []
    for k, label in enumerate(dataset.classes):
        members = index[dataset.source_labels[index] == k]
        if not len(members) and ((dataset.parts == KEPT) & (dataset.labels == k)).any():
            continue
        count = max(1, round(fraction * len(members)))
        if len(members) <= count:
            corrected = (dataset.labels[index] == k) & ~dataset.excluded[index]
            if corrected.sum() > count:
                continue
            images = f"{len(members)} image{'s' * (len(members) != 1)}"
            raise DataError(
                f"{dataset.name}: class {label!r} has {images}, too few to split off a {name} "
                "part; add images or remove the class"
            )
        ranked = members[np.argsort(ranks[members], kind="stable")]
        taken.append(ranked[:count])

    chosen = np.sort(np.concatenate(taken))
    return np.setdiff1d(index, chosen), chosen
