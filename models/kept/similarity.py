"""Near duplicates among images, by a hash of their pixels and by their embeddings."""

import cv2
import numpy as np

HASH_SIDE = 8  # of 64 bits
MAX_HASH_DISTANCE = 2  # bits that differ between near duplicates
MIN_COSINE = 0.99  # of the embeddings of near duplicates
REMEMBERED_IMAGES = 2000


def compute_hash(pixels: np.ndarray) -> int:
    """Return the difference hash of uint8 [H, W, C], 64 bits.

    A bit tells whether a cell of an 8x8 grid is brighter than its right neighbour. Method: dHash,
    N. Krawetz, "Kind of Like That", 2013.
    """
    gray = pixels.mean(2, dtype=np.float32)
    cells = cv2.resize(gray, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA)
    bits = cells[:, :-1] > cells[:, 1:]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class NearDuplicates:
    """The last images, to tell whether a further one is nearly the same as one of them."""

    def __init__(self) -> None:
        self._hashes = np.zeros(REMEMBERED_IMAGES, np.uint64)
        self._embeddings: list[np.ndarray] = []
        self._next = 0  # position of the next image; that of the oldest one if all are in use

    def has_near(self, image_hash: int, embedding: np.ndarray) -> bool:
        """Whether one of the images has nearly this hash and this embedding, float [D] or empty."""
        hashes = self._hashes[: len(self._embeddings)]
        distances = np.bitwise_count(hashes ^ np.uint64(image_hash))
        for i in np.flatnonzero(distances <= MAX_HASH_DISTANCE).tolist():
            if _are_near(self._embeddings[i], embedding):
                return True
        return False

    def add(self, image_hash: int, embedding: np.ndarray) -> None:
        """Remember an image, in place of the oldest one."""
        self._hashes[self._next] = image_hash
        if len(self._embeddings) < REMEMBERED_IMAGES:
            self._embeddings.append(embedding)
        else:
            self._embeddings[self._next] = embedding
        self._next = (self._next + 1) % REMEMBERED_IMAGES


def _are_near(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two embeddings have nearly the same direction; true where there is none."""
    if one.shape != other.shape:
        return False
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    if not lengths:
        return True
    return float(one @ other) / lengths >= MIN_COSINE
