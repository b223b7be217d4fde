"""Suspicious labels, found by a simple model."""

import numpy as np
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
