"""The int8 gate, on a network in which one layer makes int8 inaccurate."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits

from models import networks
from models.bundle import GraphFile
from models.bundle.verify import load_runner
from models.image import InputSpec
from train.export.onnx_graph import InferenceGraph, export_onnx
from train.export.quantize import QuantizationResult, QuantizeConfig, quantize

DIGITS = load_digits()
IMAGES = (DIGITS.images * 15).astype(np.uint8)[..., None]  # [N,8,8,1], 0..240
TRAINING_IMAGES = 1000
LOUD_CHANNEL_FACTOR = 1e4


@pytest.fixture(scope="module")
def hard_to_quantize(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that reads digits; between two layers one channel is 10,000 times the others.

    In float nothing changes: ReLU and max-pooling pass a factor on, and the next layer divides by
    it. With one int8 scale for all channels, the others are rounded to zero.
    """
    torch.manual_seed(0)
    network = networks.build("convnet", classes=10, channels=1, size=8)
    graph = InferenceGraph(network, [75.0], [90.0])
    images = torch.from_numpy(IMAGES[:TRAINING_IMAGES])
    labels = torch.from_numpy(DIGITS.target[:TRAINING_IMAGES])
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(graph.logits(images), labels).backward()
        optimizer.step()

    first, second = (m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        first.weight[0] *= LOUD_CHANNEL_FACTOR
        first.bias[0] *= LOUD_CHANNEL_FACTOR
        second.weight[:, 0] /= LOUD_CHANNEL_FACTOR

    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(graph, InputSpec(height=8, width=8, channels=1), 10, file)
    return file


def measure_accuracy(file: Path) -> float:
    probabilities = load_runner(GraphFile.read(file))(IMAGES[TRAINING_IMAGES:])["probabilities"]
    return float((probabilities.argmax(1) == DIGITS.target[TRAINING_IMAGES:]).mean())


def quantize_with_gate(source: Path, target: Path, max_loss: float) -> QuantizationResult:
    return quantize(
        source,
        target,
        IMAGES[:200],
        measure_accuracy,
        measure_accuracy(source),
        len(IMAGES) - TRAINING_IMAGES,
        QuantizeConfig(max_loss=max_loss),
    )


def test_layers_stay_in_float_until_the_gate_is_passed(hard_to_quantize, tmp_path):
    target = tmp_path / "int8.onnx"
    fp32_accuracy = measure_accuracy(hard_to_quantize)
    assert fp32_accuracy > 0.9

    result = quantize_with_gate(hard_to_quantize, target, max_loss=2.0)

    assert result.attempts[0].lost_points > 10  # with all layers in int8
    assert result.passed
    assert result.lost_points == pytest.approx(100 * (fp32_accuracy - measure_accuracy(target)))
    assert result.lost_points <= 2.0
    assert f"with {len(result.float_layers)} layers left in float" in result.describe(2.0)


def test_no_file_is_left_when_no_form_passes_the_gate(hard_to_quantize, tmp_path):
    result = quantize_with_gate(hard_to_quantize, tmp_path / "int8.onnx", max_loss=-100.0)
    assert not result.passed
    assert [attempt.float_share for attempt in result.attempts] == [0.0, 0.05, 0.1, 0.25, 0.5]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("max_loss", "images", "allowed"), [(0.5, 1000, 0.5), (0.5, 50, 2.0), (-1.0, 50, -1.0)]
)
def test_one_image_of_the_gate_may_be_lost(max_loss, images, allowed):
    assert QuantizeConfig(max_loss=max_loss).allowed_loss(images) == pytest.approx(allowed)


def write_bright_network(target: Path) -> None:
    """Write a dense, a depthwise and a dense convolution whose products of int8 are large.

    Input uint8 [N,16,16,3], output float32 [N,4].
    """
    rng = np.random.default_rng(0)
    weights = {
        "first": rng.uniform(0.9, 1.0, (8, 3, 3, 3)),
        "depthwise": rng.uniform(0.9, 1.0, (8, 1, 3, 3)),
        "last": rng.uniform(0.9, 1.0, (4, 8, 1, 1)),
    }
    initializers = []
    for name, values in weights.items():
        initializers.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))

    make_node = onnx.helper.make_node
    nodes = [
        make_node("Cast", ["image"], ["float"], to=onnx.TensorProto.FLOAT),
        make_node("Transpose", ["float"], ["pixels"], perm=[0, 3, 1, 2]),
        make_node("Conv", ["pixels", "first"], ["a"], "conv1"),
        make_node("Conv", ["a", "depthwise"], ["b"], "conv2", group=8),
        make_node("Conv", ["b", "last"], ["c"], "conv3"),
        make_node("GlobalAveragePool", ["c"], ["d"], "pool"),
        make_node("Flatten", ["d"], ["means"]),
    ]
    make_value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "bright",
        [make_value("image", onnx.TensorProto.UINT8, ["N", 16, 16, 3])],
        [make_value("means", onnx.TensorProto.FLOAT, ["N", 4])],
        initializers,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.save(model, target)


def test_int8_agrees_with_float_on_cpus_that_add_products_in_16_bits(tmp_path):
    """Weights of 7 bits can't saturate; depthwise convolutions have 8, as they do not saturate."""
    source = tmp_path / "model.onnx"
    target = tmp_path / "int8.onnx"
    write_bright_network(source)
    images = np.random.default_rng(0).integers(200, 256, (8, 16, 16, 3), np.uint8)

    def run(file: Path) -> np.ndarray:
        return onnxruntime.InferenceSession(file).run(["means"], {"image": images})[0]

    expected = run(source)

    def measure_agreement(file: Path) -> float:
        return float(np.abs(run(file) - expected).max() < 0.02 * expected.max())

    result = quantize(source, target, images, measure_agreement, 1.0, 1000, QuantizeConfig())

    assert result.passed
    assert result.float_layers == []
    largest: dict[str, int] = {}
    for tensor in onnx.load(target).graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.name.endswith("_quantized"):
            largest[tensor.name] = int(np.abs(values.astype(int)).max())
    assert largest == {"first_quantized": 64, "depthwise_quantized": 127, "last_quantized": 64}
