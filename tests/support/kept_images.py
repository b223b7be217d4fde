"""A directory of kept images as the service and the labelling page write it."""

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

from models.kept import KeptFolder, KeptImage, Label, Reason, Verdict, open_kept

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
