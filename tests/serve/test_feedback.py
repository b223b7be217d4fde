"""/feedback: true labels become live accuracy and calibration error, right with several processes and bounded."""

import httpx
import numpy as np
import pytest
from support import tiny_bundle
from support.server import wait_until

from models.image import InputSpec, decode
from serve.http.feedback import TABLE_SLOTS, AnswerTable, PastAnswer


def give(service, request_id: str, label: str, **more):
    return service.http.post("/feedback", json={"id": request_id, "label": label, **more})


@pytest.fixture
def service(start):
    return start("--api-processes", "2")


def test_labels_become_accuracy_and_calibration_error(service):
    assert "imago_feedback_accuracy 0" not in service.metrics()  # no label, no number
    right, confidence = [], []
    for i in range(30):
        body = service.predict(tiny_bundle.make_image(tiny_bundle.CLASSES[i % 3], seed=i)).json()
        said = body["predictions"][0]
        truth = tiny_bundle.CLASSES[i % 3] if i % 5 else tiny_bundle.CLASSES[(i + 1) % 3]
        service.http.close()  # so that another process may get the next request
        service.http = type(service.http)(base_url=service.url, timeout=30)
        answer = give(service, body["id"], truth)
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"id": body["id"], "image": 0, "correct": said["label"] == truth}
        right.append(said["label"] == truth)
        confidence.append(said["confidence"])
    right, confidence = np.array(right), np.array(confidence)
    bins = np.minimum((confidence * 15).astype(int), 14)
    error = sum(abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(15)) / 30
    assert service.metric("imago_feedback_total", outcome="correct") == right.sum() == 24
    assert service.metric("imago_feedback_total", outcome="wrong") == 6
    assert service.metric("imago_feedback_accuracy") == pytest.approx(0.8)
    assert service.metric("imago_feedback_ece") == pytest.approx(error, abs=1e-5)


def test_accuracy_is_of_the_version_that_serves(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start("--api-processes", "2", "--reload-seconds", "0.2", store=tmp_path)

    def accuracy() -> list[float]:
        return [
            float(line.split()[1])
            for line in service.metrics().splitlines()
            if line.startswith("imago_feedback_accuracy ")
        ]

    def label(truth: str) -> None:
        service.http.close()  # so that another process may get the next request
        service.http = httpx.Client(base_url=service.url, timeout=30)
        assert (
            give(
                service, service.predict(tiny_bundle.make_image("red")).json()["id"], truth
            ).status_code
            == 200
        )

    for _ in range(10):
        label("blue")
    assert accuracy() == [0]
    tiny_bundle.publish(tmp_path)
    wait_until(lambda: service.metric("imago_reloads_total", outcome="ok") == 1, 60)
    wait_until(lambda: accuracy() == [])
    label("red")
    assert accuracy() == [1]


def test_an_answer_takes_one_label(service):
    request_id = service.predict(
        tiny_bundle.make_image("red"), **{"X-Request-ID": "only-once"}
    ).json()["id"]
    assert (
        give(service, request_id, "purple").status_code == 400
    )  # no such class: the label is still to come
    assert give(service, request_id, "red").status_code == 200
    assert give(service, request_id, "red").status_code == 404
    assert give(service, "never-seen", "red").status_code == 404
    assert service.metric("imago_feedback_total", outcome="unknown") == 2
    assert service.metric("imago_feedback_total", outcome="correct") == 1


def test_each_image_of_a_request_has_its_own(server):
    files = [
        ("f", ("a", data))
        for data in (tiny_bundle.make_image("blue"), b"no image", tiny_bundle.make_image("green"))
    ]
    request_id = server.http.post("/predict", files=files).json()["id"]
    assert give(server, request_id, "green", image=2).json()["correct"] is True
    assert give(server, request_id, "green", image=0).json()["correct"] is False
    assert give(server, request_id, "green", image=1).status_code == 404
    assert give(server, request_id, "green", image=3).status_code == 404


def test_answers_in_the_open_inference_protocol_take_labels(server):
    pixels = np.stack(
        [
            decode(tiny_bundle.make_image(label), InputSpec(height=32, width=32))
            for label in ("blue", "red")
        ]
    )
    tensor = {
        "name": "image",
        "datatype": "UINT8",
        "shape": list(pixels.shape),
        "data": pixels.ravel().tolist(),
    }
    answer = server.http.post("/v2/models/colours/infer", json={"inputs": [tensor]})
    request_id = answer.headers["x-request-id"]
    assert give(server, request_id, "blue", image=0).json()["correct"] is True
    assert give(server, request_id, "green", image=1).json()["correct"] is False
    assert give(server, request_id, "red", image=1).status_code == 404


def test_labels_with_quotes(start, tmp_path):
    classes = ['a","index":9,"confidence":0', "b\\", 'c"']
    tiny_bundle.publish(tmp_path, classes=classes)
    service = start(store=tmp_path)
    for label, colour in zip(classes, tiny_bundle.CLASSES, strict=True):
        body = service.predict(tiny_bundle.make_image(colour)).json()
        assert body["predictions"][0]["label"] == label
        assert give(service, body["id"], label).json()["correct"] is True


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


def test_feedback_is_small_and_needs_the_key(start):
    service = start("--api-key", "secret")
    assert give(service, "x", "red").status_code == 401
    large = service.http.post("/feedback", content=b"x" * 100_000, headers={"X-API-Key": "secret"})
    assert large.status_code == 413


def test_the_answer_table_is_bounded_and_shared_between_processes(tmp_path):
    first = AnswerTable(str(tmp_path))
    second = AnswerTable(str(tmp_path))
    for i in range(3 * TABLE_SLOTS):
        first.put(f"request-{i}", 0, PastAnswer(version=1, class_index=i % 7, confidence=0.5))
    assert (tmp_path / "answers").stat().st_size < 4 << 20

    last = 3 * TABLE_SLOTS - 1
    assert second.pop(f"request-{last}", 0) == (1, last % 7, 0.5)
    assert first.pop(f"request-{last}", 0) is None

    # Of the latest answers, the table still holds those whose slot no other answer took.
    kept = 0
    for i in range(2 * TABLE_SLOTS, last):
        if second.pop(f"request-{i}", 0) is not None:
            kept += 1
    assert kept > 0.6 * TABLE_SLOTS
