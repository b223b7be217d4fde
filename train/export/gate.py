"""The gate: the new version against the latest one, on the same test images, before it is promoted.

Both run by onnxruntime, as they are served. See `models.comparison`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models.bundle import Bundle, BundleError, Gate, Manifest
from models.comparison import (
    Comparison,
    ComparisonError,
    GateConfig,
    TestImage,
    compare_candidates,
    decide,
)
from models.comparison.candidate import open_candidate, open_unpublished
from models.comparison.page import render_page
from models.comparison.results import LIVE, TEST, GateDecision
from models.comparison.test_images import (
    choose_images,
    limit_images,
    read_test_images,
    write_test_images,
)
from models.store import Store
from train.data import ImageData
from train.data.pixels import to_image_bytes
from train.data.source import Items, locate_file
from train.export.evaluate import PartScores
from train.export.steps import Advance

PAGE_FILE = "comparison.html"
RESULTS_FILE = "comparison.json"


@dataclass(frozen=True)
class GateResult:
    """What the gate decides on, and what it says. `gate` is None where nothing was compared."""

    gate: Gate | None
    notes: list[str]


def list_test_images(data: ImageData, scores: PartScores) -> list[TestImage]:
    """Return the test images that have no duplicate in another part, and the live test set."""
    images: list[TestImage] = []
    for i in data.index["test"][scores.unleaked_test_rows].tolist():
        images.append(_describe_image(data, i, is_live=False))
    for i in data.live_positions.tolist():
        images.append(_describe_image(data, i, is_live=True))
    return images


def _describe_image(data: ImageData, i: int, is_live: bool) -> TestImage:
    items = data.dataset.items
    path = locate_file(items, i)
    weights = data.dataset.live_weights
    weight = float(weights[i]) if is_live and weights is not None else 1.0
    return TestImage(
        name=items.name(i) if path is None else str(path.absolute()),
        label=data.classes[data.dataset.labels[i]],
        sha256=data.decoded.metadata["sha256"][i].tobytes().hex(),
        part=LIVE if is_live else TEST,
        weight=weight,
        read=partial(_read, items, i),
    )


def _read(items: Items, i: int) -> bytes:
    return to_image_bytes(items[i])


def write_list(directory: Path, data: ImageData, images: list[TestImage]) -> None:
    """Write the list of test images to a bundle; images that are not files are packed with it."""
    items = data.dataset.items
    are_files = all(locate_file(items, i) is not None for i in data.index["test"].tolist())
    write_test_images(directory, images, is_packed=not are_files)


def run_gate(
    directory: Path,
    manifest: Manifest,
    images: list[TestImage],
    store: Store,
    config: GateConfig,
    advance: Advance,
) -> GateResult:
    """Compare a bundle that is not published yet with the latest version of its model.

    Writes the comparison to the bundle as a page and as JSON. The first version passes, and so does
    one that can't be compared; a note says why.
    """
    latest = store.latest(manifest.name)
    if latest is None:
        return GateResult(None, [])
    try:
        old = store.open(manifest.name, latest)
        comparison = _compare(old, directory, manifest, images, config, advance)
    except (BundleError, ComparisonError) as error:
        return GateResult(None, [f"not compared with version {latest}: {error}"])

    decision = decide(comparison, config)
    comparison.gate = decision
    (directory / PAGE_FILE).write_text(render_page(comparison), encoding="utf-8")
    (directory / RESULTS_FILE).write_text(comparison.to_json(), encoding="utf-8")
    gate = _build_gate(latest, comparison, decision)
    notes = [f"gate {gate.describe()}"]
    for each in comparison.unshared_classes:
        recall = "no test image" if each.recall is None else f"recall {each.recall:.2%}"
        known_by = "added" if each.known_by == "new" else "removed"
        notes.append(f"class {each.label} is {known_by}: {recall} of {each.images} images")
    return GateResult(gate, notes + comparison.notes)


def _compare(
    old: Bundle,
    directory: Path,
    manifest: Manifest,
    images: list[TestImage],
    config: GateConfig,
    advance: Advance,
) -> Comparison:
    new = open_unpublished(manifest, directory)
    candidate = open_candidate(old)
    chosen = choose_images(read_test_images(old), images, old.manifest, manifest)
    limited = limit_images(chosen.images, config.images)
    return compare_candidates(candidate, new, limited, config.confidence, chosen.notes, advance)


def _build_gate(latest: int, comparison: Comparison, decision: GateDecision) -> Gate:
    results = comparison.parts[decision.part]
    return Gate(
        compared_with=latest,
        passed=decision.passed,
        reasons=decision.reasons,
        part=decision.part,
        images=results.images,
        difference=results.difference.estimate,
        difference_low=results.difference.low,
        difference_high=results.difference.high,
    )
