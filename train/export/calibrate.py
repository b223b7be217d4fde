"""Calibration on validation data: what a confidence means, when to abstain, which classes to name."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from models.bundle import Calibration

BINS = 15


@dataclass
class CalibrateConfig:
    """
    Args:
        temperature: divide the logits by a number fitted on validation data, so that confidence matches accuracy.
        abstain_accuracy: answers with too little confidence abstain, so that this share of the others is right.
        conformal_level: share of images whose prediction set holds the true class.
        energy_kept: share of validation images that the energy threshold takes for in distribution.
    """

    temperature: bool = True
    abstain_accuracy: float = 0.99
    conformal_level: float = 0.95
    energy_kept: float = 0.95

    def __post_init__(self) -> None:
        for name in ("abstain_accuracy", "conformal_level", "energy_kept"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"calibrate.{name}: {getattr(self, name)} is not between 0 and 1")


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[N,K] to probabilities [N,K], float64."""
    scaled = logits.astype(np.float64) / temperature
    exponent = np.exp(scaled - scaled.max(1, keepdims=True))
    return exponent / exponent.sum(1, keepdims=True)


def energy(logits: np.ndarray) -> np.ndarray:
    """[N,K] to -logsumexp [N]: high where the network has seen nothing like it (Liu et al., 2020)."""
    top = logits.max(1)
    return -(top + np.log(np.exp(logits - top[:, None]).sum(1)))


def nll(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of the true class."""
    true = logits[np.arange(len(labels)), labels].astype(np.float64)
    return float((-energy(logits.astype(np.float64) / temperature) - true / temperature).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T that minimises the NLL of softmax(logits / T), by LBFGS on log T.

    Guo et al., "On calibration of modern neural networks", 2017. Where every validation image is right the NLL would
    fall for ever as T goes to 0; then, as Platt did ("Probabilistic outputs for support vector machines", 1999), one
    image more than there are is taken to be wrong.
    """
    x, y = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    doubt = 1 / (len(labels) + 2) if (x.argmax(1) == y).all() else 0.0
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(x / log_t.exp(), y, label_smoothing=doubt)
        value.backward()
        return value

    solver.step(loss)
    return float(np.clip(log_t.detach().exp().item(), 0.05, 20.0))


class Bin(NamedTuple):
    """One bar of a reliability diagram."""

    confidence: float  # mean, 0..1
    accuracy: float
    images: int


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Bins of equal width over the confidence; empty ones are left out."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        Bin(
            float(confidence[place == b].mean()),
            float(right[place == b].mean()),
            int((place == b).sum()),
        )
        for b in np.unique(place)
    ]


def ece(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean |confidence - accuracy| over the bins, weighted by their counts."""
    found = reliability(probabilities, labels, bins)
    return sum(b.images * abs(b.confidence - b.accuracy) for b in found) / len(labels)


def coverage_curve(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds [M] falling, and the share answered [M] and its accuracy [M] with each.

    One row a distinct confidence: images that are equally sure are answered together or not at all.
    """
    confidence = probabilities.max(1)
    order = np.argsort(-confidence, kind="stable")
    right = np.cumsum((probabilities.argmax(1) == labels)[order])
    last = np.append(np.diff(confidence[order]) != 0, True)
    answered = np.flatnonzero(last) + 1
    return confidence[order][last], answered / len(labels), right[last] / answered


def abstain_threshold(
    probabilities: np.ndarray, labels: np.ndarray, accuracy: float
) -> tuple[float, float]:
    """The threshold that answers most with at least this accuracy, and the share it answers.

    0 where all may be answered; where no threshold is enough, 1 and a share of 0.
    """
    thresholds, answered, accuracies = coverage_curve(probabilities, labels)
    enough = np.flatnonzero(accuracies >= accuracy)
    if not len(enough):
        return 1.0, 0.0
    best = enough[-1]
    return (0.0 if best == len(thresholds) - 1 else float(thresholds[best])), float(answered[best])


def conformal_quantile(probabilities: np.ndarray, labels: np.ndarray, level: float) -> float:
    """Split conformal: the q for which {k: 1 - p_k <= q} holds the true class of a new image with probability `level`.

    Sadinle et al., "Least ambiguous set-valued classifiers with bounded error levels", 2019. 1, all classes, where
    there are too few images to promise less.
    """
    scores = np.sort(1 - probabilities[np.arange(len(labels)), labels])
    rank = int(np.ceil((len(scores) + 1) * level))
    return float(scores[rank - 1]) if rank <= len(scores) else 1.0


def conformal_coverage(probabilities: np.ndarray, labels: np.ndarray, quantile: float) -> float:
    """Share of images whose prediction set holds the true class."""
    return float((1 - probabilities[np.arange(len(labels)), labels] <= quantile).mean())


def coverage_error(level: float, calibrated_on: int, tested_on: int) -> float:
    """Standard error of the coverage seen: that of the test images and that of the images the quantile is from."""
    return float(np.sqrt(level * (1 - level) * (1 / calibrated_on + 1 / tested_on)))


Scored = tuple[np.ndarray, np.ndarray]  # logits float32 [N,K], labels int64 [N]


def calibrate(val: Scored, test: Scored, config: CalibrateConfig) -> Calibration:
    """Fit on `val`; what it then does on `test` stands beside it."""
    logits, labels = val
    temperature = fit_temperature(logits, labels) if config.temperature else 1.0
    before, after, unseen = (
        softmax(logits),
        softmax(logits, temperature),
        softmax(test[0], temperature),
    )
    threshold, coverage = abstain_threshold(after, labels, config.abstain_accuracy)
    quantile = conformal_quantile(after, labels, config.conformal_level)
    answered = unseen.max(1) >= threshold
    right = (unseen.argmax(1) == test[1])[answered]
    return Calibration(
        temperature=temperature,
        nll_before=nll(logits, labels),
        nll_after=nll(logits, labels, temperature),
        ece_before=ece(before, labels),
        ece_after=ece(after, labels),
        abstain_threshold=threshold,
        abstain_accuracy=config.abstain_accuracy,
        abstain_coverage=coverage,
        abstain_test_accuracy=float(right.mean()) if len(right) else None,
        abstain_test_coverage=float(answered.mean()),
        conformal_level=config.conformal_level,
        conformal_quantile=quantile,
        conformal_coverage=conformal_coverage(unseen, test[1], quantile),
        energy_threshold=float(np.quantile(energy(logits), config.energy_kept)),
    )
