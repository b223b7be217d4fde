"""Metrics as a real Prometheus reads them, and against the sum of what was sent to several processes."""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from support import tiny_bundle
from support.server import find_free_ports, wait_until

from models.bundle import Calibration
from serve.metrics.exposition import CONNECTION_SECONDS, MAX_CONNECTIONS

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")


def send(service, clients: int = 8, rounds: int = 12) -> tuple[Counter, Counter]:
    """Requests of all kinds, over many connections. What came back: statuses, and labels of predictions."""

    def ask(number: int) -> tuple[Counter, Counter]:
        codes, labels = Counter(), Counter()
        with httpx.Client(base_url=service.url, timeout=30) as http:
            for i in range(rounds):
                image = tiny_bundle.make_image(tiny_bundle.CLASSES[i % 3], seed=100 * number + i)
                many = [
                    ("f", (str(j), tiny_bundle.make_image(tiny_bundle.CLASSES[j % 3], seed=j)))
                    for j in range(4)
                ]
                for answer in (
                    http.post("/predict", content=image, headers={"Content-Type": "image/png"}),
                    http.post("/predict", files=[*many, ("f", ("x", b"no image"))]),
                    http.post(
                        "/predict", content=b"no image", headers={"Content-Type": "image/png"}
                    ),
                    http.post(
                        "/predict", content=b"{", headers={"Content-Type": "application/json"}
                    ),
                ):
                    codes[str(answer.status_code)] += 1
                    labels.update(
                        p["label"] for p in answer.json().get("predictions", []) if "label" in p
                    )
        return codes, labels

    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(ask, range(clients)))
    return sum((c for c, _ in results), Counter()), sum((found for _, found in results), Counter())


@pytest.fixture
def service(start, tmp_path):
    tiny_bundle.publish(
        tmp_path, calibration=Calibration(abstain_threshold=0.9825, energy_threshold=0.0)
    )
    return start("--workers", "2", "--api-processes", "2", store=tmp_path)


def test_several_processes_count_what_was_sent(service):
    codes, labels = send(service)
    assert codes == {"200": 192, "415": 96, "400": 96}
    for code, count in codes.items():
        assert service.metric("imago_requests_total", code=code) == count
    for label, count in labels.items():
        assert service.metric("imago_predictions_total", label=label) == count
    images = sum(labels.values())
    assert images == 8 * 12 * 5
    assert service.metric("imago_images_total", outcome="answered") == images
    assert service.metric("imago_images_total", outcome="refused") == 192
    assert service.metric("imago_request_duration_seconds_count") == sum(codes.values())
    assert service.metric("imago_confidence_count") == images
    assert service.metric("imago_batch_size_sum") == images
    assert service.metric("imago_inference_seconds_count") == service.metric(
        "imago_batch_size_count"
    )
    assert 0 < service.metric("imago_abstained_total") < images
    assert service.metric("imago_out_of_distribution_total") == 0
    assert service.metric("imago_pending_images") == 0
    assert service.metric("imago_ready") == 1


def test_what_is_out_of_distribution_is_counted_as_it_was_told(start, tmp_path):
    tiny_bundle.publish(tmp_path, calibration=Calibration(energy_threshold=-3.0))
    service = start("--workers", "2", store=tmp_path)
    gray = cv2.imencode(".png", np.full((32, 32, 3), 9, np.uint8))[1].tobytes()
    told = []
    for i in range(12):
        many = [
            ("f", (str(j), gray if j < i % 4 else tiny_bundle.make_image("red", seed=j)))
            for j in range(3)
        ]
        answers = service.http.post("/predict", files=[*many, ("f", ("x", b"no image"))]).json()[
            "predictions"
        ][:3]
        told += [answer["out_of_distribution"] for answer in answers]
        assert told[-3:] == [j < i % 4 for j in range(3)]
    wait_until(
        lambda: service.metric("imago_confidence_count") == 36
    )  # counted after an answer has left
    assert service.metric("imago_out_of_distribution_total") == sum(told) == 18


@pytest.mark.parametrize(
    ("name", "labels", "words"),
    [
        ("imago_restarts_total", {"kind": "worker", "reason": "crash"}, "process"),
        ("imago_ready", {"a": "b"}, "labels"),
        ("imago_restarts_total", {}, "process"),
        ("imago_restart_total", {"process": "worker"}, "no metric"),
    ],
)
def test_a_series_that_can_never_be_is_not_taken_for_zero(server, name, labels, words):
    """A test that asked for it would pass whatever the service does."""
    with pytest.raises(AssertionError, match=words):
        server.metric(name, **labels)


def test_a_worker_that_comes_back_with_another_version_tells_of_that_alone(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start("--reload-seconds", "0", store=tmp_path)
    tiny_bundle.publish(tmp_path)
    (worker,) = service.workers()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: service.http.get("/model").json().get("version") == "2")
    told = [line for line in service.metrics().splitlines() if line.startswith("imago_model_info{")]
    assert len(told) == 1
    assert 'version="2"' in told[0]


@pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool on this machine")
def test_promtool_is_content(service):
    send(service, clients=2, rounds=2)
    said = service.predict(tiny_bundle.make_image("red")).json()
    service.http.post("/feedback", json={"id": said["id"], "label": "red"})
    ran = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=service.metrics(), text=True, capture_output=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (ran.stdout + ran.stderr).strip() == ""


@pytest.mark.skipif(PROMETHEUS is None, reason="there is no Prometheus on this machine")
def test_a_real_prometheus_scrapes_it(service, tmp_path):
    codes, _ = send(service, clients=4, rounds=3)
    config, (port,) = tmp_path / "prometheus.json", find_free_ports(1)  # JSON is YAML
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "1s"},
                "scrape_configs": [
                    {
                        "job_name": "imago",
                        "static_configs": [{"targets": [f"127.0.0.1:{service.metrics_port}"]}],
                    }
                ],
            }
        )
    )
    command = [
        PROMETHEUS,
        f"--config.file={config}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:

        def query(text: str) -> dict[str, float]:
            try:
                found = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": text})
            except httpx.TransportError:
                return {}
            if found.status_code == 503:  # it is starting
                return {}
            return {
                r["metric"].get("code", ""): float(r["value"][1])
                for r in found.json()["data"]["result"]
            }

        end = time.monotonic() + 60
        while query('up{job="imago"}') != {"": 1}:
            assert time.monotonic() < end, (tmp_path / "prometheus.log").read_text()
            time.sleep(0.2)
        assert {c: n for c, n in query("imago_requests_total").items() if n} == codes
        quantile = query(
            "histogram_quantile(0.99, sum by (le) (imago_request_duration_seconds_bucket))"
        )
        assert 0 < quantile[""] < 10
        targets = httpx.get(f"http://127.0.0.1:{port}/api/v1/targets").json()["data"][
            "activeTargets"
        ]
        assert [(t["health"], t["lastError"]) for t in targets] == [("up", "")]
    finally:
        process.terminate()
        process.wait(30)


def test_a_scraper_that_goes_away_leaves_one_line_that_is_json(start):
    service = start("--log-level", "debug")
    for begun in (b"GET /met", b"GET /metrics HTTP/1.1\r\nX: "):
        scraper = socket.create_connection(("127.0.0.1", service.metrics_port))
        scraper.sendall(begun)
        scraper.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        scraper.close()  # with a reset
    wait_until(lambda: service.log.read_text().count("a scrape was not answered") == 2)
    assert service.metric("imago_ready") == 1
    assert service.stop() == 0
    lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    assert [line["level"] for line in lines if "scrape" in line["message"]] == ["debug", "debug"]


def test_slow_scrapers_are_few_and_are_not_waited_for(start):
    service = start()
    before = threads(service)
    with contextlib.ExitStack() as held:
        scrapers = [
            held.enter_context(socket.create_connection(("127.0.0.1", service.metrics_port), 30))
            for _ in range(3 * MAX_CONNECTIONS)
        ]
        wait_until(lambda: threads(service) > before)
        for scraper in scrapers:
            scraper.settimeout(0.1)
        end = time.monotonic() + 3 * CONNECTION_SECONDS
        while scrapers:
            assert threads(service) <= before + MAX_CONNECTIONS
            assert time.monotonic() < end, f"{len(scrapers)} are still waited for"
            scrapers = [scraper for scraper in scrapers if not ended(scraper)]
    wait_until(lambda: threads(service) == before)
    assert service.metric("imago_ready") == 1


def threads(service) -> int:
    """Of the first process."""
    return len(os.listdir(f"/proc/{service.process.pid}/task"))


def ended(scraper: socket.socket) -> bool:
    """Whether the other side closed the connection; else it gets one more byte."""
    try:
        scraper.sendall(b"G")
        return scraper.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_label_counts_are_bounded(start, tmp_path: Path):
    tiny_bundle.publish(tmp_path, classes=[f"class {i}" for i in range(300)])
    service = start(store=tmp_path)
    for i in range(20):
        service.http.get(f"/{i}")
        service.http.post(f"/v2/models/nobody-{i}/infer", json={})
        service.http.request(f"METHOD{i}", "/predict")
        service.predict(
            tiny_bundle.make_image("blue"), f"?top_k={i}", **{"X-Request-ID": f"id-{i}"}
        )
    series = Counter(
        line.split("{")[0].split(" ")[0]
        for line in service.metrics().splitlines()
        if line[0] != "#"
    )
    assert series["imago_predictions_total"] <= 101
    assert series["imago_requests_total"] <= 12
    assert sum(series.values()) < 350
