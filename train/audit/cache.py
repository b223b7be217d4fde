"""Findings on disk, next to the decoded pixels: the same data and split are audited once.

<cache>/audit/<key>.json
"""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np

from train.audit.findings import Findings, list_left_out, shows_mirror_images
from train.data import ImageData
from train.data.cache import replace_text
from train.data.source import PARTS

LAYOUT_VERSION = 6  # of the findings; increase it when they change


def load_cached_findings(data: ImageData) -> Findings | None:
    """Load the findings of an earlier audit of the same data and split; None without one."""
    path = _cache_path(data)
    if path is None:
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def cache_findings(data: ImageData, findings: Findings) -> None:
    """Write the findings for the next audit. Failures are ignored: the cache only saves time."""
    path = _cache_path(data)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(findings))


def _cache_path(data: ImageData) -> Path | None:
    """Return the file of these findings, named by everything that they depend on."""
    if data.cache is None:
        return None
    items = data.dataset.items
    names = "\0".join(items.name(i) for i in range(len(items)))
    key = [
        LAYOUT_VERSION,
        data.digest,
        hashlib.sha256(names.encode()).hexdigest(),
        data.source,
        list_left_out(data),
        np.flatnonzero(data.dataset.reviewed).tolist(),
        {part: data.index[part].tolist() for part in PARTS},
        data.input.model_dump(),
        shows_mirror_images(data),
        data.embeddings_key,
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return data.cache / "audit" / f"{digest[:32]}.json"
