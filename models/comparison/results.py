"""The results of a comparison: what `imago models compare --json` prints."""

from typing import Final, Literal

from pydantic import BaseModel

from models.comparison.statistics import Interval

TEST: Final = "test"
LIVE: Final = "live"
Part = Literal["test", "live"]


class Difference(BaseModel):
    """A difference, new minus old, and its confidence interval."""

    estimate: float
    low: float
    high: float

    @classmethod
    def of(cls, interval: Interval) -> "Difference":
        """Return the difference with the numbers of an interval."""
        return cls(estimate=interval.estimate, low=interval.low, high=interval.high)


class CandidateInfo(BaseModel):
    """One of the two bundles."""

    title: str
    """NAME/VERSION."""

    network: str
    variant: str
    bytes: int
    """Of the graph that runs."""

    latency_ms: float | None = None
    """Median of one image, decoding excluded, measured in turns with the other bundle."""


class PairCounts(BaseModel):
    """Images by which of the two models classifies them correctly."""

    both_right: int
    lost: int
    """Right with the old model, wrong with the new one."""

    gained: int
    both_wrong: int


class ClassComparison(BaseModel):
    """The images of one class that both models know."""

    label: str
    images: int
    old_recall: float
    new_recall: float
    difference: Difference
    """Its confidence is raised for the number of classes (Bonferroni)."""


class PartComparison(BaseModel):
    """Results on the test part, or on the live test set.

    Accuracies of the live test set are weighted by 1 / (probability of being sampled).
    """

    images: int
    effective_images: float
    """Images of equal weight that tell as much."""

    old_accuracy: float
    new_accuracy: float
    difference: Difference
    pairs: PairCounts
    p_exact: float
    """McNemar's exact test; not weighted."""

    p_mid: float
    old_log_loss: float
    new_log_loss: float
    log_loss_difference: Difference
    old_calibration_error: float
    new_calibration_error: float
    calibration_difference: Difference
    classes: list[ClassComparison]


class UnsharedClass(BaseModel):
    """A class that only one of the models knows; its images are not compared."""

    label: str
    known_by: Literal["old", "new"]
    images: int
    recall: float | None
    """Of the model that knows the class; None without images."""


class LostImage(BaseModel):
    """An image that the old model classifies correctly and the new one does not."""

    name: str
    part: Part
    label: str
    predicted: str
    old_confidence: float
    new_confidence: float
    thumbnail: str
    """Data URL; empty beyond the first images."""


class GateDecision(BaseModel):
    """Whether the new bundle may replace the old one."""

    passed: bool
    part: Part
    """The part whose accuracy counts."""

    reasons: list[str]
    """What is worse beyond the budget, one clause each."""


class Comparison(BaseModel):
    """Two bundles on the same images. Shares are 0..1."""

    old: CandidateInfo
    new: CandidateInfo
    confidence: float
    """Of the intervals, 0..1."""

    parts: dict[Part, PartComparison]
    unshared_classes: list[UnsharedClass]
    unreadable: int
    """Images that are left out, as they can't be read or decoded."""

    lost: list[LostImage]
    """All of them, those of the highest wrong confidence first."""

    notes: list[str]
    gate: GateDecision | None = None

    def to_json(self) -> str:
        """Return the results as indented JSON, without the thumbnails."""
        thumbnails = {"lost": {"__all__": {"thumbnail"}}}
        return self.model_dump_json(indent=1, exclude=thumbnails) + "\n"
