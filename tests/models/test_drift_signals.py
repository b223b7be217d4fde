"""Drift signals: what they measure, and that the index rises only when the data changes."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.drift import bin_edges, class_edges, histogram, image_signals, psi

RANDOM = np.random.default_rng(0)


def test_signals_measure_brightness_contrast_and_sharpness():
    image = RANDOM.integers(60, 180, (64, 64, 3), np.uint8)
    plain = image_signals(image)
    assert image_signals(image + 40).brightness == pytest.approx(plain.brightness + 40, abs=0.5)
    assert image_signals(image // 2).contrast == pytest.approx(plain.contrast / 2, rel=0.05)
    blurred = [image_signals(cv2.GaussianBlur(image, (0, 0), s)).sharpness for s in (1, 2, 4)]
    assert plain.sharpness > blurred[0] > blurred[1] > blurred[2]
    assert image_signals(np.full((8, 8, 1), 7, np.uint8)) == (7.0, 0.0, 0.0)


def test_a_gray_image_has_the_signals_of_its_rgb_copy():
    gray = RANDOM.integers(0, 256, (32, 32, 1), np.uint8)
    assert image_signals(gray) == pytest.approx(image_signals(np.repeat(gray, 3, 2)))


@given(st.lists(st.integers(-1000, 1000).map(lambda v: v / 8), min_size=1, max_size=200))
def test_every_value_counts_once_and_edges_increase(values):
    edges = bin_edges(np.array(values))
    assert (np.diff(edges) > 0).all()
    assert len(edges) >= 2
    assert histogram(np.array(values), edges).sum() == len(values)
    assert histogram(np.array([-1e9, 1e9]), edges).sum() == 2


def test_bins_hold_equal_mass():
    values = RANDOM.normal(size=10_000)
    assert histogram(values, bin_edges(values)).tolist() == pytest.approx([1000] * 10, abs=1)


def test_a_new_size_raises_the_index():
    baseline = np.array([320] * 50 + [500] * 50)
    edges = bin_edges(baseline)
    counts = histogram(baseline, edges)
    assert sorted(counts.tolist()) == [0, 0, 50, 50]
    assert psi(counts, histogram(baseline[::-1], edges)) == 0
    assert psi(counts, histogram(np.full(100, 640), edges)) > 1
    assert psi(counts, histogram(np.full(100, 100), edges)) > 1


def test_the_index_rises_only_when_the_data_changes():
    baseline = RANDOM.normal(size=5000)
    edges = bin_edges(baseline)
    counts = histogram(baseline, edges)
    same = RANDOM.normal(size=2000)
    shifted = RANDOM.normal(1, size=2000)
    assert psi(counts, histogram(same, edges)) < 0.02
    assert psi(counts, histogram(shifted, edges)) > 0.25


def test_class_histogram():
    labels = np.array([0, 1, 1, 2])
    assert histogram(labels, class_edges(4)).tolist() == [1, 2, 1, 0]
