"""Which images a checkpoint was trained on, so that no figure is given of them as of images that it never saw."""

import hashlib
from typing import Any

import numpy as np
import torch

from train.data import DataError, ImageData
from train.data.source import PARTS, say

SCORED = {
    "fit": ("val", "test"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}  # parts, by command


def describe(data: ImageData) -> dict[str, Any]:
    """What a checkpoint keeps of the data: `seen`, int64 [N], is the beginning of each training image's sha256."""
    flags = (
        f"--data.val_fraction {data.val_fraction} --data.test_fraction {data.test_fraction} "
        f"--seed_everything {data.seed}"
    )
    return {
        "source": data.source,
        "digest": data.digest,
        "split": _split(data),
        "flags": flags,
        "seen": torch.from_numpy(_keys(data, "train")),
    }


def check(kept: dict[str, Any], data: ImageData, command: str) -> None:
    """Say where the data or its split is not what the checkpoint was trained with; raise DataError where images that
    it was trained on would be scored."""
    if (kept["digest"], kept["split"]) == (data.digest, _split(data)):
        return
    same = kept["digest"] == data.digest
    for part in SCORED[command]:
        seen = np.flatnonzero(np.isin(_keys(data, part), kept["seen"].numpy()))
        if len(seen):
            cure = (
                f"the split is another; give the recipe it was trained with, or {kept['flags']}"
                if same
                else f"its images, labels or classes are not those of {kept['source']} as it was trained on; put those "
                "back, or give data that shares none of them"
            )
            first = data.found.items.name(int(data.index[part][seen[0]]))
            raise DataError(
                f"{data.source}: the checkpoint was trained on {len(seen)} of the {data.counts[part]} "
                f"{part} images, such as {first}: {cure}"
            )
    say(
        f"WARNING: {'another split' if same else 'other data'} than the checkpoint was trained with ({kept['source']}, "
        f"{kept['flags']}); none of the {' and '.join(SCORED[command])} images is one of those it was trained on"
    )


def _keys(data: ImageData, part: str) -> np.ndarray:
    """int64 [N]: enough of each image's sha256 to tell it from all others."""
    return np.ascontiguousarray(data.known.facts["sha256"][data.index[part]][:, :8]).view(np.int64)[
        :, 0
    ]


def _split(data: ImageData) -> str:
    return hashlib.sha256(
        b"".join(np.append(data.index[part], -1).tobytes() for part in PARTS)
    ).hexdigest()
