"""What the labelling page needs of a place that images are labelled in."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from models.kept import Verdict

NO_EMBEDDING = np.zeros(0, np.float32)


class GivenLabel(NamedTuple):
    """A label that an image has."""

    verdict: Verdict
    label: str
    who: str


@dataclass(frozen=True)
class Item:
    """An image that can be labelled."""

    id: str
    guesses: list[tuple[str, float]]  # classes and their confidence, the most likely first
    reasons: list[str] = field(default_factory=list)  # why it is here
    label: GivenLabel | None = None  # the one that counts
    others: tuple[GivenLabel, ...] = ()  # of people who disagree
    training_label: str = ""  # in the training data, if it is from there
    embedding: np.ndarray = field(default_factory=lambda: NO_EMBEDDING)  # float32 [D]
    embedding_kind: str = ""  # only embeddings of one kind can be compared
    arrived: float = 0.0  # seconds since 1970


class NewLabel(NamedTuple):
    """What a person decided about an image."""

    id: str
    verdict: Verdict
    label: str
    who: str


class LabelSource(Protocol):
    """Images, and a place for their labels. Threads may use it at once."""

    location: str  # for the page
    saves_who: bool  # whether it stores who labelled
    allows_new_classes: bool

    def list_items(self) -> list[Item]:
        """Return all images in the order of arrival. Raises OSError."""

    def list_classes(self, items: list[Item]) -> list[str]:
        """Return the classes that are known."""

    def read_image(self, item_id: str) -> bytes:
        """Return an image file. Raises FileNotFoundError, or OSError."""

    def save(self, labels: list[NewLabel]) -> list[str]:
        """Save labels durably; return the ids of images that are gone. Raises OSError."""
