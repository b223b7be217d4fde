"""Engines and variants, by the settings and by what the machine supports."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest

from models.image import InputSpec, decode
from models.store import Store
from serve.engines.onnxruntime import TRIAL_PERIOD, TRIAL_RUNS, OnnxRuntimeEngine, SessionChooser
from serve.model import Model
from serve.settings import Settings
from support import tiny_bundle
from support.server import Server, assert_refused, loopback_flags

SPEC = InputSpec(height=32, width=32)
IMAGES = [tiny_bundle.make_image(label, seed=7) for label in tiny_bundle.CLASSES]
needs_openvino = pytest.mark.skipif(
    not importlib.util.find_spec("openvino"), reason="the extra openvino is missing"
)


def check_answers(server: Server, tolerance: float) -> None:
    """Check the answers to one image and to many."""
    pixels = np.stack([decode(image, SPEC) for image in IMAGES])
    expected = tiny_bundle.expected_outputs(pixels, 3)["probabilities"]
    for image, probabilities in zip(IMAGES, expected, strict=True):
        (prediction,) = server.predict(image).json()["predictions"]
        assert prediction["index"] == probabilities.argmax()
        assert prediction["confidence"] == pytest.approx(probabilities.max(), abs=tolerance)

    files = [("f", ("x", image)) for image in IMAGES * 8]
    predictions = server.http.post("/predict", files=files).json()["predictions"]
    assert [prediction["label"] for prediction in predictions] == tiny_bundle.CLASSES * 8


def read_engine(server: Server) -> str:
    """Return the name of the engine that the server uses."""
    return server.http.get("/model").json()["engine"]


def load_model(store: Path, threads: int = 1) -> Model:
    """Load the latest version with default settings."""
    return Model(Store(store).open("colours"), Settings(store=store), threads=threads)


needs_no_gpu = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="there is a GPU"
)


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_onnxruntime(start, threads):
    server = start("--engine", "onnxruntime", "--threads", threads)
    check_answers(server, tolerance=1e-4)
    assert read_engine(server) == "onnxruntime"


@needs_openvino
def test_openvino(start):
    server = start("--engine", "openvino")
    check_answers(server, tolerance=0.03)
    assert read_engine(server) in ("openvino", "openvino-bf16")


@needs_openvino
def test_bfloat16_is_not_used_if_it_changes_labels_of_samples(start, tmp_path):
    """8 bits of precision can't separate large logits that are nearly equal."""
    gray_images: list[bytes] = []
    for seed in range(16):
        pixels = np.random.default_rng(seed).integers(90, 160, (32, 32, 3), np.uint8)
        gray_images.append(cv2.imencode(".png", pixels)[1].tobytes())
    tiny_bundle.publish(tmp_path, scale=30, files=gray_images)
    assert read_engine(start("--engine", "openvino", store=tmp_path)) == "openvino"


@needs_no_gpu
def test_cuda_without_a_gpu_is_refused_in_one_line(run_serve, bundle_store):
    assert_refused(
        run_serve("--store", str(bundle_store), "--engine", "cuda", *loopback_flags()), "cuda"
    )


@needs_no_gpu
def test_auto_falls_back_to_the_cpu_without_a_gpu(bundle_store, monkeypatch):
    """For example, an image for GPUs on a node that has none."""
    # Only onnxruntime-gpu has this provider, and it can't be installed beside the onnxruntime of
    # the other tests: no setting, file or variable of the service shows the same.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert load_model(bundle_store).engine.name == "onnxruntime"


class FakeSession:
    """A session whose runs advance a clock by what they are said to take."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.runs = 0
        self.now = 0.0

    def run(self, output_names: tuple[str, ...], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.runs += 1
        self.now += self.seconds
        return [feed["image"]]


def run_lone_images(chooser: SessionChooser, count: int) -> None:
    image = np.zeros((1, 2, 2, 3), np.uint8)
    for _ in range(count):
        assert chooser.run(image, ("probabilities",))[0] is image


def test_lone_images_run_in_the_faster_session_after_a_disturbed_start():
    """While other processes start, the session over all threads waits for a core."""
    several = FakeSession(seconds=5)
    single = FakeSession(seconds=2)
    chooser = SessionChooser([several, single], clock=lambda: several.now + single.now)
    run_lone_images(chooser, TRIAL_PERIOD)
    assert chooser.fastest is single
    assert several.runs == TRIAL_RUNS / 2

    several.seconds = 1
    run_lone_images(chooser, TRIAL_RUNS)
    assert chooser.fastest is several
    before = several.runs
    run_lone_images(chooser, TRIAL_PERIOD - TRIAL_RUNS)
    assert several.runs - before == TRIAL_PERIOD - TRIAL_RUNS


def test_one_disturbed_run_does_not_choose_the_session():
    several = FakeSession(seconds=1)
    single = FakeSession(seconds=2)
    chooser = SessionChooser([several, single], clock=lambda: several.now + single.now)
    for i in range(TRIAL_RUNS):
        several.seconds = 50 if i < TRIAL_RUNS / 2 else 1
        run_lone_images(chooser, 1)
    assert chooser.fastest is several


def test_runs_of_several_images_are_not_compared():
    several = FakeSession(seconds=5)
    single = FakeSession(seconds=1)
    chooser = SessionChooser([several, single], clock=lambda: several.now + single.now)
    for _ in range(TRIAL_RUNS):
        chooser.run(np.zeros((4, 2, 2, 3), np.uint8), ("probabilities",))
    assert single.runs == 0
    run_lone_images(chooser, TRIAL_RUNS)
    assert chooser.fastest is single


def test_the_session_of_a_lone_image_is_compared_with_requests(bundle_store):
    """The trial at the start does not decide: the first images are one, too."""
    model = load_model(bundle_store, threads=2)
    assert isinstance(model.engine, OnnxRuntimeEngine)
    chooser = model.engine.lone_sessions
    assert len(chooser.sessions) == 2
    for _ in range(TRIAL_RUNS):
        model.predict(IMAGES[0])
    assert all(seconds < float("inf") for seconds in chooser.least_seconds)


def test_unknown_variant_is_refused_in_one_line(run_serve, bundle_store):
    assert_refused(
        run_serve("--store", str(bundle_store), "--variant", "int4", *loopback_flags()),
        "int4",
        "fp32",
    )


@pytest.mark.parametrize(("slow", "faster"), [("model.onnx", "int8"), ("model.int8.onnx", "fp32")])
def test_auto_selects_the_faster_variant(tmp_path, slow, faster):
    bundle = tiny_bundle.publish(tmp_path)
    tiny_bundle.add_int8(bundle)
    tiny_bundle.slow_down(bundle, slow)
    assert load_model(tmp_path).variant == faster


@pytest.mark.parametrize("message", ["self check of int8 failed", "can't run it", "can't load it"])
def test_auto_skips_a_faster_variant_that_fails_its_self_check(start, tmp_path, message):
    bundle = tiny_bundle.publish(tmp_path)
    tiny_bundle.add_int8(bundle, scale=2 if message == "self check of int8 failed" else 1)
    if message == "can't run it":
        tiny_bundle.fail_on_bright_pixels(bundle, 0.1, "model.int8.onnx")
    if message == "can't load it":
        graph = onnx.load(bundle / "model.int8.onnx")
        graph.graph.node[0].op_type = "NoSuchThing"
        onnx.save(graph, bundle / "model.int8.onnx")
        tiny_bundle.update_checksums(bundle)
    tiny_bundle.slow_down(bundle)
    server = start(store=tmp_path)
    assert server.http.get("/model").json()["variant"] == "fp32"
    assert server.predict(IMAGES[0]).json()["predictions"][0]["label"] == "red"
    (line,) = [line for line in server.log.read_text().splitlines() if "variant not used" in line]
    assert message in line


def test_auto_is_refused_if_all_variants_fail(run_serve, tmp_path):
    bundle = tiny_bundle.publish(tmp_path)
    tiny_bundle.add_int8(bundle, scale=2)
    tiny_bundle.fail_on_bright_pixels(bundle, 0.1)
    assert_refused(run_serve("--store", str(tmp_path), *loopback_flags()), "can't run it")
    assert_refused(
        run_serve("--store", str(tmp_path), "--variant", "int8", *loopback_flags()),
        "self check of int8 failed",
    )
