"""The lines of a directory of kept images: an image, and a label."""

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

DIGEST_PATTERN = "^[0-9a-f]{64}$"
MAX_WHO_CHARACTERS = 80
MAX_LABEL_CHARACTERS = 200
MIN_PROBABILITY = 1e-12  # so that the weight of an image is finite

Record = TypeVar("Record", bound=BaseModel)


class KeptError(ValueError):
    """A directory of kept images, or a label, can't be used. The message says what to do."""


class Reason(StrEnum):
    """Why an image is kept."""

    ABSTAIN = "abstain"
    OUT_OF_DISTRIBUTION = "out_of_distribution"
    SHADOW = "shadow"
    CORRECTED = "corrected"
    RANDOM = "random"


class Verdict(StrEnum):
    """What a person decides about an image."""

    CLASS = "class"
    NONE = "none"  # an image of this kind, but of none of the classes
    FOREIGN = "foreign"  # not an image of this task at all
    WITHDRAWN = "withdrawn"  # the person takes the earlier label back


class TopClass(BaseModel):
    """A class and its calibrated probability."""

    model_config = ConfigDict(frozen=True)

    label: str
    index: int = Field(ge=0)
    confidence: float = Field(ge=0, le=1)


class ModelVersion(BaseModel):
    """The model that answered."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: int = Field(ge=1)


class KeptImage(BaseModel):
    """A line of an image. After `merge_images`, all lines of one digest."""

    model_config = ConfigDict(frozen=True)

    digest: str = Field(pattern=DIGEST_PATTERN)
    file: str = Field(pattern=r"^\d{4}-\d\d-\d\d/[0-9a-f]{64}\.[a-z]{3,4}$")
    request_id: str
    image: int = Field(ge=0)
    time: AwareDatetime
    model: ModelVersion
    top: list[TopClass] = Field(min_length=1)
    energy: float = Field(allow_inf_nan=False)
    reasons: list[Reason] = Field(min_length=1)
    probability: float | None = Field(default=None, ge=MIN_PROBABILITY, le=1)
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    embedding: str = ""

    # Of all lines with this digest; not in the file.
    weight: float = Field(default=0.0, exclude=True)
    request_ids: frozenset[str] = Field(default=frozenset(), exclude=True)

    @field_validator("embedding")
    @classmethod
    def _check_embedding(cls, embedding: str) -> str:
        """Raise ValueError for what `read_embedding` can't read, or numbers that are not finite."""
        try:
            numbers = np.frombuffer(base64.b64decode(embedding), "<f2")
        except binascii.Error as error:
            raise ValueError("the embedding is not base64") from error
        if not np.isfinite(numbers).all():
            raise ValueError("the embedding has numbers that are not finite")
        return embedding

    def read_embedding(self) -> np.ndarray:
        """Return the embedding, float32 [D]; D is 0 if the model has none."""
        data = base64.b64decode(self.embedding)
        return np.frombuffer(data, "<f2").astype(np.float32)


class Label(BaseModel):
    """A line of a label."""

    model_config = ConfigDict(frozen=True)

    digest: str = Field(pattern=DIGEST_PATTERN)
    verdict: Verdict
    label: str = Field(default="", max_length=MAX_LABEL_CHARACTERS)
    who: str = Field(min_length=1, max_length=MAX_WHO_CHARACTERS)
    time: AwareDatetime


@dataclass(frozen=True)
class LabelledImage:
    """A kept image and what people say about it."""

    image: KeptImage
    label: Label | None  # the one that counts; None without a label
    others: tuple[Label, ...] = ()  # the last labels of other people that differ from it

    @property
    def has_conflict(self) -> bool:
        """Whether people disagree."""
        return bool(self.others)


def now() -> datetime:
    """Return the time of a new line."""
    return datetime.now(UTC)


def pack_line(record: BaseModel) -> bytes:
    """Return the line of an image or a label."""
    text = json.dumps(record.model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="replace") + b"\n"


def parse_lines(content: bytes, record_type: type[Record]) -> list[Record]:
    """Return the records of a file of lines. Lines that are torn or not records are skipped."""
    records: list[Record] = []
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            records.append(record_type.model_validate_json(line))
        except ValidationError:
            continue
    return records


def merge_images(lines: Iterable[KeptImage]) -> dict[str, KeptImage]:
    """Return the images by digest, the first to arrive first; the lines of one are joined.

    `weight` becomes the sum of 1 / probability over the draws of the random share, 0 for an image
    that was not drawn.
    """
    images: dict[str, KeptImage] = {}
    for line in sorted(lines, key=lambda line: line.time):
        drawn = Reason.RANDOM in line.reasons and line.probability is not None
        weight = 1 / line.probability if drawn and line.probability else 0.0
        first = images.get(line.digest, line)
        reasons = sorted({*first.reasons, *line.reasons})
        images[line.digest] = first.model_copy(
            update={
                "reasons": reasons,
                "weight": first.weight + weight,
                "probability": first.probability or line.probability,
                "request_ids": first.request_ids | {line.request_id},
            }
        )
    return images


def merge_labels(lines: Iterable[Label]) -> dict[str, tuple[Label, tuple[Label, ...]]]:
    """Return by digest the label that counts, and the last labels of others that differ."""
    last: dict[str, dict[str, Label]] = {}
    for line in sorted(lines, key=lambda line: line.time):
        people = last.setdefault(line.digest, {})
        people.pop(line.who, None)  # so that the order of the people is that of their last labels
        if line.verdict is not Verdict.WITHDRAWN:
            people[line.who] = line

    merged: dict[str, tuple[Label, tuple[Label, ...]]] = {}
    for digest, people in last.items():
        if not people:
            continue
        *earlier, label = people.values()
        others = [other for other in earlier if not _agree(other, label)]
        merged[digest] = (label, tuple(others))
    return merged


def _agree(one: Label, other: Label) -> bool:
    return (one.verdict, one.label) == (other.verdict, other.label)


def join(
    images: dict[str, KeptImage], labels: dict[str, tuple[Label, tuple[Label, ...]]]
) -> list[LabelledImage]:
    """Return each image with its label. Labels of images that are gone are left out."""
    joined: list[LabelledImage] = []
    for digest, image in images.items():
        label, others = labels.get(digest, (None, ()))
        joined.append(LabelledImage(image, label, others))
    return joined
