"""A linear probe: logistic regression on the embeddings of a frozen network.

It is a model of its own, fitted in seconds, and the head that fine-tuning starts from (Kumar et
al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", 2022).
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from models.networks.base import Network

# Candidates for scikit-learn's C, weakest last. Embeddings are scaled to a mean square of 1, so
# that the same values suit every network.
REGULARIZATION = tuple(10.0**exponent for exponent in np.arange(-3, 2.5, 0.5))
PATIENCE = 2  # candidates without a lower validation loss, after which the search ends
MAX_ITERATIONS = 200
SINGLE_THREAD_VALUES = 10_000_000  # numbers in the embeddings up to which threads only cost time
MAX_IMAGES = 50_000  # training images of the regression; more hardly change it
EXCLUDED_BIAS = -10.0  # added for a class without training images


@dataclass(frozen=True)
class Probe:
    """A linear head [K, D], and its logits on the validation part."""

    weight: np.ndarray  # float32 [K, D]
    bias: np.ndarray  # float32 [K]
    regularization: float  # C of the scaled embeddings
    val_logits: np.ndarray  # float32 [M, K]
    val_loss: float  # mean negative log-likelihood
    val_accuracy: float

    def load_into(self, network: Network) -> None:
        """Copy weight and bias into the head of a network."""
        scale = network.logit_scale
        with torch.no_grad():
            network.head.weight.copy_(torch.from_numpy(self.weight / scale))
            network.head.bias.copy_(torch.from_numpy(self.bias / scale))


def fit_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    val: np.ndarray,
    val_labels: np.ndarray,
    classes: int,
    class_weights: np.ndarray | None = None,
) -> Probe:
    """Fit a head on embeddings, with the regularization that has the lowest validation loss.

    Args:
        train: float32 [N, D], embeddings of training images.
        train_labels: int64 [N].
        val: float32 [M, D].
        val_labels: int64 [M].
        classes: their number K.
        class_weights: float [K], factors of the loss; None for 1.
    """
    rows = np.linspace(0, len(train) - 1, min(len(train), MAX_IMAGES), dtype=np.int64)
    train = train[rows]
    train_labels = train_labels[rows]

    mean = train.mean(0)
    scale = float(np.sqrt(np.square(train - mean).mean())) or 1.0
    scaled = (train - mean) / scale
    weights = None
    if class_weights is not None:
        weights = {k: float(class_weights[k]) for k in np.unique(train_labels).tolist()}

    best: Probe | None = None
    failures = 0
    for regularization in REGULARIZATION:
        weight, bias = _fit_regression(scaled, train_labels, classes, regularization, weights)
        weight = weight / scale
        bias = bias - weight @ mean
        probe = _evaluate(weight, bias, regularization, val, val_labels)
        if best is None or probe.val_loss < best.val_loss:
            best = probe
            failures = 0
            continue
        failures += 1
        if failures == PATIENCE:
            break
    assert best is not None
    return best


def _fit_regression(
    embeddings: np.ndarray,
    labels: np.ndarray,
    classes: int,
    regularization: float,
    class_weights: dict[int, float] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight float32 [K, D] and bias float32 [K]."""
    model = LogisticRegression(
        C=regularization, class_weight=class_weights, max_iter=MAX_ITERATIONS
    )
    threads = 1 if embeddings.size <= SINGLE_THREAD_VALUES else None
    with threadpool_limits(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(embeddings, labels)

    coefficients = model.coef_
    intercepts = model.intercept_
    if len(model.classes_) == 2:
        # scikit-learn has one row for two classes, the log-odds of the second.
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercepts = np.concatenate([-intercepts / 2, intercepts / 2])

    weight = np.zeros((classes, embeddings.shape[1]), np.float32)
    bias = np.full(classes, intercepts.min() + EXCLUDED_BIAS, np.float32)
    weight[model.classes_] = coefficients
    bias[model.classes_] = intercepts
    return weight, bias


def _evaluate(
    weight: np.ndarray,
    bias: np.ndarray,
    regularization: float,
    val: np.ndarray,
    labels: np.ndarray,
) -> Probe:
    logits = (val @ weight.T + bias).astype(np.float32)
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    loss = -log_probabilities[np.arange(len(labels)), labels].mean()
    return Probe(
        weight=weight.astype(np.float32),
        bias=bias.astype(np.float32),
        regularization=regularization,
        val_logits=logits,
        val_loss=float(loss),
        val_accuracy=float((logits.argmax(1) == labels).mean()),
    )
