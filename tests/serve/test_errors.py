"""What an error tells: enough for a client, and nothing of the machine; and what is told while a worker is replaced."""

import base64
import os
import signal

import cv2
import httpx
import numpy as np
import pytest
from support import ROOT, tiny_bundle
from support.blocked_path import BlockedPath
from support.server import Server, suspended_workers, wait_until

IMAGE, INFER = tiny_bundle.make_image("red"), "/v2/models/colours/infer"
BRIGHT = cv2.imencode(".png", np.full((32, 32, 3), 255, np.uint8))[1].tobytes()


def infer(service: Server, image: bytes) -> httpx.Response:
    return service.http.post(
        INFER,
        json={
            "inputs": [
                {
                    "name": "image",
                    "datatype": "BYTES",
                    "shape": [1],
                    "data": [base64.b64encode(image).decode()],
                }
            ]
        },
    )


def check_silent(answers: list[httpx.Response], tmp_path) -> None:
    for answer in answers:
        assert answer.json().get("detail") or answer.json()["error"]
        for told in (str(tmp_path), str(ROOT), ".py", ".onnx", "Traceback", "/dev/shm", "/tmp"):
            assert told not in answer.text, answer.text


def test_no_error_tells_of_files_on_the_server(start, tmp_path):
    tiny_bundle.fail_on_bright_pixels(tiny_bundle.publish(tmp_path))
    service = start("--deadline-ms", "1000", store=tmp_path)
    ask, get, post = service.predict, service.http.get, service.http.post
    found = [
        get("/nothing"),
        get("/predict"),
        ask(b"no image"),
        ask(IMAGE[:60]),
        ask(b""),
        ask(BRIGHT),
        get("/report"),
        get("/samples/99"),
        get("/samples/..%2f..%2fmanifest.json"),
        infer(service, b"no image"),
        infer(service, BRIGHT),
        post(INFER, json={}),
        get(INFER),
        get("/v2/nothing"),
        get("/v2/models/other"),
    ]
    with suspended_workers(service):
        found += [ask(IMAGE), infer(service, IMAGE)]
    assert [answer.status_code for answer in found] == [
        404,
        405,
        415,
        422,
        400,
        500,
        404,
        404,
        404,
        415,
        500,
        400,
        405,
        404,
        404,
        504,
        504,
    ]
    check_silent(found, tmp_path)
    assert service.metric("imago_requests_total", code="504") == 2
    assert service.metric("imago_images_total", outcome="expired") == 2


def test_nothing_is_ready_while_a_killed_worker_is_replaced(start, tmp_path):
    hang = BlockedPath(tmp_path / "hang", tiny_bundle.publish(tmp_path / "store"))
    service = start("--reload-seconds", "0", store=tmp_path / "store", env=hang.env)
    assert service.metric("imago_ready") == 1
    with hang.blocked():  # so that the next worker does not come up
        (worker,) = service.workers()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not service.is_ready())
        wait_until(hang.is_reached)
        found = [service.http.get("/health/ready"), service.predict(IMAGE), infer(service, IMAGE)]
        check_silent(found, tmp_path)
        found.append(service.http.get("/v2/health/ready"))
        assert [answer.status_code for answer in found] == [503] * 4
        assert service.metric("imago_ready") == 0
        assert service.is_live()
    service.wait_ready()
    assert service.metric("imago_ready") == 1


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_metric_never_says_ready_before_the_service_does(start, processes):
    service, seen = start("--api-processes", processes, wait=False), []
    while not service.is_ready():
        try:
            told = service.metric("imago_ready")
        except httpx.TransportError:
            continue
        seen.append((told, service.is_ready()))
    assert (0, False) in seen
    assert (1, False) not in seen
