"""Calibration on validation data: temperature, abstaining, prediction sets, energy threshold.

What is fitted on validation data is measured on test data, and both go into the manifest.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import betaincinv

from models.bundle import Calibration
from models.comparison.statistics import CALIBRATION_BINS, calibration_error
from train.export.scores import Scores, energy, negative_log_likelihood, softmax

LOWEST_TEMPERATURE = 0.05
HIGHEST_TEMPERATURE = 20.0
ABSTAIN_CERTAINTY = 0.9  # confidence level of the promised accuracy


@dataclass
class CalibrateConfig:
    """How confidences are calibrated, and which thresholds are fitted.

    Args:
        temperature: divide the logits by a number fitted on validation data, so that confidence
            matches accuracy.
        abstain_accuracy: predictions with too little confidence abstain, so that this share of the
            others is correct; by default the errors are halved. Nothing abstains where the
            validation data is too small to support it.
        abstain_coverage: share of images that must be answered at least.
        conformal_level: share of images whose prediction set holds the true class.
        energy_kept: share of validation images that the energy threshold accepts as in
            distribution.
    """

    temperature: bool = True
    abstain_accuracy: float | None = None
    abstain_coverage: float = 0.5
    conformal_level: float = 0.95
    energy_kept: float = 0.95

    def __post_init__(self) -> None:
        for name in ("abstain_accuracy", "abstain_coverage", "conformal_level", "energy_kept"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"calibrate.{name}: {value} is not between 0 and 1")


def calibrate(
    val: Scores, test: Scores, config: CalibrateConfig, temperature: float | None = None
) -> Calibration:
    """Fit on validation scores and measure the outcome on test scores.

    `temperature` is that of a graph which already contains it; without one it is fitted, too.
    """
    if temperature is None:
        temperature = fit_temperature(val.logits, val.labels) if config.temperature else 1.0
    uncalibrated = softmax(val.logits)
    calibrated = softmax(val.logits, temperature)
    target = config.abstain_accuracy or halve_errors(val)
    abstention = fit_abstention(calibrated, val.labels, target, config.abstain_coverage)
    quantile = fit_conformal_quantile(calibrated, val.labels, config.conformal_level)

    test_probabilities = softmax(test.logits, temperature)
    is_answered = test_probabilities.max(1) >= abstention.threshold
    answered_correct = (test_probabilities.argmax(1) == test.labels)[is_answered]

    return Calibration(
        temperature=temperature,
        nll_before=negative_log_likelihood(val.logits, val.labels),
        nll_after=negative_log_likelihood(val.logits, val.labels, temperature),
        ece_before=expected_calibration_error(uncalibrated, val.labels),
        ece_after=expected_calibration_error(calibrated, val.labels),
        abstain_threshold=abstention.threshold,
        abstain_accuracy=target,
        abstain_bound=abstention.bound,
        abstain_coverage=abstention.coverage,
        abstain_test_accuracy=float(answered_correct.mean()) if len(answered_correct) else None,
        abstain_test_coverage=float(is_answered.mean()),
        conformal_level=config.conformal_level,
        conformal_quantile=quantile,
        conformal_coverage=conformal_coverage(test_probabilities, test.labels, quantile),
        energy_threshold=float(np.quantile(energy(val.logits), config.energy_kept)),
    )


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the T that minimizes the NLL of softmax(logits / T), by LBFGS on log T.

    Guo et al., "On calibration of modern neural networks", 2017. Where every validation image is
    classified correctly, the NLL has no minimum: it falls as T approaches 0. Then one additional
    image is assumed to be wrong, as in Platt, "Probabilistic outputs for support vector machines",
    1999.
    """
    x = torch.from_numpy(logits).double()
    y = torch.from_numpy(labels)
    smoothing = 0.0
    if (x.argmax(1) == y).all():
        smoothing = 1 / (len(labels) + 2)

    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        scaled = x / log_temperature.exp()
        value = torch.nn.functional.cross_entropy(scaled, y, label_smoothing=smoothing)
        value.backward()
        return value

    solver.step(loss)
    temperature = log_temperature.detach().exp().item()
    return float(np.clip(temperature, LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE))


class ReliabilityBin(NamedTuple):
    """One bar of a reliability diagram."""

    confidence: float  # mean, 0..1
    accuracy: float  # 0..1
    images: int


def reliability_bins(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = CALIBRATION_BINS
) -> list[ReliabilityBin]:
    """Group predictions into bins of equal width over the confidence; omit empty bins."""
    confidence = probabilities.max(1)
    is_correct = probabilities.argmax(1) == labels
    bin_of_image = np.minimum((confidence * bins).astype(int), bins - 1)

    result: list[ReliabilityBin] = []
    for number in np.unique(bin_of_image):
        members = bin_of_image == number
        result.append(
            ReliabilityBin(
                confidence=float(confidence[members].mean()),
                accuracy=float(is_correct[members].mean()),
                images=int(members.sum()),
            )
        )
    return result


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = CALIBRATION_BINS
) -> float:
    """Return the mean |confidence - accuracy| over the bins, weighted by their images."""
    return calibration_error(probabilities.max(1), probabilities.argmax(1) == labels, bins=bins)


def coverage_curve(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return falling thresholds [M], the share that each one answers [M], and its accuracy [M].

    There is one row for each distinct confidence: images of equal confidence are answered together
    or not at all.
    """
    confidence = probabilities.max(1)
    order = np.argsort(-confidence, kind="stable")
    confidence = confidence[order]
    correct = np.cumsum((probabilities.argmax(1) == labels)[order])

    is_last_of_confidence = np.append(np.diff(confidence) != 0, True)
    answered = np.flatnonzero(is_last_of_confidence) + 1
    thresholds = confidence[is_last_of_confidence]
    return thresholds, answered / len(labels), correct[is_last_of_confidence] / answered


class Abstention(NamedTuple):
    """Which predictions abstain: those of less confidence than the threshold."""

    threshold: float  # 0 where nothing abstains
    coverage: float  # share of the validation images that are answered, 0..1
    bound: float | None  # least accuracy of the answers at ABSTAIN_CERTAINTY; None: no promise


def halve_errors(scores: Scores) -> float:
    """Return the accuracy that has half of the errors of these predictions."""
    return (1 + float(scores.correct.mean())) / 2


def fit_abstention(
    probabilities: np.ndarray, labels: np.ndarray, accuracy: float, coverage: float
) -> Abstention:
    """Return the abstention that answers most images with at least this accuracy.

    The accuracy counts as reached where its lower confidence bound reaches it, so that few images
    do not promise much. Nothing abstains where no threshold that answers at least the share
    `coverage` of the images reaches it.

    The bound is that of one threshold, although all are tried. They share most of their images, so
    that the chance of a broken promise stays at about 1 - ABSTAIN_CERTAINTY.
    """
    thresholds, answered, accuracies = coverage_curve(probabilities, labels)
    images = np.rint(answered * len(labels))
    bounds = accuracy_bound(np.rint(accuracies * images), images)

    sufficient = np.flatnonzero((bounds >= accuracy) & (answered >= coverage))
    if not len(sufficient):
        return Abstention(threshold=0.0, coverage=1.0, bound=None)
    best = sufficient[-1]
    is_all = best == len(thresholds) - 1
    return Abstention(
        threshold=0.0 if is_all else float(thresholds[best]),
        coverage=float(answered[best]),
        bound=float(bounds[best]),
    )


def accuracy_bound(correct: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return the lower bound of the accuracy [M] at the confidence ABSTAIN_CERTAINTY.

    It is exact for the binomial distribution: Clopper and Pearson, "The use of confidence or
    fiducial limits illustrated in the case of the binomial", 1934.
    """
    # SciPy's function is not defined for 0, where the bound is 0.
    bounds = betaincinv(np.maximum(correct, 1), images - correct + 1, 1 - ABSTAIN_CERTAINTY)
    return np.where(correct > 0, bounds, 0.0)


def fit_conformal_quantile(probabilities: np.ndarray, labels: np.ndarray, level: float) -> float:
    """Return the q for which the set {k: 1 - p_k <= q} holds the true class with this probability.

    Split conformal prediction; Sadinle et al., "Least ambiguous set-valued classifiers with bounded
    error levels", 2019. The result is 1, which means all classes, where there are too few images.
    """
    nonconformity = np.sort(1 - probabilities[np.arange(len(labels)), labels])
    rank = int(np.ceil((len(labels) + 1) * level))
    return float(nonconformity[rank - 1]) if rank <= len(labels) else 1.0


def conformal_coverage(probabilities: np.ndarray, labels: np.ndarray, quantile: float) -> float:
    """Return the share of images whose prediction set holds the true class."""
    nonconformity = 1 - probabilities[np.arange(len(labels)), labels]
    return float((nonconformity <= quantile).mean())


def coverage_error(level: float, calibrated_on: int, tested_on: int) -> float:
    """Return the standard error of a measured coverage.

    Both the images that fit the quantile and those that test it contribute to the error.
    """
    variance = level * (1 - level) * (1 / calibrated_on + 1 / tested_on)
    return float(np.sqrt(variance))
