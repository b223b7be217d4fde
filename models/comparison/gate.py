"""The gate: whether a new version may replace the old one."""

from dataclasses import dataclass

from models.comparison.results import LIVE, TEST, Comparison, GateDecision, Part, PartComparison

LATENCY_FLOOR_MS = 1.0
"""A model that is slower by less than this passes: the rest of a request takes as long."""

MIN_CALIBRATION_IMAGES = 100
"""With fewer images, those that fit the temperature are few, too, and confidences are uncertain."""

LISTED_CLASSES = 5


@dataclass
class GateConfig:
    """What a new version has to reach before it becomes the latest; see `imago models compare`.

    Each budget is how much worse than the latest version the new one may be. Accuracies and
    calibration count as worse where the whole confidence interval of the difference lies beyond the
    budget, so that a difference which may be chance passes.

    Args:
        enabled: compare each new version with the latest one on the same test images; a version
            that is worse beyond a budget is published, but does not become the latest.
        accuracy: accuracy that may be lost, 0..1.
        class_recall: recall that any class may lose, 0..1.
        calibration: expected calibration error that may be added, 0..1; checked from 100 images on.
        latency: factor by which one image may take longer; less than 1 ms more always passes.
        confidence: level of the confidence intervals, 0..1.
        images: test images that are compared, the same ones of each version; 0 for all.
        live_images: the accuracy on the live test set counts in place of that on the test part
            where it tells as much as this many images of equal weight.
    """

    enabled: bool = True
    accuracy: float = 0.005
    class_recall: float = 0.05
    calibration: float = 0.05
    latency: float = 1.5
    confidence: float = 0.95
    images: int = 2000
    live_images: int = 200

    def __post_init__(self) -> None:
        for name in ("accuracy", "class_recall", "calibration"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"gate.{name}: {value} is not in 0..1")
        if not 0 < self.confidence < 1:
            raise ValueError(f"gate.confidence: {self.confidence} is not between 0 and 1")
        if not self.latency >= 1:
            raise ValueError(f"gate.latency: {self.latency} is less than 1")
        for name in ("images", "live_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"gate.{name}: {getattr(self, name)} is less than 0")


def decide(comparison: Comparison, config: GateConfig) -> GateDecision:
    """Return whether the new bundle passes, and what is worse beyond the budget otherwise."""
    part = _choose_part(comparison, config)
    deciding = comparison.parts[part]
    reasons = _check_accuracy(deciding, part, config)
    for name, each in comparison.parts.items():
        reasons += _check_classes(each, name, config)
    reasons += _check_calibration(deciding, config)
    reasons += _check_latency(comparison, config)
    return GateDecision(passed=not reasons, part=part, reasons=reasons)


def _choose_part(comparison: Comparison, config: GateConfig) -> Part:
    """Return the live test set where it is large enough, or where there is no other part."""
    live = comparison.parts.get(LIVE)
    if live is None:
        return TEST
    if TEST not in comparison.parts or live.effective_images >= config.live_images:
        return LIVE
    return TEST


def _check_accuracy(results: PartComparison, part: Part, config: GateConfig) -> list[str]:
    if results.difference.high >= -config.accuracy:
        return []
    return [
        f"{describe_part(part)} accuracy falls from {results.old_accuracy:.2%} to "
        f"{results.new_accuracy:.2%}, by {-results.difference.high:.2%} or more with "
        f"{config.confidence:.0%} confidence; {config.accuracy:.2%} is allowed"
    ]


def _check_classes(results: PartComparison, part: Part, config: GateConfig) -> list[str]:
    worse: list[str] = []
    for each in results.classes:
        if each.difference.high < -config.class_recall:
            worse.append(
                f"{each.label} from {each.old_recall:.1%} to {each.new_recall:.1%} "
                f"of {each.images} images"
            )
    if not worse:
        return []
    listed = ", ".join(worse[:LISTED_CLASSES])
    if len(worse) > LISTED_CLASSES:
        listed += f" and {len(worse) - LISTED_CLASSES} more"
    return [
        f"{describe_part(part)} recall falls by more than the allowed {config.class_recall:.1%}: "
        f"{listed}"
    ]


def _check_calibration(results: PartComparison, config: GateConfig) -> list[str]:
    if results.effective_images < MIN_CALIBRATION_IMAGES:
        return []
    if results.calibration_difference.low <= config.calibration:
        return []
    return [
        f"the calibration error grows from {results.old_calibration_error:.3f} to "
        f"{results.new_calibration_error:.3f}; {config.calibration:.3f} more is allowed"
    ]


def _check_latency(comparison: Comparison, config: GateConfig) -> list[str]:
    old_ms = comparison.old.latency_ms
    new_ms = comparison.new.latency_ms
    if old_ms is None or new_ms is None:
        return []
    if new_ms <= config.latency * old_ms or new_ms - old_ms < LATENCY_FLOOR_MS:
        return []
    return [
        f"one image takes {new_ms:.1f} ms instead of {old_ms:.1f} ms; {config.latency:g} times as "
        "long is allowed"
    ]


def describe_part(part: Part) -> str:
    """Return the words for a part in a sentence."""
    return "live" if part == LIVE else "test"
