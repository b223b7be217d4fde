"""/feedback: true labels become live accuracy and calibration error, in any HTTP process."""

import httpx
import numpy as np
import pytest

from models.image import InputSpec, decode
from serve.http.feedback import AnswerTable
from serve.wire import Answer
from support import tiny_bundle
from support.server import CLIENT_SECONDS, NO_TLS, Server, wait_until

BINS = 15  # of the calibration error


def send_label(server: Server, request_id: str, label: str, **members: int) -> httpx.Response:
    """Send the true label of an image, e.g. `image=2`, of an earlier request."""
    content = {"id": request_id, "label": label, **members}
    return server.http.post("/feedback", json=content)


def reconnect(server: Server) -> None:
    """Open a new connection, which another HTTP process may accept."""
    server.http.close()
    server.http = httpx.Client(base_url=server.url, timeout=CLIENT_SECONDS, verify=NO_TLS)


@pytest.fixture
def two_processes(start) -> Server:
    """A server with two HTTP processes."""
    return start("--api-processes", "2")


def test_labels_become_accuracy_and_calibration_error(two_processes):
    server = two_processes
    assert "imago_feedback_accuracy 0" not in server.metrics()  # absent without labels

    correct = []
    confidence = []
    for i in range(30):
        colour = tiny_bundle.CLASSES[i % 3]
        label = colour if i % 5 else tiny_bundle.CLASSES[(i + 1) % 3]
        answer = server.predict(tiny_bundle.make_image(colour, seed=i)).json()
        prediction = answer["predictions"][0]
        is_correct = prediction["label"] == label

        reconnect(server)
        response = send_label(server, answer["id"], label)
        assert response.status_code == 200, response.text
        assert response.json() == {"id": answer["id"], "image": 0, "correct": is_correct}
        correct.append(is_correct)
        confidence.append(prediction["confidence"])

    bins = np.minimum((np.array(confidence) * BINS).astype(int), BINS - 1)
    difference = np.array(correct) - np.array(confidence)
    error = np.abs(np.bincount(bins, difference, minlength=BINS)).sum() / 30
    assert sum(correct) == 24
    assert server.metric("imago_feedback_total", outcome="correct") == 24
    assert server.metric("imago_feedback_total", outcome="wrong") == 6
    assert server.metric("imago_feedback_accuracy") == pytest.approx(0.8)
    assert server.metric("imago_feedback_ece") == pytest.approx(error, abs=1e-5)


def test_the_accuracy_is_that_of_the_served_version(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start("--api-processes", "2", "--reload-seconds", "0.2", store=tmp_path)

    def read_accuracy() -> list[float]:
        name = "imago_feedback_accuracy "
        lines = server.metrics().splitlines()
        return [float(line.split()[1]) for line in lines if line.startswith(name)]

    def send_red_with_label(label: str) -> None:
        reconnect(server)
        request_id = server.predict(tiny_bundle.make_image("red")).json()["id"]
        assert send_label(server, request_id, label).status_code == 200

    for _ in range(10):
        send_red_with_label("blue")
    assert read_accuracy() == [0]

    tiny_bundle.publish(tmp_path)
    wait_until(lambda: server.metric("imago_reloads_total", outcome="ok") == 1)
    wait_until(lambda: read_accuracy() == [])
    send_red_with_label("red")
    assert read_accuracy() == [1]


def test_an_answer_takes_one_label(two_processes):
    server = two_processes
    headers = {"X-Request-ID": "only-once"}
    request_id = server.predict(tiny_bundle.make_image("red"), **headers).json()["id"]

    assert send_label(server, request_id, "purple").status_code == 400  # no class, so no label
    assert send_label(server, request_id, "red").status_code == 200
    assert send_label(server, request_id, "red").status_code == 404
    assert send_label(server, "never-seen", "red").status_code == 404
    assert server.metric("imago_feedback_total", outcome="unknown") == 2
    assert server.metric("imago_feedback_total", outcome="correct") == 1


def test_each_image_of_a_request_takes_its_own_label(server):
    images = [tiny_bundle.make_image("blue"), b"no image", tiny_bundle.make_image("green")]
    files = [("f", ("a", image)) for image in images]
    request_id = server.http.post("/predict", files=files).json()["id"]

    assert send_label(server, request_id, "green", image=2).json()["correct"] is True
    assert send_label(server, request_id, "green", image=0).json()["correct"] is False
    assert send_label(server, request_id, "green", image=1).status_code == 404
    assert send_label(server, request_id, "green", image=3).status_code == 404


def test_answers_of_the_open_inference_protocol_take_labels(server):
    spec = InputSpec(height=32, width=32)
    images = [tiny_bundle.make_image("blue"), tiny_bundle.make_image("red")]
    pixels = np.stack([decode(image, spec) for image in images])
    tensor = {
        "name": "image",
        "datatype": "UINT8",
        "shape": list(pixels.shape),
        "data": pixels.ravel().tolist(),
    }
    response = server.http.post("/v2/models/colours/infer", json={"inputs": [tensor]})
    request_id = response.headers["x-request-id"]

    assert send_label(server, request_id, "blue", image=0).json()["correct"] is True
    assert send_label(server, request_id, "green", image=1).json()["correct"] is False
    assert send_label(server, request_id, "red", image=1).status_code == 404


def test_labels_with_characters_that_json_escapes(start, tmp_path):
    classes = ['a","index":9,"confidence":0', "b\\", 'c"']
    tiny_bundle.publish(tmp_path, classes=classes)
    server = start(store=tmp_path)
    for label, colour in zip(classes, tiny_bundle.CLASSES, strict=True):
        answer = server.predict(tiny_bundle.make_image(colour)).json()
        assert answer["predictions"][0]["label"] == label
        assert send_label(server, answer["id"], label).json()["correct"] is True


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"id": 1, "label": "red"}',
        b'{"id": "x"}',
        b'{"id": "x", "label": 1}',
        b'{"id": "x", "label": "red", "image": -1}',
        b'{"id": "x", "label": "red", "image": true}',
        b'{"id": "\\ud800", "label": "red"}',
        b"[" * 8000,
    ],
)
def test_malformed_feedback_is_a_400(server, body):
    answer = server.http.post(
        "/feedback", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["detail"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_feedback_takes_json_only(server, content_type):
    """The other types are those that a form of any web page can send."""
    headers = {"Content-Type": content_type} if content_type else {}
    response = server.http.post(
        "/feedback", content=b'{"id": "a", "label": "red"}', headers=headers
    )
    assert response.status_code == 415
    assert "application/json" in response.json()["detail"]


def test_feedback_is_limited_in_size_and_requires_the_key(start):
    server = start("--api-key", "secret")
    assert send_label(server, "x", "red").status_code == 401
    large = server.http.post("/feedback", content=b"x" * 100_000, headers={"X-API-Key": "secret"})
    assert large.status_code == 413


def test_the_answer_table_is_bounded_and_shared_between_processes(tmp_path):
    slots = 4096
    first = AnswerTable(str(tmp_path), slots)
    second = AnswerTable(str(tmp_path), slots)
    for i in range(3 * slots):
        answer = Answer(id=1, status=200, version=1, body=b"", class_index=i % 7, confidence=0.5)
        first.put(f"request-{i}", 0, answer)
    assert (tmp_path / "answers").stat().st_size < 64 * slots

    last = 3 * slots - 1
    assert second.pop(f"request-{last}", 0) == (1, last % 7, 0.5)
    assert first.pop(f"request-{last}", 0) is None

    # Of the latest answers, the table still holds those whose slot no other answer took.
    kept = 0
    for i in range(2 * slots, last):
        if second.pop(f"request-{i}", 0) is not None:
            kept += 1
    assert kept > 0.6 * slots
