"""Images that the service kept, and their labels: serving writes them, training reads them.

    KEPT/2026-11-30/<sha256>.jpg      an image, below the day (UTC) on which it arrived
    KEPT/2026-11-30/<writer>.jsonl    a line for each image that was kept
    KEPT/labels/<writer>.jsonl        a line for each label

serve/README.md describes the lines. Files are only appended to, each by one process, so that
several processes and people may write at the same time.
"""

from models.kept.folder import KeptFolder, open_kept
from models.kept.records import (
    KeptError,
    KeptImage,
    Label,
    LabelledImage,
    Reason,
    TopClass,
    Verdict,
)

__all__ = [
    "KeptError",
    "KeptFolder",
    "KeptImage",
    "Label",
    "LabelledImage",
    "Reason",
    "TopClass",
    "Verdict",
    "open_kept",
]
