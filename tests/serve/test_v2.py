"""The Open Inference Protocol: through tritonclient, and by hand where a client would not go wrong."""

import base64
import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_bundle
from support.blocked_path import BlockedPath
from support.server import wait_until

from models.image import InputSpec, decode
from serve.http.open_inference import parse_inference
from serve.http.responses import Problem

tritonclient = pytest.importorskip("tritonclient.http")
SPEC = InputSpec(height=32, width=32)
PIXELS = np.stack(
    [
        decode(tiny_bundle.make_image(label, seed=i), SPEC)
        for i, label in enumerate(tiny_bundle.CLASSES)
    ]
)
WANT = tiny_bundle.expected_outputs(PIXELS, 3)
INFER = "/v2/models/colours/infer"


@pytest.fixture
def client(server):
    found = tritonclient.InferenceServerClient(server.url.removeprefix("http://"))
    yield found
    found.close()


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.is_model_ready("colours", "1")
    assert not client.is_model_ready("colours", "2")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("colours")
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    assert {o["name"]: o["datatype"] for o in metadata["outputs"]} == {
        "probabilities": "FP32",
        "energy": "FP32",
        "label": "BYTES",
    }


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_uint8_tensors(client, binary_in, binary_out):
    tensor = tritonclient.InferInput("image", list(PIXELS.shape), "UINT8")
    tensor.set_data_from_numpy(PIXELS, binary_data=binary_in)
    names = ("probabilities", "energy", "label")
    wanted = (
        None
        if binary_out is None
        else [tritonclient.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    )
    answer = client.infer("colours", [tensor], outputs=wanted, request_id="mine", model_version="1")
    assert np.allclose(answer.as_numpy("probabilities"), WANT["probabilities"], atol=1e-5)
    assert np.allclose(answer.as_numpy("energy"), WANT["energy"], atol=1e-4)
    labels = [v.decode() if isinstance(v, bytes) else v for v in answer.as_numpy("label")]
    assert labels == tiny_bundle.CLASSES
    response = answer.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == (
        "mine",
        "colours",
        "1",
    )


@pytest.mark.parametrize("shape", [[3], [3, 1]])
def test_image_bytes(client, shape):
    files = [tiny_bundle.make_image(label, seed=i) for i, label in enumerate(tiny_bundle.CLASSES)]
    tensor = tritonclient.InferInput("image", shape, "BYTES")
    tensor.set_data_from_numpy(np.array(files, np.object_).reshape(shape))
    answer = client.infer(
        "colours", [tensor], outputs=[tritonclient.InferRequestedOutput("probabilities")]
    )
    assert np.allclose(answer.as_numpy("probabilities"), WANT["probabilities"], atol=1e-5)
    assert answer.as_numpy("energy") is None


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/v2/health/live", 405),
        ("DELETE", "/v2/models/colours", 405),
        ("POST", "/v2/models/colours/ready", 405),
        ("GET", INFER, 405),
        ("POST", "/v2/nothing", 404),
        ("GET", "/v2/models/colours/nothing", 404),
        ("GET", "/v2/models", 404),
        ("HEAD", "/v2/health/ready", 200),
        ("GET", "/v2/models/colours%252f", 404),
    ],
)
def test_other_methods_and_paths(server, method, path, status):
    answer = server.http.request(method, path)
    assert answer.status_code == status
    if status == 405:
        assert answer.headers["allow"] == ("POST" if path == INFER else "GET, HEAD")


def test_image_bytes_in_json_are_base64(server):
    data = [base64.b64encode(tiny_bundle.make_image("blue")).decode()]
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": data}]}
    answer = server.http.post(INFER, json=body).json()
    assert {o["name"]: o["data"] for o in answer["outputs"]}["label"] == ["blue"]


def test_a_client_sees_errors_in_the_protocol_s_words(client):
    tensor = tritonclient.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"no image"], np.object_))
    with pytest.raises(tritonclient.InferenceServerException, match="not a JPEG"):
        client.infer("colours", [tensor])
    with pytest.raises(tritonclient.InferenceServerException, match="no model 'other'"):
        client.infer("other", [tensor])


def entry(**changes) -> dict:
    return {
        "inputs": [
            {
                "name": "image",
                "shape": [1, 32, 32, 3],
                "datatype": "UINT8",
                "data": [7] * 3072,
                **changes,
            }
        ]
    }


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (entry(), 200),
        (entry(data=PIXELS[:1].tolist()), 200),
        ({}, 400),
        ([], 400),
        ({"inputs": []}, 400),
        ({"inputs": entry()["inputs"] * 2}, 400),
        (entry(name="x"), 400),
        (entry(datatype="FP32"), 400),
        (entry(shape=[1, 3, 32, 32]), 400),
        (entry(shape=[2, 32, 32, 3]), 400),
        (entry(shape=[-1]), 400),
        (entry(data=[256] * 3072), 400),
        (entry(data=[0.5] * 3072), 400),
        (entry(data=["a"] * 3072), 400),
        (entry(data=[[1], [2, 3]]), 400),
        (entry(data=None), 400),
        (entry(parameters={"binary_data_size": 5}), 400),
        (entry(data=[-1] * 3072), 400),
        (entry(data=[10**30] * 3072), 400),
        (entry(data=[True] * 3072), 400),
        (entry(data=PIXELS[:2].tolist()), 400),
        (entry(data=[PIXELS[:1].tolist()]), 400),
        (entry(data=[[7] * 3072]), 200),
        (entry(data=[1, [2]] * 1536), 400),
        (entry(data=[{}] * 3072), 400),
        (entry(parameters=7), 400),
        (entry() | {"outputs": [{"name": "logits"}]}, 400),
        (entry() | {"outputs": 3}, 400),
        (entry() | {"outputs": [{"name": "energy"}, {"name": "label"}]}, 200),
        (entry() | {"outputs": [{"name": "energy"}] * 2}, 400),
        (entry(datatype="BYTES", shape=[1], data=["?"]), 400),
        (entry(datatype="BYTES", shape=[2], data=["aGk="]), 400),
        (entry(datatype="BYTES", shape=[1], data=["aGk="]), 415),
        (entry(shape=[65, 32, 32, 3], data=[0] * 65 * 3072), 413),
        (entry(data=[200] * (1 << 19)), 413),
    ],
)
def test_requests_by_hand(server, body, status):
    answer = server.http.post(INFER, json=body)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (["x" * 2_000] + [""] * 100_000, 400),
        ([[]] * 600_000, 400),
        ([{}] * 600_000, 400),
        ([0] * 900_000, 413),
    ],
    ids=["a long text", "lists", "objects", "numbers"],
)
def test_json_takes_no_more_memory_than_its_bytes_are_worth(data, status):
    content = json.dumps(entry(data=data), separators=(",", ":")).encode()
    tracemalloc.start()
    try:
        assert parsed(content, {}) == status
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", ["-1", "-2097153", "3000003"])
def test_what_is_said_to_be_json_is_in_range_before_it_is_read(server, length):
    """Were all of it but the last byte read, there would be more values than the images of a request need: 413."""
    content = b"[" + b"0," * (3 << 19) + b"0] "
    said = server.http.post(
        INFER, content=content, headers={"Inference-Header-Content-Length": length}
    )
    assert said.status_code == (413 if int(length) > 2 << 20 else 400)
    tracemalloc.start()
    try:
        assert (
            parsed(content, {b"inference-header-content-length": length.encode()})
            == said.status_code
        )
        assert tracemalloc.get_traced_memory()[1] < 1 << 20, "a copy of it is made"
    finally:
        tracemalloc.stop()


def test_many_requests_are_as_bounded_as_predict(start):
    service = start("--api-key", "secret")
    assert service.http.get("/v2/health/ready").status_code == 200
    assert service.http.get("/v2/models/colours").status_code == 401
    assert service.http.post(INFER, json=entry()).status_code == 401
    keyed = service.http.post(INFER, json=entry(), headers={"X-API-Key": "secret"})
    assert keyed.status_code == 200
    assert service.metric("imago_requests_total", code="200") == 1
    assert service.metric("imago_images_total", outcome="answered") == 1


def test_before_the_model_is_known_clients_are_told_to_come_back(start, tmp_path):
    hang = BlockedPath(tmp_path / "hang", tiny_bundle.publish(tmp_path / "store"))
    with hang.blocked():
        service = start(store=tmp_path / "store", env=hang.env, wait=False)
        wait_until(service.is_live)
        for answer in (
            service.http.post(INFER, json=entry()),
            service.http.get("/v2/models/colours"),
        ):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert "no model is ready" in answer.json()["error"]
        assert service.metric("imago_rejected_total", reason="not_ready") == 1
    service.wait_ready()
    assert service.http.post(INFER, json=entry()).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "inputs",
                    "name",
                    "shape",
                    "datatype",
                    "data",
                    "parameters",
                    "outputs",
                    "binary_data_size",
                    "binary_data",
                ]
            )
            | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


def parsed(content: bytes, headers: dict[bytes, bytes]) -> int:
    """Status of reading such a request: 200, or that of the Problem raised; anything else raises."""
    try:
        inference = parse_inference(content, headers, SPEC.model_dump(), 64)
        assert inference.images
        assert all(isinstance(image, bytes) for image in inference.images)
        return 200
    except Problem as problem:
        return problem.status


@settings(max_examples=300, deadline=None, derandomize=True)
@given(value=JSON, tail=st.binary(max_size=40), length=st.integers(-5, 300) | st.just("x"))
def test_any_json_is_read_or_refused(value, tail, length):
    text = json.dumps(value).encode()
    assert parsed(text + tail, {b"inference-header-content-length": str(length).encode()}) in (
        200,
        400,
    )
    assert parsed(text, {}) in (200, 400)
    image = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": value}],
        "outputs": value,
    }
    assert parsed(json.dumps(image).encode(), {}) in (200, 400)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    files=st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=5),
    cut=st.integers(0, 300),
)
def test_bytes_tensors_come_back_as_they_were_sent(files, cut):
    binary = b"".join(struct.pack("<I", len(f)) + f for f in files)
    for data, whole in ((binary, True), (binary[:cut], cut >= len(binary))):
        text = json.dumps(
            {
                "inputs": [
                    {
                        "name": "image",
                        "datatype": "BYTES",
                        "shape": [len(files)],
                        "parameters": {"binary_data_size": len(data)},
                    }
                ]
            }
        ).encode()
        headers = {b"inference-header-content-length": str(len(text)).encode()}
        if whole:
            assert parse_inference(text + data, headers, SPEC.model_dump(), 64).images == files
        else:
            assert parsed(text + data, headers) == 400
