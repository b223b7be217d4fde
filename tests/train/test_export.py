"""The bundle that a fit leaves, checked with other tools than those that write it."""

import html.parser
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from safetensors import safe_open

from models import networks
from models.bundle import DRIFT_SIGNALS, Bundle
from models.drift import histogram as count_by_bin
from models.image import decode
from models.networks.weights import load_weights, read_weights
from support import ROOT
from train.data import ImageData

BATCH_SIZES = (1, 2, 7, 64)
OPTIONS = {"widths": [8, 16]}  # of the network
MAX_INT8_LOSS = 5  # points: one image is 0.7, and CPUs without VNNI saturate


@pytest.fixture(scope="module")
def bundle(fitted: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A network with activation maps, trained for a few epochs: good, but not perfect."""
    return fitted(
        tmp_path_factory.mktemp("fit"),
        *["--model.network", "speednet", "--model.options", json.dumps(OPTIONS)],
        # Without smoothing, confidences differ by less than they are rounded.
        *["--model.tta", "shift", "--model.label_smoothing", "0.2"],
        *["--model.optimizer.lr", "0.005", "--data.size", "16", "--trainer.max_epochs", "3"],
        *["--export.quantize.images", "64", "--export.quantize.max_loss", str(MAX_INT8_LOSS)],
    )


def load_torch_network(bundle: Bundle) -> networks.Network:
    manifest = bundle.manifest
    size = manifest.input.height
    channels = manifest.input.channels
    options = manifest.provenance.recipe["model"]["options"]
    network = networks.build(manifest.network, len(manifest.classes), channels, size, **options)
    load_weights(network, read_weights(bundle.path / "weights.safetensors"))
    return network.eval()


def run_torch_network(bundle: Bundle, images: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the outputs from weights.safetensors and the normalization in its metadata."""
    with safe_open(bundle.path / "weights.safetensors", "pt") as file:
        metadata = file.metadata()
    mean = torch.tensor(json.loads(metadata["mean"])).view(1, -1, 1, 1)
    std = torch.tensor(json.loads(metadata["std"])).view(1, -1, 1, 1)

    with torch.inference_mode():
        x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - mean) / std
        tensors = load_torch_network(bundle).outputs(x)
    outputs = {name: value.numpy() for name, value in tensors.items()}
    logits = torch.from_numpy(outputs["logits"])
    temperature = bundle.manifest.calibration.temperature
    outputs["probabilities"] = (logits / temperature).softmax(1).numpy()
    outputs["energy"] = -logits.logsumexp(1).numpy()
    return outputs


def decode_samples(bundle: Bundle) -> np.ndarray:
    return np.stack([decode(data, bundle.manifest.input) for data in bundle.read_samples()])


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_graph_equals_the_torch_network_at_each_batch_size(bundle, batch_size):
    images = np.resize(decode_samples(bundle), (batch_size, 16, 16, 1))
    session = onnxruntime.InferenceSession(bundle.variant_path("fp32"))
    names = [output.name for output in session.get_outputs()]
    assert names == ["probabilities", "energy", "embedding", "cam"] == bundle.manifest.outputs

    outputs = dict(zip(names, session.run(None, {"image": images}), strict=True))

    expected = run_torch_network(bundle, images)
    assert np.abs(outputs["probabilities"] - expected["probabilities"]).max() <= 1e-4
    for name in ("energy", "embedding", "cam"):
        assert outputs[name] == pytest.approx(expected[name], abs=1e-3, rel=1e-3), name


def test_expected_npz_holds_the_torch_outputs_for_the_samples(bundle):
    images = decode_samples(bundle)
    expected = bundle.read_expected()
    outputs = run_torch_network(bundle, images)
    assert (expected["pixels"] == images).all()
    for name in ("probabilities", "energy", "embedding", "cam"):
        assert expected[name] == pytest.approx(outputs[name], abs=1e-4, rel=1e-4), name
    assert len(bundle.manifest.samples) == 16
    assert {sample.label for sample in bundle.manifest.samples} == set(range(10))


def test_weights_are_the_same_to_the_byte_for_the_same_run(bundle):
    """safetensors itself writes the metadata in random order."""
    content = (bundle.path / "weights.safetensors").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + header_bytes])["__metadata__"]
    assert list(metadata) == sorted(metadata)
    assert header_bytes % 8 == 0


def test_each_variant_is_one_file_of_the_pinned_opset(bundle):
    for variant in bundle.manifest.variants.values():
        model = onnx.load(bundle.path / variant.file, load_external_data=False)
        onnx.checker.check_model(model)
        opsets = {opset.domain: opset.version for opset in model.opset_import}
        assert opsets[""] == variant.opset == 20
        external = onnx.TensorProto.EXTERNAL
        assert all(tensor.data_location != external for tensor in model.graph.initializer)


def test_manifest_holds_parity_latency_and_size_of_each_variant(bundle):
    for variant in bundle.manifest.variants.values():
        assert variant.parity.batch_sizes == list(BATCH_SIZES)
        assert variant.parity.images == 64
        assert set(variant.latency.batch_ms) == {1, 8, 16}
        assert variant.bytes == (bundle.path / variant.file).stat().st_size
    parity = bundle.manifest.variants["fp32"].parity
    assert parity.max_abs_diff <= 1e-4
    assert parity.agreement == 1


def test_int8_is_chosen_on_validation_images_and_measured_on_test_images(bundle):
    data = ImageData("digits", size=16, cache="")
    data.setup()

    def measure_accuracy(variant: str, part: str) -> float:
        session = onnxruntime.InferenceSession(bundle.variant_path(variant))
        rows = data.index[part]
        (probabilities,) = session.run(["probabilities"], {"image": data.decoded.pixels[rows]})
        return float((probabilities.argmax(1) == data.dataset.labels[rows]).mean())

    def measure_lost_points(part: str) -> float:
        return 100 * (measure_accuracy("fp32", part) - measure_accuracy("int8", part))

    lost_val = measure_lost_points("val")
    lost_test = measure_lost_points("test")
    assert lost_val <= MAX_INT8_LOSS
    test_accuracy = bundle.manifest.variants["int8"].accuracy
    assert test_accuracy == pytest.approx(measure_accuracy("int8", "test"))
    note = re.fullmatch(
        r"int8 loses (\S+) points of validation accuracy \(5 allowed\).*; "
        r"it loses (\S+) points of test accuracy",
        bundle.manifest.notes[0],
    )
    noted_points = [float(number) for number in note.groups()]
    assert noted_points == pytest.approx([lost_val, lost_test], abs=0.006)


def test_calibration_and_drift_baseline_are_those_of_the_data(bundle):
    manifest = bundle.manifest
    calibration = manifest.calibration
    counts = manifest.provenance.data.counts
    assert calibration.nll_after <= calibration.nll_before + 1e-6

    error = (0.95 * 0.05 * (1 / counts["val"] + 1 / counts["test"])) ** 0.5
    is_covered = abs(calibration.conformal_coverage - 0.95) <= 2 * error
    assert is_covered or any("prediction sets" in note for note in manifest.notes)

    assert set(manifest.baseline) == set(DRIFT_SIGNALS)
    for histogram in manifest.baseline.values():
        assert sum(histogram.counts) == counts["val"]
    width = manifest.baseline["width"]  # all scans are 8 pixels wide
    assert width.counts == [0, counts["val"], 0]
    assert width.edges[1] < 8 < width.edges[2]


def test_calibration_and_drift_baseline_of_int8_are_those_of_its_own_outputs(bundle):
    data = ImageData("digits", size=16, cache="")
    data.setup()
    session = onnxruntime.InferenceSession(bundle.variant_path("int8"))

    def run(part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the confidence of the prediction and of the true class, and the energy."""
        rows = data.index[part]
        images = {"image": data.decoded.pixels[rows]}
        probabilities, energy = session.run(["probabilities", "energy"], images)
        labels = data.dataset.labels[rows]
        return probabilities.max(1), probabilities[np.arange(len(rows)), labels], energy

    int8 = bundle.manifest.variants["int8"]
    confidence, _, energy = run("val")
    threshold = np.quantile(energy, 0.95)
    assert int8.calibration.energy_threshold == pytest.approx(threshold, abs=1e-3)
    assert set(int8.baseline) == {"class", "confidence", "energy"}
    for signal, values in (("confidence", confidence), ("energy", energy)):
        baseline = int8.baseline[signal]
        counts = count_by_bin(values, np.array(baseline.edges))
        assert np.abs(counts - baseline.counts).max() <= 1, signal  # rounded at an edge

    _, true_confidence, _ = run("test")
    covered = (true_confidence >= 1 - int8.calibration.conformal_quantile).mean()
    assert int8.calibration.conformal_coverage == pytest.approx(covered, abs=0.005)
    assert int8.calibration.temperature == bundle.manifest.calibration.temperature
    assert bundle.manifest.variants["fp32"].calibration is None


@pytest.mark.parametrize("part", ["val", "test"])
def test_metrics_of_a_part_agree_with_its_confusion_matrix(bundle, part):
    metrics = bundle.manifest.metrics[part]
    matrix = np.array(metrics.confusion)
    images_of_class = matrix.sum(1)
    assert matrix.sum() == metrics.images == bundle.manifest.provenance.data.counts[part]
    assert np.trace(matrix) / matrix.sum() == pytest.approx(metrics.accuracy)
    assert [each.support for each in metrics.per_class] == images_of_class.tolist()
    recalls = [each.recall for each in metrics.per_class]
    assert recalls == pytest.approx(np.diag(matrix) / images_of_class)
    assert metrics.balanced_accuracy == pytest.approx(np.mean(recalls))
    assert metrics.majority_accuracy == pytest.approx(images_of_class.max() / metrics.images)
    assert metrics.top5 >= metrics.accuracy


def test_report_lists_the_most_frequent_confusion(bundle):
    matrix = np.array(bundle.manifest.metrics["test"].confusion)
    np.fill_diagonal(matrix, 0)
    i, j = np.unravel_index(matrix.argmax(), matrix.shape)
    classes = bundle.manifest.classes
    report = (bundle.path / "report.html").read_text()
    assert f"{classes[i]} → {classes[j]} <b>{matrix[i, j]}</b>" in report


def test_test_time_augmentation_is_reported_separately(bundle):
    plain = bundle.manifest.metrics["test"]
    augmented = bundle.manifest.metrics["test_tta"]
    assert augmented.images == plain.images
    assert augmented.nll != plain.nll
    for file in ("report.html", "README.md"):
        assert f"{100 * augmented.accuracy:.2f} %" in (bundle.path / file).read_text()


def test_provenance_holds_commit_versions_recipe_and_times(bundle):
    provenance = bundle.manifest.provenance
    if (ROOT / ".git").exists():
        is_ancestor = ["git", "merge-base", "--is-ancestor", provenance.git_commit, "HEAD"]
        subprocess.run(is_ancestor, cwd=ROOT, check=True)
    assert provenance.packages["torch"] == torch.__version__
    assert provenance.recipe["model"]["network"] == "speednet"
    assert provenance.recipe["model"]["options"] == OPTIONS
    steps = {"fit", "test", "calibrate", "export", "quantize", "certify", "report"}
    assert steps <= set(provenance.seconds)
    assert len(provenance.data.digest) == 64


class LinkCollector(html.parser.HTMLParser):
    """Collects what a page loads or links to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.links.append(value)


def test_report_is_self_contained(bundle):
    report = (bundle.path / "report.html").read_text()
    collector = LinkCollector()
    collector.feed(report)
    assert collector.links
    assert all(link.startswith("data:image/") for link in collector.links)
    assert not re.search(r"url\(|@import|<script|http", report)


def test_report_has_its_sections_and_figures(bundle):
    report = (bundle.path / "report.html").read_text()
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
        assert f"<h2>{heading}</h2>" in report
    manifest = bundle.manifest
    assert f"{100 * manifest.metrics['test'].accuracy:.2f} %" in report
    assert manifest.provenance.data.digest in report


def test_model_card_has_front_matter_and_lists_the_variants(bundle):
    card = (bundle.path / "README.md").read_text()
    _, front_matter, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front_matter)
    assert metadata["pipeline_tag"] == "image-classification"
    metric = metadata["model-index"][0]["results"][0]["metrics"][0]
    accuracy = round(bundle.manifest.metrics["test"].accuracy, 4)
    assert metric == {"type": "accuracy", "value": accuracy}
    assert body.startswith("# digits, version 1")
    for variant in bundle.manifest.variants.values():
        assert variant.file in body


def test_bundle_verifies_without_torch(bundle):
    code = (
        "import sys; sys.modules['torch'] = None; from models.__main__ import main; "
        "sys.exit(main(['verify', sys.argv[1]]))"
    )
    done = run_command("-c", code, str(bundle.path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.splitlines()[-1]
        == "ok: digits/1 reproduces its expected outputs on this machine"
    )


# Network -> side of its input in pixels.
NETWORKS = {"lenet": 28, "convnet": 28, "speednet": 32, "resnet18": 32}
NETWORKS_WITH_MAPS = {"speednet", "resnet18"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("network", NETWORKS)
def test_each_supported_network_exports_a_bundle(fitted, tmp_path: Path, network: str):
    bundle = fitted(
        tmp_path,
        *["--model.network", network, "--trainer.max_steps", "4"],
        *["--data.size", str(NETWORKS[network]), "--data.channels", "3"],
        *["--export.quantize.images", "32", "--export.quantize.gate_images", "64"],
    )
    manifest = bundle.manifest
    assert ("cam" in manifest.outputs) == (network in NETWORKS_WITH_MAPS)
    assert manifest.variants["fp32"].parity.max_abs_diff <= 1e-4

    images = decode_samples(bundle)
    session = onnxruntime.InferenceSession(bundle.variant_path("fp32"))
    for size in BATCH_SIZES:
        batch = np.resize(images, (size, *images.shape[1:]))
        (probabilities,) = session.run(["probabilities"], {"image": batch})
        expected = run_torch_network(bundle, batch)["probabilities"]
        assert np.abs(probabilities - expected).max() <= 1e-4

    if "int8" not in manifest.variants:
        assert any(note.startswith("int8 is not shipped") for note in manifest.notes)
    done = run_command("-m", "models", "verify", str(bundle.path))
    assert done.returncode == 0, done.stdout + done.stderr
