"""Calibration on data whose truth is known because it was drawn from it."""

import numpy as np
import pytest
import torch

from train.export.calibrate import (
    CalibrateConfig,
    abstain_threshold,
    calibrate,
    conformal_coverage,
    conformal_quantile,
    coverage_curve,
    coverage_error,
    ece,
    energy,
    fit_temperature,
    nll,
    reliability,
    softmax,
)


def drawn(
    images: int, classes: int = 10, sharpness: float = 3.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N,K], and labels drawn from their softmax: calibrated by construction."""
    random = np.random.default_rng(seed)
    logits = random.normal(scale=sharpness, size=(images, classes)).astype(np.float32)
    chosen = (softmax(logits).cumsum(1) > random.random((images, 1))).argmax(1)
    return logits, chosen


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_undoes_what_was_done_to_calibrated_logits(factor):
    logits, labels = drawn(20_000)
    temperature = fit_temperature(factor * logits, labels)
    assert temperature == pytest.approx(factor, rel=0.05)
    assert nll(factor * logits, labels, temperature) <= nll(factor * logits, labels) + 1e-6
    assert ece(softmax(factor * logits, temperature), labels) < 0.02


def test_it_is_the_minimum():
    logits, labels = drawn(2000)
    found = fit_temperature(2 * logits, labels)
    around = [nll(2 * logits, labels, found * f) for f in (0.9, 1.0, 1.1)]
    assert min(around) == around[1]


def test_a_perfect_validation_part_does_not_make_it_certain_of_everything():
    labels = np.arange(100) % 10
    logits = 5 * np.eye(10, dtype=np.float32)[labels] + drawn(100, sharpness=0.1)[0]
    confidence = softmax(logits, fit_temperature(logits, labels)).max(1).mean()
    assert confidence == pytest.approx(1 - 1 / 102, abs=0.003)


def test_nll_and_energy_are_those_of_torch():
    logits, labels = drawn(50)
    x = torch.from_numpy(logits).double()
    assert nll(logits, labels, 1.7) == pytest.approx(
        torch.nn.functional.cross_entropy(x / 1.7, torch.from_numpy(labels)).item()
    )
    assert energy(logits) == pytest.approx(-x.logsumexp(1).numpy(), rel=1e-5)


def test_calibration_error_of_a_known_case():
    probabilities = np.array([[0.9, 0.1]] * 10 + [[0.3, 0.7]] * 10)
    labels = np.array([0] * 8 + [1] * 2 + [1] * 5 + [0] * 5)  # 80 % right at 0.9, 50 % right at 0.7
    assert ece(probabilities, labels) == pytest.approx(0.5 * 0.1 + 0.5 * 0.2)
    assert [b.images for b in reliability(probabilities, labels)] == [10, 10]


@pytest.mark.parametrize("wanted", [0.7, 0.9, 0.99])
def test_the_threshold_keeps_its_word_and_answers_as_many_as_it_can(wanted):
    logits, labels = drawn(5000)
    probabilities = softmax(logits)
    threshold, coverage = abstain_threshold(probabilities, labels, wanted)
    answered = probabilities.max(1) >= threshold
    assert (probabilities.argmax(1) == labels)[answered].mean() >= wanted
    assert answered.mean() == pytest.approx(coverage)
    _, shares, accuracies = coverage_curve(probabilities, labels)
    assert not (accuracies[shares > coverage] >= wanted).any()


def test_the_threshold_where_all_or_nothing_will_do():
    probabilities = np.array([[0.8, 0.2]] * 4)
    assert abstain_threshold(probabilities, np.zeros(4, int), 0.99) == (0.0, 1.0)
    assert abstain_threshold(probabilities, np.array([0, 0, 0, 1]), 0.99) == (
        1.0,
        0.0,
    )  # all equally sure


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_prediction_sets_cover_new_images_as_promised(level):
    logits, labels = drawn(20_000)
    covered = []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(labels))
        here, there = order[:1000], order[1000:5000]
        quantile = conformal_quantile(softmax(logits[here]), labels[here], level)
        covered.append(conformal_coverage(softmax(logits[there]), labels[there], quantile))
        assert abs(covered[-1] - level) <= 4 * coverage_error(level, 1000, 4000)
    assert np.mean(covered) == pytest.approx(
        level, abs=2 * coverage_error(level, 1000, 4000) / 20**0.5
    )


def test_too_few_images_promise_nothing():
    logits, labels = drawn(10)
    assert conformal_quantile(softmax(logits), labels, 0.95) == 1.0


def test_all_of_it_together():
    val, test = drawn(4000, seed=1), drawn(4000, seed=2)
    val, test = (3 * val[0], val[1]), (3 * test[0], test[1])
    found = calibrate(val, test, CalibrateConfig())
    assert found.temperature == pytest.approx(3, rel=0.05)
    assert found.ece_after < found.ece_before
    assert found.nll_after < found.nll_before
    assert found.abstain_test_accuracy == pytest.approx(0.99, abs=0.02)
    assert abs(found.conformal_coverage - 0.95) <= 2 * coverage_error(0.95, 4000, 4000)
    assert (energy(val[0]) <= found.energy_threshold).mean() == pytest.approx(0.95, abs=0.001)
    plain = calibrate(val, test, CalibrateConfig(temperature=False))
    assert plain.temperature == 1
    assert plain.nll_after == plain.nll_before


@pytest.mark.parametrize("name", ["abstain_accuracy", "conformal_level", "energy_kept"])
@pytest.mark.parametrize("value", [0, 1, 95])
def test_shares_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=f"calibrate.{name}: {value} is not between 0 and 1"):
        CalibrateConfig(**{name: value})
