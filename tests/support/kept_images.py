"""A directory of kept images as the service and the labelling page write it."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from models.kept import KeptFolder, KeptImage, Label, Reason, Verdict, open_kept
from models.kept.records import ModelVersion, TopClass
from support import tiny_bundle

START = datetime(2026, 11, 30, 12, tzinfo=UTC)
LIVE_HALF = 2**31  # digests whose last 8 hexadecimal digits are below are live test images


def is_live_digest(content: bytes) -> bool:
    """Whether a random image belongs to the live test set."""
    return int(hashlib.sha256(content).hexdigest()[-8:], 16) < LIVE_HALF


def add_image(
    kept: KeptFolder | Path | str,
    content: bytes,
    label: str = "",
    reason: Reason = Reason.RANDOM,
    probability: float = 0.25,
    who: str = "ann",
    verdict: Verdict = Verdict.CLASS,
    second: int = 0,
) -> str:
    """Add a PNG image, with a label unless that is empty; return its digest."""
    folder = kept if isinstance(kept, KeptFolder) else open_kept(kept)
    digest = hashlib.sha256(content).hexdigest()
    time = START + timedelta(seconds=second)
    image = KeptImage(
        digest=digest,
        file=f"{time.date()}/{digest}.png",
        request_id=digest[:8],
        image=0,
        time=time,
        model={"name": "colours", "version": 1},
        top=[{"label": "red", "index": 0, "confidence": 0.5}],
        energy=-1.0,
        reasons=[reason],
        probability=probability if reason is Reason.RANDOM else None,
        width=32,
        height=32,
    )
    folder.add_image(image, content)
    if label or verdict is not Verdict.CLASS:
        record = Label(digest=digest, verdict=verdict, label=label, who=who, time=time)
        folder.add_labels([record])
    return digest


def add_answered_image(
    kept: KeptFolder,
    seed: int = 0,
    colour: str = "red",
    request_id: str = "a",
    reason: Reason = Reason.RANDOM,
    day: int = 0,
    confidence: float = 0.5,
    embedding: Sequence[float] = (1, 2, 3),
) -> KeptImage:
    """Add an image that arrives `day` days after START, with guesses and an embedding.

    Images differ by their seed.
    """
    content = tiny_bundle.make_image(colour, size=64, seed=seed)
    digest = hashlib.sha256(content).hexdigest()
    time = START + timedelta(days=day, seconds=seed)
    index = tiny_bundle.CLASSES.index(colour)
    second = (index + 1) % len(tiny_bundle.CLASSES)
    image = KeptImage(
        digest=digest,
        file=f"{time.date()}/{digest}.png",
        request_id=request_id,
        image=0,
        time=time,
        model=ModelVersion(name="colours", version=1),
        top=[
            TopClass(label=colour, index=index, confidence=confidence),
            TopClass(
                label=tiny_bundle.CLASSES[second], index=second, confidence=0.9 * (1 - confidence)
            ),
        ],
        energy=-1.0,
        reasons=[reason],
        probability=0.25 if reason is Reason.RANDOM else None,
        width=64,
        height=64,
        embedding=base64.b64encode(np.array(embedding, "<f2").tobytes()).decode(),
    )
    kept.add_image(image, content)
    return image
