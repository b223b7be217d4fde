"""Static int8 quantization with onnxruntime.

QDQ format, per-channel weights, u8 activations and s8 weights. Layers that cost too much accuracy
stay in float.

Without VNNI, x86 CPUs add pairs of products u8 x s8 in 16 bits, which saturate: weights of 8 bits
give other results there than on other CPUs. So weights use 7 bits, except for depthwise
convolutions: they are the most sensitive to rounding, and their kernels add in 32 bits.
"""

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

# Operators that int8 makes faster, and those that lie between two of them. Converting other
# elementwise operators costs more than int8 gains; tests/benchmarks/bundle_export.py measures it.
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
NOISE_IMAGES = 4  # all intermediate tensors are held in memory for them at once
FLOAT_SHARES = (0.0, 0.05, 0.1, 0.25, 0.5)  # of the layers that stay in float, tried in this order
CALIBRATION_BATCH_SIZE = 16
ROUNDING = 1e-6  # points of accuracy


@dataclass
class QuantizeConfig:
    """Whether and how the int8 variant is made.

    Args:
        enabled: make an int8 variant and ship it if it passes the gate.
        images: training images that set the ranges of activations.
        max_loss: points of validation accuracy that int8 may cost. Where that is less than one
            image of the gate, one image is allowed: fewer can't be told from chance.
        gate_images: largest number of validation images for the gate, and of test images for the
            reported accuracy.
    """

    enabled: bool = True
    images: int = 256
    max_loss: float = 0.5
    gate_images: int = 10_000

    def __post_init__(self) -> None:
        if self.images < 1 or self.gate_images < 1:
            raise ValueError("quantize.images and quantize.gate_images: give 1 or more")

    def allowed_loss(self, images: int) -> float:
        """Return the points of accuracy that int8 may cost on this many images."""
        one_image = 100 / images
        return self.max_loss if self.max_loss < 0 else max(self.max_loss, one_image)


@dataclass(frozen=True)
class QuantizationAttempt:
    """One int8 form of the graph and what it costs."""

    float_share: float  # of the layers that stay in float, 0..1
    lost_points: float  # of accuracy on the gate's images; negative where int8 is better


@dataclass(frozen=True)
class QuantizationResult:
    """The outcome of a quantization."""

    passed: bool
    attempts: list[QuantizationAttempt]  # the last one is the one that passed, if any
    float_layers: list[str]  # names of the layers that stayed in float in the last attempt

    @property
    def lost_points(self) -> float:
        """Points of accuracy that the last attempt lost on the gate's images."""
        return self.attempts[-1].lost_points

    def describe(self, allowed_loss: float) -> str:
        """Return one line for the report: what was shipped, or why nothing was."""
        if self.passed:
            line = f"int8 loses {self.lost_points:.2f} points of validation accuracy "
            line += f"({allowed_loss:.4g} allowed)"
            if self.float_layers:
                line += f", with {len(self.float_layers)} layers left in float"
            return line

        losses: list[str] = []
        for attempt in self.attempts:
            losses.append(
                f"{attempt.lost_points:.2f} with {attempt.float_share:.0%} of the layers left in "
                "float"
            )
        return (
            f"int8 is not shipped: it loses more than {allowed_loss:.4g} points of validation "
            f"accuracy ({', '.join(losses)})"
        )


def quantize(
    source: Path,
    target: Path,
    images: np.ndarray,
    measure_accuracy: Callable[[Path], float],
    fp32_accuracy: float,
    gate_images: int,
    config: QuantizeConfig,
) -> QuantizationResult:
    """Write the int8 form of `source` with as few layers in float as the gate allows.

    Deletes `target` where no form passes. `images`, uint8 [n,H,W,C], are training images whose
    activations set the ranges. `measure_accuracy` returns the accuracy of a file, 0..1, and
    `fp32_accuracy` is that of `source` on the same images, `gate_images` of them.
    """
    allowed_loss = config.allowed_loss(gate_images)
    prepared = target.with_suffix(".prepared")
    ranked_layers: list[str] = []
    attempts: list[QuantizationAttempt] = []
    try:
        layers = _prepare(source, prepared)
        for share in FLOAT_SHARES:
            float_layers: list[str] = []
            if share > 0:
                if not ranked_layers:
                    ranked_layers = rank_layers_by_noise(prepared, images[:NOISE_IMAGES], layers)
                count = max(1, round(share * len(layers)))
                float_layers = ranked_layers[:count]

            _write_int8(prepared, target, images, float_layers)
            lost_points = 100 * (fp32_accuracy - measure_accuracy(target))
            attempts.append(QuantizationAttempt(share, lost_points))
            if lost_points <= allowed_loss + ROUNDING:
                return QuantizationResult(True, attempts, float_layers)
    finally:
        prepared.unlink(missing_ok=True)

    target.unlink()
    return QuantizationResult(False, attempts, float_layers)


def _prepare(source: Path, target: Path) -> list[str]:
    """Fold constants, fuse and infer shapes, as onnxruntime's quantizer needs it.

    Returns the names of the layers that can be quantized.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with _silence_quantizer():
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    nodes = onnx.load(target, load_external_data=False).graph.node
    return [node.name for node in nodes if node.op_type in OPERATORS]


def _write_int8(prepared: Path, target: Path, images: np.ndarray, float_layers: list[str]) -> None:
    """Quantize all layers but `float_layers`."""
    from onnxruntime import quantization

    in_8_bits = {
        name: [{"axis": 0, "reduce_range": False}] for name in _depthwise_kernels(prepared)
    }
    with _silence_quantizer():
        quantization.quantize_static(
            str(prepared),
            str(target),
            CalibrationBatches(images),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=OPERATORS,
            nodes_to_exclude=float_layers,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={"TensorQuantOverrides": in_8_bits},
        )


def _depthwise_kernels(prepared: Path) -> list[str]:
    """Return the names of the weights of convolutions that have one kernel for each channel."""
    graph = onnx.load(prepared, load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    names: list[str] = []
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        groups = [attribute.i for attribute in node.attribute if attribute.name == "group"]
        shape = shapes.get(node.input[1], [])
        if groups and groups[0] > 1 and shape[:2] == [groups[0], 1]:
            names.append(node.input[1])
    return names


def rank_layers_by_noise(prepared: Path, images: np.ndarray, layers: list[str]) -> list[str]:
    """Return the layers, worst first, by the quantization noise in their inputs and outputs.

    A layer counts as much as its worst tensor; see `quantization_noise`.
    """
    model = onnx.load(prepared, load_external_data=False)
    tensors_of_layer = _activations_of_layers(model, layers)
    values = _run_for_tensors(model, images, tensors_of_layer)

    noise_of_layer: dict[str, float] = {}
    for layer, tensors in tensors_of_layer.items():
        noises = [quantization_noise(values[tensor]) for tensor in tensors]
        noise_of_layer[layer] = max(noises, default=0.0)
    return sorted(layers, key=lambda layer: -noise_of_layer[layer])


def quantization_noise(values: np.ndarray) -> float:
    """Return the share of noise in a tensor whose channels share one int8 scale, 0..1.

    It is the mean over the channels of n / (n + v): n is the variance of rounding to 255 steps of
    the whole tensor's range, v that of the channel. A channel that is faint in comparison with
    others loses all of its values and counts as 1.
    """
    if values.ndim < 2 or values.dtype != np.float32:
        return 0.0
    rounding_variance = (np.ptp(values) / 255) ** 2 / 12 + 1e-30

    # Images have their channels second, tokens have them last.
    channel_axis = 1 if values.ndim == 4 else values.ndim - 1
    other_axes = tuple(axis for axis in range(values.ndim) if axis != channel_axis)
    channel_variance = values.var(other_axes)
    return float((rounding_variance / (rounding_variance + channel_variance)).mean())


def _activations_of_layers(model: onnx.ModelProto, layers: list[str]) -> dict[str, list[str]]:
    """Return the names of the tensors that each layer reads or writes, without its weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    tensors_of_layer: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.name in layers:
            tensors = [*node.input, *node.output]
            tensors_of_layer[node.name] = [t for t in tensors if t and t not in weights]
    return tensors_of_layer


def _run_for_tensors(
    model: onnx.ModelProto, images: np.ndarray, tensors_of_layer: dict[str, list[str]]
) -> dict[str, np.ndarray]:
    """Run the model and return the values of these tensors by name."""
    names: set[str] = set()
    for tensors in tensors_of_layer.values():
        names.update(tensors)
    outputs = sorted(names)

    model.graph.ClearField("output")
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = session.run(outputs, {"image": images})
    return dict(zip(outputs, values, strict=True))


class CalibrationBatches:
    """Feeds of calibration images for onnxruntime, which calls `get_next` until it returns None."""

    def __init__(self, images: np.ndarray, batch_size: int = CALIBRATION_BATCH_SIZE):
        starts = range(batch_size, len(images), batch_size)
        self._batches: Iterator[np.ndarray] = iter(np.split(images, starts))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next feed; the name is onnxruntime's."""
        batch = next(self._batches, None)
        return None if batch is None else {"image": batch}


@contextmanager
def _silence_quantizer() -> Iterator[None]:
    """Hide the advice that onnxruntime's quantizer logs to the root logger."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
