"""In which order images are labelled, and which of them look alike."""

import random
from collections.abc import Callable

import numpy as np

from models.labelling.source import Item

MAX_CANDIDATES = 4000  # images that the diversity is computed among: the most uncertain ones
MAX_LABELLED = 1000  # labelled images that new ones should differ from: the last ones
LOOK_ALIKES = 24
MIN_LOOK_ALIKE_COSINE = 0.8
RANDOM_SEED = 0

Order = Callable[[list[Item], list[Item], int], list[Item]]


def measure_uncertainty(item: Item) -> float:
    """Return 1 less the margin between the two most likely classes, 0 to 1.

    Method: margin sampling, Scheffer et al. 2001.
    """
    confidences = [confidence for _, confidence in item.guesses[:2]]
    if not confidences:
        return 1.0
    second = confidences[1] if len(confidences) > 1 else 0.0
    return 1.0 - (confidences[0] - second)


def order_by_teaching(items: list[Item], labelled: list[Item], limit: int) -> list[Item]:
    """Return the images that teach most: uncertain, and unlike one another and those labelled.

    Greedy: the next image is the one with the largest product of uncertainty and distance to the
    closest image that is chosen or labelled. Method: k-center greedy, Sener and Savarese 2018,
    weighed by the margin.
    """
    candidates = sorted(items, key=measure_uncertainty, reverse=True)[:MAX_CANDIDATES]
    if not candidates:
        return []
    uncertainty = np.array([measure_uncertainty(item) for item in candidates], np.float32)
    matrix, kinds = _stack_embeddings(candidates)
    distances = np.ones(len(candidates), np.float32)
    for item in labelled[-MAX_LABELLED:]:
        _shorten_distances(distances, matrix, kinds, item)

    chosen: list[Item] = []
    is_left = np.ones(len(candidates), bool)
    for _ in range(min(limit, len(candidates))):
        # Copies of a chosen image are last, and among them the most uncertain are first.
        scores = (uncertainty + 1e-3) * (distances + 1e-6)
        scores[~is_left] = -1
        position = int(scores.argmax())
        chosen.append(candidates[position])
        is_left[position] = False
        _shorten_distances(distances, matrix, kinds, candidates[position])
    return chosen


def order_by_arrival(items: list[Item], labelled: list[Item], limit: int) -> list[Item]:
    """Return the last images to arrive, the newest first."""
    return sorted(items, key=lambda item: item.arrived, reverse=True)[:limit]


def order_randomly(items: list[Item], labelled: list[Item], limit: int) -> list[Item]:
    """Return images in an order that is random, and the same each time."""
    shuffled = sorted(items, key=lambda item: item.id)
    random.Random(RANDOM_SEED).shuffle(shuffled)
    return shuffled[:limit]


def find_look_alikes(item: Item, others: list[Item]) -> list[Item]:
    """Return the images whose embeddings are closest to that of `item`, the closest first."""
    comparable = [
        other
        for other in others
        if other.id != item.id
        and other.embedding_kind == item.embedding_kind
        and len(other.embedding) == len(item.embedding)
    ]
    if not comparable or not len(item.embedding):
        return []
    matrix = np.stack([_normalize(other.embedding) for other in comparable])
    cosines = matrix @ _normalize(item.embedding)
    positions = (-cosines).argsort(kind="stable")[:LOOK_ALIKES].tolist()
    return [comparable[i] for i in positions if cosines[i] >= MIN_LOOK_ALIKE_COSINE]


# By name, as the page lists them.
ORDERS: dict[str, tuple[str, Order]] = {
    "teach": ("What teaches most first: uncertain and unlike the others", order_by_teaching),
    "newest": ("Newest first", order_by_arrival),
    "random": ("Random", order_randomly),
}


def _normalize(embedding: np.ndarray) -> np.ndarray:
    return embedding / max(float(np.linalg.norm(embedding)), 1e-12)


def _stack_embeddings(items: list[Item]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the unit embeddings [N, D] of each kind, and their positions [N] among the items."""
    positions: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        if len(item.embedding):
            positions.setdefault(_kind(item), []).append(i)
    matrix: dict[str, np.ndarray] = {}
    for kind, members in positions.items():
        matrix[kind] = np.stack([_normalize(items[i].embedding) for i in members])
    return matrix, {kind: np.array(members) for kind, members in positions.items()}


def _kind(item: Item) -> str:
    return f"{item.embedding_kind} {len(item.embedding)}"


def _shorten_distances(
    distances: np.ndarray, matrix: dict[str, np.ndarray], kinds: dict[str, np.ndarray], item: Item
) -> None:
    """Update the cosine distance of each candidate to the closest image with that of `item`."""
    kind = _kind(item)
    if kind not in matrix:
        return
    members = kinds[kind]
    new = 1 - matrix[kind] @ _normalize(item.embedding)
    distances[members] = np.minimum(distances[members], np.clip(new, 0, 1))
