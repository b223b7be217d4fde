"""POST /predict: bodies in each format, the answer, and the errors of a request."""

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from models.image import InputSpec, decode
from support import tiny_bundle

INPUT = InputSpec(height=32, width=32)
MEMBERS = (
    "label",
    "index",
    "confidence",
    "top",
    "prediction_set",
    "abstain",
    "out_of_distribution",
    "energy",
)


def read_label_or_status(prediction: dict[str, Any]) -> str | int:
    """Return the label of a prediction, or the status of an error in its place."""
    if "error" in prediction:
        return prediction["error"]["status"]
    return prediction["label"]


def read_outcomes(response: httpx.Response) -> list[str | int]:
    """Return the label or the status of each image."""
    return [read_label_or_status(prediction) for prediction in response.json()["predictions"]]


def encode(image: bytes) -> str:
    return base64.b64encode(image).decode()


@pytest.mark.parametrize("label", tiny_bundle.CLASSES)
def test_raw_bytes(server, label):
    image = tiny_bundle.make_image(label)
    expected = tiny_bundle.expected_outputs(decode(image, INPUT)[None], 3)

    response = server.predict(image)
    assert response.status_code == 200
    answer = response.json()
    (prediction,) = answer["predictions"]
    assert tuple(prediction) == MEMBERS
    assert prediction["label"] == label
    assert prediction["confidence"] == pytest.approx(expected["probabilities"].max(), abs=1e-5)
    assert prediction["energy"] == pytest.approx(expected["energy"][0], abs=1e-4)
    assert answer["model"] == {"name": "colours", "version": "1"}
    assert answer["id"] == response.headers["x-request-id"]
    assert response.headers["x-model-version"] == "1"
    timings = response.headers["server-timing"].split(", ")
    assert [timing.split(";")[0] for timing in timings] == ["queue", "decode", "infer"]


def test_a_failed_image_is_an_error_among_the_predictions(server):
    files = [
        ("a", ("a.png", tiny_bundle.make_image("blue"))),
        ("b", ("b.txt", b"hello")),
        ("c", ("c.jpg", tiny_bundle.make_image("red", 64))),
    ]
    response = server.http.post("/predict", files=files)
    assert response.status_code == 200
    assert read_outcomes(response) == ["blue", 415, "red"]


@pytest.mark.parametrize("flags", [(), ("--cache-entries", "9")])
def test_empty_files_and_invalid_base64_are_errors_among_the_predictions(start, flags):
    server = start(*flags)
    blue = tiny_bundle.make_image("blue")
    files = [("f", ("a", b"")), ("f", ("b", blue)), ("f", ("c", b""))]
    texts = {"images": ["?", encode(blue), "", "é"]}

    for _ in range(2):  # the second time blue is in the cache
        multipart = server.http.post("/predict", files=files)
        assert read_outcomes(multipart) == [422, "blue", 422]
        json_body = server.http.post("/predict", json=texts)
        assert read_outcomes(json_body) == [400, "blue", 422, 400]
        for response in (multipart, json_body):
            assert response.status_code == 200
            assert response.headers["x-model-version"] == "1"
    assert server.metric("imago_images_total", outcome="refused") == 10


def test_the_status_is_an_error_if_all_images_fail(server):
    files = [("a", ("a", b"hello")), ("b", ("b", b"world"))]
    response = server.http.post("/predict", files=files)
    assert response.status_code == 415
    assert read_outcomes(response) == [415, 415]

    response = server.http.post("/predict", json={"images": ["?", encode(b"hello")]})
    assert response.status_code == 415
    assert read_outcomes(response) == [400, 415]


def test_json(server):
    texts = [encode(tiny_bundle.make_image(label)) for label in tiny_bundle.CLASSES]
    many = server.http.post("/predict", json={"images": texts})
    assert read_outcomes(many) == tiny_bundle.CLASSES
    one = server.http.post("/predict", json={"image": texts[1]})
    assert one.json()["predictions"] == [many.json()["predictions"][1]]


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_base64_is_read_alike_in_json_multipart_and_the_open_inference_protocol(server, prefix):
    """Here URL-safe and without padding."""
    images = [tiny_bundle.make_image("green", seed=seed) for seed in range(9)]
    image = next(image for image in images if len(image) % 3)  # its base64 has padding
    text = prefix + base64.urlsafe_b64encode(image).decode().rstrip("=")
    assert read_outcomes(server.http.post("/predict", json={"image": text})) == ["green"]

    headers = {"Content-Transfer-Encoding": "base64"}
    files = [("f", ("a.png", text.encode(), "image/png", headers))]
    assert read_outcomes(server.http.post("/predict", files=files)) == ["green"]

    tensor = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [[text]]}
    response = server.http.post("/v2/models/colours/infer", json={"inputs": [tensor]})
    assert response.json()["outputs"][-1]["data"] == ["green"]


def test_embedding_as_numbers_or_base64(server):
    images = [tiny_bundle.make_image(label) for label in tiny_bundle.CLASSES]
    pixels = np.stack([decode(image, INPUT) for image in images])
    expected = tiny_bundle.expected_outputs(pixels, 3)["embedding"]

    for image, embedding in zip(images, expected, strict=True):
        (prediction,) = server.predict(image, "?embedding=true").json()["predictions"]
        assert prediction["embedding"] == pytest.approx(embedding, abs=1e-5)
        (prediction,) = server.predict(image, "?embedding=base64").json()["predictions"]
        halves = np.frombuffer(base64.b64decode(prediction["embedding"]), "<f2")
        assert halves == pytest.approx(embedding, rel=1e-3)
        assert "embedding" not in server.predict(image, "?embedding=false").json()["predictions"][0]

    many = {"images": [encode(image) for image in images]}
    answers = server.http.post("/predict?embedding=true", json=many).json()["predictions"]
    assert np.array([answer["embedding"] for answer in answers]) == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize(
    ("encoding", "status"), [("Identity", 200), ("IDENTITY", 200), ("", 200), ("gzip", 415)]
)
def test_content_encoding(server, encoding, status):
    headers = {"Content-Encoding": encoding}
    assert server.predict(tiny_bundle.make_image("red"), **headers).status_code == status

    data = [encode(tiny_bundle.make_image("red"))]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": data}
    path = "/v2/models/colours/infer"
    response = server.http.post(path, json={"inputs": [tensor]}, headers=headers)
    assert response.status_code == status


def test_top_k(server):
    green = tiny_bundle.make_image("green")
    top_1 = server.predict(green, "?top_k=1").json()["predictions"][0]["top"]
    assert [choice["label"] for choice in top_1] == ["green"]

    top = server.predict(green, "?top_k=1000").json()["predictions"][0]["top"]
    assert sorted(choice["label"] for choice in top) == sorted(tiny_bundle.CLASSES)
    assert sum(choice["confidence"] for choice in top) == pytest.approx(1, abs=1e-4)


def test_many_images_of_one_request(server):
    labels = [tiny_bundle.CLASSES[i % 3] for i in range(60)]
    files = []
    for i, label in enumerate(labels):
        files.append(("f", (f"{i}.png", tiny_bundle.make_image(label, seed=i))))
    assert read_outcomes(server.http.post("/predict", files=files)) == labels


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"content": b""}, 400),
        ({"content": b"hello"}, 415),
        ({"content": b"\xff\xd8\xff\xe0 cut short"}, 422),
        (
            {"content": b"a=1", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
            415,
        ),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        ({"content": b'{"image": "?"}', "headers": {"Content-Type": "application/json"}}, 400),
        ({"content": b'{"images": [1]}', "headers": {"Content-Type": "application/json"}}, 400),
        ({"content": b'{"images": []}', "headers": {"Content-Type": "application/json"}}, 400),
        (
            {"content": b'{"images": ["?", ""]}', "headers": {"Content-Type": "application/json"}},
            400,
        ),
        (
            {"content": b'{"images": ["", ""]}', "headers": {"Content-Type": "application/json"}},
            400,
        ),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400),
        ({"content": b"{", "params": {"top_k": "0"}}, 400),
        ({"content": b"{", "params": {"top_k": "x"}}, 400),
        ({"content": b"{", "params": {"top_k": "1" * 5000}}, 400),
        ({"content": b"{", "params": {"top_k": "1001"}}, 400),
        ({"content": b"{", "params": {"explain": "x"}}, 400),
        ({"content": b"{", "params": {"embedding": "float16"}}, 400),
        ({"content": b"{", "params": {"embedding": ""}}, 400),
    ],
)
def test_bad_requests_are_4xx_problems(server, request_, status):
    answer = server.http.post("/predict", **{"headers": {"Content-Type": "image/png"}, **request_})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]


def test_a_request_id_is_accepted_if_it_is_harmless(server):
    data = tiny_bundle.make_image("red")
    assert server.predict(data, **{"X-Request-ID": "trace-7"}).json()["id"] == "trace-7"
    assert server.predict(data, **{"X-Request-ID": 'x"<script>'}).json()["id"] != 'x"<script>'
    assert server.predict(data).json()["id"] != server.predict(data).json()["id"]


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ("/health/live", "status", "live"),
        ("/health/ready", "status", "ready"),
        ("/model", "name", "colours"),
    ],
)
def test_other_endpoints(server, path, key, value):
    answer = server.http.get(path)
    assert answer.status_code == 200
    assert answer.json()[key] == value


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("POST", "/model", 405),
        ("GET", "/nothing", 404),
        ("GET", "/health", 404),
        ("GET", "/info", 404),
        ("POST", "/shutdown", 404),
        ("GET", "/metrics", 404),
    ],
)
def test_other_paths_and_methods_are_refused(server, method, path, status):
    answer = server.http.request(method, path)
    assert answer.status_code == status
    assert "server" not in answer.headers


def test_docs_list_the_paths_of_the_openapi_document(server):
    paths = server.http.get("/openapi.json").json()["paths"]
    page = server.http.get("/docs").text
    for path in paths:
        assert path in page
    assert "http://" not in page.replace("http://localhost", "")
    assert "https://" not in page
