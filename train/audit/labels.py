"""Labels that a first model, trained on other images, is sure are wrong.

The first model: responses to random whitened patches of the images themselves, pooled over a grid (Coates and Ng, "The
importance of encoding versus training with sparse coding and vector quantization", 2011), and a ridge regression in
closed form, so that k folds cost hardly more than one. The rule: confident learning (Northcutt et al., "Confident
learning: estimating uncertainty in dataset labels", 2021): an image belongs to the class whose probability is at least
what images of that class have on average.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, cross_entropy, interpolate, one_hot

SIDE, PATCH, STRIDE, FILTERS, GRID = 32, 6, 3, 128, 2
FOLDS = 5
CHUNK = 4096  # images that scores are held of at once
RIDGE = 0.003  # times the images
MARGIN = 0.5  # the model's class is at least so much more probable than the label


@dataclass(frozen=True)
class Suspects:
    """Images whose label is doubtful, most doubtful first, and how good the model that says so is."""

    index: np.ndarray  # int64 [S], positions
    label: np.ndarray  # int64 [S], what the model takes them for
    confidence: np.ndarray  # float32 [S], probability of that
    accuracy: float  # out of sample


def suspects(
    pixels: np.ndarray,
    labels: np.ndarray,
    index: np.ndarray,
    classes: int,
    device: torch.device,
    groups: np.ndarray | None = None,
) -> Suspects:
    """Look at the images at `index` of uint8 [N, H, W, C] and their `labels` int64 [N].

    `groups` int64 [N]: copies have the same number. None is judged by a model that was trained on another one.
    """
    truth = torch.from_numpy(labels[index]).to(device)
    parts = torch.arange(len(index), device=device).split(CHUNK)
    groups = index if groups is None else groups[index]
    folds = torch.from_numpy(_folds(groups)).to(device)
    scores = _scores(_features(pixels, index, device), truth, folds, classes, parts)
    sharpness = _sharpness(scores, truth, parts)

    def chance(rows: Tensor) -> Tensor:
        """float32 [B, K], anew each time: those of all images at once would take most of the memory."""
        return (sharpness * scores(rows)).softmax(1)

    own, guess = (
        torch.cat(found)
        for found in zip(
            *(
                (c.gather(1, truth[rows, None])[:, 0], c.argmax(1))
                for rows in parts
                for c in [chance(rows)]
            ),
            strict=True,
        )
    )
    count = torch.bincount(truth, minlength=classes).clamp_min(1)
    usual = torch.zeros(classes, device=device).index_add_(0, truth, own) / count
    confidence, label = (
        torch.cat(found)
        for found in zip(*(_other(chance(rows), truth[rows], usual) for rows in parts), strict=True)
    )
    margin = confidence - own
    found = (margin >= MARGIN).nonzero()[:, 0]
    found = found[margin[found].argsort(descending=True)]
    return Suspects(
        index[found.cpu().numpy()],
        label[found].cpu().numpy(),
        confidence[found].cpu().numpy(),
        float((guess == truth).float().mean()),
    )


def _other(chance: Tensor, truth: Tensor, usual: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and class, the labels' own left out, of the most probable class that an image may belong to."""
    sure = chance.where(chance >= usual, torch.zeros_like(chance)).scatter_(1, truth[:, None], 0)
    best = sure.max(1)
    return best.values, best.indices


def _features(pixels: np.ndarray, index: np.ndarray, device: torch.device) -> Tensor:
    """float16 [M, D]: 2 kB an image, and all that is kept of one."""
    filters, bias = _filters(pixels, index, device)
    parts = []
    for rows in np.array_split(index, -(-len(index) // 512)):
        response = conv2d(_images(pixels[rows], device), filters, bias, STRIDE)
        both = torch.cat([response.sub(0.5).relu_(), response.neg().sub_(0.5).relu_()], 1)
        parts.append(adaptive_avg_pool2d(both, GRID).flatten(1).half())
    return torch.cat(parts)


def _images(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B, H, W, C] to float32 [B, C, SIDE, SIDE] with mean 0 and deviation 1 an image."""
    images = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2).float()
    if images.shape[2:] != (SIDE, SIDE):
        images = interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    std, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
    return (images - mean) / (std + 10)


def _filters(pixels: np.ndarray, index: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kernels [FILTERS, C, PATCH, PATCH] and biases: random patches, whitened, applied to whitened patches."""
    draw = np.random.default_rng(0)
    some = _images(
        pixels[np.sort(draw.choice(index, min(len(index), 2000), replace=False))], device
    )
    patches = (
        some.unfold(2, PATCH, 1)
        .unfold(3, PATCH, 1)
        .permute(0, 2, 3, 1, 4, 5)
        .flatten(3)
        .flatten(0, 2)
    )
    patches = patches[
        torch.from_numpy(draw.choice(len(patches), min(len(patches), 20_000), replace=False)).to(
            device
        )
    ]
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    whiten = vectors @ torch.diag((values.clamp_min(0) + 0.1 * values.mean()).rsqrt()) @ vectors.T
    chosen = torch.nn.functional.normalize((patches[:FILTERS] - mean) @ whiten)
    kernels = chosen @ whiten
    return kernels.view(len(chosen), some.shape[1], PATCH, PATCH), -(kernels @ mean)


def _folds(groups: np.ndarray) -> np.ndarray:
    """int64 [M] in 0..FOLDS-1, the same within each of the `groups` [M]."""
    different, which = np.unique(groups, return_inverse=True)
    return (np.random.default_rng(1).permutation(len(different)) % FOLDS)[which]


def _scores(
    features: Tensor, truth: Tensor, fold: Tensor, classes: int, parts: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """From rows [B] to out-of-sample scores [B, K]: each `fold` [M] is scored by a ridge regression on the others."""
    count, width, device = *features.shape, features.device
    zero = torch.zeros(width, device=device)
    mean = sum((features[rows].float().sum(0) for rows in parts), zero) / count
    square = sum(((features[rows].float() - mean).square().sum(0) for rows in parts), zero)
    std = (square / (count - 1)).sqrt() + 1e-6
    grams, products = (torch.zeros(FOLDS, width, n, device=device) for n in (width, classes))
    for rows in parts:
        for k in range(FOLDS):
            mine = rows[fold[rows] == k]
            x = (features[mine].float() - mean) / std
            grams[k] += x.T @ x
            products[k] += x.T @ (one_hot(truth[mine], classes).float() - 1 / classes)
    ridge = RIDGE * count * torch.eye(width, device=device)
    weights = [
        torch.linalg.solve(grams.sum(0) - grams[k] + ridge, products.sum(0) - products[k])
        for k in range(FOLDS)
    ]

    def scores(rows: Tensor) -> Tensor:
        x, found = (
            (features[rows].float() - mean) / std,
            torch.empty(len(rows), classes, device=device),
        )
        for k, weight in enumerate(weights):
            found[fold[rows] == k] = x[fold[rows] == k] @ weight
        return found

    return scores


def _sharpness(scores: Callable[[Tensor], Tensor], truth: Tensor, parts: Sequence[Tensor]) -> float:
    """What the scores are multiplied by before the softmax: the most likely of some."""
    some = np.geomspace(1, 100, 30)
    loss = np.zeros(len(some))
    for rows in parts:
        found = scores(rows)
        loss += [float(cross_entropy(s * found, truth[rows], reduction="sum")) for s in some]
    return float(some[loss.argmin()])
