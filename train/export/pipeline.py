"""After the fit: test, calibrate, export, quantize, certify, report, publish."""

import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from models.bundle import (
    EXPECTED_FILE,
    SAMPLES_DIRECTORY,
    BundleError,
    Calibration,
    DataInfo,
    Histogram,
    Manifest,
    Metrics,
    Sample,
    Variant,
    file_sha256,
    write_checksums,
)
from models.bundle.verify import compare_outputs, load_runner
from models.image import decode
from models.networks.base import Network
from models.store import StagedVersion, Store
from train.data import ImageData
from train.export import evaluate
from train.export import parity as parity_check
from train.export.calibrate import CalibrateConfig, calibrate, coverage_error
from train.export.drift_baseline import MAX_IMAGES, baseline
from train.export.onnx_graph import InferenceGraph, export_onnx
from train.export.provenance import provenance
from train.export.quantize import QuantizeConfig, quantize
from train.learning.system import Classifier
from train.runs.history import History
from train.runs.trainer import ImageTrainer

CERTIFIED = 64  # validation images that parity is measured on
INT8_TOLERANCE = 0.02  # of a probability: the least that other kernels' rounding may change


@dataclass
class ExportConfig:
    """What follows the fit.

    Args:
        enabled: test the best weights and write a bundle.
        samples: validation images that go into the bundle, for every server to check itself on.
        calibrate: temperature, abstaining, prediction sets.
        quantize: the int8 variant and its gate.
        report: write report.html and README.md.
        purpose: what the model is for, in a sentence, for the report.
        limits: what it is not for, in a sentence, for the report.
        license: of the model, as Hugging Face spells it, for README.md.
        sign_key: PEM file of an elliptic curve private key that signs the bundle; needs the extra `signing`.
        promote: make the new version the latest.
    """

    enabled: bool = True
    samples: int = 16
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    report: bool = True
    purpose: str | None = None
    limits: str | None = None
    license: str = "unknown"
    sign_key: str | None = None
    promote: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"export.samples: {self.samples} is less than 1")
        if self.sign_key and not Path(self.sign_key).is_file():
            raise ValueError(f"export.sign_key: {self.sign_key}: no such file")


def export_bundle(
    trainer: ImageTrainer,
    system: Classifier,
    data: ImageData,
    export: ExportConfig,
    store: str,
    name: str,
    recipe: dict[str, Any],
) -> Path | None:
    """Publish the best weights as the next version of `name` and print one line; returns its directory.

    In the first process alone; in others it does nothing and returns None.
    """
    if not trainer.is_global_zero:
        return None
    history = next((c.rows for c in trainer.callbacks if isinstance(c, History)), [])
    seconds = {
        "fit": round(sum(row["seconds"] for row in history), 3)
    }  # also what was done before a resume
    device = trainer.strategy.root_device
    # As it was trained and validated: weights from elsewhere may bring moments of their own.
    network, mean, std = (
        best_network(trainer, system),
        system.mean.flatten().tolist(),
        system.std.flatten().tolist(),
    )
    served = InferenceGraph(network, mean, std)
    with timed(seconds, "test"):
        val, test = (evaluate.score(served, data, part, device) for part in ("val", "test"))
        augmented = (
            evaluate.score(served, data, "test", device, system.tta)
            if system.tta != "none"
            else None
        )
    with timed(seconds, "calibrate"):
        calibration = calibrate(
            (val.logits, val.labels), (test.logits, test.labels), export.calibrate
        )
    served = served.cpu().requires_grad_(False)
    served.temperature = calibration.temperature
    with Store(store).stage(name) as staged:
        about = {"network": system.name, "options": system.options, "mean": mean, "std": std}
        save_file(
            {k: v.contiguous() for k, v in served.network.state_dict().items()},
            staged.path / "weights.safetensors",
            {key: json.dumps(value) for key, value in about.items()},
        )
        samples, expected = write_samples(staged.path, served, data, export.samples)
        variants, notes = make_variants(
            staged.path,
            served,
            data,
            expected,
            {"val": val, "test": test},
            export.quantize,
            seconds,
        )
        info = DataInfo(source=str(data.source), digest=data.digest, counts=data.counts)
        manifest = Manifest(
            name=name,
            version=staged.version,
            created=datetime.now(UTC),
            network=system.name,
            classes=data.classes,
            input=data.input,
            outputs=served.names(),
            variants=variants,
            calibration=calibration,
            samples=samples,
            baseline=drift_baseline(data, val, calibration),
            metrics=score_all(data, val, test, augmented, calibration),
            notes=notes + doubts(calibration, data.counts),
            provenance=provenance(device, info, recipe["seed_everything"], recipe, seconds),
        )
        if export.report:
            with timed(seconds, "report"):
                from train.export.report import write_report

                write_report(staged.path, manifest, served, data, val, test, history, export)
        path = seal(staged, manifest, seconds, export)
    tested = manifest.metrics["test"]
    print(
        f"{path}: test accuracy {tested.accuracy:.4f} on {tested.images} images; "
        f"serve it: {interpreter()} -m serve --store {store} --model {name}"
    )
    return path


def interpreter() -> str:
    """This Python as it is called from here: `.venv/bin/python` in a clone."""
    return sys.executable.removeprefix(f"{Path.cwd()}{os.sep}")


def seal(
    staged: StagedVersion, manifest: Manifest, seconds: dict[str, float], export: ExportConfig
) -> Path:
    """Manifest, digests, signature; then it becomes visible."""
    manifest.provenance.seconds = seconds
    manifest.write(staged.path)
    write_checksums(staged.path)
    if export.sign_key:
        from models.bundle.signing import sign_bundle

        sign_bundle(staged.path, Path(export.sign_key))
    return staged.publish(export.promote).path


def best_network(trainer: L.Trainer, system: Classifier) -> Network:
    """A float32 copy on the CPU with the weights of the best checkpoint, or those at hand where there is none."""
    network = (
        copy.deepcopy(system.network).cpu().float()
    )  # first: the best weights may be a precise average
    keeper = trainer.checkpoint_callback
    if isinstance(keeper, ModelCheckpoint) and keeper.monitor and (best := keeper.best_model_path):
        state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
        network.load_state_dict(
            {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
        )
    return network.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]  # see system


def write_samples(
    directory: Path, served: InferenceGraph, data: ImageData, count: int
) -> tuple[list[Sample], dict]:
    """Real validation images as files, and what the torch network gives for them."""
    (directory / SAMPLES_DIRECTORY).mkdir()
    samples = data.samples(count)
    for file, content, _ in samples:
        (directory / SAMPLES_DIRECTORY / file).write_bytes(content)
    pixels = np.stack([decode(content, data.input) for _, content, _ in samples])
    expected = parity_check.torch_outputs(served, pixels) | {"pixels": pixels}
    np.savez_compressed(
        directory / SAMPLES_DIRECTORY / EXPECTED_FILE, allow_pickle=False, **expected
    )
    return [Sample(file=file, label=label) for file, _, label in samples], expected


def make_variants(
    directory: Path,
    served: InferenceGraph,
    data: ImageData,
    expected: dict[str, np.ndarray],
    scores: dict[str, evaluate.Scores],
    config: QuantizeConfig,
    seconds: dict[str, float],
) -> tuple[dict[str, Variant], list[str]]:
    """model.onnx and, where it passes its gate, model.int8.onnx, certified and timed; and notes for the manifest."""
    files, accuracy, notes = {"fp32": directory / "model.onnx"}, {}, []
    with timed(seconds, "export"):
        opset = export_onnx(served, data.input, len(data.classes), files["fp32"])
    accuracy["fp32"] = float((scores["test"].logits.argmax(1) == scores["test"].labels).mean())
    if config.enabled:
        with timed(seconds, "quantize"):
            target = directory / "model.int8.onnx"
            tested, note = make_int8(files["fp32"], target, data, scores, config)
        notes.append(note)
        if tested is not None:
            files["int8"], accuracy["int8"] = target, tested
    with timed(seconds, "certify"):
        runs = {name: load_runner(file) for name, file in files.items()}
        images = evaluate.images(data, "val", evaluate.evenly_spaced(data.counts["val"], CERTIFIED))
        parity = {name: parity_check.parity(run, served, images) for name, run in runs.items()}
        if parity["fp32"].max_abs_diff > parity_check.TOLERANCE or parity["fp32"].agreement < 1:
            raise BundleError(
                f"{files['fp32'].name}: its probabilities differ from the torch network's by "
                f"{parity['fp32'].max_abs_diff:.2g}, and {parity_check.TOLERANCE} is allowed"
            )
        latency = parity_check.latencies(runs, images)
        tolerance = {
            name: parity_check.TOLERANCE
            if name == "fp32"
            else max(
                INT8_TOLERANCE,
                2 * compare_outputs(run(expected["pixels"]), expected, 1.0).max_abs_diff,
            )
            for name, run in runs.items()
        }
    variants = {
        name: Variant(
            file=file.name,
            precision=name,
            sha256=file_sha256(file),
            bytes=file.stat().st_size,
            opset=opset,
            accuracy=accuracy[name],
            latency=latency[name],
            parity=parity[name],
            tolerance=tolerance[name],
        )
        for name, file in files.items()
    }
    if "int8" in latency:
        ratio = latency["int8"].images_per_second / latency["fp32"].images_per_second
        notes.append(
            f"int8 runs {ratio:.2f} times as many images a second as fp32 on {latency['fp32'].device}"
        )
    return variants, notes


def make_int8(
    source: Path,
    target: Path,
    data: ImageData,
    scores: dict[str, evaluate.Scores],
    config: QuantizeConfig,
) -> tuple[float | None, str]:
    """Its accuracy on the test part, or None where it is not shipped; and a note that says how it went. Its gate is
    of validation images: what is left in float is chosen by it."""
    rows = {
        part: evaluate.evenly_spaced(len(of.labels), config.gate_images)
        for part, of in scores.items()
    }

    def accuracy(file: Path, part: str) -> float:
        run = load_runner(file)
        right = [
            run(evaluate.images(data, part, some))["probabilities"].argmax(1)
            == scores[part].labels[some]
            for some in np.array_split(rows[part], -(-len(rows[part]) // 64))
        ]
        return float(np.concatenate(right).mean())

    reference = {
        part: float((of.logits.argmax(1) == of.labels)[rows[part]].mean())
        for part, of in scores.items()
    }
    training = evaluate.images(
        data, "train", evaluate.evenly_spaced(data.counts["train"], config.images)
    )
    try:
        found = quantize(
            source, target, training, lambda file: accuracy(file, "val"), reference["val"], config
        )
    except Exception as error:  # a network may hold what onnxruntime's quantizer does not know, and raises anything
        target.unlink(missing_ok=True)
        cause = " ".join(str(error).split())[:200]
        return None, f"int8 is not shipped: onnxruntime can't quantize this network ({cause})"
    if not found.passed:
        return None, found.describe(config.max_loss)
    tested = accuracy(target, "test")
    return (
        tested,
        f"{found.describe(config.max_loss)}; of test accuracy it loses {100 * (reference['test'] - tested):.2f}",
    )


def score_all(
    data: ImageData,
    val: evaluate.Scores,
    test: evaluate.Scores,
    augmented: evaluate.Scores | None,
    calibration: Calibration,
) -> dict[str, Metrics]:
    """Metrics of each part, and of the test part without what the audit found in the others and with augmentation."""
    scored = {"val": val, "test": test}
    if 0 < len(data.leaked_test) < len(test.labels):
        scored["test_unleaked"] = test.without(data.leaked_test)
    if augmented is not None:
        scored["test_tta"] = augmented
    return {part: evaluate.metrics(of, calibration.temperature) for part, of in scored.items()}


def drift_baseline(
    data: ImageData, val: evaluate.Scores, calibration: Calibration
) -> dict[str, Histogram]:
    """Of validation data. Widths and heights are those of the files, before they were made to fit."""
    facts = data.known.facts[data.index["val"]]
    images = evaluate.images(data, "val", evaluate.evenly_spaced(len(val.labels), MAX_IMAGES))
    return baseline(
        val.logits, calibration.temperature, images, np.stack([facts["width"], facts["height"]], 1)
    )


def doubts(calibration: Calibration, counts: dict[str, int]) -> list[str]:
    """What a reader should know of the promises that test data did not confirm."""
    found = []
    level, seen = calibration.conformal_level, calibration.conformal_coverage
    if (
        level is not None
        and seen is not None
        and (abs(seen - level) > 2 * coverage_error(level, counts["val"], counts["test"]))
    ):
        found.append(
            f"prediction sets hold the true class of {seen:.1%} of the test images; {level:.0%} was asked for"
        )
    if calibration.abstain_coverage == 0:
        found.append(
            f"no threshold reaches {calibration.abstain_accuracy:.1%} accuracy, so every answer abstains"
        )
    return found


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[step] = round(time.monotonic() - began, 3)
