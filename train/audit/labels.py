"""Labels that a first model, trained on other images, is sure are wrong.

The first model: responses to random whitened patches of the images themselves, pooled over a grid (Coates and Ng, "The
importance of encoding versus training with sparse coding and vector quantization", 2011), and a ridge regression in
closed form, so that k folds cost hardly more than one. The rule: confident learning (Northcutt et al., "Confident
learning: estimating uncertainty in dataset labels", 2021): an image belongs to the class whose probability is at least
what images of that class have on average.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate

SIDE, PATCH, STRIDE, FILTERS, GRID = 32, 6, 3, 128, 2
FOLDS = 5
RIDGE = 0.003  # times the images
MARGIN = 0.5  # the model's class is at least so much more probable than the label


@dataclass(frozen=True)
class Suspects:
    """Images whose label is doubtful, most doubtful first, and how good the model that says so is."""

    index: np.ndarray  # int64 [S], positions
    label: np.ndarray  # int64 [S], what the model takes them for
    confidence: np.ndarray  # float32 [S], probability of that
    accuracy: float  # out of sample


def suspects(pixels: np.ndarray, labels: np.ndarray, index: np.ndarray, classes: int, device: torch.device) -> Suspects:
    """Look at the images at `index` of uint8 [N, H, W, C] and their `labels` int64 [N]."""
    truth = torch.from_numpy(labels[index]).to(device)
    chance = _probabilities(_features(pixels, index, device), truth, classes)
    own = chance.gather(1, truth[:, None])[:, 0]
    count = torch.bincount(truth, minlength=classes).clamp_min(1)
    usual = torch.zeros(classes, device=device).index_add_(0, truth, own) / count
    sure = chance.where(chance >= usual, torch.zeros_like(chance))
    sure.scatter_(1, truth[:, None], 0)
    other = sure.max(1)
    margin = other.values - own
    found = (margin >= MARGIN).nonzero()[:, 0]
    found = found[margin[found].argsort(descending=True)]
    accuracy = float((chance.argmax(1) == truth).float().mean())
    return Suspects(index[found.cpu().numpy()], other.indices[found].cpu().numpy(),
                    other.values[found].cpu().numpy(), accuracy)


def _features(pixels: np.ndarray, index: np.ndarray, device: torch.device) -> Tensor:
    """float32 [M, D], each column with mean 0 and deviation 1."""
    filters, bias = _filters(pixels, index, device)
    parts = []
    for rows in np.array_split(index, -(-len(index) // 512)):
        response = conv2d(_images(pixels[rows], device), filters, bias, STRIDE)
        both = torch.cat([response.sub(0.5).relu_(), response.neg().sub_(0.5).relu_()], 1)
        parts.append(adaptive_avg_pool2d(both, GRID).flatten(1))
    features = torch.cat(parts)
    return (features - features.mean(0)) / (features.std(0) + 1e-6)


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
    some = _images(pixels[np.sort(draw.choice(index, min(len(index), 2000), replace=False))], device)
    patches = some.unfold(2, PATCH, 1).unfold(3, PATCH, 1).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    patches = patches[torch.from_numpy(draw.choice(len(patches), min(len(patches), 20_000), replace=False)).to(device)]
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    whiten = vectors @ torch.diag((values.clamp_min(0) + 0.1 * values.mean()).rsqrt()) @ vectors.T
    chosen = torch.nn.functional.normalize((patches[:FILTERS] - mean) @ whiten)
    kernels = chosen @ whiten
    return kernels.view(len(chosen), some.shape[1], PATCH, PATCH), -(kernels @ mean)


def _probabilities(features: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Out-of-sample class probabilities [M, K]: each fold is scored by a ridge regression on the others."""
    fold = torch.from_numpy(np.random.default_rng(1).permutation(len(features)) % FOLDS).to(features.device)
    target = torch.nn.functional.one_hot(truth, classes).float() - 1 / classes
    folds = [(features[fold == k], target[fold == k]) for k in range(FOLDS)]
    grams, products = [x.T @ x for x, _ in folds], [x.T @ y for x, y in folds]
    ridge = RIDGE * len(features) * torch.eye(features.shape[1], device=features.device)
    scores = torch.empty_like(target)
    for k, (x, _) in enumerate(folds):
        scores[fold == k] = x @ torch.linalg.solve(sum(grams) - grams[k] + ridge, sum(products) - products[k])
    sharpness = min(np.geomspace(1, 100, 30), key=lambda s: float(torch.nn.functional.cross_entropy(s * scores, truth)))
    return (sharpness * scores).softmax(1)
