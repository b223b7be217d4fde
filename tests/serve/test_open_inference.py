"""The Open Inference Protocol, through tritonclient, and with requests that it would not send."""

import base64
import functools
import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.image import InputSpec, decode
from serve.http.open_inference import parse_inference
from serve.http.responses import Problem
from support import tiny_bundle
from support.blocked_path import BlockedPath
from support.server import wait_until

tritonclient = pytest.importorskip("tritonclient.http")
SPEC = InputSpec(height=32, width=32)
IMAGES = [tiny_bundle.make_image(label, seed=i) for i, label in enumerate(tiny_bundle.CLASSES)]
PIXELS = np.stack([decode(image, SPEC) for image in IMAGES])
EXPECTED = tiny_bundle.expected_outputs(PIXELS, 3)
OUTPUTS = ("probabilities", "energy", "label")
INFER_PATH = "/v2/models/colours/infer"
LENGTH_HEADER = b"inference-header-content-length"


@pytest.fixture
def client(server):
    """A client of the server by tritonclient."""
    client = tritonclient.InferenceServerClient(server.url.removeprefix("http://"))
    yield client
    client.close()


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.is_model_ready("colours", "1")
    assert not client.is_model_ready("colours", "2")
    assert not client.is_model_ready("other")
    extensions = client.get_server_metadata()["extensions"]
    assert extensions == ["binary_tensor_data", "classification"]
    metadata = client.get_model_metadata("colours")
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    datatypes = {output["name"]: output["datatype"] for output in metadata["outputs"]}
    assert datatypes == {
        "probabilities": "FP32",
        "energy": "FP32",
        "label": "BYTES",
        "embedding": "FP32",
        "cam": "FP32",
    }
    shapes = {output["name"]: output["shape"] for output in metadata["outputs"]}
    assert shapes["embedding"] == [-1, 3]
    assert shapes["cam"] == [-1, 32, 32]


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize("names", [["embedding"], ["cam"], ["cam", "label", "embedding"]])
def test_embedding_and_cam_are_sent_if_they_are_named(client, names, is_binary):
    tensor = tritonclient.InferInput("image", list(PIXELS.shape), "UINT8")
    tensor.set_data_from_numpy(PIXELS)
    outputs = [tritonclient.InferRequestedOutput(name, is_binary) for name in names]
    answer = client.infer("colours", [tensor], outputs=outputs)
    assert [output["name"] for output in answer.get_response()["outputs"]] == names
    if "embedding" in names:
        assert answer.as_numpy("embedding") == pytest.approx(EXPECTED["embedding"], abs=1e-5)
    if "cam" in names:
        of_label = EXPECTED["cam"][range(3), range(3)]
        assert answer.as_numpy("cam") == pytest.approx(of_label, abs=1e-4)


def test_an_output_that_the_model_lacks_gets_400(start, tmp_path):
    """As in /predict; and the metadata does not list it."""
    path = tiny_bundle.publish(tmp_path)
    tiny_bundle.remove_output(path, "embedding")
    server = start(store=tmp_path)
    answer = server.predict(IMAGES[0], "?embedding=true")
    assert answer.status_code == 400
    assert "no embeddings" in answer.json()["detail"]

    data = [base64.b64encode(IMAGES[0]).decode()]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": data}
    body = {"inputs": [tensor], "outputs": [{"name": "embedding"}]}
    answer = server.http.post(INFER_PATH, json=body)
    assert answer.status_code == 400
    assert answer.json() == {"error": "this model has no output embedding"}
    outputs = server.http.get("/v2/models/colours").json()["outputs"]
    assert "embedding" not in [output["name"] for output in outputs]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_uint8_tensors_are_classified(client, binary_in, binary_out):
    tensor = tritonclient.InferInput("image", list(PIXELS.shape), "UINT8")
    tensor.set_data_from_numpy(PIXELS, binary_data=binary_in)
    outputs = None  # all
    if binary_out is not None:
        outputs = [tritonclient.InferRequestedOutput(name, binary_out) for name in OUTPUTS]

    answer = client.infer(
        "colours", [tensor], outputs=outputs, request_id="id-7", model_version="1"
    )
    assert np.allclose(answer.as_numpy("probabilities"), EXPECTED["probabilities"], atol=1e-5)
    assert np.allclose(answer.as_numpy("energy"), EXPECTED["energy"], atol=1e-4)
    labels = answer.as_numpy("label").astype(str)
    assert labels.tolist() == tiny_bundle.CLASSES
    response = answer.get_response()
    assert response["id"] == "id-7"
    assert response["model_name"] == "colours"
    assert response["model_version"] == "1"


@pytest.mark.parametrize("shape", [[3], [3, 1]])
def test_image_files_are_classified(client, shape):
    tensor = tritonclient.InferInput("image", shape, "BYTES")
    tensor.set_data_from_numpy(np.array(IMAGES, np.object_).reshape(shape))
    output = tritonclient.InferRequestedOutput("probabilities")
    answer = client.infer("colours", [tensor], outputs=[output])
    assert np.allclose(answer.as_numpy("probabilities"), EXPECTED["probabilities"], atol=1e-5)
    assert answer.as_numpy("energy") is None


@pytest.mark.parametrize("is_binary", [True, False])
def test_classification_returns_the_most_likely_classes(client, is_binary):
    """As Triton's server does."""
    tensor = tritonclient.InferInput("image", list(PIXELS.shape), "UINT8")
    tensor.set_data_from_numpy(PIXELS)
    output = tritonclient.InferRequestedOutput("probabilities", is_binary, class_count=2)
    rows = client.infer("colours", [tensor], outputs=[output]).as_numpy("probabilities")
    assert rows.shape == (3, 2)
    for i, row in enumerate(rows.astype(str)):
        for text in row:
            probability, index, label = text.split(":")
            assert label == tiny_bundle.CLASSES[int(index)]
            assert float(probability) == pytest.approx(
                EXPECTED["probabilities"][i, int(index)], abs=1e-5
            )
        assert row[0].endswith(f":{i}:{tiny_bundle.CLASSES[i]}")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/v2/health/live", 405),
        ("DELETE", "/v2/models/colours", 405),
        ("POST", "/v2/models/colours/ready", 405),
        ("GET", INFER_PATH, 405),
        ("POST", "/v2/nothing", 404),
        ("GET", "/v2/models/colours/nothing", 404),
        ("GET", "/v2/models", 404),
        ("HEAD", "/v2/health/ready", 200),
        ("GET", "/v2/models/colours%252f", 404),
    ],
)
def test_methods_and_paths(server, method, path, status):
    answer = server.http.request(method, path)
    assert answer.status_code == status
    if status == 405:
        assert answer.headers["allow"] == ("POST" if path == INFER_PATH else "GET, HEAD")


def test_image_files_in_json_are_base64(server):
    data = [base64.b64encode(tiny_bundle.make_image("blue")).decode()]
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": data}]}
    answer = server.http.post(INFER_PATH, json=body).json()
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    assert outputs["label"] == ["blue"]


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ([2], ["$image", "?"], "data[1] of the input is not valid base64"),
        ([2, 1], [["$image"], [7]], "data[1] of the input is not a string"),
        ([2, 1], [["$image"], ["bm8gaW1hZ2U"]], "image 1: not a JPEG"),
    ],
)
def test_messages_name_the_image_that_is_wrong(server, shape, data, message):
    image = base64.b64encode(IMAGES[0]).decode()
    data = json.loads(json.dumps(data).replace("$image", image))
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": shape, "data": data}]}
    answer = server.http.post(INFER_PATH, json=body)
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"name": "energy", "parameters": {"classification": 1}}, "classification"),
        ({"name": "label", "parameters": {"classification": 1}}, "classification"),
        ({"name": "probabilities", "parameters": {"classification": -1}}, "classification"),
        ({"name": "probabilities", "parameters": {"classification": "2"}}, "classification"),
        ({"name": "energy", "parameters": {"shared_memory_region": "x"}}, "shared_memory_region"),
    ],
)
def test_what_an_output_cannot_be_is_refused_by_name(server, output, message):
    answer = server.http.post(INFER_PATH, json=build_request() | {"outputs": [output]})
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_errors_have_the_form_of_the_protocol(client):
    tensor = tritonclient.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"no image"], np.object_))
    with pytest.raises(tritonclient.InferenceServerException, match="not a JPEG"):
        client.infer("colours", [tensor])
    with pytest.raises(tritonclient.InferenceServerException, match="no model 'other'"):
        client.infer("other", [tensor])


def build_request(**changes: object) -> dict:
    """Return a request with one image, whose input has these changes."""
    tensor = {
        "name": "image",
        "shape": [1, 32, 32, 3],
        "datatype": "UINT8",
        "data": [7] * 3072,
        **changes,
    }
    return {"inputs": [tensor]}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (build_request(), 200),
        (build_request(data=PIXELS[:1].tolist()), 200),
        ({}, 400),
        ([], 400),
        ({"inputs": []}, 400),
        ({"inputs": build_request()["inputs"] * 2}, 400),
        (build_request(name="x"), 400),
        (build_request(datatype="FP32"), 400),
        (build_request(shape=[1, 3, 32, 32]), 400),
        (build_request(shape=[2, 32, 32, 3]), 400),
        (build_request(shape=[-1]), 400),
        (build_request(data=[256] * 3072), 400),
        (build_request(data=[0.5] * 3072), 400),
        (build_request(data=["a"] * 3072), 400),
        (build_request(data=[[1], [2, 3]]), 400),
        (build_request(data=None), 400),
        (build_request(parameters={"binary_data_size": 5}), 400),
        (build_request(data=[-1] * 3072), 400),
        (build_request(data=[10**30] * 3072), 400),
        (build_request(data=[True] * 3072), 400),
        (build_request(data=PIXELS[:2].tolist()), 400),
        (build_request(data=[PIXELS[:1].tolist()]), 400),
        (build_request(data=[[7] * 3072]), 200),
        (build_request(data=[1, [2]] * 1536), 400),
        (build_request(data=[{}] * 3072), 400),
        (build_request(parameters=7), 400),
        (build_request() | {"outputs": [{"name": "logits"}]}, 400),
        (build_request() | {"outputs": 3}, 400),
        (build_request() | {"id": 7}, 400),
        (build_request() | {"id": functools.reduce(lambda inner, _: [inner], range(900))}, 400),
        (build_request() | {"outputs": [{"name": "energy"}, {"name": "label"}]}, 200),
        (build_request() | {"outputs": [{"name": "energy"}] * 2}, 400),
        (build_request(datatype="BYTES", shape=[1], data=["?"]), 400),
        (build_request(datatype="BYTES", shape=[2], data=["aGk="]), 400),
        (build_request(datatype="BYTES", shape=[2, 1], data=[["aGk="], "aGk="]), 400),
        (build_request(datatype="BYTES", shape=[1], data=[["aGk="]]), 400),
        (build_request(datatype="BYTES", shape=[1, 1], data=[[["aGk="]]]), 400),
        (build_request(datatype="BYTES", shape=[1], data=["aGk="]), 415),
        (build_request(shape=[65, 32, 32, 3], data=[0] * 65 * 3072), 413),
        (build_request(data=[200] * (1 << 19)), 413),
    ],
)
def test_requests_in_json(server, body, status):
    answer = server.http.post(INFER_PATH, json=body)
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]


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
def test_memory_for_json_stays_proportional_to_its_size(data, status):
    content = json.dumps(build_request(data=data), separators=(",", ":")).encode()
    tracemalloc.start()
    try:
        assert parse_status(content, {}) == status
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", ["-1", "-2097153", "3000003"])
def test_length_of_json_is_checked_before_it_is_read(server, length):
    """A slice that ends at -1 would have more values than images need, and status 413."""
    content = b"[" + b"0," * (3 << 19) + b"0] "
    status = 413 if int(length) > 2 << 20 else 400
    headers = {LENGTH_HEADER: length.encode()}
    response = server.http.post(INFER_PATH, content=content, headers=headers)
    assert response.status_code == status

    tracemalloc.start()
    try:
        assert parse_status(content, headers) == status
        assert tracemalloc.get_traced_memory()[1] < 1 << 20, "the content was copied"
    finally:
        tracemalloc.stop()


def test_api_key_and_metrics_are_those_of_predict(start):
    server = start("--api-key", "secret")
    assert server.http.get("/v2/health/ready").status_code == 200
    assert server.http.get("/v2/models/colours").status_code == 401
    assert server.http.post(INFER_PATH, json=build_request()).status_code == 401
    keyed = server.http.post(INFER_PATH, json=build_request(), headers={"X-API-Key": "secret"})
    assert keyed.status_code == 200
    assert server.metric("imago_requests_total", code="200") == 1
    assert server.metric("imago_images_total", outcome="answered") == 1


def test_status_is_503_until_a_model_is_ready(start, tmp_path):
    blocked_path = BlockedPath(tmp_path / "hang", tiny_bundle.publish(tmp_path / "store"))
    with blocked_path.blocked():
        server = start(store=tmp_path / "store", env=blocked_path.env, wait=False)
        wait_until(server.is_live)
        for answer in (
            server.http.post(INFER_PATH, json=build_request()),
            server.http.get("/v2/models/colours"),
        ):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert "no model is ready" in answer.json()["error"]
        assert server.metric("imago_rejected_total", reason="not_ready") == 1
    server.wait_ready()
    assert server.http.post(INFER_PATH, json=build_request()).status_code == 200


KEYS = [
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
keys = st.sampled_from(KEYS) | st.text(max_size=4)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=12,
)


def parse_status(content: bytes, headers: dict[bytes, bytes]) -> int:
    """Return the status of parsing a request: 200, or that of the Problem."""
    try:
        inference = parse_inference(content, headers, SPEC.model_dump(), 64)
        assert inference.images
        assert all(isinstance(image, bytes) for image in inference.images)
        return 200
    except Problem as problem:
        return problem.status


@settings(max_examples=300, deadline=None, derandomize=True)
@given(value=json_values, tail=st.binary(max_size=40), length=st.integers(-5, 300) | st.just("x"))
def test_any_json_is_parsed_or_refused(value, tail, length):
    text = json.dumps(value).encode()
    headers = {LENGTH_HEADER: str(length).encode()}
    assert parse_status(text + tail, headers) in (200, 400)
    assert parse_status(text, {}) in (200, 400)

    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": value}
    request = {"inputs": [tensor], "outputs": value}
    assert parse_status(json.dumps(request).encode(), {}) in (200, 400)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    files=st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=5),
    cut=st.integers(0, 300),
)
def test_binary_files_are_split_as_they_were_joined(files, cut):
    binary = b"".join(struct.pack("<I", len(file)) + file for file in files)
    for data in (binary, binary[:cut]):
        tensor = {
            "name": "image",
            "datatype": "BYTES",
            "shape": [len(files)],
            "parameters": {"binary_data_size": len(data)},
        }
        text = json.dumps({"inputs": [tensor]}).encode()
        headers = {LENGTH_HEADER: str(len(text)).encode()}
        if data == binary:
            assert parse_inference(text + data, headers, SPEC.model_dump(), 64).images == files
        else:
            assert parse_status(text + data, headers) == 400
