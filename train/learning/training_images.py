"""Which images a checkpoint was trained on, so that none of them is scored as an unseen image.

The system writes the record into each checkpoint and checks it when a checkpoint is loaded.
"""

import hashlib
from typing import Any

import numpy as np
import torch

from train.data import DataError, ImageData
from train.data.source import PARTS, notify

# The parts of the data that each command scores.
SCORED_PARTS = {
    "fit": ("val", "test"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}


def describe_training_images(data: ImageData) -> dict[str, Any]:
    """Return what a checkpoint keeps of the data.

    `seen`, int64 [N], holds the first eight bytes of the sha256 of each training image.
    """
    flags = (
        f"--data.val_fraction {data.val_fraction} --data.test_fraction {data.test_fraction} "
        f"--seed_everything {data.seed}"
    )
    return {
        "source": data.source,
        "digest": data.digest,
        "split": _split_digest(data),
        "flags": flags,
        "seen": torch.from_numpy(_image_keys(data, "train")),
    }


def check_no_training_image_is_scored(
    record: dict[str, Any], data: ImageData, command: str
) -> None:
    """Raise DataError where `command` would score images that the checkpoint was trained on.

    Print a warning where the data or its split differ from those of the checkpoint and share no
    image that would be scored.
    """
    is_same_data = record["digest"] == data.digest
    if is_same_data and record["split"] == _split_digest(data):
        return

    for part in SCORED_PARTS[command]:
        is_trained_on = np.isin(_image_keys(data, part), record["seen"].numpy())
        rows = np.flatnonzero(is_trained_on)
        if len(rows) == 0:
            continue

        if is_same_data:
            advice = (
                f"the split is another; give the recipe it was trained with, or {record['flags']}"
            )
        else:
            advice = (
                f"its images, labels or classes are not those of {record['source']} at the time of "
                "training; restore those, or give data that shares none of them"
            )
        example = data.dataset.items.name(int(data.index[part][rows[0]]))
        raise DataError(
            f"{data.source}: the checkpoint was trained on {len(rows)} of the "
            f"{data.counts[part]} {part} images, such as {example}: {advice}"
        )

    difference = "another split" if is_same_data else "other data"
    parts = " and ".join(SCORED_PARTS[command])
    notify(
        f"WARNING: {difference} than the checkpoint was trained with ({record['source']}, "
        f"{record['flags']}); none of the {parts} images was used to train it"
    )


def _image_keys(data: ImageData, part: str) -> np.ndarray:
    """Return int64 [N]: the first eight bytes of each image's sha256, which identify it."""
    digests = data.decoded.metadata["sha256"][data.index[part]]
    first_bytes = np.ascontiguousarray(digests[:, :8])
    return first_bytes.view(np.int64)[:, 0]


def _split_digest(data: ImageData) -> str:
    """Return the sha256 of which image is in which part."""
    digest = hashlib.sha256()
    for part in PARTS:
        digest.update(np.append(data.index[part], -1).tobytes())
    return digest.hexdigest()
