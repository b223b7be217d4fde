"""Errors: they tell a client enough and nothing about the server, also during a restart."""

import base64
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

from support import ROOT, tiny_bundle
from support.blocked_path import BlockedPath
from support.server import Server, suspended_workers, wait_until

IMAGE = tiny_bundle.make_image("red")
INFER_PATH = "/v2/models/colours/infer"

# The model of `fail_on_bright_pixels` fails on it.
BRIGHT_IMAGE = cv2.imencode(".png", np.full((32, 32, 3), 255, np.uint8))[1].tobytes()


def infer(server: Server, image: bytes) -> httpx.Response:
    """Send an image file by the Open Inference Protocol."""
    text = base64.b64encode(image).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
    return server.http.post(INFER_PATH, json={"inputs": [tensor]})


def assert_hides_the_server(response: httpx.Response, store: Path) -> None:
    """Check that an error has a text, without paths, file names or code of the server."""
    assert response.json().get("detail") or response.json()["error"]
    for text in (str(store), str(ROOT), ".py", ".onnx", "Traceback", "/dev/shm", "/tmp"):
        assert text not in response.text, response.text


def test_errors_hide_the_files_of_the_server(start, tmp_path):
    tiny_bundle.fail_on_bright_pixels(tiny_bundle.publish(tmp_path))
    server = start("--deadline-ms", "4000", store=tmp_path)
    responses = [
        (server.http.get("/nothing"), 404),
        (server.http.get("/predict"), 405),
        (server.predict(b"no image"), 415),
        (server.predict(IMAGE[:60]), 422),
        (server.predict(b""), 400),
        (server.predict(BRIGHT_IMAGE), 500),
        (server.http.get("/report"), 404),
        (server.http.get("/samples/99"), 404),
        (server.http.get("/samples/..%2f..%2fmanifest.json"), 404),
        (infer(server, b"no image"), 415),
        (infer(server, BRIGHT_IMAGE), 500),
        (server.http.post(INFER_PATH, json={}), 400),
        (server.http.get(INFER_PATH), 405),
        (server.http.get("/v2/nothing"), 404),
        (server.http.get("/v2/models/other"), 404),
    ]
    with suspended_workers(server):
        with ThreadPoolExecutor(2) as threads:
            late = [threads.submit(send, server, IMAGE) for send in (Server.predict, infer)]
        responses += [(future.result(), 504) for future in late]

    for response, status in responses:
        assert response.status_code == status, response.text
        assert_hides_the_server(response, tmp_path)
    assert server.metric("imago_requests_total", code="504") == 2
    assert server.metric("imago_images_total", outcome="expired") == 2


def test_the_service_is_not_ready_while_a_killed_worker_is_replaced(start, tmp_path):
    store = tmp_path / "store"
    blocked_path = BlockedPath(tmp_path / "hang", tiny_bundle.publish(store))
    flags = ("--reload-seconds", "0", "--deadline-ms", "500")
    server = start(*flags, store=store, env=blocked_path.env)
    assert server.metric("imago_ready") == 1

    with blocked_path.blocked():  # so that the next worker does not become ready
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not server.is_ready())
        wait_until(blocked_path.is_reached)

        # Images wait for the next worker until their deadline.
        for response, status in (
            (server.http.get("/health/ready"), 503),
            (server.predict(IMAGE), 504),
            (infer(server, IMAGE), 504),
        ):
            assert response.status_code == status
            assert_hides_the_server(response, tmp_path)
        assert server.http.get("/v2/health/ready").status_code == 503
        assert server.metric("imago_ready") == 0
        assert server.is_live()

    server.wait_ready()
    assert server.metric("imago_ready") == 1


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_ready_metric_is_never_ahead_of_the_health_check(start, tmp_path, processes):
    blocked_path = BlockedPath(tmp_path / "hang", tiny_bundle.publish(tmp_path / "store"))
    flags = ("--api-processes", processes)
    with blocked_path.blocked():  # so that the service is seen before it is ready
        server = start(*flags, store=tmp_path / "store", env=blocked_path.env, wait=False)
        wait_until(server.is_live)
        assert server.metric("imago_ready") == 0
        assert not server.is_ready()

    is_ready = False
    while not is_ready:
        metric = server.metric("imago_ready")
        is_ready = server.is_ready()
        assert (metric, is_ready) != (1, False)
