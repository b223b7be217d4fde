"""Static int8 through onnxruntime: QDQ, per channel, u8 activations and s8 weights; what hurts is left in float."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from models.cpu_quota import available_cores

# What int8 makes faster, and what lies between two such layers; other elementwise operators cost more to convert than
# they gain. Seen with these: ResNet-18 3.4x of fp32, EfficientNet-B0 0.8x (tests/benchmarks/bundle_export.json).
OPERATORS = [
    "Conv",
    "MatMul",
    "Gemm",
    "Add",
    "Relu",
    "Clip",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
]
DAMAGE_IMAGES = 4  # every tensor in between is held for them at once
FRACTIONS = (0.0, 0.1, 0.25, 0.5)  # of the layers left in float, tried in this order


@dataclass
class QuantizeConfig:
    """
    Args:
        enabled: make an int8 variant and ship it if it passes the gate.
        images: training images that set the ranges of activations.
        max_loss: points of validation accuracy that int8 may cost.
        gate_images: validation images that the gate counts, at most; and test images that the outcome is measured on.
    """

    enabled: bool = True
    images: int = 256
    max_loss: float = 0.5
    gate_images: int = 10_000

    def __post_init__(self) -> None:
        if self.images < 1 or self.gate_images < 1:
            raise ValueError("quantize.images and quantize.gate_images: give 1 or more")


@dataclass(frozen=True)
class QuantizationResult:
    """How quantization ended. `lost`: points of accuracy on the gate's images; negative where int8 is better."""

    lost: float
    left_in_float: list[str]
    passed: bool
    tried: list[tuple[float, float]]  # share of layers left in float, points lost

    def describe(self, max_loss: float) -> str:
        """One line for people: what happened and why."""
        if not self.passed:
            tries = ", ".join(
                f"{lost:.2f} with {share:.0%} of the layers left in float"
                for share, lost in self.tried
            )
            return f"int8 is not shipped: it loses more than {max_loss} points of validation accuracy ({tries})"
        left = (
            f", with {len(self.left_in_float)} layers left in float" if self.left_in_float else ""
        )
        return (
            f"int8 loses {self.lost:.2f} points of validation accuracy ({max_loss} allowed){left}"
        )


def quantize(
    source: Path,
    target: Path,
    images: np.ndarray,
    accuracy: Callable[[Path], float],
    reference: float,
    config: QuantizeConfig,
) -> QuantizationResult:
    """Write the int8 form of `source` with as few layers left in float as pass the gate; none is left where none does.

    `images` uint8 [n,H,W,C]: real training images, whose activations set the ranges. `accuracy` of a file and
    `reference`, that of fp32, are shares of the same images.
    """
    prepared = target.with_suffix(".prepared")
    order: list[str] = []
    tried = []
    try:
        layers = _prepare(source, prepared)
        for share in FRACTIONS:
            if share and not order:
                order = by_damage(prepared, images[:DAMAGE_IMAGES], layers)
            left = order[: max(1, round(share * len(layers)))] if share else []
            _write(prepared, target, images, left)
            lost = 100 * (reference - accuracy(target))
            tried.append((share, lost))
            if lost <= config.max_loss:
                return QuantizationResult(lost, left, True, tried)
    finally:
        prepared.unlink(missing_ok=True)
    target.unlink()
    return QuantizationResult(lost, left, False, tried)


def _prepare(source: Path, target: Path) -> list[str]:
    """Fold constants, fuse and infer shapes as onnxruntime's quantizer wants it; returns the names of the layers."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with _quiet():
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    nodes = onnx.load(target, load_external_data=False).graph.node
    return [node.name for node in nodes if node.op_type in OPERATORS]


def _write(prepared: Path, target: Path, images: np.ndarray, left_in_float: list[str]) -> None:
    from onnxruntime import quantization as ort

    with _quiet():
        ort.quantize_static(
            str(prepared),
            str(target),
            Batches(images),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            op_types_to_quantize=OPERATORS,
            nodes_to_exclude=left_in_float,
            calibrate_method=ort.CalibrationMethod.MinMax,
        )


def by_damage(prepared: Path, images: np.ndarray, layers: list[str]) -> list[str]:
    """Layers, worst first, by the damage that one scale for all channels does to what they read or write.

    The damage to a tensor is the mean over its channels of n / (n + v): n the variance of rounding to 255 steps of the
    whole tensor's range, v that of the channel. A channel that is faint beside others has nothing left, and counts 1.
    """
    model = onnx.load(prepared, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    touched = {
        node.name: [t for t in [*node.input, *node.output] if t and t not in weights]
        for node in model.graph.node
        if node.name in layers
    }
    tensors = sorted({t for names in touched.values() for t in names})
    model.graph.ClearField("output")
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = dict(zip(tensors, session.run(tensors, {"image": images}), strict=True))

    def damage(values: np.ndarray) -> float:
        if values.ndim < 2 or values.dtype != np.float32:
            return 0.0
        noise = (np.ptp(values) / 255) ** 2 / 12 + 1e-30
        axis = (
            1 if values.ndim == 4 else values.ndim - 1
        )  # images have their channels second, tokens last
        spread = values.var(tuple(i for i in range(values.ndim) if i != axis))
        return float((noise / (noise + spread)).mean())

    worst = {
        name: max((damage(found[t]) for t in names), default=0.0) for name, names in touched.items()
    }
    return sorted(layers, key=lambda name: -worst[name])


class Batches:
    """Calibration data as onnxruntime wants it: one feed a call, then None."""

    def __init__(self, images: np.ndarray, size: int = 16):
        self.batches: Iterator[np.ndarray] = iter(np.split(images, range(size, len(images), size)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"image": batch}


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantizer tells the root logger what it thinks of a model."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
