"""Batching: waiting images form batches that all threads share, and a timer only on demand."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import httpx
import numpy as np
import pytest

from support import tiny_bundle
from support.server import Server, suspended_workers, wait_until

IMAGE = tiny_bundle.make_image("red")


BLACK_IMAGE = cv2.imencode(".png", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
BRIGHT_IMAGE = cv2.imencode(".png", np.full((32, 32, 3), 255, np.uint8))[1].tobytes()


@pytest.fixture(scope="module")
def slow_image() -> bytes:
    """An image that takes at least a tenth of a second to decode."""
    return cv2.imencode(".png", np.zeros((3200, 3200, 4), np.uint8))[1].tobytes()


def count_batches(server: Server) -> float:
    return server.metric("imago_batch_size_count")


def count_batched_images(server: Server) -> float:
    return server.metric("imago_batch_size_sum")


def predict_together(
    server: Server, images: list[bytes], min_pending: int | None = None
) -> list[httpx.Response]:
    """Send images to suspended workers, so that they find them all at once when they continue.

    The workers continue when `min_pending` images wait for them, by default all, or when one has
    expired.
    """
    if min_pending is None:
        min_pending = len(images)
    with ThreadPoolExecutor(len(images)) as threads:
        with suspended_workers(server):
            futures = [threads.submit(server.predict, image) for image in images]
            wait_until(
                lambda: (
                    server.metric("imago_pending_images") >= min_pending
                    or any(future.done() for future in futures)
                )
            )
        return [future.result() for future in futures]


def test_waiting_images_form_a_batch(start):
    server = start("--threads", "1", "--max-batch-size", "8")
    responses = predict_together(server, [IMAGE] * 16)
    assert {response.status_code for response in responses} == {200}
    wait_until(lambda: count_batched_images(server) == 16)
    assert count_batches(server) <= 3


def test_threads_share_the_images_of_a_request(start, tmp_path):
    tiny_bundle.publish(tmp_path, size=256)  # enough work for two threads
    server = start("--threads", "2", "--max-batch-size", "16", store=tmp_path)
    files = [("f", (f"{i}", IMAGE)) for i in range(16)]

    # Several attempts, because a thread that is awake first may take all images.
    for requests in range(1, 21):
        server.http.post("/predict", files=files)
        wait_until(lambda total=16 * requests: count_batched_images(server) == total)
        if count_batches(server) > requests:
            break
    assert count_batches(server) > requests


def test_a_batch_waits_for_more_images_only_on_demand(start):
    """Until it is full, or until the time is over."""
    server = start("--threads", "1", "--max-batch-size", "4", "--batch-wait-ms", "1000")
    timing = server.predict(IMAGE).headers["server-timing"]
    queue_ms = float(timing.split("dur=")[1].split(",")[0])
    assert queue_ms > 500
    wait_until(lambda: count_batched_images(server) == 1)

    # On a busy machine the four may arrive over a longer time, so there are several attempts.
    for attempt in range(1, 21):
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(server.predict, [IMAGE] * 4))
        wait_until(lambda total=1 + 4 * attempt: count_batched_images(server) == total)
        if count_batches(server) < 1 + 4 * attempt:
            break
    assert count_batches(server) < 1 + 4 * attempt


def test_images_that_expire_in_a_batch_are_dropped(start, slow_image):
    server = start("--threads", "1", "--max-batch-size", "16", "--deadline-ms", "1500")
    responses = predict_together(server, [slow_image] * 16, min_pending=13)
    statuses = [response.status_code for response in responses]
    assert set(statuses) <= {200, 504}

    statuses.append(server.predict(IMAGE).status_code)
    while statuses[-1] != 200:  # until the worker is idle again
        statuses.append(server.predict(IMAGE).status_code)
    assert server.metric("imago_images_total", outcome="answered") == statuses.count(200)
    assert server.metric("imago_images_total", outcome="expired") == statuses.count(504)


@pytest.mark.parametrize(
    ("alter", "image", "detail"),
    [
        (tiny_bundle.fail_on_bright_pixels, BRIGHT_IMAGE, "the model failed on this image"),
        (tiny_bundle.give_nan_for_black, BLACK_IMAGE, "NaN or infinite"),
    ],
    ids=["error", "NaN"],
)
def test_an_image_on_which_the_model_fails_does_not_affect_its_batch(
    start, tmp_path, alter, image, detail
):
    alter(tiny_bundle.publish(tmp_path))
    server = start("--threads", "1", store=tmp_path)

    images = [IMAGE] * 8
    images[3] = image
    responses = predict_together(server, images)

    failed = responses.pop(3)
    assert failed.status_code == 500
    assert detail in failed.json()["detail"]
    for response in responses:
        assert response.status_code == 200
        assert response.json()["predictions"][0]["label"] == "red"
    assert server.metric("imago_images_total", outcome="failed") == 1
    assert server.metric("imago_restarts_total", process="worker", reason="crash") == 0
    wait_until(lambda: server.metric("imago_confidence_count") == 7)
    assert server.metric("imago_confidence_sum") == pytest.approx(7, abs=0.5)


@pytest.mark.slow
def test_a_worker_with_a_long_batch_is_not_restarted(start, slow_image):
    server = start(
        *("--threads", "1"),
        *("--max-batch-size", "16"),
        *("--worker-timeout-seconds", "2"),
        *("--deadline-ms", "60000"),
    )
    responses = predict_together(server, [slow_image] * 16, min_pending=13)
    assert {response.status_code for response in responses} == {200}
    assert server.metric("imago_restarts_total", process="worker", reason="hang") == 0


@pytest.mark.slow
def test_a_worker_whose_threads_wait_to_decode_is_not_restarted(start, tmp_path):
    """One large image is decoded at a time, so the last waits much longer than the timeout."""
    tiny_bundle.publish(tmp_path, size=256)  # enough work for many threads
    large_image = cv2.imencode(".png", np.zeros((4500, 4500, 4), np.uint8))[1].tobytes()
    server = start(
        *("--threads", "32"),
        *("--max-batch-size", "1"),
        *("--worker-timeout-seconds", "4"),
        *("--deadline-ms", "120000"),
        store=tmp_path,
    )
    server.http.timeout = 120
    with ThreadPoolExecutor(32) as threads:
        futures = [threads.submit(server.predict, large_image) for _ in range(32)]
        statuses = {future.result().status_code for future in futures}
    assert statuses == {200}
    assert server.metric("imago_restarts_total", process="worker", reason="hang") == 0
