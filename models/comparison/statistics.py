"""Statistics of paired predictions: two models, the same images.

Only numpy and the standard library: the serving image has no SciPy.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CALIBRATION_BINS = 15
BOOTSTRAP_SAMPLES = 300
BOOTSTRAP_SEED = 0


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def normal_quantile(confidence: float) -> float:
    """Return the z for which a standard normal variable is in -z..z with this probability."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def mcnemar_exact(losses: int, gains: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    `losses`: images that only the old model gets right; `gains`: those that only the new one does.
    Without a difference, each of them is a gain with probability 1/2. McNemar, "Note on the
    sampling error of the difference between correlated proportions or percentages", 1947.
    """
    discordant = losses + gains
    return min(1.0, 2 * _binomial_tail(min(losses, gains), discordant))


def mcnemar_mid_p(losses: int, gains: int) -> float:
    """Return the two-sided mid-p value of the McNemar test, which is less conservative.

    Fagerland, Lydersen and Laake, "The McNemar test for binary matched-pairs data: mid-p and
    asymptotic are better than exact conditional", 2013.
    """
    discordant = losses + gains
    if not discordant:
        return 1.0
    if losses == gains:
        return 1 - 0.5 * _binomial_probability(losses, discordant)
    least = min(losses, gains)
    return 2 * _binomial_tail(least, discordant) - _binomial_probability(least, discordant)


def _binomial_probability(count: int, trials: int) -> float:
    """Return P(X = count) of a binomial variable with probability 1/2."""
    log_choose = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
    return math.exp(log_choose - trials * math.log(2))


def _binomial_tail(count: int, trials: int) -> float:
    """Return P(X <= count) of a binomial variable with probability 1/2."""
    return sum(_binomial_probability(k, trials) for k in range(count + 1))


def paired_difference(losses: int, gains: int, images: int, confidence: float) -> Interval:
    """Return the difference of two accuracies on the same images, new minus old.

    The interval is Wald's after one image is added to each cell of the discordant pairs: Bonett and
    Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", 2012; recommended by Fagerland, Lydersen and Laake, "Recommended tests and
    confidence intervals for paired binomial proportions", 2014.
    """
    gain_share = (gains + 1) / (images + 2)
    loss_share = (losses + 1) / (images + 2)
    center = gain_share - loss_share
    variance = (gain_share + loss_share - center**2) / (images + 2)
    reach = normal_quantile(confidence) * math.sqrt(variance)
    return Interval((gains - losses) / images, max(-1.0, center - reach), min(1.0, center + reach))


def weighted_mean(values: np.ndarray, weights: np.ndarray, confidence: float) -> Interval:
    """Return the weighted mean of values [N], such as differences of paired results.

    With weights 1 / (probability of being sampled) this estimates the mean over all traffic: the
    estimator of Hájek, "Comment on an essay by D. Basu", 1971, the ratio of two sums of Horvitz and
    Thompson, "A generalization of sampling without replacement from a finite universe", 1952. The
    variance is that of the linearized ratio (Särndal, Swensson and Wretman, "Model assisted survey
    sampling", 1992, section 5.7), for images that were sampled independently.
    """
    total = weights.sum()
    mean = float((weights * values).sum() / total)
    variance = float(((weights * (values - mean)) ** 2).sum() / total**2)
    if len(values) > 1:
        variance *= len(values) / (len(values) - 1)
    reach = normal_quantile(confidence) * math.sqrt(variance)
    return Interval(mean, mean - reach, mean + reach)


def effective_images(weights: np.ndarray) -> float:
    """Return how many images of equal weight tell as much: Kish, "Survey sampling", 1965."""
    if not len(weights):
        return 0.0
    return float(weights.sum() ** 2 / (weights**2).sum())


def calibration_error(
    confidence: np.ndarray,
    is_correct: np.ndarray,
    weights: np.ndarray | None = None,
    bins: int = CALIBRATION_BINS,
) -> float:
    """Return the expected calibration error of predictions [N], 0..1.

    It is the mean of |confidence - accuracy| over bins of equal width, weighted by their images:
    Guo et al., "On calibration of modern neural networks", 2017.
    """
    if weights is None:
        weights = np.ones(len(confidence))
    bin_of_image = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = weights * (confidence - is_correct)
    return float(np.abs(np.bincount(bin_of_image, gaps, bins)).sum() / weights.sum())


def calibration_difference(
    confidences: tuple[np.ndarray, np.ndarray],
    corrects: tuple[np.ndarray, np.ndarray],
    weights: np.ndarray,
    confidence: float,
) -> Interval:
    """Return the difference of two calibration errors on the same images, new minus old.

    The interval is that of the percentile bootstrap over images, with a fixed seed: Efron and
    Tibshirani, "An introduction to the bootstrap", 1993, chapter 13.
    """

    def difference(rows: np.ndarray | slice) -> float:
        errors: list[float] = []
        for confidence_of_model, correct_of_model in zip(confidences, corrects, strict=True):
            errors.append(
                calibration_error(confidence_of_model[rows], correct_of_model[rows], weights[rows])
            )
        return errors[1] - errors[0]

    generator = np.random.default_rng(BOOTSTRAP_SEED)
    images = len(weights)
    samples: list[float] = []
    for _ in range(BOOTSTRAP_SAMPLES):
        samples.append(difference(generator.integers(0, images, images)))
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(difference(slice(None)), float(low), float(high))
