"""Run two bundles on the same images, as they are served, and compare image by image."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from models.bundle.verify import Runner, load_runner
from models.comparison.candidate import Candidate
from models.comparison.results import (
    LIVE,
    TEST,
    CandidateInfo,
    ClassComparison,
    Comparison,
    Difference,
    LostImage,
    PairCounts,
    Part,
    PartComparison,
    UnsharedClass,
)
from models.comparison.statistics import (
    calibration_difference,
    calibration_error,
    effective_images,
    mcnemar_exact,
    mcnemar_mid_p,
    paired_difference,
    weighted_mean,
)
from models.comparison.test_images import TestImage
from models.comparison.thumbnails import encode_data_url
from models.image import ImageError, InputSpec, decode

BATCH_SIZE = 32
MIN_PROBABILITY = 1e-12
"""Log loss counts smaller probabilities as this one."""

MAX_THUMBNAILS = 60
LATENCY_SECONDS = 0.3
MIN_LATENCY_RUNS = 5

Advance = Callable[[int], None]
"""Reports that this many more images have been processed."""


class ComparisonError(ValueError):
    """Bundles that can't be compared. The message is one line: what is wrong, what to do."""


class LatencyPair(NamedTuple):
    """Median milliseconds of one image."""

    old: float
    new: float


@dataclass(frozen=True)
class Answers:
    """The answers of one model, one row an image."""

    predicted: np.ndarray  # object [N], names of classes
    confidence: np.ndarray  # float64 [N], 0..1
    is_correct: np.ndarray  # bool [N]
    true_probability: np.ndarray  # float64 [N], 0 where the model does not know the class

    @property
    def log_loss(self) -> np.ndarray:
        """The negative log-likelihood of the true class, float64 [N]."""
        return -np.log(np.maximum(self.true_probability, MIN_PROBABILITY))

    def take(self, rows: np.ndarray) -> "Answers":
        """Return the answers of these rows."""
        return Answers(
            self.predicted[rows],
            self.confidence[rows],
            self.is_correct[rows],
            self.true_probability[rows],
        )


def ignore_progress(images: int) -> None:
    """Report to no one."""


def compare_candidates(
    old: Candidate,
    new: Candidate,
    images: Sequence[TestImage],
    confidence: float = 0.95,
    notes: Sequence[str] = (),
    advance: Advance = ignore_progress,
) -> Comparison:
    """Run both models on the images and return the comparison, without the decision of a gate.

    Only images of classes that both models know are compared; the others give the recall of the
    model that knows them. `confidence`: that of all intervals, 0..1. Raises ComparisonError where
    the models share no class, or no image of a shared class can be decoded, and BundleError where
    onnxruntime fails.
    """
    shared = [label for label in old.classes if label in set(new.classes)]
    if not shared:
        raise ComparisonError(
            f"{old.title} and {new.title} have no class in common, so they can't be compared"
        )
    known = {*old.classes, *new.classes}
    images = [image for image in images if image.label in known]
    old_run = load_runner(old.graph)
    new_run = load_runner(new.graph)

    readable, old_answers, new_answers = _run_both(old, old_run, new, new_run, images, advance)
    labels = np.array([image.label for image in readable], object)
    is_shared = np.isin(labels.astype(str), shared) if len(labels) else np.zeros(0, bool)
    if not is_shared.any():
        raise ComparisonError(
            f"no test image of {old.title} and {new.title} can be read; give the folder that holds "
            "them with --data"
        )

    parts: dict[Part, PartComparison] = {}
    for part in (TEST, LIVE):
        in_part = np.array([image.part == part for image in readable])
        rows = np.flatnonzero(in_part & is_shared)
        if len(rows):
            weights = np.array([readable[row].weight for row in rows])
            parts[part] = _compare_part(
                labels[rows], weights, old_answers.take(rows), new_answers.take(rows), confidence
            )

    latency = _measure_latencies(old, old_run, new, new_run)
    return Comparison(
        old=_describe(old, latency.old),
        new=_describe(new, latency.new),
        confidence=confidence,
        parts=parts,
        unshared_classes=_list_unshared(old, new, labels, old_answers, new_answers),
        unreadable=len(images) - len(readable),
        lost=_list_lost(old, readable, is_shared, old_answers, new_answers),
        notes=list(notes),
    )


def _describe(candidate: Candidate, latency_ms: float) -> CandidateInfo:
    return CandidateInfo(
        title=candidate.title,
        network=candidate.network,
        variant=candidate.variant,
        bytes=len(candidate.graph.content),
        latency_ms=latency_ms,
    )


# Running


def _run_both(
    old: Candidate,
    old_run: Runner,
    new: Candidate,
    new_run: Runner,
    images: Sequence[TestImage],
    advance: Advance,
) -> tuple[list[TestImage], Answers, Answers]:
    """Return the images that both inputs can be made of, and the answers of both models."""
    readable: list[TestImage] = []
    old_batches: list[np.ndarray] = []
    new_batches: list[np.ndarray] = []
    for start in range(0, len(images), BATCH_SIZE):
        batch = images[start : start + BATCH_SIZE]
        old_pixels: list[np.ndarray] = []
        new_pixels: list[np.ndarray] = []
        for image, first, second in _decode_both(batch, old.input, new.input):
            readable.append(image)
            old_pixels.append(first)
            new_pixels.append(second)
        if old_pixels:
            old_batches.append(old_run(np.stack(old_pixels))["probabilities"])
            new_batches.append(new_run(np.stack(new_pixels))["probabilities"])
        advance(len(batch))

    labels = [image.label for image in readable]
    return (
        readable,
        _read_answers(old.classes, old_batches, labels),
        _read_answers(new.classes, new_batches, labels),
    )


def _decode_both(
    images: Sequence[TestImage], old: InputSpec, new: InputSpec
) -> Iterator[tuple[TestImage, np.ndarray, np.ndarray]]:
    """Yield the images that can be decoded, and their pixels for both inputs."""
    for image in images:
        try:
            content = image.read()
            old_pixels = decode(content, old)
            new_pixels = old_pixels if new == old else decode(content, new)
        except (OSError, ImageError):
            continue
        yield image, old_pixels, new_pixels


def _read_answers(
    classes: Sequence[str], batches: Sequence[np.ndarray], labels: Sequence[str]
) -> Answers:
    """Return the answers for probabilities, batches of float [B,K]."""
    probabilities = np.concatenate([*batches, np.zeros((0, len(classes)))]).astype(np.float64)
    predicted = np.array(classes, object)[probabilities.argmax(1)]
    numbers = {name: k for k, name in enumerate(classes)}
    true_probability = np.zeros(len(labels))
    for row, label in enumerate(labels):
        if label in numbers:
            true_probability[row] = probabilities[row, numbers[label]]
    return Answers(
        predicted=predicted,
        confidence=np.minimum(probabilities.max(1), 1.0),
        is_correct=predicted == np.array(labels, object),
        true_probability=true_probability,
    )


def _measure_latencies(
    old: Candidate, old_run: Runner, new: Candidate, new_run: Runner
) -> LatencyPair:
    """Time one image with both models in turns, so that a busy machine slows down both."""
    old_image = _blank_image(old.input)
    new_image = _blank_image(new.input)
    old_run(old_image)
    new_run(new_image)
    old_ms: list[float] = []
    new_ms: list[float] = []
    end = time.perf_counter() + LATENCY_SECONDS
    while len(old_ms) < MIN_LATENCY_RUNS or time.perf_counter() < end:
        old_ms.append(_time_ms(old_run, old_image))
        new_ms.append(_time_ms(new_run, new_image))
    return LatencyPair(median(old_ms), median(new_ms))


def _blank_image(spec: InputSpec) -> np.ndarray:
    return np.zeros((1, spec.height, spec.width, spec.channels), np.uint8)


def _time_ms(run: Runner, image: np.ndarray) -> float:
    start = time.perf_counter()
    run(image)
    return 1000 * (time.perf_counter() - start)


# Comparing


def _compare_part(
    labels: np.ndarray, weights: np.ndarray, old: Answers, new: Answers, confidence: float
) -> PartComparison:
    """Compare the answers for the images of one part; all classes are known by both models."""
    lost = int((old.is_correct & ~new.is_correct).sum())
    gained = int((new.is_correct & ~old.is_correct).sum())
    return PartComparison(
        images=len(labels),
        effective_images=effective_images(weights),
        old_accuracy=_mean(old.is_correct, weights),
        new_accuracy=_mean(new.is_correct, weights),
        difference=_accuracy_difference(old, new, weights, confidence),
        pairs=PairCounts(
            both_right=int((old.is_correct & new.is_correct).sum()),
            lost=lost,
            gained=gained,
            both_wrong=int((~old.is_correct & ~new.is_correct).sum()),
        ),
        p_exact=mcnemar_exact(lost, gained),
        p_mid=mcnemar_mid_p(lost, gained),
        old_log_loss=_mean(old.log_loss, weights),
        new_log_loss=_mean(new.log_loss, weights),
        log_loss_difference=Difference.of(
            weighted_mean(new.log_loss - old.log_loss, weights, confidence)
        ),
        old_calibration_error=calibration_error(old.confidence, old.is_correct, weights),
        new_calibration_error=calibration_error(new.confidence, new.is_correct, weights),
        calibration_difference=Difference.of(
            calibration_difference(
                (old.confidence, new.confidence),
                (old.is_correct, new.is_correct),
                weights,
                confidence,
            )
        ),
        classes=_compare_classes(labels, weights, old, new, confidence),
    )


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float(np.average(values, weights=weights))


def _accuracy_difference(
    old: Answers, new: Answers, weights: np.ndarray, confidence: float
) -> Difference:
    """Return the difference of the accuracies: of counts, or weighted where weights differ."""
    if np.ptp(weights) == 0:
        lost = int((old.is_correct & ~new.is_correct).sum())
        gained = int((new.is_correct & ~old.is_correct).sum())
        return Difference.of(paired_difference(lost, gained, len(weights), confidence))
    changes = new.is_correct.astype(float) - old.is_correct
    return Difference.of(weighted_mean(changes, weights, confidence))


def _compare_classes(
    labels: np.ndarray, weights: np.ndarray, old: Answers, new: Answers, confidence: float
) -> list[ClassComparison]:
    """Compare the recall of each class, largest loss first."""
    names = sorted(set(labels.tolist()))
    # Bonferroni: the chance that any class is outside of its interval is that of one interval.
    class_confidence = 1 - (1 - confidence) / len(names)
    classes: list[ClassComparison] = []
    for name in names:
        rows = np.flatnonzero(labels == name)
        old_rows = old.take(rows)
        new_rows = new.take(rows)
        classes.append(
            ClassComparison(
                label=name,
                images=len(rows),
                old_recall=_mean(old_rows.is_correct, weights[rows]),
                new_recall=_mean(new_rows.is_correct, weights[rows]),
                difference=_accuracy_difference(
                    old_rows, new_rows, weights[rows], class_confidence
                ),
            )
        )
    return sorted(classes, key=lambda each: each.difference.estimate)


def _list_unshared(
    old: Candidate,
    new: Candidate,
    labels: np.ndarray,
    old_answers: Answers,
    new_answers: Answers,
) -> list[UnsharedClass]:
    """Return the classes that only one model knows, with its recall on their images."""
    unshared: list[UnsharedClass] = []
    for label in sorted({*old.classes} ^ {*new.classes}):
        is_new = label in new.classes
        answers = new_answers if is_new else old_answers
        rows = np.flatnonzero(labels == label)
        recall = float(answers.is_correct[rows].mean()) if len(rows) else None
        unshared.append(
            UnsharedClass(
                label=label,
                known_by="new" if is_new else "old",
                images=len(rows),
                recall=recall,
            )
        )
    return unshared


def _list_lost(
    old: Candidate,
    images: Sequence[TestImage],
    is_shared: np.ndarray,
    old_answers: Answers,
    new_answers: Answers,
) -> list[LostImage]:
    """Return the images that were right and are wrong now, the most confident mistake first."""
    rows = np.flatnonzero(is_shared & old_answers.is_correct & ~new_answers.is_correct)
    rows = rows[np.argsort(-new_answers.confidence[rows], kind="stable")]
    lost: list[LostImage] = []
    for rank, row in enumerate(rows.tolist()):
        image = images[row]
        thumbnail = ""
        if rank < MAX_THUMBNAILS:
            thumbnail = encode_data_url(decode(image.read(), old.input))
        lost.append(
            LostImage(
                name=os.fsencode(image.name).decode(errors="backslashreplace"),
                part=image.part,
                label=image.label,
                predicted=str(new_answers.predicted[row]),
                old_confidence=float(old_answers.confidence[row]),
                new_confidence=float(new_answers.confidence[row]),
                thumbnail=thumbnail,
            )
        )
    return lost
