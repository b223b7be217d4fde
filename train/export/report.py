"""The report of a bundle, report.html, and its short form, README.md.

The report shows what the model is for, how accurate it is, and where it fails.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from models.bundle import Calibration, CorrectionCounts, Manifest
from models.comparison.thumbnails import encode_data_url
from train.audit.summary import format_count
from train.data import ImageData
from train.export import charts
from train.export.activation_maps import overlay_activation_map
from train.export.calibrate import ABSTAIN_CERTAINTY, coverage_curve, reliability_bins
from train.export.config import ExportConfig
from train.export.evaluate import PartScores, evenly_spaced_rows, load_images
from train.export.onnx_graph import InferenceGraph
from train.export.parity import run_torch
from train.export.scores import Scores, softmax

MAX_MISTAKES = 12
MAX_CONFUSED_PAIRS = 8
MAX_MATRIX_CLASSES = 40  # with more, the cells are too small to read
MAX_NAMED_CLASSES = 12
DIAGRAM_BINS = 10
MIN_CURVE_COVERAGE = 0.02  # the accuracy of fewer images is noise
MAX_CURVE_POINTS = 400


@dataclass(frozen=True)
class Mistake:
    """A test image that is classified wrongly."""

    image: str  # data URL
    activation_map: str | None  # data URL
    true_class: str
    predicted_class: str
    confidence: float  # 0..1


def write_report(
    directory: Path,
    manifest: Manifest,
    graph: InferenceGraph,
    data: ImageData,
    scores: PartScores,
    history: list[dict[str, float]],
    config: ExportConfig,
) -> None:
    """Write report.html and README.md into a directory."""
    variables = _template_variables(manifest, graph, data, scores, history, config)
    environment = _build_environment()
    for template, file in (("report.html", "report.html"), ("readme.md", "README.md")):
        text = environment.get_template(template).render(variables)
        (directory / file).write_text(text)


def _build_environment() -> Environment:
    """Return the environment of the templates; it escapes variables in HTML, not in Markdown."""
    environment = Environment(
        # The style is that of the comparison page, too.
        loader=ChoiceLoader([PackageLoader("train.export"), PackageLoader("models.comparison")]),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = format_percent
    environment.filters["megabytes"] = format_megabytes
    return environment


def _template_variables(
    manifest: Manifest,
    graph: InferenceGraph,
    data: ImageData,
    scores: PartScores,
    history: list[dict[str, float]],
    config: ExportConfig,
) -> dict[str, Any]:
    """Return what both templates show, by the name that they use."""
    calibration = manifest.calibration
    test = manifest.test_metrics
    assert test is not None
    test_scores = scores.unleaked_test
    val_probabilities = softmax(scores.val.logits, calibration.temperature)
    test_probabilities = softmax(test_scores.logits, calibration.temperature)
    in_prediction_set = 1 - test_probabilities <= (calibration.conformal_quantile or 0)
    weakest_first = sorted(
        zip(manifest.classes, test.per_class, strict=True), key=lambda pair: pair[1].f1
    )

    return {
        "manifest": manifest,
        "test": test,
        "leaked_images": len(data.leaked_test_rows),
        "are_all_leaked": len(data.leaked_test_rows) == len(scores.test.labels),
        "calibration": calibration,
        "abstention": describe_abstention(calibration, test.accuracy),
        "variant_abstention": _describe_variant_abstention(manifest),
        "provenance": manifest.provenance,
        "corrections": describe_corrections(manifest.provenance.data.corrections),
        "fp32": manifest.variants["fp32"],
        "purpose": config.purpose or _default_purpose(manifest),
        "limits": config.limits or _default_limits(),
        "license": config.license,
        "parameters": sum(p.numel() for p in graph.network.parameters()),
        "has_activation_maps": graph.network.spatial,
        "curves": draw_training_curves(history),
        "confusion": _draw_confusion_matrix(test.confusion, manifest.classes),
        "confused": find_confused_pairs(test_scores, manifest.classes),
        "per_class": weakest_first,
        "mistakes": find_mistakes(graph, data, scores, test_probabilities, manifest.classes),
        "reliability": draw_reliability(
            softmax(scores.val.logits), val_probabilities, scores.val.labels
        ),
        "coverage": draw_coverage(test_probabilities, test_scores.labels, manifest),
        "mean_set_size": float(in_prediction_set.sum(1).mean()),
        "audit": describe_audit(data),
    }


def describe_corrections(counts: CorrectionCounts) -> str:
    """Describe the corrections of the data in words; empty without any."""
    if not counts.relabelled and not counts.left_out:
        return ""
    return (
        f"{format_count(counts.relabelled, 'image')} relabelled and {counts.left_out} left out by "
        "hand"
    )


def format_percent(share: float | None, digits: int = 2) -> str:
    """Format a share, 0..1, as percent; a dash stands for None."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def format_megabytes(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / 1e6:.2f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"


def describe_abstention(calibration: Calibration, test_accuracy: float | None) -> str:
    """Describe in words which predictions abstain, and how accurate the others are."""
    if calibration.abstain_bound is None:
        return (
            "Nothing abstains: the validation data supports no threshold with an accuracy of "
            f"{format_percent(calibration.abstain_accuracy, 1)}."
        )
    promise = (
        f"at least {format_percent(calibration.abstain_bound, 1)} of the answers are correct, with "
        f"{ABSTAIN_CERTAINTY:.0%} confidence, by the validation data"
    )
    if not calibration.abstain_threshold:
        return f"Nothing abstains: {promise}."
    return (
        f"Predictions with a confidence below {calibration.abstain_threshold:.3f} abstain. The "
        f"others are the answers: {promise}, where "
        f"{format_percent(calibration.abstain_coverage, 1)} of the images are answered. On test "
        f"data {format_percent(calibration.abstain_test_coverage, 1)} are answered with an "
        f"accuracy of {format_percent(calibration.abstain_test_accuracy)}, against "
        f"{format_percent(test_accuracy)} of all predictions."
    )


def _describe_variant_abstention(manifest: Manifest) -> dict[str, str]:
    """Return the description by name of each variant that has its own calibration."""
    descriptions: dict[str, str] = {}
    for name, variant in manifest.variants.items():
        if variant.calibration is not None:
            descriptions[name] = describe_abstention(variant.calibration, variant.accuracy)
    return descriptions


def _default_purpose(manifest: Manifest) -> str:
    classes = manifest.classes
    names = classes
    if len(classes) > MAX_NAMED_CLASSES:
        names = [*classes[:10], f"{len(classes) - 10} more"]
    listed = ", ".join(names[:-1]) + f" or {names[-1]}"
    kind = "grayscale" if manifest.input.channels == 1 else "color"
    return f"Classifies a {kind} image as one of {len(classes)} classes: {listed}."


def _default_limits() -> str:
    return (
        "Images unlike the training images: the model assigns one of its classes to any image. "
        "Monitor the energy, which is high for unusual images, and the drift signals, which "
        "compare many images with the validation data. Where a mistake can cause harm, have a "
        "person review the predictions."
    )


def draw_training_curves(history: list[dict[str, float]]) -> dict[str, Markup]:
    """Return charts of loss and accuracy over the epochs, by title; none for a single epoch."""
    if len(history) < 2:
        return {}

    charts_by_title: dict[str, Markup] = {}
    loss = _collect_series(history, "loss")
    if loss:
        charts_by_title["Loss"] = charts.draw_curves(loss, "epoch", "loss")
    accuracy = _collect_series(history, "accuracy", scale=100)
    if accuracy:
        charts_by_title["Accuracy"] = charts.draw_curves(accuracy, "epoch", "accuracy, %")
    return charts_by_title


def _collect_series(
    history: list[dict[str, float]], metric: str, scale: float = 1.0
) -> dict[str, list[charts.Point]]:
    """Return (epoch, value) of a metric for the training and the validation part, if logged."""
    series: dict[str, list[charts.Point]] = {}
    for part in ("train", "val"):
        key = f"{part}/{metric}"
        points = [(row["epoch"], scale * row[key]) for row in history if key in row]
        if points:
            series[part] = points
    return series


def _draw_confusion_matrix(confusion: list[list[int]], classes: list[str]) -> Markup | None:
    if len(classes) > MAX_MATRIX_CLASSES:
        return None
    return charts.draw_confusion_matrix(confusion, classes)


def find_confused_pairs(
    test: Scores, classes: list[str], limit: int = MAX_CONFUSED_PAIRS
) -> list[tuple[str, str, int]]:
    """Return (true class, predicted class, images), most images first."""
    predicted = test.logits.argmax(1)
    label_pairs = np.stack([test.labels, predicted], 1)[~test.correct]
    pairs, images = np.unique(label_pairs, axis=0, return_counts=True)

    result: list[tuple[str, str, int]] = []
    for row in np.argsort(-images, kind="stable")[:limit]:
        true_class, predicted_class = pairs[row]
        result.append((classes[true_class], classes[predicted_class], int(images[row])))
    return result


def find_mistakes(
    graph: InferenceGraph,
    data: ImageData,
    scores: PartScores,
    probabilities: np.ndarray,
    classes: list[str],
) -> list[Mistake]:
    """Return the wrong predictions of highest confidence, with their class activation maps.

    `probabilities`: [N,K], of the test images without leaked ones.
    """
    test = scores.unleaked_test
    confidence = probabilities.max(1)
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != test.labels)
    by_confidence = np.argsort(-confidence[wrong], kind="stable")
    rows = wrong[by_confidence][:MAX_MISTAKES]
    if not len(rows):
        return []

    images = load_images(data, "test", scores.unleaked_test_rows[rows])
    maps = run_torch(graph, images).get("cam")
    mistakes: list[Mistake] = []
    for i, row in enumerate(rows):
        activation_map = None
        if maps is not None:
            overlay = overlay_activation_map(images[i], maps[i][predicted[row]])
            activation_map = encode_data_url(overlay)
        mistakes.append(
            Mistake(
                image=encode_data_url(images[i]),
                activation_map=activation_map,
                true_class=classes[test.labels[row]],
                predicted_class=classes[predicted[row]],
                confidence=float(confidence[row]),
            )
        )
    return mistakes


def draw_reliability(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> Markup:
    """Return accuracy over confidence: bars after calibration, a line before.

    `before` and `after`: probabilities [N,K] without and with the temperature.
    """
    chart = charts.Chart((0, 1), (0, 1), "confidence", "accuracy")
    for each in reliability_bins(after, labels, DIAGRAM_BINS):
        left = min(int(each.confidence * DIAGRAM_BINS), DIAGRAM_BINS - 1) / DIAGRAM_BINS
        title = (
            f"{each.images} images: confidence {each.confidence:.3f}, accuracy {each.accuracy:.3f}"
        )
        chart.draw_bar(left, left + 1 / DIAGRAM_BINS, each.accuracy, "bar", title)

    chart.draw_line([(0, 0), (1, 1)], "line ideal")
    uncalibrated = reliability_bins(before, labels, DIAGRAM_BINS)
    chart.draw_line([(each.confidence, each.accuracy) for each in uncalibrated], "line s1")
    chart.draw_legend({"before": "line s1", "after": "line thick", "ideal": "line ideal"})
    return chart.to_svg("reliability on validation data")


def draw_coverage(probabilities: np.ndarray, labels: np.ndarray, manifest: Manifest) -> Markup:
    """Return accuracy over the share of images that is answered, on test data."""
    _, answered, accuracy = coverage_curve(probabilities, labels)
    usable = np.flatnonzero(answered >= MIN_CURVE_COVERAGE)
    rows = usable[evenly_spaced_rows(len(usable), MAX_CURVE_POINTS)]
    points = [(100 * answered[row], 100 * accuracy[row]) for row in rows]

    lowest = min(y for _, y in points)
    bottom = lowest - 0.05 * (100 - lowest) - 0.1
    chart = charts.Chart((0, 100), (bottom, 100), "answered, %", "accuracy, %")
    chart.draw_line(points, "line s0")

    calibration = manifest.calibration
    test_coverage = calibration.abstain_test_coverage
    test_accuracy = calibration.abstain_test_accuracy
    if calibration.abstain_threshold and test_coverage is not None and test_accuracy is not None:
        text = f"threshold {calibration.abstain_threshold:.3f}"
        chart.draw_dot(100 * test_coverage, 100 * test_accuracy, text)
    return chart.to_svg("accuracy over coverage on test data")


def describe_audit(data: ImageData) -> list[str]:
    """Return the findings of the audit, one line each."""
    lines: list[str] = []
    if data.unreadable:
        files = format_count(len(data.unreadable), "unreadable file")
        lines.append(f"{files} left out")
    if data.audit_summary is None:
        lines.append("the data was not audited")
        return lines

    lines += data.audit_summary
    if not lines:
        lines.append("no duplicates, leaks, unusual images or suspicious labels found")
    return lines
