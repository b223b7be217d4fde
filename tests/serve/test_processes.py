"""Several HTTP processes and several workers behave as one service."""

import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support import ROOT, tiny_bundle
from support.server import Server

GOOD, BAD = tiny_bundle.make_image("blue"), b"hello"


@pytest.fixture(scope="module")
def service(bundle_store, tmp_path_factory):
    with Server(
        bundle_store,
        tmp_path_factory.mktemp("fleet") / "log",
        "--api-processes",
        "2",
        "--workers",
        "2",
        "--threads",
        "1",
        "--drift-window",
        "0",
    ) as running:
        yield running.wait_ready()


def test_metrics_are_the_sum_over_all_processes(service):
    def client(number: int) -> Counter:
        statuses: Counter = Counter()
        with httpx.Client(
            base_url=service.url, timeout=30
        ) as http:  # a connection each, so both processes get some
            for i in range(25):
                kind, content = ("good", GOOD) if (i + number) % 5 else ("bad", BAD)
                answer = http.post(
                    "/predict", content=content, headers={"Content-Type": "image/png"}
                )
                statuses[kind, answer.status_code] += 1
            many = [("f", (f"{i}", GOOD)) for i in range(3)] + [("f", ("x", BAD))]
            statuses["many", http.post("/predict", files=many).status_code] += 1
        return statuses

    with ThreadPoolExecutor(16) as threads:
        sent = sum(threads.map(client, range(16)), Counter())
    assert set(sent) == {("good", 200), ("bad", 415), ("many", 200)}
    assert sent.total() == 16 * 26
    good, bad, many = sent["good", 200], sent["bad", 415], sent["many", 200]
    metric = service.metric
    assert metric("imago_requests_total", code="200") == good + many
    assert metric("imago_requests_total", code="415") == bad
    assert metric("imago_request_duration_seconds_count") == good + bad + many
    assert metric("imago_images_total", outcome="answered") == good + 3 * many
    assert metric("imago_images_total", outcome="refused") == bad + many
    for name in ("queue_wait_seconds", "decode_seconds", "confidence"):
        assert metric(f"imago_{name}_count") == good + 3 * many
    assert metric("imago_batch_size_sum") == good + 3 * many
    assert metric("imago_batch_size_count") == metric("imago_inference_seconds_count")
    assert metric("imago_predictions_total", label="blue") == good + 3 * many
    assert metric("imago_predictions_total", label="red") == 0
    assert metric("imago_pending_images") == 0
    assert metric("imago_ready") == 1
    for kind in ("request_duration_seconds", "batch_size", "confidence"):
        assert metric(f"imago_{kind}_bucket", le="+Inf") == metric(f"imago_{kind}_count")


def test_all_workers_and_http_processes_get_requests(service):
    """Each process has counters of its own, and none of them is 0."""
    runs = [path for path in Path("/dev/shm").glob("imago-*") if maps_directory(service, path)]
    assert len(runs) == 1
    from serve.metrics.shared_counters import read_entries

    for pattern, name in (("api-?", "requests"), ("worker-?-0", "batch_size")):
        counts = []
        for path in sorted(runs[0].glob(f"{pattern}.metrics")):
            data = path.read_bytes()
            values = memoryview(data).cast("d")
            counts.append(sum(values[at] for metric, _, at in read_entries(data) if metric == name))
        assert len(counts) == 2
        assert min(counts) > 0, f"{pattern}: {counts}"


def maps_directory(server: Server, path: Path) -> bool:
    """Whether the server has mapped files of this directory."""
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    return str(path) in maps


def test_request_ids_differ_between_processes(service):
    def ask(_: int) -> str:
        return httpx.post(
            f"{service.url}/predict", content=GOOD, headers={"Content-Type": "image/png"}
        ).json()["id"]

    with ThreadPoolExecutor(8) as threads:
        ids = list(threads.map(ask, range(64)))
    assert len(set(ids)) == 64


def test_unchecked_service_of_the_benchmarks_answers(start):
    """It counts nothing and gives all requests the same id."""
    service = start(
        "--max-pending",
        "1",
        command=[sys.executable, str(ROOT / "tests" / "benchmarks" / "serve_unchecked.py")],
    )
    for _ in range(20):
        answer = service.http.post("/predict", files=[("f", ("a", GOOD)), ("f", ("b", GOOD))])
        assert [p["label"] for p in answer.json()["predictions"]] == ["blue", "blue"]
        assert answer.headers["x-request-id"] == "0"
    counted = [
        line
        for line in service.metrics().splitlines()
        if line[0] != "#" and not line.endswith(" 0.0")
    ]
    assert {re.match(r"\w+", line)[0] for line in counted} == {"imago_ready", "imago_model_info"}
