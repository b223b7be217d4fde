"""The int8 gate on a network that one layer spoils for int8."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from models import networks
from models.bundle.verify import load_runner
from models.image import InputSpec
from train.export.onnx_graph import InferenceGraph, export_onnx
from train.export.quantize import QuantizationResult, QuantizeConfig, quantize

DIGITS = load_digits()
IMAGES = (DIGITS.images * 15).astype(np.uint8)[..., None]  # [N,8,8,1], 0..240


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that reads digits, one channel of which is 10,000 times as loud as all others between two layers.

    In float nothing changes: ReLU and max-pooling pass a factor on, and the next layer divides by it. With one scale
    for all channels in between, int8 rounds the others to zero.
    """
    torch.manual_seed(0)
    network = networks.build("convnet", classes=10, channels=1, size=8)
    served = InferenceGraph(network, [75.0], [90.0])
    images, labels = torch.from_numpy(IMAGES[:1000]), torch.from_numpy(DIGITS.target[:1000])
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(served.logits(images), labels).backward()
        optimizer.step()
    first, second = (m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        first.weight[0] *= 1e4
        first.bias[0] *= 1e4
        second.weight[:, 0] /= 1e4
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(served, InputSpec(height=8, width=8, channels=1), 10, file)
    return file


def accuracy(file: Path) -> float:
    return float(
        (load_runner(file)(IMAGES[1000:])["probabilities"].argmax(1) == DIGITS.target[1000:]).mean()
    )


def run(spoiled: Path, target: Path, max_loss: float) -> QuantizationResult:
    return quantize(
        spoiled,
        target,
        IMAGES[:200],
        accuracy,
        accuracy(spoiled),
        QuantizeConfig(max_loss=max_loss),
    )


def test_what_hurts_is_left_in_float_until_the_gate_is_passed(spoiled, tmp_path):
    assert accuracy(spoiled) > 0.9
    found = run(spoiled, tmp_path / "int8.onnx", 2.0)
    assert found.attempts[0].lost_points > 10  # what all layers in int8 would have lost
    assert found.passed
    assert found.lost_points == pytest.approx(100 * (accuracy(spoiled) - accuracy(tmp_path / "int8.onnx")))
    assert found.lost_points <= 2.0
    assert f"with {len(found.float_layers)} layers left in float" in found.describe(2.0)


def test_nothing_is_left_behind_where_no_form_passes(spoiled, tmp_path):
    found = run(spoiled, tmp_path / "int8.onnx", -100.0)
    assert not found.passed
    assert [attempt.float_share for attempt in found.attempts] == [0.0, 0.1, 0.25, 0.5]
    assert list(tmp_path.iterdir()) == []
