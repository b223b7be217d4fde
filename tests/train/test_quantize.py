"""The int8 gate, on a network in which one layer makes int8 inaccurate."""

from pathlib import Path

import numpy as np
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
    assert [attempt.float_share for attempt in result.attempts] == [0.0, 0.1, 0.25, 0.5]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("max_loss", "images", "allowed"), [(0.5, 1000, 0.5), (0.5, 50, 2.0), (-1.0, 50, -1.0)]
)
def test_one_image_of_the_gate_may_be_lost(max_loss, images, allowed):
    assert QuantizeConfig(max_loss=max_loss).allowed_loss(images) == pytest.approx(allowed)
