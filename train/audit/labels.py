"""Suspicious labels: a simple model, trained on other images, is sure of another class.

Steps:
    features  Embeddings by the pretrained network that training starts from. Where it starts from
              random weights: responses to random whitened patches of the images themselves,
              rectified and pooled over a grid (Coates and Ng, "The Importance of Encoding Versus
              Training with Sparse Coding and Vector Quantization", 2011).
    folds     K-fold cross-validation: each image is scored by a ridge regression that was fitted
              on the other folds, in closed form, so that K folds cost hardly more than one.
              Duplicates share a fold. The intercept is the share of each class, so that a rare
              class is not predicted for lack of evidence.
    scale     One temperature turns scores into probabilities.
    rule      Confident learning (Northcutt et al., "Confident Learning: Estimating Uncertainty in
              Dataset Labels", 2021): an image may belong to a class if its probability is at least
              the mean over the images labelled with that class. Of these classes the most probable
              is suggested, if it exceeds the label's probability by MIN_MARGIN.
    check     A model that is not better than always predicting the largest class has learned
              nothing that could contradict a label, so it suggests nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import (
    adaptive_avg_pool2d,
    conv2d,
    cross_entropy,
    interpolate,
    normalize,
    one_hot,
)

# Features
SIDE = 32  # pixels; images are resized to it
PATCH = 6  # side of a patch in pixels
STRIDE = 3  # pixels between patches
FILTERS = 128
GRID = 2  # pooled cells a side
THRESHOLD = 0.5  # of the rectified responses
CONTRAST_FLOOR = 10  # gray levels added to the standard deviation: noise in flat images stays small
WHITENING_FLOOR = 0.1  # share of the mean eigenvalue added to all
FILTER_IMAGES = 2000  # images that patches are taken from
FILTER_PATCHES = 20_000  # patches that the whitening is measured on
FEATURE_BATCH = 512  # images

# Model
FOLDS = 5
RIDGE = 0.003  # times the number of images
SCALES = np.geomspace(1, 100, 30)  # candidates
CHUNK_SIZE = 4096  # images whose scores are in memory at once

MIN_MARGIN = 0.5  # probability of the suggested class less that of the label


@dataclass(frozen=True)
class LabelErrors:
    """Images with a suspicious label, the most suspicious first, and the accuracy of the model.

    There are none where the model is not better than always predicting the largest class.
    """

    index: np.ndarray  # int64 [S], positions
    suggested: np.ndarray  # int64 [S], classes that the model predicts
    confidence: np.ndarray  # float32 [S], their probabilities
    accuracy: float  # out of sample, 0..1
    largest_share: float  # of the images that belong to the largest class, 0..1

    @property
    def is_checked(self) -> bool:
        """Whether the model is good enough to contradict a label."""
        return self.accuracy > self.largest_share


def find_label_errors(
    pixels: np.ndarray,
    labels: np.ndarray,
    index: np.ndarray,
    classes: int,
    device: torch.device,
    groups: np.ndarray | None = None,
    embeddings: np.ndarray | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> LabelErrors:
    """Find suspicious labels.

    Args:
        pixels: uint8 [N, H, W, C].
        labels: int64 [N].
        index: int64 [M], positions of the images to check.
        classes: number of classes, K.
        device: where features and scores are computed.
        groups: int64 [N], equal for duplicates. No image is scored by a model that was fitted on
            a duplicate of it.
        embeddings: float32 [N, D], by a pretrained network; they replace the features that are
            computed from the pixels.
        chunk_size: images whose scores are in memory at once.
    """
    truth = torch.from_numpy(labels[index]).to(device)
    chunks = torch.arange(len(index), device=device).split(chunk_size)
    folds = _assign_folds(index if groups is None else groups[index])
    if embeddings is None:
        features = _compute_features(pixels, index, device)
    else:
        features = _normalize_embeddings(embeddings[index], device)
    model = _fit(features, truth, torch.from_numpy(folds).to(device), classes, chunks)
    scale = _fit_scale(model, truth, chunks)

    # Two passes, each of which computes the probabilities [B, K] of a chunk: all of them together
    # would take most of the memory.
    label_probability, predicted = _score_labels(model, scale, truth, chunks)
    accuracy = float((predicted == truth).float().mean())
    largest_share = float(model.shares.max())
    if accuracy <= largest_share:
        nothing = np.zeros(0, np.int64)
        return LabelErrors(nothing, nothing, np.zeros(0, np.float32), accuracy, largest_share)

    thresholds = _class_means(label_probability, truth, classes)
    confidence, suggested = _suggest_classes(model, scale, truth, thresholds, chunks)

    margin = confidence - label_probability
    suspects = (margin >= MIN_MARGIN).nonzero()[:, 0]
    suspects = suspects[margin[suspects].argsort(descending=True)]
    return LabelErrors(
        index[suspects.cpu().numpy()],
        suggested[suspects].cpu().numpy(),
        confidence[suspects].cpu().numpy(),
        accuracy,
        largest_share,
    )


# Features


def _normalize_embeddings(embeddings: np.ndarray, device: torch.device) -> Tensor:
    """Return float16 [M, D] of length sqrt(D) each, whatever the scale of the network."""
    features = normalize(torch.from_numpy(embeddings).to(device), dim=1)
    return (features * features.shape[1] ** 0.5).half()


def _compute_features(pixels: np.ndarray, index: np.ndarray, device: torch.device) -> Tensor:
    """Return float16 [M, D]: 2 kB an image, all that is kept of it."""
    filters, bias = _learn_filters(pixels, index, device)
    batches = []
    for rows in np.array_split(index, -(-len(index) // FEATURE_BATCH)):
        response = conv2d(_normalize_images(pixels[rows], device), filters, bias, STRIDE)
        positive = response.sub(THRESHOLD).relu_()
        negative = response.neg().sub_(THRESHOLD).relu_()
        rectified = torch.cat([positive, negative], 1)
        batches.append(adaptive_avg_pool2d(rectified, GRID).flatten(1).half())
    return torch.cat(batches)


def _normalize_images(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Convert uint8 [B, H, W, C] to float32 [B, C, SIDE, SIDE] of mean 0 and contrast 1 each."""
    images = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2).float()
    if images.shape[2:] != (SIDE, SIDE):
        images = interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    std, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
    return (images - mean) / (std + CONTRAST_FLOOR)


def _learn_filters(
    pixels: np.ndarray, index: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return kernels [FILTERS, C, PATCH, PATCH] and biases [FILTERS].

    The filters are random patches of the images, whitened and of length 1. The kernels whiten what
    they are applied to as well.
    """
    rng = np.random.default_rng(0)
    chosen = rng.choice(index, min(len(index), FILTER_IMAGES), replace=False)
    images = _normalize_images(pixels[np.sort(chosen)], device)

    windows = images.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # [B, C, y, x, PATCH, PATCH]
    patches = windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    sample = rng.choice(len(patches), min(len(patches), FILTER_PATCHES), replace=False)
    patches = patches[torch.from_numpy(sample).to(device)]

    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean) / len(patches)
    values, vectors = torch.linalg.eigh(covariance)
    scales = (values.clamp_min(0) + WHITENING_FLOOR * values.mean()).rsqrt()
    whitening = vectors @ torch.diag(scales) @ vectors.T

    filters = normalize((patches[:FILTERS] - mean) @ whitening)
    kernels = filters @ whitening
    bias = -(kernels @ mean)
    return kernels.view(len(filters), images.shape[1], PATCH, PATCH), bias


# Model


def _assign_folds(groups: np.ndarray) -> np.ndarray:
    """Return int64 [M] in 0..FOLDS-1, equal within each of the groups [M]."""
    distinct, group = np.unique(groups, return_inverse=True)
    fold_of_group = np.random.default_rng(1).permutation(len(distinct)) % FOLDS
    return fold_of_group[group]


@dataclass(frozen=True)
class CrossValidatedRidge:
    """Ridge regressions on standardized features, one for each fold, fitted on the others."""

    features: Tensor  # float16 [M, D]
    folds: Tensor  # int64 [M]
    mean: Tensor  # float32 [D]
    std: Tensor  # float32 [D]
    shares: Tensor  # float32 [K], of the classes; the intercept
    weights: list[Tensor]  # float32 [D, K] for each fold

    def scores(self, rows: Tensor) -> Tensor:
        """Return out-of-sample scores of rows [B]: float32 [B, K]."""
        x = (self.features[rows].float() - self.mean) / self.std
        scores = torch.empty(len(rows), self.weights[0].shape[1], device=x.device)
        for fold, weight in enumerate(self.weights):
            in_fold = self.folds[rows] == fold
            scores[in_fold] = x[in_fold] @ weight
        return scores + self.shares


def _fit(
    features: Tensor, truth: Tensor, folds: Tensor, classes: int, chunks: Sequence[Tensor]
) -> CrossValidatedRidge:
    """Fit one ridge regression for each fold, from sums over the others, chunk by chunk."""
    count, width = features.shape
    device = features.device
    total = torch.zeros(width, device=device)
    for rows in chunks:
        total = total + features[rows].float().sum(0)
    mean = total / count

    squares = torch.zeros(width, device=device)
    for rows in chunks:
        squares = squares + (features[rows].float() - mean).square().sum(0)
    std = (squares / (count - 1)).sqrt() + 1e-6

    shares = torch.bincount(truth, minlength=classes).float() / count

    # Of each fold: X^T X and X^T Y, with Y the one-hot labels less the shares of the classes.
    grams = torch.zeros(FOLDS, width, width, device=device)
    products = torch.zeros(FOLDS, width, classes, device=device)
    for rows in chunks:
        for fold in range(FOLDS):
            fold_rows = rows[folds[rows] == fold]
            x = (features[fold_rows].float() - mean) / std
            grams[fold] += x.T @ x
            products[fold] += x.T @ (one_hot(truth[fold_rows], classes).float() - shares)

    ridge = RIDGE * count * torch.eye(width, device=device)
    weights = []
    for fold in range(FOLDS):
        gram = grams.sum(0) - grams[fold] + ridge
        product = products.sum(0) - products[fold]
        weights.append(torch.linalg.solve(gram, product))
    return CrossValidatedRidge(features, folds, mean, std, shares, weights)


def _fit_scale(model: CrossValidatedRidge, truth: Tensor, chunks: Sequence[Tensor]) -> float:
    """Return the factor of the scores before the softmax that makes the labels most likely."""
    losses = np.zeros(len(SCALES))
    for rows in chunks:
        scores = model.scores(rows)
        for i, scale in enumerate(SCALES):
            losses[i] += float(cross_entropy(scale * scores, truth[rows], reduction="sum"))
    return float(SCALES[losses.argmin()])


# Rule


def _score_labels(
    model: CrossValidatedRidge, scale: float, truth: Tensor, chunks: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the probability of each image's label [M], and the predicted class [M]."""
    label_probabilities = []
    predictions = []
    for rows in chunks:
        probabilities = (scale * model.scores(rows)).softmax(1)
        label_probabilities.append(probabilities.gather(1, truth[rows, None])[:, 0])
        predictions.append(probabilities.argmax(1))
    return torch.cat(label_probabilities), torch.cat(predictions)


def _class_means(values: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Return [K]: the mean of the values [M] over the images labelled with each class."""
    counts = torch.bincount(truth, minlength=classes).clamp_min(1)
    sums = torch.zeros(classes, device=values.device).index_add_(0, truth, values)
    return sums / counts


def _suggest_classes(
    model: CrossValidatedRidge,
    scale: float,
    truth: Tensor,
    thresholds: Tensor,
    chunks: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the probability [M] of the class to suggest for each image, and the class [M]."""
    confidences = []
    suggestions = []
    for rows in chunks:
        probabilities = (scale * model.scores(rows)).softmax(1)
        confidence, suggested = _most_probable_other(probabilities, truth[rows], thresholds)
        confidences.append(confidence)
        suggestions.append(suggested)
    return torch.cat(confidences), torch.cat(suggestions)


def _most_probable_other(
    probabilities: Tensor, truth: Tensor, thresholds: Tensor
) -> tuple[Tensor, Tensor]:
    """Return probability [B] and class [B] of the most probable class other than the label.

    Classes below their threshold [K] are left out; without any other, the probability is 0.
    """
    candidates = probabilities.where(probabilities >= thresholds, torch.zeros_like(probabilities))
    candidates = candidates.scatter_(1, truth[:, None], 0)
    best = candidates.max(1)
    return best.values, best.indices
