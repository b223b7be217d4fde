"""Shadow: a second version gets a share of the traffic in idle time, without affecting answers."""

import os
import signal

import cv2
import numpy as np
import pytest

from support import tiny_bundle
from support.server import SHADOW_SECONDS, Server, wait_until


def read_counts(server: Server) -> dict[str, float]:
    """Return the number of images of each outcome."""
    return {
        outcome: server.metric("imago_shadow_images_total", outcome=outcome)
        for outcome in ("agree", "disagree", "failed", "dropped", "too_large")
    }


@pytest.mark.slow
def test_agreement_and_latency_of_the_shadow_version(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    tiny_bundle.publish(tmp_path, classes=["red", "green", "purple"], promote=False)
    server = start("--shadow-version", "2", "--shadow-share", "1", "--version", "1", store=tmp_path)
    wait_until(lambda: "shadow ready" in server.log.read_text(), SHADOW_SECONDS)
    for i in range(30):
        answer = server.predict(tiny_bundle.make_image(tiny_bundle.CLASSES[i % 3], seed=i)).json()
        assert answer["model"]["version"] == "1"
        # The socket holds few images, and the shadow process runs in idle time.
        wait_until(lambda i=i: sum(read_counts(server).values()) == i + 1, SHADOW_SECONDS)
    counts = read_counts(server)
    assert counts["failed"] == 0
    assert counts["dropped"] == 0
    assert counts["agree"] == 20
    assert counts["disagree"] == 10
    assert server.metric("imago_shadow_seconds_count") == 30
    assert 'imago_shadow_info{name="colours",variant="fp32",version="2"} 1.0' in server.metrics()
    assert server.metric("imago_predictions_total", label="purple") == 0


def test_images_too_large_for_a_datagram_are_counted_separately(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start("--shadow-version", "1", "--shadow-share", "1", store=tmp_path)
    wait_until(lambda: "shadow ready" in server.log.read_text(), SHADOW_SECONDS)
    large = tiny_bundle.make_image("red", 400)
    assert len(large) > 192 << 10
    assert server.predict(large).status_code == 200
    wait_until(lambda: read_counts(server)["too_large"] == 1, SHADOW_SECONDS)
    assert server.predict(tiny_bundle.make_image("red")).status_code == 200
    wait_until(lambda: read_counts(server)["agree"] == 1, SHADOW_SECONDS)
    assert sum(read_counts(server).values()) == 2


def test_only_a_share_of_the_images_is_sent(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start("--shadow-version", "1", "--shadow-share", "0.2", store=tmp_path)
    for i in range(200):
        server.predict(tiny_bundle.make_image("red", seed=i))
    wait_until(lambda: sum(read_counts(server).values()) >= 15, SHADOW_SECONDS)
    assert sum(read_counts(server).values()) <= 65


def test_a_shadow_version_that_cannot_be_loaded_is_not_run(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    path = tiny_bundle.publish(tmp_path, promote=False)
    (path / "model.onnx").write_bytes(b"no graph")
    server = start("--shadow-version", "2", "--shadow-share", "1", store=tmp_path)
    for i in range(20):
        assert server.predict(tiny_bundle.make_image("red", seed=i)).status_code == 200
    wait_until(lambda: "shadow version not loaded" in server.log.read_text(), SHADOW_SECONDS)
    wait_until(lambda: read_counts(server)["dropped"] == 20)
    # A restart would fail in the same way.
    assert server.metric("imago_restarts_total", process="shadow", reason="crash") == 0
    assert server.stop() == 0


def test_a_shadow_version_that_fails_on_an_image_continues(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    tiny_bundle.fail_on_bright_pixels(tiny_bundle.publish(tmp_path, promote=False))
    server = start("--shadow-version", "2", "--shadow-share", "1", "--version", "1", store=tmp_path)
    wait_until(lambda: "shadow ready" in server.log.read_text(), SHADOW_SECONDS)
    bright = cv2.imencode(".png", np.full((32, 32, 3), 255, np.uint8))[1].tobytes()
    assert server.predict(bright).status_code == 200
    wait_until(lambda: read_counts(server)["failed"] == 1, SHADOW_SECONDS)
    assert server.predict(tiny_bundle.make_image("red")).status_code == 200
    wait_until(lambda: read_counts(server)["agree"] == 1, SHADOW_SECONDS)
    assert server.metric("imago_restarts_total", process="shadow", reason="crash") == 0


def test_a_killed_shadow_process_is_replaced(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start("--shadow-version", "1", "--shadow-share", "1", store=tmp_path)
    wait_until(lambda: "shadow ready" in server.log.read_text(), SHADOW_SECONDS)
    (shadow,) = [pid for pid in server.children() if has_idle_priority(pid)]
    os.kill(shadow, signal.SIGKILL)
    wait_until(lambda: server.log.read_text().count("shadow ready") == 2, SHADOW_SECONDS)
    assert server.metric("imago_restarts_total", process="shadow", reason="crash") == 1
    assert server.predict(tiny_bundle.make_image("red")).status_code == 200
    wait_until(lambda: read_counts(server)["agree"] == 1, SHADOW_SECONDS)


def has_idle_priority(pid: int) -> bool:
    """Whether a process only gets idle CPU time (SCHED_IDLE)."""
    return os.sched_getscheduler(pid) == os.SCHED_IDLE
