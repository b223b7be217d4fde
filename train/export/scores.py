"""Logits of one part of the data with their labels, and what is computed from logits."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """Logits and labels of one part, in the order of the data module's index."""

    logits: np.ndarray  # float32 [N,K]
    labels: np.ndarray  # int64 [N]

    @property
    def correct(self) -> np.ndarray:
        """Which images are classified correctly, bool [N]."""
        return self.logits.argmax(1) == self.labels

    @property
    def accuracy(self) -> float:
        """Share of images that are classified correctly, 0..1."""
        return float(self.correct.mean())

    def take(self, rows: np.ndarray) -> "Scores":
        """Return the scores of these rows, int64 [n]."""
        return Scores(self.logits[rows], self.labels[rows])


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return probabilities [N,K], float64, of logits [N,K]."""
    scaled = logits.astype(np.float64) / temperature
    exponent = np.exp(scaled - scaled.max(1, keepdims=True))
    return exponent / exponent.sum(1, keepdims=True)


def energy(logits: np.ndarray) -> np.ndarray:
    """Return -logsumexp [N] of logits [N,K]: high for images unlike the training data.

    Liu et al., "Energy-based out-of-distribution detection", 2020.
    """
    top = logits.max(1)
    return -(top + np.log(np.exp(logits - top[:, None]).sum(1)))


def recover_logits(
    probabilities: np.ndarray, energies: np.ndarray, temperature: float
) -> np.ndarray:
    """Return the logits [N,K] of a graph from its outputs `probabilities` [N,K] and `energy` [N].

    The probabilities are softmax(logits / temperature), so they give the logits up to a constant,
    and the energy, -logsumexp(logits), gives the constant. A probability that was rounded to 0
    counts as the smallest float32.
    """
    smallest = np.finfo(np.float32).tiny
    logits = temperature * np.log(np.maximum(probabilities.astype(np.float64), smallest))
    constant = energy(logits) - energies
    return (logits + constant[:, None]).astype(np.float32)


def negative_log_likelihood(
    logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0
) -> float:
    """Return the mean negative log-likelihood of the true classes."""
    scaled_true = logits[np.arange(len(labels)), labels].astype(np.float64) / temperature
    log_partition = -energy(logits.astype(np.float64) / temperature)
    return float((log_partition - scaled_true).mean())
