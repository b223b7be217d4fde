"""The metrics, compared with what was sent to several processes, and read by a real Prometheus."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

from models.bundle import Calibration
from support import tiny_bundle
from support.server import CLIENT_SECONDS, NO_TLS, Server, find_free_ports, wait_until

PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
PNG = {"Content-Type": "image/png"}
JSON = {"Content-Type": "application/json"}


def send(server: Server, clients: int = 8, rounds: int = 12) -> tuple[Counter, Counter]:
    """Send requests of all kinds over several connections.

    Returns how often each status code and each predicted label was received.
    """
    with ThreadPoolExecutor(clients) as threads:
        results = list(threads.map(partial(send_rounds, server, rounds), range(clients)))
    codes = Counter()
    labels = Counter()
    for client_codes, client_labels in results:
        codes += client_codes
        labels += client_labels
    return codes, labels


def send_rounds(server: Server, rounds: int, client_number: int) -> tuple[Counter, Counter]:
    """Send one request of each kind per round: one image, many, no image, and malformed JSON."""
    codes = Counter()
    labels = Counter()
    images = [tiny_bundle.make_image(tiny_bundle.CLASSES[i % 3], seed=i) for i in range(4)]
    files = [("f", (str(i), image)) for i, image in enumerate([*images, b"no image"])]
    with httpx.Client(base_url=server.url, timeout=CLIENT_SECONDS, verify=NO_TLS) as http:
        for i in range(rounds):
            label = tiny_bundle.CLASSES[i % 3]
            image = tiny_bundle.make_image(label, seed=100 * client_number + i)
            for response in (
                http.post("/predict", content=image, headers=PNG),
                http.post("/predict", files=files),
                http.post("/predict", content=b"no image", headers=PNG),
                http.post("/predict", content=b"{", headers=JSON),
            ):
                codes[str(response.status_code)] += 1
                for prediction in response.json().get("predictions", []):
                    if "label" in prediction:
                        labels[prediction["label"]] += 1
    return codes, labels


def sum_of_predictions(server: Server) -> float:
    """Workers count a batch after its answers are sent, the predictions nearly last."""
    return sum(
        server.metric("imago_predictions_total", label=label) for label in tiny_bundle.CLASSES
    )


@pytest.fixture
def service(start, tmp_path):
    tiny_bundle.publish(
        tmp_path, calibration=Calibration(abstain_threshold=0.9825, energy_threshold=0.0)
    )
    return start("--workers", "2", "--api-processes", "2", store=tmp_path)


def test_counts_of_several_processes_add_up(service):
    codes, labels = send(service)
    assert codes == {"200": 192, "415": 96, "400": 96}
    images = sum(labels.values())
    assert images == 8 * 12 * 5
    wait_until(lambda: sum_of_predictions(service) == images)
    for code, count in codes.items():
        assert service.metric("imago_requests_total", code=code) == count
    for label, count in labels.items():
        assert service.metric("imago_predictions_total", label=label) == count
    assert service.metric("imago_images_total", outcome="answered") == images
    assert service.metric("imago_images_total", outcome="refused") == 192
    assert service.metric("imago_request_duration_seconds_count") == sum(codes.values())
    assert service.metric("imago_confidence_count") == images
    assert service.metric("imago_batch_size_sum") == images
    assert service.metric("imago_inference_seconds_count") == service.metric(
        "imago_batch_size_count"
    )
    wait_until(lambda: service.metric("imago_abstained_total") > 0)
    assert service.metric("imago_abstained_total") < images
    assert service.metric("imago_out_of_distribution_total") == 0
    assert service.metric("imago_pending_images") == 0
    assert service.metric("imago_ready") == 1


def test_out_of_distribution_counts_agree_with_the_answers(start, tmp_path):
    tiny_bundle.publish(tmp_path, calibration=Calibration(energy_threshold=-3.0))
    server = start("--workers", "2", store=tmp_path)
    gray = cv2.imencode(".png", np.full((32, 32, 3), 9, np.uint8))[1].tobytes()
    red = tiny_bundle.make_image("red")
    for i in range(12):
        gray_images = i % 4
        images = [gray] * gray_images + [red] * (3 - gray_images)
        files = [("f", (str(j), image)) for j, image in enumerate([*images, b"no image"])]
        predictions = server.http.post("/predict", files=files).json()["predictions"]
        flags = [prediction["out_of_distribution"] for prediction in predictions[:3]]
        assert flags == [True] * gray_images + [False] * (3 - gray_images)

    # Predictions are counted after the answer is sent.
    wait_until(lambda: server.metric("imago_confidence_count") == 36)
    wait_until(lambda: server.metric("imago_out_of_distribution_total") == 18)


@pytest.mark.parametrize(
    ("name", "labels", "words"),
    [
        ("imago_restarts_total", {"kind": "worker", "reason": "crash"}, "process"),
        ("imago_ready", {"a": "b"}, "labels"),
        ("imago_restarts_total", {}, "process"),
        ("imago_restart_total", {"process": "worker"}, "no metric"),
    ],
)
def test_the_helper_refuses_series_that_cannot_exist(server, name, labels, words):
    """It returns 0 for a series that does not exist yet; a misspelled one must not pass as 0."""
    with pytest.raises(AssertionError, match=words):
        server.metric(name, **labels)


def test_model_info_has_only_the_version_of_the_replaced_worker(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start("--reload-seconds", "0", store=tmp_path)
    tiny_bundle.publish(tmp_path)
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: server.http.get("/model").json().get("version") == "2")
    lines = server.metrics().splitlines()
    (info,) = [line for line in lines if line.startswith("imago_model_info{")]
    assert 'version="2"' in info


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_accepts_the_metrics(service):
    send(service, clients=2, rounds=2)
    answer = service.predict(tiny_bundle.make_image("red")).json()
    service.http.post("/feedback", json={"id": answer["id"], "label": "red"})
    result = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=service.metrics(), text=True, capture_output=True
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert output.strip() == ""


@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed")
def test_a_real_prometheus_scrapes_the_service(service, tmp_path):
    codes, _ = send(service, clients=4, rounds=3)
    with running_prometheus(tmp_path, service.metrics_port) as url:
        end = time.monotonic() + 240
        while query(url, 'up{job="imago"}') != {"": 1}:
            assert time.monotonic() < end, (tmp_path / "prometheus.log").read_text()
            time.sleep(0.2)

        counts = query(url, "imago_requests_total")
        assert {code: count for code, count in counts.items() if count} == codes
        buckets = "sum by (le) (imago_request_duration_seconds_bucket)"
        quantile = query(url, f"histogram_quantile(0.99, {buckets})")
        assert 0 < quantile[""] < 10

        (target,) = httpx.get(f"{url}/api/v1/targets").json()["data"]["activeTargets"]
        assert target["health"] == "up"
        assert target["lastError"] == ""


@contextlib.contextmanager
def running_prometheus(directory: Path, metrics_port: int) -> Iterator[str]:
    """Run a Prometheus that scrapes this port once a second, and yield its URL."""
    scrape = {
        "job_name": "imago",
        "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}],
    }
    config = directory / "prometheus.json"  # JSON is YAML
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}))
    (port,) = find_free_ports(1)
    command = [
        PROMETHEUS,
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def query(url: str, expression: str) -> dict[str, float]:
    """Return the values of a PromQL query by label `code`, none until Prometheus is ready."""
    try:
        response = httpx.get(f"{url}/api/v1/query", params={"query": expression}, verify=NO_TLS)
    except httpx.TransportError:
        return {}
    if response.status_code == 503:
        return {}

    values: dict[str, float] = {}
    for result in response.json()["data"]["result"]:
        code = result["metric"].get("code", "")
        values[code] = float(result["value"][1])
    return values


def test_a_disconnected_scraper_is_logged_at_debug_level(start):
    server = start("--log-level", "debug")
    for request_start in (b"GET /met", b"GET /metrics HTTP/1.1\r\nX: "):
        scraper = socket.create_connection(("127.0.0.1", server.metrics_port))
        scraper.sendall(request_start)
        scraper.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        scraper.close()  # sends RST
    wait_until(lambda: server.log.read_text().count("a scrape was not answered") == 2)
    assert server.metric("imago_ready") == 1
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert [line["level"] for line in lines if "scrape" in line["message"]] == ["debug", "debug"]


@pytest.mark.slow
def test_slow_scrapers_are_limited_in_number_and_time(start):
    """At most 16 scrapes run at once, each for about ten seconds at most."""
    server = start()
    before = count_threads(server)
    with contextlib.ExitStack() as stack:
        scrapers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.metrics_port), 30))
            for _ in range(48)
        ]
        wait_until(lambda: count_threads(server) > before)
        for scraper in scrapers:
            scraper.settimeout(0.1)
        end = time.monotonic() + 120
        while scrapers:
            assert count_threads(server) <= before + 16
            assert time.monotonic() < end, f"{len(scrapers)} are still open"
            scrapers = [scraper for scraper in scrapers if not is_closed(scraper)]
    wait_until(lambda: count_threads(server) == before)
    assert server.metric("imago_ready") == 1


def count_threads(server: Server) -> int:
    """Return the number of threads of the supervisor."""
    return len(os.listdir(f"/proc/{server.process.pid}/task"))


def is_closed(scraper: socket.socket) -> bool:
    """Send one more byte and return whether the server has closed the connection."""
    try:
        scraper.sendall(b"G")
        return scraper.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_label_counts_are_bounded(start, tmp_path: Path):
    tiny_bundle.publish(tmp_path, classes=[f"class {i}" for i in range(300)])
    server = start(store=tmp_path)
    for i in range(20):
        server.http.get(f"/{i}")
        server.http.post(f"/v2/models/unknown-{i}/infer", json={})
        server.http.request(f"METHOD{i}", "/predict")
        server.predict(tiny_bundle.make_image("blue"), f"?top_k={i}", **{"X-Request-ID": f"id-{i}"})
    series: Counter[str] = Counter()
    for line in server.metrics().splitlines():
        if line[0] != "#":
            series[re.match(r"\w+", line)[0]] += 1
    assert series["imago_predictions_total"] <= 101
    assert series["imago_requests_total"] <= 13
    assert sum(series.values()) < 350
