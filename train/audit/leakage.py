"""Leakage: images with a duplicate in a part that the model is fitted to or chosen by."""

from typing import TypedDict

import numpy as np

from train.audit.duplicates import Duplicates

# part -> parts that must not hold duplicates of its images. Validation chooses the best epoch.
SEEN_PARTS = {"test": ("train", "val"), "val": ("train",)}


class Leak(TypedDict):
    """Leaked images of one part."""

    count: int
    share: float  # of the part, 0..1
    reviewed: int  # of them, images with a correction
    positions: list[int]  # in the data set, ascending; all of them


def find_leaks(parts: np.ndarray, duplicates: Duplicates, reviewed: np.ndarray) -> dict[str, Leak]:
    """Return the leaked images of the test and the validation part.

    Args:
        parts: [N], the part of each image, empty for images in none.
        duplicates: exact and near duplicates of the same images.
        reviewed: bool [N], images with a correction.
    """
    return {part: _find_leak(part, parts, duplicates, reviewed) for part in SEEN_PARTS}


def _find_leak(part: str, parts: np.ndarray, duplicates: Duplicates, reviewed: np.ndarray) -> Leak:
    in_part = parts == part
    seen = np.isin(parts, SEEN_PARTS[part])
    positions = np.flatnonzero(in_part & duplicates.have_duplicate_in(seen))
    return {
        "count": len(positions),
        "share": round(len(positions) / max(1, int(in_part.sum())), 4),
        "reviewed": int(reviewed[positions].sum()),
        "positions": positions.tolist(),
    }
