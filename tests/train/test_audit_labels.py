"""Labels that a first model doubts."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from train.audit import labels


def test_a_copy_is_no_witness_for_a_wrong_label():
    images, truth = load_digits(return_X_y=True)
    pixels = np.repeat(images.reshape(-1, 8, 8, 1).astype(np.uint8) * 15, 4, 0)
    wrong = truth.copy()
    wrong[:20] = (wrong[:20] + 5) % 10
    index = np.arange(len(pixels))
    found = labels.suspects(pixels, np.repeat(wrong, 4), index, 10, torch.device("cpu"), index // 4)
    assert (
        len(set((found.index // 4).tolist()) & set(range(20))) >= 12
    )  # one, where copies vouch for one another


def test_images_are_scored_alike_in_chunks_of_any_size(monkeypatch):
    digits = load_digits()
    pixels, index = (digits.images * 15).astype(np.uint8)[..., None], np.arange(len(digits.target))
    label = digits.target.astype(np.int64)
    label[::90] = (label[::90] + 3) % 10
    whole = labels.suspects(pixels, label, index, 10, torch.device("cpu"))
    monkeypatch.setattr(labels, "CHUNK", 100)
    parts = labels.suspects(pixels, label, index, 10, torch.device("cpu"))
    assert len(whole.index) > 10
    assert parts.index.tolist() == whole.index.tolist()
    assert parts.label.tolist() == whole.label.tolist()
