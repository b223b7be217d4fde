"""The checks of the audit and their typed result, which is also the content of audit.json.

`collect_findings` runs all of them in one process. Lists of pairs and images are cut at LISTED;
counts are always full.
"""

from typing import TypedDict

import numpy as np

from train.audit import duplicates as duplicate_search
from train.audit import labels as label_check
from train.audit.duplicates import Duplicates, Pairs
from train.audit.leakage import Leak, find_leaks
from train.data import ImageData
from train.data.source import PARTS

LISTED = 200  # entries of a list
USUAL_SIZES = 5  # listed sizes

RARE_SHARE = 0.1  # a class with fewer training images than this share of the largest is rare
MIN_CLASS_IMAGES = 10  # training images; fewer are too few to learn a class from

UNUSUAL_AREA_RATIO = 8.0  # to the median area, either way
UNUSUAL_ASPECT_RATIO = 2.5  # to the median aspect ratio, either way
UNUSUAL_MODE_SHARE = 0.05  # a mode of a smaller share of the images is unusual


class ImageEntry(TypedDict):
    """One image."""

    position: int  # in the data set
    file: str
    part: str
    label: str
    reviewed: bool  # whether the user has corrected or kept it


class PairEntry(TypedDict):
    """Two images that are duplicates."""

    first: ImageEntry
    second: ImageEntry
    likeness: float  # 0..1, 1 for exact duplicates
    reviewed: bool  # whether both images are


class DuplicateFindings(TypedDict):
    """Exact duplicates."""

    count: int  # pairs
    across_parts: int
    other_label: int  # pairs of different labels
    reviewed: int  # pairs
    pairs: list[PairEntry]  # reviewed ones last; pairs across parts first, then the closest


class NearDuplicateFindings(DuplicateFindings):
    """Near duplicates."""

    looked_for: bool  # False where the images are too small
    complete: bool  # False where only the closest candidates were compared


class ClassCount(TypedDict):
    """Images of one class."""

    label: str
    train: int
    val: int
    test: int
    note: str  # what is wrong with the number of training images, or empty
    missing_in: list[str]  # "val" and "test" without an image of the class


class UnusualEntry(ImageEntry):
    """An image of unusual size or mode."""

    why: str


class UnusualFindings(TypedDict):
    """Sizes and modes of the stored images."""

    modes: dict[str, int]  # mode -> images
    sizes: dict[str, int]  # the most frequent sizes, such as 640x480 -> images
    different_sizes: int
    count: int  # unusual images
    reviewed: int  # of them
    images: list[UnusualEntry]  # reviewed ones last


class SampleBitsFindings(TypedDict):
    """Images with 16 bits a sample, which are reduced to 8."""

    count: int
    significant_bits: int  # that are read; larger samples become white
    largest: int  # bits that the largest sample of all images takes
    clipped: int  # images with larger samples than are read


class SuspectEntry(ImageEntry):
    """An image with a suspicious label."""

    suggested: str
    confidence: float  # of the suggested class, 0..1


class LabelFindings(TypedDict):
    """Suspicious labels."""

    accuracy: float  # of the model that checks them, 0..1
    largest_share: float  # of the images that belong to the largest class, 0..1
    checked: bool  # False where the model is not better than always predicting that class
    count: int
    reviewed: int  # of them
    suspects: list[SuspectEntry]  # the most suspicious first, reviewed ones last


class UnreadableEntry(TypedDict):
    """A file that can't be read."""

    file: str
    label: str
    problem: str
    reviewed: bool


class LeftOutEntry(TypedDict):
    """Files that are not among the images."""

    folder: str
    count: int
    reason: str


class Findings(TypedDict):
    """Result of the audit."""

    source: str
    digest: str  # of the data, in hex
    classes: list[str]
    counts: dict[str, int]  # part -> images
    unreadable: list[UnreadableEntry]
    left_out: list[LeftOutEntry]
    exact_duplicates: DuplicateFindings
    near_duplicates: NearDuplicateFindings
    leakage: dict[str, Leak]  # of "test" and "val"
    class_counts: list[ClassCount]
    odd: UnusualFindings
    sample_bits: SampleBitsFindings
    labels: LabelFindings


class Refusal(TypedDict):
    """Content of audit.json for data that `ImageData.setup` refused."""

    source: str
    problem: str
    classes: list[str]
    unreadable: list[UnreadableEntry]
    left_out: list[LeftOutEntry]


def collect_findings(data: ImageData) -> Findings:
    """Run all checks on a data module after `setup`."""
    pixels = data.decoded.pixels
    parts = _parts_of_images(data)
    usable = parts != ""
    duplicates = duplicate_search.find_duplicates(
        pixels, data.decoded.metadata["sha256"], usable, data.device, shows_mirror_images(data)
    )
    near_duplicates: NearDuplicateFindings = {
        **_describe_pairs(data, parts, duplicates.near),
        "looked_for": duplicate_search.can_find_near_duplicates(pixels),
        "complete": duplicates.near.complete,
    }
    return {
        "source": data.source,
        "digest": data.digest,
        "classes": data.classes,
        "counts": data.counts,
        "unreadable": _list_unreadable(data),
        "left_out": list_left_out(data),
        "exact_duplicates": _describe_pairs(data, parts, duplicates.exact),
        "near_duplicates": near_duplicates,
        "leakage": find_leaks(parts, duplicates, data.dataset.reviewed),
        "class_counts": _count_classes(data),
        "odd": _find_unusual_images(data, parts),
        "sample_bits": _count_sample_bits(data),
        "labels": _check_labels(data, parts, duplicates),
    }


def describe_refusal(data: ImageData, problem: str) -> Refusal:
    """Describe data that `ImageData.setup` refused after it had decoded all images."""
    return {
        "source": data.source,
        "problem": problem,
        "classes": data.classes,
        "unreadable": _list_unreadable(data),
        "left_out": list_left_out(data),
    }


def shows_mirror_images(data: ImageData) -> bool:
    """Whether training mirrors images, so that a mirror image in another part is a duplicate."""
    return data.augment.flip != "none"


def _list_unreadable(data: ImageData) -> list[UnreadableEntry]:
    """Return the files that can't be read, reviewed ones last."""
    positions = data.unreadable_positions()
    labels = data.dataset.labels[positions]
    reviewed = data.dataset.reviewed[positions]
    entries: list[UnreadableEntry] = []
    for u in np.argsort(reviewed, kind="stable").tolist():
        name, problem = data.unreadable[u]
        entries.append(
            {
                "file": name,
                "label": data.classes[labels[u]],
                "problem": problem,
                "reviewed": bool(reviewed[u]),
            }
        )
    return entries


def list_left_out(data: ImageData) -> list[LeftOutEntry]:
    """Return what the source left out when it was read."""
    return [
        {"folder": entry.folder, "count": entry.count, "reason": entry.reason}
        for entry in data.dataset.left_out
    ]


def _parts_of_images(data: ImageData) -> np.ndarray:
    """Return the part of each image, [N], empty for images in none."""
    parts = np.full(len(data.dataset.items), "", "U5")
    for name in PARTS:
        parts[data.index[name]] = name
    return parts


def _describe_image(data: ImageData, parts: np.ndarray, i: int) -> ImageEntry:
    return {
        "position": int(i),
        "file": data.dataset.items.name(int(i)),
        "part": str(parts[i]),
        "label": data.classes[data.dataset.labels[i]],
        "reviewed": bool(data.dataset.reviewed[i]),
    }


def _describe_pairs(data: ImageData, parts: np.ndarray, pairs: Pairs) -> DuplicateFindings:
    """Count pairs of duplicates; list those across parts first, and reviewed ones last."""
    labels = data.dataset.labels
    reviewed = data.dataset.reviewed[pairs.first] & data.dataset.reviewed[pairs.second]
    across_parts = parts[pairs.first] != parts[pairs.second]
    other_label = labels[pairs.first] != labels[pairs.second]

    entries: list[PairEntry] = []
    for p in np.lexsort((~across_parts, reviewed))[:LISTED].tolist():
        entries.append(
            {
                "first": _describe_image(data, parts, pairs.first[p]),
                "second": _describe_image(data, parts, pairs.second[p]),
                "likeness": round(float(pairs.similarity[p]), 3),
                "reviewed": bool(reviewed[p]),
            }
        )
    return {
        "count": len(pairs.first),
        "across_parts": int(across_parts.sum()),
        "other_label": int(other_label.sum()),
        "reviewed": int(reviewed.sum()),
        "pairs": entries,
    }


def _count_classes(data: ImageData) -> list[ClassCount]:
    """Count the images of each class by part, and note classes with few."""
    counts = {part: data.count_classes(part).tolist() for part in PARTS}
    largest = max(counts["train"])
    rows: list[ClassCount] = []
    for k, label in enumerate(data.classes):
        rows.append(
            {
                "label": label,
                "train": counts["train"][k],
                "val": counts["val"][k],
                "test": counts["test"][k],
                "note": _note_class_size(counts["train"][k], largest),
                "missing_in": [part for part in ("val", "test") if counts[part][k] == 0],
            }
        )
    return rows


def _note_class_size(count: int, largest: int) -> str:
    if count < MIN_CLASS_IMAGES:
        return f"fewer than {MIN_CLASS_IMAGES} to train on"
    return "rare" if count < RARE_SHARE * largest else ""


def _find_unusual_images(data: ImageData, parts: np.ndarray) -> UnusualFindings:
    """Find images whose size or mode differs from most others."""
    metadata = data.decoded.metadata
    index = np.flatnonzero((parts != "") & (metadata["width"] > 0))
    width = metadata["width"][index].astype(float)
    height = metadata["height"][index].astype(float)
    unusual_size = _differs(width * height, UNUSUAL_AREA_RATIO)
    unusual_size |= _differs(width / height, UNUSUAL_ASPECT_RATIO)

    modes, mode_of_image, mode_counts = np.unique(
        metadata["mode"][index], return_inverse=True, return_counts=True
    )
    unusual_mode = (mode_counts / len(index) < UNUSUAL_MODE_SHARE)[mode_of_image]

    entries: list[UnusualEntry] = []
    unusual = np.flatnonzero(unusual_size | unusual_mode)
    reviewed = data.dataset.reviewed[index[unusual]]
    for j in unusual[np.argsort(reviewed, kind="stable")][:LISTED].tolist():
        reasons = []
        if unusual_size[j]:
            reasons.append(f"size {int(width[j])}x{int(height[j])}")
        if unusual_mode[j]:
            reasons.append(f"mode {modes[mode_of_image[j]]}")
        image = _describe_image(data, parts, index[j])
        entries.append({**image, "why": ", ".join(reasons)})

    sizes, size_counts = np.unique(
        np.stack([width, height], 1).astype(int), axis=0, return_counts=True
    )
    most_frequent = size_counts.argsort()[::-1][:USUAL_SIZES]
    return {
        "modes": dict(zip(map(str, modes), mode_counts.tolist(), strict=True)),
        "sizes": {f"{sizes[s][0]}x{sizes[s][1]}": int(size_counts[s]) for s in most_frequent},
        "different_sizes": len(sizes),
        "count": len(unusual),
        "reviewed": int(reviewed.sum()),
        "images": entries,
    }


def _count_sample_bits(data: ImageData) -> SampleBitsFindings:
    """Count the images with 16 bits a sample, and those with larger samples than are read."""
    sample_bits = data.decoded.metadata["sample_bits"]
    significant_bits = data.input.significant_bits
    return {
        "count": int((sample_bits > 0).sum()),
        "significant_bits": significant_bits,
        "largest": int(sample_bits.max()),
        "clipped": int((sample_bits > significant_bits).sum()),
    }


def _differs(values: np.ndarray, ratio: float) -> np.ndarray:
    """Return bool [M]: values more than `ratio` times larger or smaller than the median."""
    if len(values) == 0:
        return np.zeros(0, bool)
    median = np.median(values)
    return np.maximum(values / median, median / values) > ratio


def _check_labels(data: ImageData, parts: np.ndarray, duplicates: Duplicates) -> LabelFindings:
    """List the images whose label a simple model contradicts."""
    errors = label_check.find_label_errors(
        data.decoded.pixels,
        data.dataset.labels,
        np.flatnonzero(parts != ""),
        len(data.classes),
        data.device,
        duplicates.groups(),
        data.embeddings,
    )
    reviewed = data.dataset.reviewed[errors.index]
    entries: list[SuspectEntry] = []
    for s in np.argsort(reviewed, kind="stable")[:LISTED].tolist():
        image = _describe_image(data, parts, errors.index[s])
        suggested = data.classes[errors.suggested[s]]
        confidence = round(float(errors.confidence[s]), 3)
        entries.append({**image, "suggested": suggested, "confidence": confidence})
    return {
        "accuracy": round(errors.accuracy, 4),
        "largest_share": round(errors.largest_share, 4),
        "checked": errors.is_checked,
        "count": len(errors.index),
        "reviewed": int(reviewed.sum()),
        "suspects": entries,
    }
