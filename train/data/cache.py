"""Decoded pixels on disk, so that each data set is decoded once for each input size.

    <cache>/pixels/<digest>-<spec>/{pixels.npy, facts.npy}    keyed by what the data is
    <cache>/pixels/<fingerprint>-<spec>.key                   from what the data looks like (paths, sizes, times) to it

An entry is written beside its place and renamed in whole. A lock makes a second job wait for the first and then
read what it wrote; without the lock both would decode, and either result would do.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from filelock import FileLock

from models.image import InputSpec
from train.data.pixels import FACTS, describe, examine
from train.data.source import Arrays, Items, say

LAYOUT = 2  # of the entries; a change of decoding changes it too


@dataclass(frozen=True)
class Known:
    """All images of a source at one size. Rows follow the positions in the source."""

    pixels: np.ndarray  # uint8 [N, H, W, C]; black where `facts` names a problem
    facts: np.ndarray  # FACTS [N]


def known(items: Items, spec: InputSpec, cache: Path | None, workers: int, title: str) -> Known:
    """Pixels and facts of every item, from the cache or by decoding all; without `cache`, or where it can't be
    written, they are held in memory only."""
    if isinstance(items, Arrays) and items.array.shape[1:] == (
        spec.height,
        spec.width,
        spec.channels,
    ):
        return Known(items.array, describe(items.array))
    if cache is None:
        return _decode(items, spec, workers, title)
    place = cache / "pixels"
    suffix = hashlib.sha256(
        f"{LAYOUT} {cv2.__version__} {spec.model_dump_json()}".encode()
    ).hexdigest()[:16]
    key = place / f"{items.fingerprint()[:32]}-{suffix}.key"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{key}.lock"):
            found = _load(key, len(items), spec)
            if found is None or _more_readable(items, found.facts):
                found = _fill(key, suffix, items, spec, workers, title)
            if found is None:
                raise OSError("what was written there does not read back")
            return found
    except OSError as error:
        say(
            f"{place}: the decoded pixels can't be kept there ({error.strerror or error}), so they stay in memory only"
        )
        return _decode(items, spec, workers, title)


def _load(key: Path, count: int, spec: InputSpec) -> Known | None:
    """The entry that the key names, or None where there is none or it is damaged."""
    try:
        entry = key.parent / key.read_text()
        pixels = np.load(
            entry / "pixels.npy", mmap_mode="c"
        )  # private pages: shared between jobs until written to
        facts = np.load(entry / "facts.npy")
    except (OSError, ValueError):
        return None
    sound = pixels.shape == (count, spec.height, spec.width, spec.channels) and facts.shape == (
        count,
    )
    return Known(pixels, facts) if sound and facts.dtype == FACTS else None


def _more_readable(items: Items, facts: np.ndarray) -> bool:
    """Whether an item that could not be read then can be now: its mode or its disk may be other than they were, which
    no fingerprint shows."""
    for i in np.flatnonzero(~facts["sha256"].any(1)).tolist():
        with contextlib.suppress(OSError):
            items[i]
            return True
    return False


def _fill(
    key: Path, suffix: str, items: Items, spec: InputSpec, workers: int, title: str
) -> Known | None:
    """Decode into a hidden directory, publish it under the digest of what was read, and load it."""
    mine = f".staging-{key.name}-"  # the lock is the key's, so any that are there were left by a job that was killed
    for left in key.parent.glob(f"{mine}*"):
        shutil.rmtree(left, ignore_errors=True)
    staged = Path(tempfile.mkdtemp(prefix=mine, dir=key.parent))
    try:
        shape = (len(items), spec.height, spec.width, spec.channels)
        pixels = np.lib.format.open_memmap(staged / "pixels.npy", "w+", np.uint8, shape)
        with (staged / "pixels.npy").open("r+b") as file:
            os.posix_fallocate(
                file.fileno(), 0, os.fstat(file.fileno()).st_size
            )  # a full disk shows now, as an error
        facts = np.zeros(len(items), FACTS)
        _decode_into(pixels, facts, items, spec, workers, title)
        pixels.flush()
        np.save(staged / "facts.npy", facts)
        entry = (
            key.parent / f"{hashlib.sha256(facts['sha256'].tobytes()).hexdigest()[:32]}-{suffix}"
        )
        if _sound(entry):
            shutil.rmtree(staged)
        else:
            shutil.rmtree(entry, ignore_errors=True)
            staged.rename(entry)
        replacement = key.with_name(f".{key.name}-{os.getpid()}")
        replacement.write_text(entry.name)
        replacement.replace(key)
        return _load(key, len(items), spec)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _sound(entry: Path) -> bool:
    try:
        return len(np.load(entry / "pixels.npy", mmap_mode="r")) == len(
            np.load(entry / "facts.npy")
        )
    except (OSError, ValueError):
        return False


def _decode(items: Items, spec: InputSpec, workers: int, title: str) -> Known:
    pixels = np.zeros((len(items), spec.height, spec.width, spec.channels), np.uint8)
    facts = np.zeros(len(items), FACTS)
    _decode_into(pixels, facts, items, spec, workers, title)
    return Known(pixels, facts)


def _decode_into(
    pixels: np.ndarray, facts: np.ndarray, items: Items, spec: InputSpec, workers: int, title: str
) -> None:
    for rows, some, about in examine(items, np.arange(len(items)), spec, workers, title):
        pixels[rows], facts[rows] = some, about
