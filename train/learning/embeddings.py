"""Embeddings of images by a frozen network, kept on disk: each image is computed once.

    <cache>/embeddings/<key>/<digest>.npz    digests uint8 [M, 32] and embeddings float32 [M, D]

The key stands for weights and preprocessing; an image is known by the SHA-256 of its file. A data
set that grows only computes what is new, and adds a file of it.
"""

import contextlib
import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor

from train.data import ImageData
from train.data.source import notify

Embed = Callable[[Tensor], np.ndarray]
"""Maps images uint8 [B, C, H, W] to embeddings float32 [B, D]."""


@dataclass(frozen=True)
class EmbeddingCache:
    """The embeddings of one network and one preprocessing."""

    directory: Path | None  # None keeps nothing

    def load(self) -> dict[bytes, np.ndarray]:
        """Return embeddings float32 [D] by the SHA-256 of the image, without unreadable files."""
        known: dict[bytes, np.ndarray] = {}
        if self.directory is None or not self.directory.is_dir():
            return known
        for path in sorted(self.directory.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as file:
                    digests = file["digests"]
                    embeddings = file["embeddings"]
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                continue
            for digest, embedding in zip(digests, embeddings, strict=False):
                known[digest.tobytes()] = embedding
        return known

    def add(self, digests: np.ndarray, embeddings: np.ndarray) -> None:
        """Add a file, which appears complete or not at all; a full disk only costs the file."""
        if self.directory is None:
            return
        name = hashlib.sha256(digests.tobytes()).hexdigest()[:32]
        staged = self.directory / f".{name}-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with staged.open("wb") as file:
                np.savez(file, digests=digests, embeddings=embeddings)
            staged.replace(self.directory / f"{name}.npz")
        except OSError as error:
            notify(
                f"{self.directory}: embeddings can't be kept there ({error.strerror or error}), so "
                "the next run computes them again"
            )
            with contextlib.suppress(OSError):
                staged.unlink()


def open_embedding_cache(cache: Path | None, *key: str) -> EmbeddingCache:
    """Return the cache of these weights and this preprocessing; `key` names all they depend on."""
    if cache is None:
        return EmbeddingCache(None)
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
    return EmbeddingCache(cache / "embeddings" / digest)


class EmbeddedImages:
    """Which images of a data set have a cached embedding, and how the others are computed."""

    def __init__(self, data: ImageData, cache: EmbeddingCache):
        self.data = data
        self.cache = cache
        self.digests = data.decoded.metadata["sha256"]  # uint8 [N, 32]
        self.known = cache.load()
        self.missing = self._list_missing()

    def _list_missing(self) -> np.ndarray:
        """Return one position of each image without an embedding, int64, ascending."""
        usable = np.sort(np.concatenate(list(self.data.index.values())))
        first: dict[bytes, int] = {}
        for i in usable.tolist():
            digest = self.digests[i].tobytes()
            if digest not in self.known:
                first.setdefault(digest, i)
        return np.array(sorted(first.values()), np.int64)

    def compute(self, embed: Embed) -> np.ndarray:
        """Compute what is missing and return the embeddings of all images, float32 [N, D].

        Images that are in no part, such as unreadable ones, have zeros.
        """
        if len(self.missing):
            embeddings = self._embed(embed)
            self._report()
            digests = self.digests[self.missing]
            self.cache.add(digests, embeddings)
            for digest, embedding in zip(digests, embeddings, strict=True):
                self.known[digest.tobytes()] = embedding

        width = len(next(iter(self.known.values())))
        result = np.zeros((len(self.digests), width), np.float32)
        for index in self.data.index.values():
            for i in index.tolist():
                result[i] = self.known[self.digests[i].tobytes()]
        return result

    def _report(self) -> None:
        """Print how many embeddings are computed, and how many are known from earlier runs."""
        images = sum(len(index) for index in self.data.index.values())
        known = images - len(self.missing)
        text = f"embeddings of {len(self.missing):,} images are computed"
        notify(f"{text}; {known:,} are in the cache" if self.known else text)

    def _embed(self, embed: Embed) -> np.ndarray:
        """Return float32 [M, D] of the missing images, with a progress bar on a terminal."""
        batches = self.data.positions_dataloader(self.missing)
        chunks: list[np.ndarray] = []
        for images, _ in track(
            batches,
            description=f"Embedding {self.data.dataset.name}",
            total=len(batches),
            console=Console(file=sys.stderr),
            transient=True,
            disable=not sys.stderr.isatty(),
        ):
            chunks.append(embed(images))
        return np.concatenate(chunks)
