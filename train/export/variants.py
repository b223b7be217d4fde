"""The fp32 and int8 variants of a bundle's graph, and their certification against torch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.bundle import BundleError, GraphFile, Variant, file_sha256
from models.bundle.verify import Runner, compare_outputs, load_runner
from train.data import ImageData
from train.export.calibrate import CalibrateConfig, calibrate
from train.export.drift_baseline import build_prediction_baseline
from train.export.evaluate import PartScores, evenly_spaced_rows, load_images
from train.export.onnx_graph import InferenceGraph, export_onnx
from train.export.parity import FP32_TOLERANCE, measure_latencies, measure_parity
from train.export.quantize import QuantizeConfig, quantize
from train.export.scores import Scores, recover_logits
from train.export.steps import Advance

FP32_FILE = "model.onnx"
INT8_FILE = "model.int8.onnx"
PARITY_IMAGES = 64  # validation images
GATE_BATCH_SIZE = 64
# Of a probability. The int8 kernels of other CPUs round differently.
MIN_INT8_TOLERANCE = 0.02
SHOWN_ERROR_CHARACTERS = 200


@dataclass(frozen=True)
class VariantFile:
    """An ONNX file that is written but not certified yet."""

    precision: str  # fp32 or int8
    path: Path
    opset: int
    val: Scores  # of this file, for the validation part or rows of it
    test: Scores  # the same for the test images without a duplicate in another part


def export_fp32(
    directory: Path, graph: InferenceGraph, data: ImageData, scores: PartScores
) -> VariantFile:
    """Write model.onnx, the graph in float32."""
    path = directory / FP32_FILE
    opset = export_onnx(graph, data.input, len(data.classes), path)
    return VariantFile("fp32", path, opset, scores.val, scores.unleaked_test)


def quantize_int8(
    fp32: VariantFile,
    data: ImageData,
    scores: PartScores,
    config: QuantizeConfig,
    temperature: float,
    advance: Advance,
) -> tuple[VariantFile | None, str]:
    """Write model.int8.onnx if it passes its accuracy gate.

    Returns the file, or None where it is not shipped, and a note for the report. The gate uses
    validation images, because it chooses the layers that stay in float. The reported accuracy is
    then measured on test images. `temperature` is that of the graph.
    """
    target = fp32.path.with_name(INT8_FILE)
    training_rows = evenly_spaced_rows(data.counts["train"], config.images)
    val_rows = evenly_spaced_rows(len(scores.val.labels), config.gate_images)
    unleaked = scores.unleaked_test_rows
    test_rows = unleaked[evenly_spaced_rows(len(unleaked), config.gate_images)]

    def score_val(file: Path) -> Scores:
        return _score_rows(file, data, "val", scores.val.labels, val_rows, temperature, advance)

    try:
        result = quantize(
            fp32.path,
            target,
            load_images(data, "train", training_rows),
            lambda file: score_val(file).accuracy,
            float(scores.val.correct[val_rows].mean()),
            len(val_rows),
            config,
        )
    except Exception as error:
        # onnxruntime's quantizer raises exceptions of any type for what it does not support.
        target.unlink(missing_ok=True)
        cause = " ".join(str(error).split())[:SHOWN_ERROR_CHARACTERS]
        return None, f"int8 is not shipped: onnxruntime can't quantize this network ({cause})"

    note = result.describe(config.allowed_loss(len(val_rows)))
    if not result.passed:
        return None, note

    test = _score_rows(target, data, "test", scores.test.labels, test_rows, temperature, advance)
    fp32_accuracy = float(scores.test.correct[test_rows].mean())
    note += f"; it loses {100 * (fp32_accuracy - test.accuracy):.2f} points of test accuracy"
    return VariantFile("int8", target, fp32.opset, score_val(target), test), note


def _score_rows(
    file: Path,
    data: ImageData,
    part: str,
    labels: np.ndarray,
    rows: np.ndarray,
    temperature: float,
    advance: Advance,
) -> Scores:
    """Return the scores that an ONNX file gives these rows of a part; `labels` are all of it."""
    run = load_runner(GraphFile.read(file))
    batches = np.array_split(rows, -(-len(rows) // GATE_BATCH_SIZE))
    logits: list[np.ndarray] = []
    for batch_rows in batches:
        outputs = run(load_images(data, part, batch_rows))
        logits.append(recover_logits(outputs["probabilities"], outputs["energy"], temperature))
        advance(len(batch_rows))
    return Scores(np.concatenate(logits), labels[rows])


def certify_variants(
    files: list[VariantFile],
    graph: InferenceGraph,
    data: ImageData,
    expected: dict[str, np.ndarray],
    config: CalibrateConfig,
) -> dict[str, Variant]:
    """Measure parity with the torch network and latency; return the manifest's entries by name.

    int8 is calibrated on its own outputs, with the temperature that its graph has from fp32.
    `expected`: pixels and outputs of the bundle's samples. Raises BundleError where the fp32 file
    differs from the torch network.
    """
    runners = {file.precision: load_runner(GraphFile.read(file.path)) for file in files}
    rows = evenly_spaced_rows(data.counts["val"], PARITY_IMAGES)
    images = load_images(data, "val", rows)
    parity = {name: measure_parity(run, graph, images) for name, run in runners.items()}

    fp32 = parity["fp32"]
    if fp32.max_abs_diff > FP32_TOLERANCE or fp32.agreement < 1:
        raise BundleError(
            f"{FP32_FILE}: its probabilities differ from the torch network's by "
            f"{fp32.max_abs_diff:.2g}, and {FP32_TOLERANCE} is allowed"
        )

    latencies = measure_latencies(runners, images)
    variants: dict[str, Variant] = {}
    for file in files:
        name = file.precision
        variant = Variant(
            file=file.path.name,
            precision=name,
            sha256=file_sha256(file.path),
            bytes=file.path.stat().st_size,
            opset=file.opset,
            accuracy=file.test.accuracy,
            latency=latencies[name],
            parity=parity[name],
            tolerance=FP32_TOLERANCE,
        )
        if name == "int8":
            variant.tolerance = _choose_int8_tolerance(runners[name], expected)
            variant.calibration = calibrate(file.val, file.test, config, graph.temperature)
            variant.baseline = build_prediction_baseline(file.val.logits, graph.temperature)
        variants[name] = variant
    return variants


def _choose_int8_tolerance(run: Runner, expected: dict[str, np.ndarray]) -> float:
    """Return the allowed difference of a probability: twice the one measured on the samples."""
    difference = compare_outputs(run(expected["pixels"]), expected, tolerance=1.0).max_abs_diff
    return max(MIN_INT8_TOLERANCE, 2 * difference)


def describe_speedup(variants: dict[str, Variant]) -> list[str]:
    """Return a note on the speed of int8, if there is an int8 variant."""
    if "int8" not in variants:
        return []
    fp32 = variants["fp32"].latency
    int8 = variants["int8"].latency
    assert fp32 is not None
    assert int8 is not None
    ratio = int8.images_per_second / fp32.images_per_second
    return [f"int8 runs {ratio:.2f} times as many images a second as fp32 on {fp32.device}"]
