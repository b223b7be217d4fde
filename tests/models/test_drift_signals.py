"""Drift signals: what they measure, and that the index rises only when the data changes."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.drift import (
    bin_edges,
    class_edges,
    count_bins,
    drift_index,
    histogram,
    image_signals,
    merge_bins,
    psi,
)

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


ALERT = 0.25
"""The index above which ImagoDrift fires."""
LIVE_IMAGES = 2000
DRAWS = 200


def share_of_alerts(
    baselines: np.ndarray, traffic: np.ndarray, edges: np.ndarray | None = None
) -> float:
    """Return in which share of the rows the index is above ALERT, computed as the server does.

    `baselines` [DRAWS,n] and `traffic` [DRAWS,m] are values of one signal, one draw a row.
    """
    alerts = 0
    for baseline, live in zip(baselines, traffic, strict=True):
        fine_edges = bin_edges(baseline) if edges is None else edges
        counts = histogram(baseline, fine_edges).tolist()
        max_bins = count_bins(len(baseline), len(live))
        inner_edges, merged = merge_bins(fine_edges.tolist(), counts, max_bins)
        merged_edges = np.array([-np.inf, *inner_edges, np.inf])
        alerts += drift_index(np.array(merged), histogram(live, merged_edges)) > ALERT
    return alerts / len(baselines)


@pytest.mark.parametrize("images", [15, 20, 30, 50, 100, 1000])
def test_a_continuous_signal_alerts_for_drift_only(images):
    random = np.random.default_rng(images)
    baselines = random.normal(size=(DRAWS, images))
    traffic = random.normal(size=(DRAWS, LIVE_IMAGES))
    assert share_of_alerts(baselines, traffic) <= 0.01
    assert share_of_alerts(baselines, traffic + 2) >= 0.99


@pytest.mark.parametrize("images_per_class", [1, 2, 3, 10])
def test_the_predicted_class_alerts_for_drift_only(images_per_class):
    """A fifth of the predictions is wrong, and the validation part holds each class equally."""
    classes = 100
    random = np.random.default_rng(images_per_class)
    labels = np.tile(np.arange(classes), (DRAWS, images_per_class))
    guesses = random.integers(0, classes, labels.shape)
    baselines = np.where(random.random(labels.shape) < 0.8, labels, guesses)
    edges = class_edges(classes)
    traffic = random.integers(0, classes, (DRAWS, LIVE_IMAGES))
    assert share_of_alerts(baselines, traffic, edges) <= 0.01
    assert share_of_alerts(baselines, traffic // 2, edges) >= 0.99


@pytest.mark.parametrize("images", [15, 1000])
@pytest.mark.parametrize("size", [100, 640])
def test_a_new_size_alerts_with_any_number_of_validation_images(images, size):
    baseline = np.full((1, images), 320)
    assert share_of_alerts(baseline, np.full((1, LIVE_IMAGES), 320)) == 0
    assert share_of_alerts(baseline, np.full((1, LIVE_IMAGES), size)) == 1
