"""Several HTTP processes and several workers behave as one service."""

import fcntl
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from models.image import SHARED_BYTES
from serve.metrics.shared_counters import read_entries
from serve.shared_state import SharedState
from serve.worker.decoding_memory import LOCK_NAME, DecodingMemory
from support import ROOT, tiny_bundle
from support.server import CLIENT_SECONDS, NO_TLS, Server, wait_until

GOOD = tiny_bundle.make_image("blue")
BAD = b"hello"
PNG = {"Content-Type": "image/png"}
LISTEN = "0A"  # a state of a socket in /proc/net/tcp


@pytest.fixture(scope="module")
def service(bundle_store, serve_commands, tmp_path_factory):
    flags = (
        *("--api-processes", "2"),
        *("--workers", "2"),
        *("--threads", "1"),
        *("--drift-window", "0"),
    )
    log = tmp_path_factory.mktemp("processes") / "log"
    with Server(bundle_store, log, *flags, forker=serve_commands) as running:
        yield running.wait_ready()


def send_requests(server: Server, client_number: int) -> Counter:
    """Send 26 requests over one connection. Count them by kind and status."""
    four_files = [("f", (str(i), image)) for i, image in enumerate([GOOD, GOOD, GOOD, BAD])]
    statuses: Counter = Counter()
    with httpx.Client(base_url=server.url, timeout=CLIENT_SECONDS, verify=NO_TLS) as http:
        for i in range(25):
            is_good = (i + client_number) % 5 > 0
            response = http.post("/predict", content=GOOD if is_good else BAD, headers=PNG)
            statuses["good" if is_good else "bad", response.status_code] += 1
        response = http.post("/predict", files=four_files)
        statuses["many", response.status_code] += 1
    return statuses


def test_metrics_are_the_sum_over_all_processes(service):
    with ThreadPoolExecutor(16) as threads:
        counts = threads.map(partial(send_requests, service), range(16))
    sent = sum(counts, Counter())
    assert set(sent) == {("good", 200), ("bad", 415), ("many", 200)}
    assert sent.total() == 16 * 26
    good = sent["good", 200]
    bad = sent["bad", 415]
    many = sent["many", 200]

    metric = service.metric
    # Workers count a batch after its answers are sent, the predictions last.
    wait_until(lambda: metric("imago_predictions_total", label="blue") == good + 3 * many)
    assert metric("imago_requests_total", code="200") == good + many
    assert metric("imago_requests_total", code="415") == bad
    assert metric("imago_request_duration_seconds_count") == good + bad + many
    assert metric("imago_images_total", outcome="answered") == good + 3 * many
    assert metric("imago_images_total", outcome="refused") == bad + many
    for name in ("queue_wait_seconds", "decode_seconds", "confidence"):
        assert metric(f"imago_{name}_count") == good + 3 * many
    assert metric("imago_batch_size_sum") == good + 3 * many
    assert metric("imago_batch_size_count") == metric("imago_inference_seconds_count")
    assert metric("imago_predictions_total", label="red") == 0
    assert metric("imago_pending_images") == 0
    assert metric("imago_ready") == 1
    for kind in ("request_duration_seconds", "batch_size", "confidence"):
        assert metric(f"imago_{kind}_bucket", le="+Inf") == metric(f"imago_{kind}_count")


def test_all_workers_and_http_processes_get_requests(service):
    """Each process has its own file of counters, and none of them stays 0."""
    directory = service.run_directory()
    http_files = sorted(directory.glob("api-?.metrics"))
    worker_files = sorted(directory.glob("worker-?-0.metrics"))
    assert len(http_files) == len(worker_files) == 2

    def all_have_counted() -> bool:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(send, range(8)))
        counts = [read_counter(path, "requests") for path in http_files]
        counts += [read_counter(path, "batch_size") for path in worker_files]
        return min(counts) > 0

    def send(_: int) -> None:
        """Send an image over a connection of its own, which any HTTP process may accept."""
        assert (
            httpx.post(
                f"{service.url}/predict", content=GOOD, headers=PNG, verify=NO_TLS
            ).status_code
            == 200
        )

    wait_until(all_have_counted)


def read_counter(path: Path, name: str) -> float:
    """Return the sum of the first numbers of all series of a metric, in one file of counters."""
    data = path.read_bytes()
    values = memoryview(data).cast("d")
    return sum(values[index] for metric, _, index in read_entries(data) if metric == name)


def test_processes_are_named(service):
    names = [read_process_name(pid) for pid in service.children()]
    assert sorted(names) == [
        "imago-http-0",
        "imago-http-1",
        "imago-launcher",
        "imago-worker-0",
        "imago-worker-1",
    ]


def read_process_name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().rstrip()


def test_the_launcher_has_one_thread(service):
    """A fork copies only the thread that calls it: another could hold a lock for ever."""
    (launcher,) = service.find_processes("launcher")
    assert len(list(Path(f"/proc/{launcher}/task").iterdir())) == 1


def test_workers_hold_no_listening_socket(service):
    """One that hangs would keep the port of a supervisor that was killed."""
    listening = {inode for pid in service.http_processes() for inode in listening_sockets(pid)}
    assert listening
    for pid in service.find_processes("worker") + service.find_processes("launcher"):
        assert not listening & open_sockets(pid)


def listening_sockets(pid: int) -> set[str]:
    """Return the inodes of the TCP sockets of a process that listen."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {fields[9] for fields in lines if fields[3] == LISTEN}
    return listening & open_sockets(pid)


def open_sockets(pid: int) -> set[str]:
    """Return the inodes of all sockets of a process."""
    targets = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return {target[8:-1] for target in targets if target.startswith("socket:[")}


def test_request_ids_differ_between_processes(service):
    def read_id(_: int) -> str:
        return httpx.post(
            f"{service.url}/predict", content=GOOD, headers=PNG, verify=NO_TLS
        ).json()["id"]

    with ThreadPoolExecutor(8) as threads:
        ids = list(threads.map(read_id, range(64)))
    assert len(set(ids)) == 64


def test_unchecked_service_of_the_benchmarks_answers(start):
    """It counts nothing and gives all requests the same id."""
    script = ROOT / "tests" / "benchmarks" / "serve_unchecked.py"
    server = start("--max-pending", "1", command=[sys.executable, str(script)])
    for _ in range(20):
        answer = server.http.post("/predict", files=[("f", ("a", GOOD)), ("f", ("b", GOOD))])
        assert [p["label"] for p in answer.json()["predictions"]] == ["blue", "blue"]
        assert answer.headers["x-request-id"] == "0"
    counted = [
        line
        for line in server.metrics().splitlines()
        if line[0] != "#" and not line.endswith(" 0.0")
    ]
    assert {re.match(r"\w+", line)[0] for line in counted} == {
        "imago_ready",
        "imago_model_info",
        "imago_store_reachable",
    }


def test_workers_share_the_bound_on_memory_for_decoding(tmp_path):
    state = SharedState.create(str(tmp_path))
    first, second = (DecodingMemory(str(tmp_path), state, worker, 2) for worker in range(2))

    def decode_large_image() -> int:
        with second.reserve(SHARED_BYTES // 2):
            return state.decoding_bytes(2)

    with ThreadPoolExecutor(1) as threads:
        with first.reserve(2 * SHARED_BYTES // 3):
            waiting = threads.submit(decode_large_image)
            wait_until(lambda: has_waiting_worker(tmp_path / LOCK_NAME))
            assert not waiting.done()
            assert state.decoding_bytes(2) == 2 * SHARED_BYTES // 3
        assert waiting.result(240) == SHARED_BYTES // 2
    assert state.decoding_bytes(2) == 0

    with first.reserve(SHARED_BYTES + 1), ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(decode_large_image)
        wait_until(lambda: has_waiting_worker(tmp_path / LOCK_NAME))
        assert not waiting.done()
        state.reset_worker(0)  # as where the first worker has ended
        assert waiting.result(240) == SHARED_BYTES // 2


def has_waiting_worker(lock: Path) -> bool:
    """Whether a worker waits for the memory that others hold."""
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
