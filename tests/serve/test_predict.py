"""POST /predict: bodies in each format, the answer, and the errors of a request."""

import base64

import numpy as np
import pytest
from support import tiny_bundle

from models.image import InputSpec, decode

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


@pytest.mark.parametrize("label", tiny_bundle.CLASSES)
def test_raw_bytes(server, label):
    data = tiny_bundle.make_image(label)
    answer = server.predict(data)
    assert answer.status_code == 200
    body = answer.json()
    (prediction,) = body["predictions"]
    expected = tiny_bundle.expected_outputs(decode(data, INPUT)[None], 3)
    assert prediction["label"] == label
    assert prediction["confidence"] == pytest.approx(expected["probabilities"].max(), abs=1e-5)
    assert prediction["energy"] == pytest.approx(expected["energy"][0], abs=1e-4)
    assert tuple(prediction) == MEMBERS
    assert body["model"] == {"name": "colours", "version": "1"}
    assert body["id"] == answer.headers["x-request-id"]
    assert answer.headers["x-model-version"] == "1"
    timings = answer.headers["server-timing"].split(", ")
    assert [timing.split(";")[0] for timing in timings] == ["queue", "decode", "infer"]


def test_a_failed_image_is_an_error_among_the_predictions(server):
    files = [
        ("a", ("a.png", tiny_bundle.make_image("blue"))),
        ("b", ("b.txt", b"hello")),
        ("c", ("c.jpg", tiny_bundle.make_image("red", 64))),
    ]
    answer = server.http.post("/predict", files=files)
    assert answer.status_code == 200
    blue, error, red = answer.json()["predictions"]
    assert (blue["label"], red["label"]) == ("blue", "red")
    assert error["error"]["status"] == 415


@pytest.mark.parametrize("flags", [(), ("--cache-entries", "9")])
def test_empty_files_and_invalid_base64_are_errors_among_the_predictions(start, flags):
    server = start(*flags)
    good = tiny_bundle.make_image("blue")
    files = [("f", ("a", b"")), ("f", ("b", good)), ("f", ("c", b""))]
    texts = {"images": ["?", base64.b64encode(good).decode(), "", "é"]}
    for _ in range(2):  # the second time they are in the cache
        for request, statuses in (
            ({"files": files}, [422, "blue", 422]),
            ({"json": texts}, [400, "blue", 422, 400]),
        ):
            answer = server.http.post("/predict", **request)
            assert answer.status_code == 200
            assert answer.headers["x-model-version"] == "1"
            assert [
                p["error"]["status"] if "error" in p else p["label"]
                for p in answer.json()["predictions"]
            ] == statuses
    assert server.metric("imago_images_total", outcome="refused") == 10


def test_the_status_is_an_error_if_all_images_fail(server):
    answer = server.http.post("/predict", files=[("a", ("a", b"hello")), ("b", ("b", b"world"))])
    assert answer.status_code == 415
    assert [p["error"]["status"] for p in answer.json()["predictions"]] == [415, 415]
    answer = server.http.post(
        "/predict", json={"images": ["?", base64.b64encode(b"hello").decode()]}
    )
    assert answer.status_code == 415
    assert [p["error"]["status"] for p in answer.json()["predictions"]] == [400, 415]


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_json(server, prefix):
    texts = [
        prefix + base64.b64encode(tiny_bundle.make_image(label)).decode()
        for label in tiny_bundle.CLASSES
    ]
    many = server.http.post("/predict", json={"images": texts}).json()
    assert [p["label"] for p in many["predictions"]] == tiny_bundle.CLASSES
    one = server.http.post("/predict", json={"image": texts[1]}).json()
    assert one["predictions"] == [many["predictions"][1]]


def test_top_k(server):
    data = tiny_bundle.make_image("green")
    assert len(server.predict(data, "?top_k=1").json()["predictions"][0]["top"]) == 1
    top = server.predict(data, "?top_k=1000").json()["predictions"][0]["top"]
    assert sorted(choice["label"] for choice in top) == sorted(tiny_bundle.CLASSES)
    assert np.isclose(sum(choice["confidence"] for choice in top), 1, atol=1e-4)


def test_many_images_of_one_request(server):
    labels = [tiny_bundle.CLASSES[i % 3] for i in range(60)]
    files = [
        ("f", (f"{i}.png", tiny_bundle.make_image(label, seed=i))) for i, label in enumerate(labels)
    ]
    answer = server.http.post("/predict", files=files)
    assert [p["label"] for p in answer.json()["predictions"]] == labels


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
