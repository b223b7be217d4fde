"""What is left on disk after a fit, looked at with other tools than those that wrote it."""

import html.parser
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from safetensors import safe_open
from support import ROOT

from models import networks
from models.bundle import DRIFT_SIGNALS, Bundle
from models.image import decode
from models.networks.weights import load_weights
from train.data import ImageData


@pytest.fixture(scope="module")
def bundle(fitted: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of a network with global average pooling, trained for a few epochs: good, and not perfect."""
    return fitted(
        tmp_path_factory.mktemp("fit"),
        "--model.network",
        "shufflenet_v2_x0_5",
        "--trainer.max_epochs",
        "3",
        "--export.quantize.images",
        "64",
        "--export.quantize.max_loss",
        "5",
        "--model.tta",
        "shift",
        "--data.size",
        "16",
        "--model.optimizer.lr",
        "0.005",
    )


def torch_network(bundle: Bundle) -> networks.Network:
    m = bundle.manifest
    network = networks.build(m.network, len(m.classes), m.input.channels, m.input.height)
    load_weights(network, str(bundle.path / "weights.safetensors"))
    return network.eval()


def torch_answers(bundle: Bundle, images: np.ndarray) -> dict[str, np.ndarray]:
    """From weights.safetensors and what it says of the normalisation."""
    with safe_open(bundle.path / "weights.safetensors", "pt") as file:
        mean, std = (
            torch.tensor(json.loads(file.metadata()[key])).view(1, -1, 1, 1)
            for key in ("mean", "std")
        )
    with torch.inference_mode():
        x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - mean) / std
        found = {name: value.numpy() for name, value in torch_network(bundle).outputs(x).items()}
    logits = torch.from_numpy(found["logits"])
    found["probabilities"] = (logits / bundle.manifest.calibration.temperature).softmax(1).numpy()
    found["energy"] = -logits.logsumexp(1).numpy()
    return found


def images_of(bundle: Bundle) -> np.ndarray:
    return np.stack([decode(data, bundle.manifest.input) for data in bundle.read_samples()])


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_graph_is_the_network_at_any_batch_size(bundle, size):
    images = np.resize(images_of(bundle), (size, 16, 16, 1))
    session = onnxruntime.InferenceSession(bundle.variant_path("fp32"))
    names = [output.name for output in session.get_outputs()]
    assert names == ["probabilities", "energy", "embedding", "cam"] == bundle.manifest.outputs
    found = dict(zip(names, session.run(None, {"image": images}), strict=True))
    wanted = torch_answers(bundle, images)
    assert np.abs(found["probabilities"] - wanted["probabilities"]).max() <= 1e-4
    for name in ("energy", "embedding", "cam"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-3, rel=1e-3), name


def test_class_activation_maps_are_exact(bundle):
    found = torch_answers(bundle, images_of(bundle))
    bias = torch_network(bundle).head.bias.detach().numpy()
    assert found["cam"].mean((2, 3)) + bias == pytest.approx(found["logits"], abs=1e-3)


def test_expected_outputs_are_those_of_the_torch_network_for_the_samples(bundle):
    expected, wanted = bundle.read_expected(), torch_answers(bundle, images_of(bundle))
    assert (expected["pixels"] == images_of(bundle)).all()
    for name in ("probabilities", "energy", "embedding", "cam"):
        assert expected[name] == pytest.approx(wanted[name], abs=1e-4, rel=1e-4), name
    assert len(bundle.manifest.samples) == 16
    assert {s.label for s in bundle.manifest.samples} == set(range(10))


def test_one_file_of_the_pinned_opset(bundle):
    for variant in bundle.manifest.variants.values():
        model = onnx.load(bundle.path / variant.file, load_external_data=False)
        onnx.checker.check_model(model)
        assert {o.domain: o.version for o in model.opset_import}[""] == variant.opset == 20
        assert not [
            t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL
        ]


def test_the_certificate(bundle):
    for variant in bundle.manifest.variants.values():
        assert variant.parity.batch_sizes == [1, 2, 7, 64]
        assert variant.parity.images == 64
        assert set(variant.latency.batch_ms) == {1, 8, 16}
        assert variant.bytes == (bundle.path / variant.file).stat().st_size
    parity = bundle.manifest.variants["fp32"].parity
    assert parity.max_abs_diff <= 1e-4
    assert parity.agreement == 1


def test_int8_is_chosen_by_validation_images_and_measured_on_test_images(bundle):
    data = ImageData("digits", size=16, cache="")
    data.setup()

    def accuracy(variant: str, part: str) -> float:
        session = onnxruntime.InferenceSession(bundle.variant_path(variant))
        found = session.run(["probabilities"], {"image": data.known.pixels[data.index[part]]})[0]
        return float((found.argmax(1) == data.found.labels[data.index[part]]).mean())

    lost = {
        part: 100 * (accuracy("fp32", part) - accuracy("int8", part)) for part in ("val", "test")
    }
    assert lost["val"] <= 5  # an image more or less is 0.7, and CPUs without VNNI saturate
    assert bundle.manifest.variants["int8"].accuracy == pytest.approx(accuracy("int8", "test"))
    said = re.fullmatch(
        r"int8 loses (\S+) points of validation accuracy \(5.0 allowed\).*; "
        r"it loses (\S+) points of test accuracy",
        bundle.manifest.notes[0],
    )
    assert [float(number) for number in said.groups()] == pytest.approx(
        [lost["val"], lost["test"]], abs=0.006
    )


def test_calibration_and_baseline_are_of_the_data(bundle):
    m = bundle.manifest
    c, counts = m.calibration, m.provenance.data.counts
    assert c.nll_after <= c.nll_before + 1e-6
    error = (0.95 * 0.05 * (1 / counts["val"] + 1 / counts["test"])) ** 0.5
    kept = abs(c.conformal_coverage - 0.95) <= 2 * error
    assert kept or any("prediction sets" in note for note in m.notes)
    assert set(m.baseline) == set(DRIFT_SIGNALS)
    assert {sum(h.counts) for h in m.baseline.values()} == {counts["val"]}
    assert m.baseline["width"].counts == [0, counts["val"], 0]  # all scans are 8 pixels wide
    assert m.baseline["width"].edges[1] < 8 < m.baseline["width"].edges[2]


def test_metrics_agree_with_each_other(bundle):
    for part in ("val", "test"):
        found = bundle.manifest.metrics[part]
        matrix = np.array(found.confusion)
        assert matrix.sum() == found.images == bundle.manifest.provenance.data.counts[part]
        assert np.trace(matrix) / matrix.sum() == pytest.approx(found.accuracy)
        assert [c.support for c in found.per_class] == matrix.sum(1).tolist()
        assert [c.recall for c in found.per_class] == pytest.approx(np.diag(matrix) / matrix.sum(1))
        assert found.top5 >= found.accuracy
    matrix = np.array(bundle.manifest.metrics["test"].confusion)
    np.fill_diagonal(matrix, 0)
    (i, j), names = np.unravel_index(matrix.argmax(), matrix.shape), bundle.manifest.classes
    assert (
        f"{names[i]} → {names[j]} <b>{matrix[i, j]}</b>"
        in (bundle.path / "report.html").read_text()
    )


def test_test_time_augmentation_is_reported_apart(bundle):
    plain, augmented = (bundle.manifest.metrics[part] for part in ("test", "test_tta"))
    assert augmented.images == plain.images
    assert augmented.nll != plain.nll
    for file in ("report.html", "README.md"):
        assert f"{100 * augmented.accuracy:.2f} %" in (bundle.path / file).read_text()


def test_provenance(bundle):
    p = bundle.manifest.provenance
    if (ROOT / ".git").exists():
        subprocess.run(
            ["git", "merge-base", "--is-ancestor", p.git_commit, "HEAD"], cwd=ROOT, check=True
        )
    assert p.packages["torch"] == torch.__version__
    assert p.recipe["model"]["network"] == "shufflenet_v2_x0_5"
    assert {"fit", "test", "calibrate", "export", "quantize", "certify", "report"} <= set(p.seconds)
    assert len(p.data.digest) == 64


def test_the_report_needs_no_network_and_tells_what_it_should(bundle):
    text = (bundle.path / "report.html").read_text()

    class Links(html.parser.HTMLParser):
        found: ClassVar[list[str]] = []

        def handle_starttag(self, tag, attributes):
            self.found += [
                v for k, v in attributes if k in ("src", "href", "srcset", "data", "action")
            ]

    Links().feed(text)
    assert Links.found
    assert all(link.startswith("data:image/") for link in Links.found)
    assert not re.search(r"url\(|@import|<script|http", text)
    for heading in (
        "Intended use",
        "Data",
        "Training",
        "Results",
        "Most confident mistakes",
        "Calibration",
        "Variants",
        "Provenance",
    ):
        assert heading in text
    m = bundle.manifest
    assert f"{100 * m.metrics['test'].accuracy:.2f} %" in text
    assert m.provenance.data.digest in text
    assert all(v.file in (bundle.path / "README.md").read_text() for v in m.variants.values())


def test_the_model_card_has_front_matter(bundle):
    _, front, body = (bundle.path / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["pipeline_tag"] == "image-classification"
    result = card["model-index"][0]["results"][0]["metrics"][0]
    assert result == {
        "type": "accuracy",
        "value": round(bundle.manifest.metrics["test"].accuracy, 4),
    }
    assert body.startswith("# digits, version 1")


def test_it_verifies_without_torch(bundle):
    code = (
        "import sys; sys.modules['torch'] = None; from models.__main__ import main; "
        "sys.exit(main(['verify', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ok: digits/1 reproduces its expected outputs on this machine"


NETWORKS = {
    "lenet": 28,
    "convnet": 28,
    "speednet": 32,
    "resnet18": 32,
    "resnet50": 32,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
    "vit_b_16": 32,
}
MAPS = {"speednet", "resnet18", "resnet50", "efficientnet_b0"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_that_claims_export_gives_a_bundle(fitted, tmp_path, network):
    bundle = fitted(
        tmp_path,
        "--model.network",
        network,
        "--data.size",
        str(NETWORKS[network]),
        "--data.channels",
        "3",
        "--trainer.max_steps",
        "4",
        "--export.quantize.images",
        "32",
        "--export.quantize.gate_images",
        "64",
    )
    m = bundle.manifest
    assert ("cam" in m.outputs) == (network in MAPS)
    assert m.variants["fp32"].parity.max_abs_diff <= 1e-4
    images = images_of(bundle)
    session = onnxruntime.InferenceSession(bundle.variant_path("fp32"))
    for size in (1, 2, 7, 64):
        batch = np.resize(images, (size, *images.shape[1:]))
        found = session.run(["probabilities"], {"image": batch})[0]
        assert np.abs(found - torch_answers(bundle, batch)["probabilities"]).max() <= 1e-4
    if "int8" not in m.variants:
        assert any(note.startswith("int8 is not shipped") for note in m.notes)
    done = subprocess.run(
        [sys.executable, "-m", "models", "verify", str(bundle.path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
