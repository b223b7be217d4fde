"""Failures and shutdown under load: killed and hanging processes, and the drain on SIGTERM."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

from serve.active_jobs import open_active_jobs, read_failures
from serve.stall_timer import read_thread_times
from support import ROOT, tiny_bundle
from support.blocked_path import BlockedPath
from support.load_generator import LoadGenerator
from support.server import SHADOW_SECONDS, Server, suspend_processes, wait_until

IMAGE = tiny_bundle.make_image("green")
WHITE = cv2.imencode(".png", np.full((32, 32, 3), 255, np.uint8))[1].tobytes()


def kill_workers(server: Server, times: int) -> None:
    """Kill the worker and wait until another is ready, this many times."""
    for _ in range(times):
        (pid,) = server.workers()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: server.workers() not in ([pid], []) and server.is_ready())


def check_kills(server: Server, times: int) -> None:
    """Kill workers under load; each request must be answered and counted."""
    with LoadGenerator(server.port, IMAGE) as load:
        wait_until(lambda: load.statuses[200] > 50)
        kill_workers(server, times)
        before = load.statuses[200]
        wait_until(lambda: load.statuses[200] > before + 50)
    assert load.unanswered == []
    assert load.refused_connections == 0
    assert set(load.statuses) <= {200, 503}
    assert server.metric("imago_restarts_total", process="worker", reason="crash") == times
    wait_until(lambda: server.metric("imago_pending_images") == 0)
    total = sum(server.metric("imago_requests_total", code=str(code)) for code in (200, 503))
    assert total == load.statuses.total()
    # A worker counts a batch after it has sent the answers, so each kill may lose one batch.
    images = server.metric("imago_images_total", outcome="answered")
    assert abs(images - load.statuses[200]) <= 8 * times


def test_a_killed_worker_is_replaced_and_every_request_is_answered(start):
    server = start("--threads", "2", "--deadline-ms", "200000")
    check_kills(server, 3)
    # A fork imports nothing; the command line of another interpreter would differ.
    (worker,) = server.workers()
    assert read_command(worker) == read_command(server.process.pid)


def read_command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_killed_launcher_is_replaced_with_its_workers(start):
    server = start("--workers", "2", "--threads", "1")
    workers = server.workers()
    (launcher,) = server.find_processes("launcher")
    with LoadGenerator(server.port, IMAGE, clients=4) as load:
        wait_until(lambda: load.statuses[200] > 20)
        os.kill(launcher, signal.SIGKILL)
        wait_until(lambda: len(server.workers()) == 2 and server.workers() != workers)
        wait_until(server.is_ready)
        before = load.statuses[200]
        wait_until(lambda: load.statuses[200] > before + 20)
    assert load.unanswered == []
    assert set(load.statuses) <= {200, 503}
    assert server.metric("imago_restarts_total", process="worker", reason="crash") == 2
    assert not any(is_alive(pid) for pid in workers)

    children = server.children()  # of the second launcher
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in children))


@pytest.mark.slow
def test_a_launcher_that_hangs_is_replaced_when_a_worker_ends(start):
    server = start("--worker-timeout-seconds", "1")
    (launcher,) = server.find_processes("launcher")
    (worker,) = server.workers()
    suspend_processes([launcher])
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not server.is_ready())
    wait_until(server.is_ready, seconds=300)
    assert server.predict(IMAGE).status_code == 200
    assert not is_alive(launcher)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_kills_of_the_worker(start):
    check_kills(start("--threads", "2", "--deadline-ms", "200000"), 100)


def test_a_worker_without_a_sign_of_life_is_replaced_and_no_request_is_lost(start):
    server = start("--worker-timeout-seconds", "2", "--deadline-ms", "200000")
    (pid,) = server.workers()
    with LoadGenerator(server.port, IMAGE, clients=4) as load:
        wait_until(lambda: load.statuses[200] > 20)
        suspend_processes([pid])
        wait_until(lambda: server.is_ready() and server.workers() != [pid])
        before = load.statuses[200]
        wait_until(lambda: load.statuses[200] > before + 20)
    assert load.unanswered == []
    assert set(load.statuses) == {200}
    assert server.metric("imago_restarts_total", process="worker", reason="hang") == 1


@pytest.fixture
def endless_store(tmp_path):
    """A store whose model loops endlessly for WHITE."""
    tiny_bundle.loop_forever_on_white(tiny_bundle.publish(tmp_path / "store"))
    return tmp_path / "store"


def assert_refused(response: httpx.Response, reason: str) -> None:
    """Assert that the image is not to be sent again."""
    assert response.status_code == 422
    assert reason in response.json()["detail"]
    assert "retry-after" not in response.headers


@pytest.mark.parametrize("reason", ["hang", "crash"])
def test_only_the_image_on_which_a_worker_fails_gets_422(start, endless_store, reason):
    """The worker that replaces it answers the others."""
    flags = ("--threads", "1", "--max-batch-size", "1")
    timeout = "1" if reason == "hang" else "30"
    timeouts = ("--worker-timeout-seconds", timeout, "--deadline-ms", "200000")
    server = start(*flags, *timeouts, store=endless_store)
    with ThreadPoolExecutor(3) as executor:
        failing = executor.submit(server.predict, WHITE)
        wait_until(lambda: server.metric("imago_pending_images") == 1)
        waiting = [executor.submit(server.predict, IMAGE) for _ in range(2)]
        if reason == "crash":
            wait_until(lambda: server.metric("imago_pending_images") == 3)
            send_to_busy_thread(server, signal.SIGSEGV)

    assert_refused(failing.result(), "takes too long" if reason == "hang" else "crashes")
    for future in waiting:
        assert future.result().json()["predictions"][0]["label"] == "green"
    assert server.metric("imago_images_total", outcome="refused") == 1
    assert server.metric("imago_images_total", outcome="failed") == 0
    assert server.metric("imago_restarts_total", process="worker", reason=reason) == 1


# Two predictors have a job each; the thread that is named crashes. The main thread is no predictor.
CRASH = """
import ctypes, sys, threading
from serve.active_jobs import ActiveJobs, build_key

directory, crashing, busy = sys.argv[1:]
active_jobs = ActiveJobs(directory, worker=0, predictors=2, max_batch_size=4)
barrier = threading.Barrier(3)

def work(predictor):
    active_jobs.set_thread(predictor)
    if predictor < int(busy):
        active_jobs.set_job(predictor, build_key(1000 + predictor, job_id=7))
    barrier.wait()
    if crashing == str(predictor):
        ctypes.string_at(0)
    threading.Event().wait()

for predictor in range(2):
    threading.Thread(target=work, args=(predictor,), daemon=True).start()
barrier.wait()
if crashing == "main":
    ctypes.string_at(0)
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("crashing", "busy", "jobs"),
    [
        ("0", 2, [(1000, 7)]),
        ("1", 2, [(1001, 7)]),
        ("main", 1, [(1000, 7)]),  # as a thread of the engine
        ("main", 2, []),
    ],
)
def test_the_job_of_the_thread_that_crashes_is_known(tmp_path, crashing, busy, jobs):
    command = [sys.executable, "-c", CRASH, str(tmp_path), crashing, str(busy)]
    process = subprocess.run(command, stderr=subprocess.PIPE, cwd=ROOT, timeout=240)
    assert process.returncode == -signal.SIGSEGV
    assert process.stderr == b""
    with open_active_jobs(str(tmp_path), worker=0) as file:
        failures = read_failures(file).failed
    assert [failure.jobs for failure in failures] == [[job] for job in jobs]
    assert not any(failure.is_hang for failure in failures)


def send_together(server: Server, *images: bytes) -> list[int]:
    """Send images in one request; return the status of each."""
    files = [("f", ("a.png", image)) for image in images]
    predictions = server.http.post("/predict", files=files).json()["predictions"]
    return [p["error"]["status"] if "error" in p else 200 for p in predictions]


def test_the_cause_among_several_images_gets_422_and_the_others_are_answered(start, endless_store):
    """The images of a run that hangs are run once more, each alone."""
    flags = ("--threads", "1", "--max-batch-size", "4", "--batch-wait-ms", "1000")
    timeouts = ("--worker-timeout-seconds", "1", "--deadline-ms", "200000")
    server = start(*flags, *timeouts, store=endless_store)
    assert send_together(server, IMAGE, IMAGE, WHITE, IMAGE) == [200, 200, 422, 200]
    assert server.metric("imago_restarts_total", process="worker", reason="hang") == 2


def test_an_image_in_the_hands_of_two_killed_workers_gets_503(start, endless_store):
    """A killed worker leaves no report, so that the image may be the cause or not."""
    server = start("--threads", "1", "--deadline-ms", "60000", store=endless_store)
    with ThreadPoolExecutor(1) as executor:
        response = executor.submit(server.predict, WHITE)
        killed = 0
        for _ in range(2):
            wait_until(lambda killed=killed: server.is_ready() and server.workers() != [killed])
            wait_for_busy_thread(server)
            (killed,) = server.workers()
            os.kill(killed, signal.SIGKILL)
        assert response.result().status_code == 503
    assert response.result().headers["retry-after"] == "1"


def read_cpu_seconds(process: int) -> dict[int, float]:
    """Return the CPU time that each thread of a process has used."""
    seconds: dict[int, float] = {}
    for stat in Path(f"/proc/{process}/task").glob("*/stat"):
        _, _, fields = stat.read_text().rpartition(") ")
        ticks = fields.split()[11:13]  # in user mode, and in the kernel
        seconds[int(stat.parent.name)] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return seconds


def wait_for_busy_thread(server: Server) -> int:
    """Wait until one thread of the worker has run for half a second, and return that thread.

    Threads that start, or wake for a moment, do not use so much CPU time.
    """
    (worker,) = server.workers()
    start = read_cpu_seconds(worker)
    busy: list[int] = []

    def has_run() -> bool:
        for thread, seconds in read_cpu_seconds(worker).items():
            if seconds > start.get(thread, seconds) + 0.5:
                busy.append(thread)
        return bool(busy)

    wait_until(has_run)
    return busy[0]


def send_to_busy_thread(server: Server, number: signal.Signals) -> None:
    """Send a signal to one thread, as the kernel does where that thread crashes."""
    thread = wait_for_busy_thread(server)
    assert ctypes.CDLL(None).tgkill(server.workers()[0], thread, number) == 0


@contextlib.contextmanager
def crowded_core(process: int, processes: int) -> Iterator[None]:
    """Let the threads of a process share one core with so many processes that use it fully."""
    core = min(os.sched_getaffinity(0))
    threads = [int(thread) for thread in os.listdir(f"/proc/{process}/task")]
    cores = {thread: os.sched_getaffinity(thread) for thread in threads}
    command = ["sh", "-c", "while :; do :; done"]
    with contextlib.ExitStack() as stack:
        for _ in range(processes):
            busy = stack.enter_context(subprocess.Popen(command))
            stack.callback(busy.kill)
            os.sched_setaffinity(busy.pid, {core})
        for thread in threads:
            os.sched_setaffinity(thread, {core})
        yield
        for thread in threads:
            os.sched_setaffinity(thread, cores[thread])


@pytest.mark.skipif(not read_thread_times(os.getpid()), reason="this kernel counts no waits")
def test_a_busy_machine_is_not_taken_for_a_hang(start):
    """Decoding takes longer than the timeout while other processes use the core."""
    timeout = 2
    image = cv2.imencode(".png", np.zeros((5500, 5500, 3), np.uint8))[1].tobytes()
    flags = ("--workers", "1", "--threads", "1", "--deadline-ms", "240000")
    server = start(*flags, "--worker-timeout-seconds", str(timeout))
    (worker,) = server.workers()

    def has_waited() -> bool:
        waiting = (times.waiting for times in read_thread_times(worker).values())
        return max(waiting, default=0.0) > 2 * timeout

    with ThreadPoolExecutor(1) as executor, crowded_core(worker, processes=20):
        response = executor.submit(server.predict, image)
        wait_until(lambda: has_waited() or response.done())
    assert response.result().status_code == 200
    assert server.metric("imago_restarts_total", process="worker", reason="hang") == 0


@pytest.mark.slow
def test_a_slow_graph_is_not_taken_for_a_hang(start, tmp_path):
    tiny_bundle.slow_down(tiny_bundle.publish(tmp_path, size=4, samples=2), iterations=300_000)
    server = start(
        "--threads", "1", "--max-batch-size", "1", "--worker-timeout-seconds", "0.1", store=tmp_path
    )
    for _ in range(8):  # the supervisor checks once a second
        assert server.predict(IMAGE).status_code == 200
    assert server.metric("imago_inference_seconds_sum") > 8 * 0.2
    assert server.metric("imago_restarts_total", process="worker", reason="hang") == 0


def test_images_that_wait_for_a_killed_worker_go_to_the_next(start):
    server = start()
    (pid,) = server.workers()
    suspend_processes([pid])
    with ThreadPoolExecutor(2) as executor:
        waiting = executor.submit(send_together, server, IMAGE, IMAGE)
        wait_until(lambda: server.metric("imago_pending_images") == 2)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not server.is_ready())
        sent_meanwhile = executor.submit(server.predict, IMAGE)
        assert waiting.result() == [200, 200]
        assert sent_meanwhile.result().status_code == 200


def test_the_other_worker_serves_while_one_is_replaced(start, tmp_path):
    """The service is not ready meanwhile."""
    store = tmp_path / "store"
    blocked_path = BlockedPath(tmp_path / "hang", tiny_bundle.publish(store))
    flags = ("--workers", "2", "--threads", "1", "--reload-seconds", "0")
    server = start(*flags, store=store, env=blocked_path.env)
    with LoadGenerator(server.port, IMAGE, clients=4) as load:
        wait_until(lambda: load.statuses[200] > 20)
        with blocked_path.blocked():  # so that the next worker does not become ready
            os.kill(server.workers()[0], signal.SIGKILL)
            wait_until(lambda: not server.is_ready())
            before = load.statuses[200]
            wait_until(lambda: load.statuses[200] > before + 20)
        wait_until(server.is_ready)
    assert load.unanswered == []
    assert set(load.statuses) <= {200, 503}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_http_process_is_replaced(start, processes):
    """The connections that it holds are closed; no other is refused, and none gets 503."""
    server = start("--api-processes", str(processes))
    killed = server.http_processes()
    assert len(killed) == processes
    clients = 4
    with LoadGenerator(server.port, IMAGE, clients=clients) as load:
        wait_until(lambda: load.statuses[200] > 20)
        os.kill(killed[0], signal.SIGKILL)
        wait_until(lambda: server.http_processes() not in (killed, killed[1:]))
        before = load.statuses[200]
        wait_until(lambda: load.statuses[200] > before + 200)
        wait_until(server.is_ready)
    assert len(load.unanswered) <= clients
    assert load.refused_connections == 0
    assert set(load.statuses) == {200}
    assert server.metric("imago_restarts_total", process="http", reason="crash") == 1
    wait_until(lambda: server.metric("imago_pending_images") == 0)


def test_sigterm_under_load_loses_no_request(start):
    server = start("--drain-seconds", "20")
    with LoadGenerator(server.port, IMAGE, clients=16, pause=0.002) as load:
        wait_until(lambda: load.statuses[200] > 100)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(240) == 0
    assert load.unanswered == []
    assert set(load.statuses) <= {200, 503}
    assert "Traceback" not in server.log.read_text()


def test_queued_requests_are_answered_after_sigterm(start):
    """The service is not ready at once, but answers what is queued for a suspended worker."""
    server = start("--drain-seconds", "200")
    (pid,) = server.workers()
    suspend_processes([pid])
    with LoadGenerator(server.port, IMAGE, clients=8) as load:
        wait_until(lambda: server.metric("imago_pending_images") == 8)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not server.is_ready())
        assert server.http.get("/health/live").status_code == 200
        # For a second, new requests are still accepted: an empty body then gets 400.
        wait_until(lambda: server.predict(b"").status_code == 503)
        assert server.predict(IMAGE).status_code == 503
        assert server.process.poll() is None
        load.stop_sending()
        os.kill(pid, signal.SIGCONT)
        assert server.process.wait(240) == 0
    assert load.statuses == {200: 8}
    assert load.unanswered == []


@pytest.mark.parametrize("seconds", [2, 3])
def test_a_drain_that_cannot_finish_ends_in_time_with_503(start, seconds):
    server = start("--drain-seconds", str(seconds), "--deadline-ms", "600000")
    suspend_processes(server.workers())
    with LoadGenerator(server.port, IMAGE, clients=2) as load:
        wait_until(lambda: server.metric("imago_pending_images") == 2)
        load.stop_sending()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(240) == 0  # far from the deadline of 600 s
    assert load.statuses == {503: 2}
    assert load.unanswered == []


def test_sigterm_during_the_start(start):
    server = start(wait=False)
    wait_until(server.children)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(240) in (0, -signal.SIGTERM)


def test_a_signal_delivered_to_another_thread_is_handled(start):
    """The kernel may deliver a signal to any thread; Python handles it in the first."""
    server = start()
    first = server.process.pid
    other = next(tid for tid in map(int, os.listdir(f"/proc/{first}/task")) if tid != first)
    os.kill(other, signal.SIGTERM)
    assert server.process.wait(240) == 0


@pytest.mark.slow
def test_a_signal_to_the_process_group_drains(start):
    """Ctrl+C in a terminal and systemd send a signal to all processes of the group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        server = start("--shadow-version", "1", command=["setsid", sys.executable, "-m", "serve"])
        wait_until(lambda server=server: "shadow ready" in server.log.read_text(), SHADOW_SECONDS)
        with LoadGenerator(server.port, IMAGE, clients=4, pause=0.002) as load:
            wait_until(lambda load=load: load.statuses[200] > 20)
            os.killpg(server.process.pid, number)
            assert server.process.wait(240) == 0
        assert load.unanswered == []
        assert "Traceback" not in server.log.read_text()


def test_no_process_outlives_a_killed_supervisor(start):
    server = start()
    children = server.children()
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in children))


@pytest.mark.slow
def test_the_next_start_removes_the_run_directory_of_a_killed_supervisor(start):
    killed = start()
    living = start()
    killed_directory = killed.run_directory()
    living_directory = living.run_directory()
    children = killed.children()
    killed.process.kill()
    killed.process.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in children))
    assert killed_directory.exists()
    start()
    assert not killed_directory.exists()
    assert living_directory.exists()
    assert living.predict(IMAGE).status_code == 200


def is_alive(pid: int) -> bool:
    try:
        state = re.search(r"State:\s+(\w)", Path(f"/proc/{pid}/status").read_text())
    except FileNotFoundError:
        return False
    return state is not None and state[1] != "Z"


def test_no_files_remain_after_the_shutdown(start, tmp_path):
    """Neither in shared memory nor in the temporary directory."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    server = start("--workers", "2", "--shadow-version", "1", env={"TMPDIR": str(temporary)})
    directory = server.run_directory()
    wait_until((directory / "shadow.sock").exists, SHADOW_SECONDS)
    assert server.predict(IMAGE).status_code == 200
    assert server.stop() == 0
    assert not directory.exists()
    assert not list(temporary.iterdir())


def test_serving_needs_no_torch(start):
    """No process of a running service loads torch, and the command runs without it."""
    server = start()
    assert server.predict(IMAGE).status_code == 200
    for pid in [server.process.pid, *server.children()]:
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    blocked = (
        "import sys, runpy\n"
        "class Block:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'lightning', 'train'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "runpy.run_module('serve', run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", blocked, "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
