"""Engines and variants, by the settings and by what the machine supports."""

import importlib.util

import cv2
import numpy as np
import onnx
import pytest

from models.image import InputSpec, decode
from models.store import Store
from serve.engines import select
from serve.engines.onnxruntime import OnnxRuntimeEngine
from serve.model import Model
from serve.settings import Settings
from support import tiny_bundle
from support.server import assert_refused, loopback_flags, run_serve

IMAGES = [tiny_bundle.make_image(label, seed=7) for label in tiny_bundle.CLASSES]
needs_openvino = pytest.mark.skipif(
    not importlib.util.find_spec("openvino"), reason="the extra openvino is missing"
)


def check_answers(server, tolerance: float) -> str:
    """Check answers of single and of many images. Return the name of the engine."""
    for data in IMAGES:
        want = tiny_bundle.expected_outputs(decode(data, InputSpec(height=32, width=32))[None], 3)[
            "probabilities"
        ][0]
        (prediction,) = server.predict(data).json()["predictions"]
        assert prediction["index"] == want.argmax()
        assert prediction["confidence"] == pytest.approx(want.max(), abs=tolerance)
    many = server.http.post("/predict", files=[("f", ("x", data)) for data in IMAGES * 8]).json()
    assert [p["label"] for p in many["predictions"]] == tiny_bundle.CLASSES * 8
    return server.http.get("/model").json()["engine"]


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_onnxruntime(start, threads):
    assert (
        check_answers(start("--engine", "onnxruntime", "--threads", threads), 1e-4) == "onnxruntime"
    )


@needs_openvino
def test_openvino(start):
    assert check_answers(start("--engine", "openvino"), 0.03) in ("openvino", "openvino-bf16")


@needs_openvino
def test_bfloat16_is_not_used_where_it_changes_labels_of_samples(start, tmp_path):
    """8 bits of precision can't separate large logits that are nearly equal."""
    gray = [np.random.default_rng(i).integers(90, 160, (32, 32, 3), np.uint8) for i in range(16)]
    tiny_bundle.publish(
        tmp_path, scale=30, files=[cv2.imencode(".png", pixels)[1].tobytes() for pixels in gray]
    )
    server = start("--engine", "openvino", store=tmp_path)
    assert server.http.get("/model").json()["engine"] == "openvino"


def test_cuda_without_a_gpu_is_refused_in_one_line(bundle_store):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a GPU")
    assert_refused(
        run_serve("--store", str(bundle_store), "--engine", "cuda", *loopback_flags()), "cuda"
    )


def test_auto_falls_back_to_the_cpu_without_a_gpu(bundle_store, monkeypatch):
    """For example, an image for GPUs on a node that has none."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    model = Model(Store(bundle_store).open("colours"), Settings(store=str(bundle_store)), 1)
    assert model.engine.name == "onnxruntime"


def test_auto_falls_back_to_the_cpu_where_the_gpu_fails(bundle_store, monkeypatch):
    class Broken(OnnxRuntimeEngine):
        name = "cuda"

        def run(self, *_):
            raise RuntimeError("out of memory")

    monkeypatch.setattr(select, "has_cuda_provider", lambda: True)
    monkeypatch.setattr(select, "CudaEngine", Broken)
    model = Model(Store(bundle_store).open("colours"), Settings(store=str(bundle_store)), 1)
    assert model.engine.name == "onnxruntime"


def test_unknown_variant_is_refused_in_one_line(bundle_store):
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
    assert Model(Store(tmp_path).open("colours"), Settings(store=tmp_path), 1).variant == faster


@pytest.mark.parametrize("how", ["other outputs", "can't be run", "can't be loaded"])
def test_auto_skips_a_faster_variant_that_fails_its_self_check(start, tmp_path, how):
    bundle = tiny_bundle.publish(tmp_path)
    tiny_bundle.add_int8(bundle, scale=2 if how == "other outputs" else 1)
    if how == "can't be run":
        tiny_bundle.fail_on_bright_pixels(bundle, 0.1, "model.int8.onnx")
    if how == "can't be loaded":
        graph = onnx.load(bundle / "model.int8.onnx")
        graph.graph.node[0].op_type = "NoSuchThing"
        onnx.save(graph, bundle / "model.int8.onnx")
        tiny_bundle.update_checksums(bundle)
    tiny_bundle.slow_down(bundle)
    server = start(store=tmp_path)
    assert server.http.get("/model").json()["variant"] == "fp32"
    assert server.predict(IMAGES[0]).json()["predictions"][0]["label"] == "red"
    (line,) = [line for line in server.log.read_text().splitlines() if "variant not used" in line]
    assert {
        "other outputs": "self check of int8 failed",
        "can't be run": "can't run it",
        "can't be loaded": "can't load it",
    }[how] in line


def test_auto_is_refused_where_all_variants_fail(tmp_path):
    bundle = tiny_bundle.publish(tmp_path)
    tiny_bundle.add_int8(bundle, scale=2)
    tiny_bundle.fail_on_bright_pixels(bundle, 0.1)
    assert_refused(run_serve("--store", str(tmp_path), *loopback_flags()), "can't run it")
    assert_refused(
        run_serve("--store", str(tmp_path), "--variant", "int8", *loopback_flags()),
        "self check of int8 failed",
    )
