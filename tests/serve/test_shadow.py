"""Shadow: a second version gets a share of the traffic, in idle time, and can do no harm."""

import os
import signal

import cv2
import numpy as np
import pytest
from support import tiny_bundle
from support.server import wait_until


def counted(service) -> dict[str, float]:
    return {
        outcome: service.metric("imago_shadow_images_total", outcome=outcome)
        for outcome in ("agree", "disagree", "failed", "dropped", "too_large")
    }


def test_agreement_and_latency_of_a_second_version(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    tiny_bundle.publish(tmp_path, classes=["red", "green", "purple"], promote=False)
    service = start(
        "--shadow-version", "2", "--shadow-share", "1", "--version", "1", store=tmp_path
    )
    wait_until(lambda: "shadow ready" in service.log.read_text())
    for i in range(30):
        answer = service.predict(tiny_bundle.make_image(tiny_bundle.CLASSES[i % 3], seed=i)).json()
        assert answer["model"]["version"] == "1"
        wait_until(
            lambda i=i: sum(counted(service).values()) == i + 1
        )  # room for few, and it runs when others rest
    found = counted(service)
    assert found["failed"] == found["dropped"] == 0
    assert (found["agree"], found["disagree"]) == (20, 10)
    assert service.metric("imago_shadow_seconds_count") == 30
    assert 'imago_shadow_info{name="colours",variant="fp32",version="2"} 1.0' in service.metrics()
    assert service.metric("imago_predictions_total", label="purple") == 0


def test_what_is_too_large_to_be_handed_over_counts_apart(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start("--shadow-version", "1", "--shadow-share", "1", store=tmp_path)
    wait_until(lambda: "shadow ready" in service.log.read_text())
    large = tiny_bundle.make_image("red", 400)
    assert len(large) > 192 << 10
    assert service.predict(large).status_code == 200
    wait_until(lambda: counted(service)["too_large"] == 1)
    assert service.predict(tiny_bundle.make_image("red")).status_code == 200
    wait_until(lambda: counted(service)["agree"] == 1)
    assert sum(counted(service).values()) == 2


def test_only_a_share_is_taken(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start("--shadow-version", "1", "--shadow-share", "0.2", store=tmp_path)
    for i in range(200):
        service.predict(tiny_bundle.make_image("red", seed=i))
    assert sum(counted(service).values()) == pytest.approx(40, abs=25)


def test_a_shadow_that_cannot_be_loaded_does_no_harm(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    path = tiny_bundle.publish(tmp_path, promote=False)
    (path / "model.onnx").write_bytes(b"no graph")
    service = start("--shadow-version", "2", "--shadow-share", "1", store=tmp_path)
    for i in range(20):
        assert service.predict(tiny_bundle.make_image("red", seed=i)).status_code == 200
    wait_until(lambda: "shadow version not loaded" in service.log.read_text())
    assert counted(service)["dropped"] == 20
    assert service.metric("imago_restarts_total", process="shadow", reason="crash") == 0, (
        "another could not either"
    )
    assert service.stop() == 0


def test_a_shadow_that_fails_on_an_image_goes_on(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    tiny_bundle.fail_on_bright_pixels(tiny_bundle.publish(tmp_path, promote=False))
    service = start(
        "--shadow-version", "2", "--shadow-share", "1", "--version", "1", store=tmp_path
    )
    wait_until(lambda: "shadow ready" in service.log.read_text())
    bright = cv2.imencode(".png", np.full((32, 32, 3), 255, np.uint8))[1].tobytes()
    assert service.predict(bright).status_code == 200
    wait_until(lambda: counted(service)["failed"] == 1)
    assert service.predict(tiny_bundle.make_image("red")).status_code == 200
    wait_until(lambda: counted(service)["agree"] == 1)
    assert service.metric("imago_restarts_total", process="shadow", reason="crash") == 0


def test_a_shadow_that_dies_is_replaced(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start("--shadow-version", "1", "--shadow-share", "1", store=tmp_path)
    wait_until(lambda: "shadow ready" in service.log.read_text())
    (shadow,) = [pid for pid in service.children() if idle(pid)]
    os.kill(shadow, signal.SIGKILL)
    wait_until(lambda: service.log.read_text().count("shadow ready") == 2)
    assert service.metric("imago_restarts_total", process="shadow", reason="crash") == 1
    assert service.predict(tiny_bundle.make_image("red")).status_code == 200
    wait_until(lambda: counted(service)["agree"] == 1)


def idle(pid: int) -> bool:
    """Whether it only gets idle time (SCHED_IDLE)."""
    return os.sched_getscheduler(pid) == os.SCHED_IDLE
