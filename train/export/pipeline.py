"""The steps from a finished fit to a published bundle.

train/cli/run.py calls them in order, in the first process only. The longer steps have separate
files: calibrate.py, variants.py, report.py.
"""

import copy
import json
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save

from models.bundle import (
    EXPECTED_FILE,
    SAMPLES_DIRECTORY,
    Calibration,
    CorrectionCounts,
    DataInfo,
    Histogram,
    Manifest,
    Sample,
    Variant,
    write_checksums,
)
from models.image import decode
from models.networks.base import Network
from models.store import StagedVersion
from train.data import ImageData
from train.export.calibrate import coverage_error
from train.export.config import ExportConfig
from train.export.drift_baseline import (
    MAX_BASELINE_IMAGES,
    build_image_baseline,
    build_prediction_baseline,
)
from train.export.evaluate import (
    PartScores,
    compute_all_metrics,
    evenly_spaced_rows,
    load_images,
)
from train.export.onnx_graph import InferenceGraph
from train.export.parity import run_torch
from train.export.provenance import build_provenance
from train.export.scores import Scores
from train.export.steps import ExportSteps
from train.export.variants import describe_speedup
from train.learning.system import Classifier
from train.learning.test_time_augmentation import TestTimeAugmentation
from train.runs.trainer import ImageTrainer


@dataclass(frozen=True)
class TrainedModel:
    """The best weights of a run, in float32 on the CPU, and how their network was made."""

    network_name: str
    options: dict[str, Any]  # of the network
    mean: list[float]  # of each channel, in 0..255
    std: list[float]  # of each channel, in 0..255
    tta: TestTimeAugmentation
    graph: InferenceGraph


@dataclass(frozen=True)
class RunRecord:
    """What a bundle records of the run that it comes from."""

    recipe: dict[str, Any]  # all settings as plain values
    device: torch.device
    history: list[dict[str, float]]  # one row an epoch

    @property
    def fit_seconds(self) -> float:
        """Seconds of all epochs, also of those before a resume."""
        return sum(row["seconds"] for row in self.history)


@dataclass(frozen=True)
class BundleSamples:
    """Validation images in the bundle, and the outputs of the torch network for them."""

    entries: list[Sample]
    expected: dict[str, np.ndarray]  # by output name, and the decoded `pixels`


@dataclass(frozen=True)
class BundleContents:
    """The results that the manifest and the report are made of."""

    model: TrainedModel
    scores: PartScores
    calibration: Calibration
    samples: list[Sample]
    variants: dict[str, Variant]
    notes: list[str]


def load_best_model(trainer: ImageTrainer, system: Classifier) -> TrainedModel:
    """Return the model with the weights of the best checkpoint, or the current ones without one."""
    checkpoint_callback = trainer.checkpoint_callback
    if isinstance(checkpoint_callback, ModelCheckpoint) and checkpoint_callback.monitor:
        return load_model(system, checkpoint_callback.best_model_path)
    return load_model(system, "")


def load_model(system: Classifier, checkpoint: str | Path) -> TrainedModel:
    """Return the model with the weights of a checkpoint; an empty path keeps the current ones.

    Mean and deviation come from the system and not from the data, as loaded weights may replace
    them.
    """
    # Convert to float32 first: the best weights may be an average that is kept in float32.
    network = copy.deepcopy(system.network).cpu().float()
    _load_network_weights(network, str(checkpoint))
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's overloads leave it out
    network.eval()

    mean = system.mean.flatten().tolist()
    std = system.std.flatten().tolist()
    return TrainedModel(
        network_name=system.name,
        options=system.options,
        mean=mean,
        std=std,
        tta=system.tta,
        graph=InferenceGraph(network, mean, std),
    )


def _load_network_weights(network: Network, checkpoint_path: str) -> None:
    """Load the network's weights from a checkpoint; do nothing where the path is empty."""
    if not checkpoint_path:
        return
    state = torch.load(checkpoint_path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "network."
    weights = {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
    network.load_state_dict(weights)


def set_temperature(model: TrainedModel, calibration: Calibration) -> None:
    """Set the temperature of the graph, and move it to the CPU, where it is exported."""
    model.graph.cpu().requires_grad_(False)
    model.graph.temperature = calibration.temperature


def write_weights(directory: Path, model: TrainedModel, classes: list[str]) -> None:
    """Write weights.safetensors, with the network's name, options, classes, mean and deviation."""
    metadata = {
        "network": model.network_name,
        "options": model.options,
        "classes": classes,
        "mean": model.mean,
        "std": model.std,
    }
    state = model.graph.network.state_dict()
    tensors = {name: value.contiguous() for name, value in state.items()}
    encoded = {key: json.dumps(value) for key, value in metadata.items()}
    content = _sort_safetensors_header(save(tensors, encoded))
    (directory / "weights.safetensors").write_bytes(content)


def _sort_safetensors_header(content: bytes) -> bytes:
    """Return a file in safetensors format with its metadata sorted by name.

    safetensors 0.8 writes them in random order, so that no two files were the same to the byte. The
    file is 8 bytes, the little-endian length of the header; the header, JSON that may be padded
    with blanks; and the data of the tensors.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def write_samples(
    directory: Path, model: TrainedModel, data: ImageData, count: int
) -> BundleSamples:
    """Write validation images as files, and the torch network's outputs for them as a .npz file."""
    samples_directory = directory / SAMPLES_DIRECTORY
    samples_directory.mkdir()

    entries: list[Sample] = []
    decoded: list[np.ndarray] = []
    for file, content, label in data.validation_samples(count):
        (samples_directory / file).write_bytes(content)
        decoded.append(decode(content, data.input))
        entries.append(Sample(file=file, label=label))

    pixels = np.stack(decoded)
    expected = run_torch(model.graph, pixels)
    expected["pixels"] = pixels
    np.savez_compressed(samples_directory / EXPECTED_FILE, allow_pickle=False, **expected)
    return BundleSamples(entries, expected)


def build_manifest(
    staged: StagedVersion,
    contents: BundleContents,
    data: ImageData,
    run: RunRecord,
    steps: ExportSteps,
) -> Manifest:
    """Return the manifest of a staged version."""
    model = contents.model
    calibration = contents.calibration
    metrics = compute_all_metrics(contents.scores, calibration.temperature)
    data_info = DataInfo(
        source=str(data.source),
        digest=data.digest,
        counts=data.counts,
        corrections=CorrectionCounts(
            relabelled=data.dataset.count_relabelled(), left_out=data.dataset.count_excluded()
        ),
    )
    return Manifest(
        name=staged.name,
        version=staged.version,
        created=datetime.now(UTC),
        network=model.network_name,
        classes=data.classes,
        input=data.input,
        outputs=model.graph.output_names(),
        variants=contents.variants,
        calibration=calibration,
        samples=contents.samples,
        baseline=_measure_baseline(data, contents.scores.val, calibration),
        metrics=metrics,
        notes=contents.notes,
        provenance=build_provenance(run.device, data_info, run.recipe, steps.seconds),
    )


def _measure_baseline(
    data: ImageData, val: Scores, calibration: Calibration
) -> dict[str, Histogram]:
    """Return the drift baseline of the validation part.

    Widths and heights are those of the files, before they were resized.
    """
    metadata = data.decoded.metadata[data.index["val"]]
    sizes = np.stack([metadata["width"], metadata["height"]], 1)
    rows = evenly_spaced_rows(len(val.labels), MAX_BASELINE_IMAGES)
    images = load_images(data, "val", rows)
    predictions = build_prediction_baseline(val.logits, calibration.temperature)
    return predictions | build_image_baseline(images, sizes)


def describe_variants(
    variants: dict[str, Variant], calibration: Calibration, scores: PartScores
) -> list[str]:
    """Return notes on the speed of the variants and on targets that they miss.

    `calibration` is that of fp32; other variants may have their own. A note that holds for several
    variants is returned once.
    """
    notes = describe_speedup(variants)
    notes += describe_missed_targets(calibration, scores)
    for name, variant in variants.items():
        if variant.calibration is not None:
            missed = describe_missed_targets(variant.calibration, scores)
            notes += [f"{name}: {note}" for note in missed if note not in notes]
    return notes


def describe_missed_targets(calibration: Calibration, scores: PartScores) -> list[str]:
    """Return notes on the calibration targets that are not reached."""
    val_images = len(scores.val.labels)
    test_images = len(scores.unleaked_test_rows)
    notes: list[str] = []
    level = calibration.conformal_level
    coverage = calibration.conformal_coverage
    if level is not None and coverage is not None:
        allowed = 2 * coverage_error(level, val_images, test_images)
        if abs(coverage - level) > allowed:
            notes.append(
                f"prediction sets hold the true class of {coverage:.1%} of the test images; the "
                f"target is {level:.0%}"
            )
    if calibration.abstain_bound is None:
        notes.append(describe_missing_abstention(calibration, val_images))
    return notes


def describe_missing_abstention(calibration: Calibration, val_images: int) -> str:
    """Return a note on why nothing abstains."""
    if calibration.abstain_accuracy == 1:
        return (
            f"no prediction abstains: all {val_images} validation images are classified correctly, "
            "so there is no error to avoid"
        )
    return (
        f"no prediction abstains: {val_images} validation images support no threshold that reaches "
        f"{calibration.abstain_accuracy:.1%} accuracy; more validation images, or a lower "
        "--export.calibrate.abstain_accuracy or abstain_coverage, can support one"
    )


def publish(
    staged: StagedVersion, manifest: Manifest, steps: ExportSteps, config: ExportConfig
) -> Path:
    """Write manifest, checksums and signature, make the version visible; return its directory."""
    manifest.provenance.seconds = steps.seconds
    manifest.write(staged.path)
    write_checksums(staged.path)
    if config.sign_key:
        # Imported here, as it needs the extra `signing`.
        from models.bundle.signing import sign_bundle

        sign_bundle(staged.path, Path(config.sign_key))
    return staged.publish(config.promote and not is_refused(manifest)).path


def is_refused(manifest: Manifest) -> bool:
    """Whether the gate keeps a version from becoming the latest."""
    return manifest.gate is not None and not manifest.gate.passed


def describe_refusal(manifest: Manifest, store: str) -> str:
    """Return one line: why a version is not promoted, and what to do."""
    assert manifest.gate is not None
    name = manifest.name
    version = manifest.version
    return (
        f"train: {name}/{version} is not promoted, version {manifest.gate.compared_with} stays the "
        f"latest: {'; '.join(manifest.gate.reasons)}; comparison.html in the bundle shows the "
        f"images; to promote it anyway: {_python()} -m models promote {name} {version} --force "
        f"--store {store}"
    )


def _python() -> str:
    """Return the interpreter as it is called in this directory: .venv/bin/python in a clone."""
    return sys.executable.removeprefix(f"{Path.cwd()}{os.sep}")


def describe_bundle(location: str, manifest: Manifest, store: str, name: str) -> str:
    """Return one line: how good the model is, and the command that serves it."""
    test = manifest.test_metrics
    assert test is not None
    leaked = manifest.metrics["test"].images - test.images
    images = f"{test.images} images"
    if leaked:
        images += f", without {leaked} that have a duplicate in another part"

    line = (
        f"{location}: test accuracy {test.accuracy:.4f} (balanced {test.balanced_accuracy:.4f}, "
        f"majority class {test.majority_accuracy:.4f}) on {images}"
    )
    if is_refused(manifest):
        return line
    return f"{line}; serve it: {_python()} -m serve --store {store} --model {name}"
