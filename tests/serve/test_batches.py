"""How batches form: from what waits, shared by the cores, and by a timer only where that is asked for."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from support import tiny_bundle
from support.server import suspended_workers, wait_until

IMAGE = tiny_bundle.make_image("red")


@pytest.fixture(scope="module")
def slow() -> bytes:
    """An image that takes a tenth of a second or more to decode."""
    return cv2.imencode(".png", np.zeros((3200, 3200, 4), np.uint8))[1].tobytes()


def batches(server) -> tuple[float, float]:
    """How many there were, and the images in them."""
    return server.metric("imago_batch_size_count"), server.metric("imago_batch_size_sum")


def test_what_waits_becomes_a_batch(start):
    server = start("--threads", "1", "--max-batch-size", "8")
    with ThreadPoolExecutor(16) as threads:
        with suspended_workers(server):
            sent = [threads.submit(server.predict, IMAGE) for _ in range(16)]
            wait_until(lambda: server.metric("imago_pending_images") == 16)
        assert {future.result().status_code for future in sent} == {200}
    wait_until(lambda: batches(server)[1] == 16)
    assert batches(server)[0] <= 3


def test_the_images_of_a_request_are_shared_by_the_cores(start, tmp_path):
    tiny_bundle.publish(tmp_path, size=256)  # enough to do for two
    server = start("--threads", "2", "--max-batch-size", "16", store=tmp_path)
    for sent in range(
        1, 21
    ):  # a core that is awake first may rightly take what the other has not begun
        server.http.post("/predict", files=[("f", (f"{i}", IMAGE)) for i in range(16)])
        wait_until(lambda total=16 * sent: batches(server)[1] == total)
        if batches(server)[0] > sent:
            break
    assert batches(server)[0] > sent


def test_a_lone_request_waits_for_company_only_where_that_is_asked_for(start):
    server = start("--threads", "1", "--batch-wait-ms", "1000")
    with ThreadPoolExecutor(4) as threads:
        times = [
            f.result().headers["server-timing"]
            for f in [threads.submit(server.predict, IMAGE) for _ in range(4)]
        ]
    wait_until(lambda: batches(server)[1] == 4)
    assert batches(server)[0] <= 2
    assert max(float(text.split("dur=")[1].split(",")[0]) for text in times) > 500


def test_what_expires_in_a_batch_is_not_done_late(start, slow):
    server = start("--threads", "1", "--max-batch-size", "16", "--deadline-ms", "1500")
    with ThreadPoolExecutor(16) as threads:
        with suspended_workers(server):
            sent = [threads.submit(server.predict, slow) for _ in range(16)]
            wait_until(lambda: server.metric("imago_pending_images") > 12)
        statuses = [future.result().status_code for future in sent]
    assert set(statuses) <= {200, 504}
    wait_until(lambda: server.predict(IMAGE).status_code == 200)  # it rests again
    done = server.metric("imago_images_total", outcome="answered") - 1
    assert done == statuses.count(200)
    assert server.metric("imago_images_total", outcome="expired") == statuses.count(504)


def test_an_image_on_which_the_model_fails_hurts_no_other_of_its_batch(start, tmp_path):
    tiny_bundle.fail_on_bright_pixels(
        tiny_bundle.publish(tmp_path)
    )  # brighter than any of its samples
    bright = cv2.imencode(".png", np.full((32, 32, 3), 255, np.uint8))[1].tobytes()
    server = start("--threads", "1", store=tmp_path)
    with ThreadPoolExecutor(8) as threads:
        with suspended_workers(server):
            sent = [threads.submit(server.predict, bright if i == 3 else IMAGE) for i in range(8)]
            wait_until(lambda: server.metric("imago_pending_images") == 8)
        answers = [future.result() for future in sent]
    assert [answer.status_code for answer in answers] == [500 if i == 3 else 200 for i in range(8)]
    assert answers[3].json()["detail"] == "the model failed on this image"
    assert {
        answer.json()["predictions"][0]["label"] for i, answer in enumerate(answers) if i != 3
    } == {"red"}
    assert server.metric("imago_images_total", outcome="failed") == 1
    assert server.metric("imago_restarts_total", process="worker", reason="crash") == 0


def test_a_long_batch_is_no_hang(start, slow):
    server = start(
        "--threads",
        "1",
        "--max-batch-size",
        "16",
        "--worker-timeout-seconds",
        "2",
        "--deadline-ms",
        "60000",
    )
    with ThreadPoolExecutor(16) as threads:
        with suspended_workers(server):
            sent = [threads.submit(server.predict, slow) for _ in range(16)]
            wait_until(lambda: server.metric("imago_pending_images") > 12)
        assert {future.result().status_code for future in sent} == {200}
    assert server.metric("imago_restarts_total", process="worker", reason="hang") == 0


def test_to_wait_for_the_turn_of_a_large_image_is_no_hang(start, tmp_path):
    """Only one is decoded at a time, whatever the threads; here the last waits far longer than a worker may hang."""
    tiny_bundle.publish(tmp_path, size=256)  # enough to do for many
    large = cv2.imencode(".png", np.zeros((4500, 4500, 4), np.uint8))[1].tobytes()
    server = start(
        "--threads",
        "32",
        "--max-batch-size",
        "1",
        "--worker-timeout-seconds",
        "4",
        "--deadline-ms",
        "120000",
        store=tmp_path,
    )
    server.http.timeout = 120
    with ThreadPoolExecutor(32) as threads:
        statuses = {
            future.result().status_code
            for future in [threads.submit(server.predict, large) for _ in range(32)]
        }
    assert statuses == {200}
    assert server.metric("imago_restarts_total", process="worker", reason="hang") == 0
