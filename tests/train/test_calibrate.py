"""Calibration on synthetic data: labels are drawn from the probabilities, so the truth is known."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from models.bundle import Calibration, Latency, Variant
from train.export.calibrate import (
    ABSTAIN_CERTAINTY,
    CalibrateConfig,
    accuracy_bound,
    calibrate,
    conformal_coverage,
    coverage_curve,
    coverage_error,
    expected_calibration_error,
    fit_abstention,
    fit_conformal_quantile,
    fit_temperature,
    halve_errors,
    reliability_bins,
)
from train.export.evaluate import PartScores
from train.export.pipeline import describe_variants
from train.export.scores import Scores, energy, negative_log_likelihood, softmax


def draw_scores(
    images: int, classes: int = 10, sharpness: float = 3.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N,K] and labels drawn from their softmax: calibrated by construction."""
    random = np.random.default_rng(seed)
    logits = random.normal(scale=sharpness, size=(images, classes)).astype(np.float32)
    labels = (softmax(logits).cumsum(1) > random.random((images, 1))).argmax(1)
    return logits, labels


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_temperature_recovers_the_scale_of_calibrated_logits(factor):
    logits, labels = draw_scores(20_000)
    scaled = factor * logits

    temperature = fit_temperature(scaled, labels)

    assert temperature == pytest.approx(factor, rel=0.05)
    before = negative_log_likelihood(scaled, labels)
    assert negative_log_likelihood(scaled, labels, temperature) <= before + 1e-6
    assert expected_calibration_error(softmax(scaled, temperature), labels) < 0.02


def test_temperature_minimizes_the_negative_log_likelihood():
    logits, labels = draw_scores(2000)
    best = fit_temperature(2 * logits, labels)

    losses = []
    for factor in (0.9, 1.0, 1.1):
        losses.append(negative_log_likelihood(2 * logits, labels, best * factor))

    assert min(losses) == losses[1]


def test_temperature_stays_moderate_when_all_validation_images_are_correct():
    labels = np.arange(100) % 10
    noise, _ = draw_scores(100, sharpness=0.1)
    logits = 5 * np.eye(10, dtype=np.float32)[labels] + noise

    confidence = softmax(logits, fit_temperature(logits, labels)).max(1).mean()

    assert confidence == pytest.approx(1 - 1 / 102, abs=0.003)


def test_negative_log_likelihood_and_energy_agree_with_torch():
    logits, labels = draw_scores(50)
    x = torch.from_numpy(logits).double()
    expected = torch.nn.functional.cross_entropy(x / 1.7, torch.from_numpy(labels)).item()
    assert negative_log_likelihood(logits, labels, 1.7) == pytest.approx(expected)
    assert energy(logits) == pytest.approx(-x.logsumexp(1).numpy(), rel=1e-5)


def test_calibration_error_of_a_known_case():
    probabilities = np.array([[0.9, 0.1]] * 10 + [[0.3, 0.7]] * 10)
    # 80 % correct at a confidence of 0.9, 50 % correct at 0.7.
    labels = np.array([0] * 8 + [1] * 2 + [1] * 5 + [0] * 5)
    error = expected_calibration_error(probabilities, labels)
    assert error == pytest.approx(0.5 * 0.1 + 0.5 * 0.2)
    assert [each.images for each in reliability_bins(probabilities, labels)] == [10, 10]


@pytest.mark.parametrize("accuracy", [0.93, 0.97, 0.99])
def test_abstain_threshold_reaches_the_accuracy_and_answers_most_images(accuracy):
    logits, labels = draw_scores(5000, sharpness=10)
    probabilities = softmax(logits)

    abstention = fit_abstention(probabilities, labels, accuracy, 0.3)

    is_answered = probabilities.max(1) >= abstention.threshold
    is_correct = probabilities.argmax(1) == labels
    answers = int(is_answered.sum())
    bound = binomtest(int(is_correct[is_answered].sum()), answers, alternative="greater")
    assert abstention.bound == pytest.approx(bound.proportion_ci(0.9).low)
    assert abstention.bound >= accuracy
    assert is_answered.mean() == pytest.approx(abstention.coverage)
    _, shares, accuracies = coverage_curve(probabilities, labels)
    images = shares * len(labels)
    bounds = accuracy_bound(accuracies * images, images)
    assert not (bounds[shares > abstention.coverage] >= accuracy).any()


def test_abstention_answers_all_or_abstains_from_none_at_equal_confidence():
    probabilities = np.array([[0.8, 0.2]] * 100)
    all_correct = np.zeros(100, int)
    one_wrong = np.arange(100) // 99
    assert fit_abstention(probabilities, all_correct, 0.97, 0.5)[:2] == (0.0, 1.0)
    assert fit_abstention(probabilities, one_wrong, 0.97, 0.5) == (0.0, 1.0, None)


def test_no_threshold_answers_less_than_the_least_coverage():
    logits, labels = draw_scores(5000, sharpness=10)
    probabilities = softmax(logits)
    coverage = fit_abstention(probabilities, labels, 0.99, 0.3).coverage
    assert fit_abstention(probabilities, labels, 0.99, coverage - 0.01).coverage == coverage
    assert fit_abstention(probabilities, labels, 0.99, coverage + 0.01) == (0.0, 1.0, None)


@pytest.mark.parametrize("images", [108, 360])
def test_promised_accuracy_is_kept_on_new_images(images):
    """With the default target: half of the errors that the validation images have."""
    logits, labels = draw_scores(40_000, sharpness=8)
    probabilities = softmax(logits)
    confidence = probabilities.max(1)
    is_correct = probabilities.argmax(1) == labels
    random = np.random.default_rng(1)
    promises = 0
    broken = 0
    for _ in range(200):
        rows = random.integers(0, len(labels), images)
        accuracy = halve_errors(Scores(logits[rows], labels[rows]))
        abstention = fit_abstention(probabilities[rows], labels[rows], accuracy, 0.5)
        if abstention.bound is None:
            continue
        promises += 1
        broken += is_correct[confidence >= abstention.threshold].mean() < accuracy
    assert promises >= 100
    assert broken <= (1 - ABSTAIN_CERTAINTY) * 200


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_prediction_sets_reach_their_coverage_on_new_images(level):
    logits, labels = draw_scores(20_000)
    probabilities = softmax(logits)
    error = coverage_error(level, 1000, 4000)
    coverages = []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(labels))
        fitted = order[:1000]
        tested = order[1000:5000]
        quantile = fit_conformal_quantile(probabilities[fitted], labels[fitted], level)
        coverage = conformal_coverage(probabilities[tested], labels[tested], quantile)
        assert abs(coverage - level) <= 4 * error
        coverages.append(coverage)
    assert np.mean(coverages) == pytest.approx(level, abs=2 * error / 20**0.5)


def test_prediction_sets_hold_all_classes_when_there_are_too_few_images():
    logits, labels = draw_scores(10)
    assert fit_conformal_quantile(softmax(logits), labels, 0.95) == 1.0


def test_calibrate_fits_on_validation_and_measures_on_test_scores():
    val_logits, val_labels = draw_scores(4000, sharpness=6, seed=1)
    test_logits, test_labels = draw_scores(4000, sharpness=6, seed=2)
    val = Scores(3 * val_logits, val_labels)
    test = Scores(3 * test_logits, test_labels)

    result = calibrate(val, test, CalibrateConfig())

    assert result.temperature == pytest.approx(3, rel=0.05)
    assert result.ece_after < result.ece_before
    assert result.nll_after < result.nll_before
    accuracy = (test.logits.argmax(1) == test.labels).mean()
    assert result.abstain_accuracy == pytest.approx((1 + accuracy) / 2, abs=0.01)
    assert result.abstain_bound >= result.abstain_accuracy
    assert result.abstain_test_accuracy >= result.abstain_accuracy
    assert result.abstain_test_coverage == pytest.approx(result.abstain_coverage, abs=0.03)
    assert abs(result.conformal_coverage - 0.95) <= 2 * coverage_error(0.95, 4000, 4000)
    kept = (energy(val.logits) <= result.energy_threshold).mean()
    assert kept == pytest.approx(0.95, abs=0.001)


def test_calibrate_without_temperature_leaves_the_logits_unscaled():
    val = Scores(*draw_scores(100, seed=1))
    result = calibrate(val, val, CalibrateConfig(temperature=False))
    assert result.temperature == 1
    assert result.nll_after == result.nll_before


@pytest.mark.parametrize(
    "name", ["abstain_accuracy", "abstain_coverage", "conformal_level", "energy_kept"]
)
@pytest.mark.parametrize("value", [0, 1, 95])
def test_shares_outside_of_0_to_1_are_refused(name, value):
    with pytest.raises(ValueError, match=f"calibrate.{name}: {value} is not between 0 and 1"):
        CalibrateConfig(**{name: value})


def test_a_note_that_holds_for_all_variants_is_returned_once():
    """Nothing abstains in either variant. The prediction sets of int8 alone miss their target."""
    logits, labels = draw_scores(100)
    part = Scores(logits, labels)
    scores = PartScores(part, part, None, np.arange(100))
    target = Calibration(abstain_accuracy=0.99, conformal_level=0.95, conformal_coverage=0.95)
    variants: dict[str, Variant] = {}
    for name in ("fp32", "int8"):
        latency = Latency(device="cpu", threads=1, batch_ms={}, images_per_second=1)
        variants[name] = Variant(
            file=f"{name}.onnx", precision=name, sha256="", bytes=1, opset=18, latency=latency
        )
    variants["int8"].calibration = target.model_copy(update={"conformal_coverage": 0.5})

    _, *notes = describe_variants(variants, target, scores)

    assert len(notes) == 2
    assert notes[0].startswith("no prediction abstains: ")
    assert notes[1].startswith("int8: prediction sets hold the true class of 50.0%")
