"""The report: one page that tells a person what this model is, how good it is, and where it fails."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from models.bundle import Manifest
from train.audit import summary
from train.data import ImageData
from train.export import charts, evaluate
from train.export.calibrate import coverage_curve, reliability, softmax
from train.export.onnx_graph import InferenceGraph
from train.export.parity import torch_outputs
from train.export.report_images import overlay, png

MISTAKES = 12
MATRIX_CLASSES = 40  # more would be a grey square


def write_report(
    directory: Path,
    manifest: Manifest,
    served: InferenceGraph,
    data: ImageData,
    val: evaluate.Scores,
    test: evaluate.Scores,
    history: list[dict[str, float]],
    export: Any,
) -> None:
    """Write report.html and README.md. `export`: the options, for purpose, limits and license."""
    m, temperature = manifest, manifest.calibration.temperature
    probabilities = softmax(test.logits, temperature)
    page = {
        "m": m,
        "test": m.metrics["test"],
        "val": m.metrics["val"],
        "c": m.calibration,
        "p": m.provenance,
        "purpose": export.purpose or _purpose(m),
        "limits": export.limits or _limits(m),
        "license": export.license,
        "parameters": sum(p.numel() for p in served.network.parameters()),
        "cam": served.network.spatial,
        "curves": training_curves(history),
        "confusion": _matrix(m),
        "confused": most_confused(test, m.classes),
        "per_class": sorted(
            zip(m.classes, m.metrics["test"].per_class, strict=True), key=lambda row: row[1].f1
        ),
        "mistakes": mistakes(served, data, test, probabilities, m.classes),
        "reliability": reliability_diagram(
            softmax(val.logits), softmax(val.logits, temperature), val.labels
        ),
        "coverage": coverage_diagram(probabilities, test.labels, m),
        "set_size": float(
            (1 - probabilities <= (m.calibration.conformal_quantile or 0)).sum(1).mean()
        ),
        "audit": audit_lines(data),
    }
    environment = Environment(
        loader=PackageLoader("train.export"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "megabytes": megabytes}
    (directory / "report.html").write_text(environment.get_template("report.html").render(page))
    environment.autoescape = False
    (directory / "README.md").write_text(environment.get_template("readme.md").render(page))


def percent(share: float | None, digits: int = 2) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"


def _purpose(m: Manifest) -> str:
    few = m.classes if len(m.classes) <= 12 else [*m.classes[:10], f"{len(m.classes) - 10} more"]
    names = ", ".join(few[:-1]) + f" or {few[-1]}"
    return (
        f"Tells which of {len(m.classes)} classes a {'grey' if m.input.channels == 1 else 'colour'} image shows: "
        f"{names}."
    )


def _limits(m: Manifest) -> str:
    return (
        "Images unlike those it was trained on: whatever it is shown, it answers with one of its classes. Watch "
        "the energy, which says how unlike an image is, and the drift signals, which say it of many. Where a "
        "mistake would harm somebody, let a person decide."
    )


def training_curves(history: list[dict[str, float]]) -> dict[str, Markup]:
    """Loss, and accuracy in percent, over the epochs; nothing where fewer than two were seen."""
    if len(history) < 2:
        return {}

    def line(key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        return [(row["epoch"], scale * row[key]) for row in history if key in row]

    loss = {name: found for name in ("train", "val") if (found := line(f"{name}/loss"))}
    accuracy = {
        name: found for name in ("train", "val") if (found := line(f"{name}/accuracy", 100))
    }
    return {
        name: charts.curves(series, "epoch", label)
        for name, series, label in (("Loss", loss, "loss"), ("Accuracy", accuracy, "accuracy, %"))
        if series
    }


def _matrix(m: Manifest) -> Markup | None:
    return (
        charts.confusion(m.metrics["test"].confusion, m.classes)
        if len(m.classes) <= MATRIX_CLASSES
        else None
    )


def most_confused(
    test: evaluate.Scores, classes: list[str], count: int = 8
) -> list[tuple[str, str, int]]:
    """(true class, predicted class, images), most first."""
    predicted = test.logits.argmax(1)
    wrong = predicted != test.labels
    pairs, images = np.unique(
        np.stack([test.labels, predicted], 1)[wrong], axis=0, return_counts=True
    )
    order = np.argsort(-images, kind="stable")[:count]
    return [
        (classes[i], classes[j], int(n))
        for (i, j), n in zip(pairs[order], images[order], strict=True)
    ]


@dataclass(frozen=True)
class Mistake:
    picture: str  # data URL
    map: str | None
    true: str
    predicted: str
    confidence: float


def mistakes(
    served: InferenceGraph,
    data: ImageData,
    test: evaluate.Scores,
    probabilities: np.ndarray,
    classes: list[str],
) -> list[Mistake]:
    """The test images it was most sure of and wrong about, and where it looked."""
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != test.labels)
    rows = wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:MISTAKES]
    if not len(rows):
        return []
    pixels = evaluate.images(data, "test", rows)
    cams = torch_outputs(served, pixels).get("cam", [None] * len(rows))
    return [
        Mistake(
            png(image),
            None if cam is None else png(overlay(image, cam[predicted[row]])),
            classes[test.labels[row]],
            classes[predicted[row]],
            float(probabilities[row].max()),
        )
        for row, image, cam in zip(rows, pixels, cams, strict=True)
    ]


def reliability_diagram(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> Markup:
    """Accuracy of the answers at each confidence: bars after calibration, a line before."""
    frame = charts.Frame((0, 1), (0, 1), "confidence", "accuracy")
    for b in reliability(after, labels, 10):
        left = min(int(b.confidence * 10), 9) / 10
        frame.bar(
            left,
            left + 0.1,
            b.accuracy,
            "bar",
            f"{b.images} images: confidence {b.confidence:.3f}, accuracy {b.accuracy:.3f}",
        )
    frame.line([(0, 0), (1, 1)], "line ideal")
    frame.line([(b.confidence, b.accuracy) for b in reliability(before, labels, 10)], "line s1")
    frame.legend({"before": "line s1", "after": "line thick", "ideal": "line ideal"})
    return frame.svg("reliability on validation data")


def coverage_diagram(probabilities: np.ndarray, labels: np.ndarray, m: Manifest) -> Markup:
    """Accuracy of what is answered, over the share that is answered, on test data."""
    _, answered, accuracy = coverage_curve(probabilities, labels)
    keep = answered >= 0.02  # a handful of images makes no accuracy
    some = np.flatnonzero(keep)[evaluate.evenly_spaced(int(keep.sum()), 400)]
    points = [(100 * answered[i], 100 * accuracy[i]) for i in some]
    lowest = min(y for _, y in points)
    frame = charts.Frame(
        (0, 100), (lowest - 0.05 * (100 - lowest) - 0.1, 100), "answered, %", "accuracy, %"
    )
    frame.line(points, "line s0")
    c = m.calibration
    if c.abstain_test_accuracy is not None and c.abstain_test_coverage is not None:
        frame.dot(
            100 * c.abstain_test_coverage,
            100 * c.abstain_test_accuracy,
            f"threshold {c.abstain_threshold:.3f}",
        )
    return frame.svg("accuracy over coverage on test data")


def audit_lines(data: ImageData) -> list[str]:
    """What the audit found, a line each."""
    found = (
        [f"{len(data.unreadable)} files can't be read and were left out"] if data.unreadable else []
    )
    if data.findings is None:
        return [*found, "the data was not audited"]
    return [*found, *summary(data.findings)] or [
        "no duplicates, no leakage, no odd images, no doubtful labels found"
    ]
