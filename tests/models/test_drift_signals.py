"""Drift signals: what they measure, and that the index moves when the data does and not before."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.drift import bin_edges, class_edges, histogram, image_signals, psi

RANDOM = np.random.default_rng(0)


def test_signals_follow_what_they_are_named_for():
    image = RANDOM.integers(60, 180, (64, 64, 3), np.uint8)
    plain = image_signals(image)
    assert image_signals(image + 40).brightness == pytest.approx(plain.brightness + 40, abs=0.5)
    assert image_signals(image // 2).contrast == pytest.approx(plain.contrast / 2, rel=0.05)
    blurred = [image_signals(cv2.GaussianBlur(image, (0, 0), s)).sharpness for s in (1, 2, 4)]
    assert plain.sharpness > blurred[0] > blurred[1] > blurred[2]
    assert image_signals(np.full((8, 8, 1), 7, np.uint8)) == (7.0, 0.0, 0.0)


def test_grey_and_its_own_colour_are_alike():
    gray = RANDOM.integers(0, 256, (32, 32, 1), np.uint8)
    assert image_signals(gray) == pytest.approx(image_signals(np.repeat(gray, 3, 2)))


@given(st.lists(st.integers(-1000, 1000).map(lambda v: v / 8), min_size=1, max_size=200))
def test_every_value_counts_once_and_edges_rise(values):
    found = bin_edges(np.array(values))
    assert (np.diff(found) > 0).all()
    assert len(found) >= 2
    assert histogram(np.array(values), found).sum() == len(values)
    assert histogram(np.array([-1e9, 1e9]), found).sum() == 2


def test_bins_hold_equal_mass():
    values = RANDOM.normal(size=10_000)
    assert histogram(values, bin_edges(values)).tolist() == pytest.approx([1000] * 10, abs=1)


def test_a_size_never_seen_before_shows():
    baseline = np.array([320] * 50 + [500] * 50)
    found = bin_edges(baseline)
    counts = histogram(baseline, found)
    assert sorted(counts.tolist()) == [0, 0, 50, 50]
    assert psi(counts, histogram(baseline[::-1], found)) == 0
    assert psi(counts, histogram(np.full(100, 640), found)) > 1
    assert psi(counts, histogram(np.full(100, 100), found)) > 1


def test_the_index_moves_with_the_data_and_not_before():
    baseline = RANDOM.normal(size=5000)
    found = bin_edges(baseline)
    counts = histogram(baseline, found)
    same, shifted = RANDOM.normal(size=2000), RANDOM.normal(1, size=2000)
    assert psi(counts, histogram(same, found)) < 0.02
    assert psi(counts, histogram(shifted, found)) > 0.25


def test_class_mix():
    labels = np.array([0, 1, 1, 2])
    assert histogram(labels, class_edges(4)).tolist() == [1, 2, 1, 0]
