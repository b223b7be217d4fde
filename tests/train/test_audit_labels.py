"""Suspicious labels, found by a simple model."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from train.audit.labels import find_label_errors

CPU = torch.device("cpu")


def test_copies_with_the_same_wrong_label_do_not_confirm_it():
    images, truth = load_digits(return_X_y=True)
    pixels = np.repeat(images.reshape(-1, 8, 8, 1).astype(np.uint8) * 15, 4, 0)
    wrong = truth.copy()
    wrong[:20] = (wrong[:20] + 5) % 10
    index = np.arange(len(pixels))

    errors = find_label_errors(pixels, np.repeat(wrong, 4), index, 10, CPU, groups=index // 4)

    originals = set((errors.index // 4).tolist())
    assert len(originals & set(range(20))) >= 12  # 1 without groups


def make_unequal_classes(rare: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 300 digits below 5 as one class, and `rare` images of the digit 6 as the other."""
    digits = load_digits()
    pixels = (digits.images * 15).astype(np.uint8)[..., None]
    common = np.flatnonzero(digits.target < 5)[:300]
    others = np.flatnonzero(digits.target == 6)[:rare]
    return pixels[np.concatenate([common, others])], np.repeat([0, 1], [300, rare])


@pytest.mark.parametrize("rare", [6, 12, 30])
def test_unequal_classes_do_not_make_labels_suspicious(rare):
    pixels, labels = make_unequal_classes(rare)

    errors = find_label_errors(pixels, labels, np.arange(len(labels)), 2, CPU)

    assert errors.accuracy >= 0.98
    assert len(errors.index) <= 1


def test_wrong_labels_among_unequal_classes_are_found():
    pixels, labels = make_unequal_classes(60)
    labels[300:306] = 0

    errors = find_label_errors(pixels, labels, np.arange(len(labels)), 2, CPU)

    assert len(errors.index) >= 3
    assert set(errors.index[:3].tolist()) <= set(range(300, 306))


def test_a_model_below_the_share_of_the_largest_class_names_no_labels():
    pixels = np.random.default_rng(0).integers(0, 256, (306, 16, 16, 1), np.uint8)
    labels = np.repeat([0, 1], [300, 6])

    errors = find_label_errors(pixels, labels, np.arange(306), 2, CPU)

    assert errors.accuracy <= errors.largest_share == pytest.approx(300 / 306)
    assert not errors.is_checked
    assert len(errors.index) == len(errors.suggested) == len(errors.confidence) == 0


def test_the_chunk_size_does_not_change_the_result():
    digits = load_digits()
    pixels = (digits.images * 15).astype(np.uint8)[..., None]
    index = np.arange(len(digits.target))
    labels = digits.target.astype(np.int64)
    labels[::90] = (labels[::90] + 3) % 10

    whole = find_label_errors(pixels, labels, index, 10, CPU)
    chunked = find_label_errors(pixels, labels, index, 10, CPU, chunk_size=100)

    assert len(whole.index) > 10
    assert chunked.index.tolist() == whole.index.tolist()
    assert chunked.suggested.tolist() == whole.suggested.tolist()


def test_embeddings_replace_the_features_of_the_pixels():
    """Pixels that show nothing leave the labels unchecked; embeddings find the wrong ones."""
    images, truth = load_digits(return_X_y=True)
    blank = np.zeros((len(truth), 8, 8, 1), np.uint8)
    wrong = truth.copy()
    wrong[:20] = (wrong[:20] + 5) % 10
    index = np.arange(len(truth))[::-1].copy()

    unchecked = find_label_errors(blank, wrong, index, 10, CPU)
    errors = find_label_errors(blank, wrong, index, 10, CPU, embeddings=images.astype(np.float32))

    assert not unchecked.is_checked
    assert errors.accuracy > 0.85
    assert len(set(errors.index[:30].tolist()) & set(range(20))) >= 12
