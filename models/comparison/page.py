"""The page and the lines that show a comparison."""

from typing import Any

from models.comparison.gate import describe_part
from models.comparison.results import Comparison, GateDecision, PartComparison
from models.comparison.thumbnails import SIDE_PIXELS

PART_TITLES = {"test": "Test part", "live": "Live test set"}


def render_page(comparison: Comparison) -> str:
    """Return the comparison as a self-contained HTML page. Needs jinja2."""
    # Imported here: the serving image has no jinja2, and needs none.
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("models.comparison"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = format_percent
    environment.filters["points"] = format_points
    variables: dict[str, Any] = {
        "comparison": comparison,
        "old": comparison.old,
        "new": comparison.new,
        "gate": comparison.gate,
        "titles": PART_TITLES,
        "shown": [image for image in comparison.lost if image.thumbnail],
        "side_pixels": SIDE_PIXELS,
    }
    return environment.get_template("comparison.html").render(variables)


def format_percent(share: float | None, digits: int = 2) -> str:
    """Format a share, 0..1, as percent; a dash stands for None."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def format_points(difference: float, digits: int = 2) -> str:
    """Format a difference of shares in points of percent, with its sign."""
    return f"{100 * difference:+.{digits}f}"


def describe_comparison(comparison: Comparison) -> list[str]:
    """Return the comparison in a few lines for the console."""
    old = comparison.old
    new = comparison.new
    lines = [f"{old.title} ({old.network}, {old.variant}) -> {new.title} ({new.network}, "
             f"{new.variant})"]  # fmt: skip
    for part, results in comparison.parts.items():
        lines += _describe_part_results(PART_TITLES[part], results, comparison.confidence)
    for each in comparison.unshared_classes:
        recall = "no test image" if each.recall is None else f"recall {each.recall:.2%}"
        lines.append(f"  class {each.label}: only {each.known_by}, {recall} ({each.images} images)")
    if old.latency_ms is not None and new.latency_ms is not None:
        lines.append(
            f"  one image {old.latency_ms:.2f} -> {new.latency_ms:.2f} ms, "
            f"{old.bytes / 1e6:.2f} -> {new.bytes / 1e6:.2f} MB"
        )
    lines += [f"  note: {note}" for note in comparison.notes]
    if comparison.unreadable:
        lines.append(f"  note: {comparison.unreadable} images can't be read and are left out")
    if comparison.gate is not None:
        lines.append(describe_decision(comparison.gate))
    return lines


def _describe_part_results(title: str, results: PartComparison, confidence: float) -> list[str]:
    difference = results.difference
    return [
        f"  {title}: {results.images} images, accuracy {results.old_accuracy:.2%} -> "
        f"{results.new_accuracy:.2%}, difference {format_points(difference.estimate)} points "
        f"({confidence:.0%} interval {format_points(difference.low)} to "
        f"{format_points(difference.high)})",
        f"    {results.pairs.lost} were right and are wrong, {results.pairs.gained} were wrong and "
        f"are right; McNemar p {results.p_exact:.3g} exact, {results.p_mid:.3g} mid-p",
        f"    calibration error {results.old_calibration_error:.4f} -> "
        f"{results.new_calibration_error:.4f}, log loss {results.old_log_loss:.4f} -> "
        f"{results.new_log_loss:.4f}",
    ]


def describe_decision(decision: GateDecision) -> str:
    """Return the decision of the gate in one line."""
    if decision.passed:
        return f"passes the gate, by the {describe_part(decision.part)} accuracy"
    return f"refused by the gate: {'; '.join(decision.reasons)}"
