"""What tests of hot reload share."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from support import tiny_bundle
from support.server import wait_until

FAST_RELOAD = ("--reload-seconds", "0.2")


@contextmanager
def load(service, clients: int = 4) -> Iterator[list[tuple[int, str]]]:
    """Clients that ask without a pause; status and version of each answer."""
    answers, stop = [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as http:
            while not stop.is_set():
                answer = http.post(
                    "/predict",
                    content=tiny_bundle.make_image("red"),
                    headers={"Content-Type": "image/png"},
                )
                answers.append((answer.status_code, answer.headers.get("x-model-version", "")))

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def replace_worker(service) -> None:
    """Kill the only worker and wait for the next."""
    (worker,) = service.workers()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: service.workers() not in ([worker], []))
    wait_until(service.is_ready)


def check_processes(store) -> list[int]:
    """Processes that check a version of this store."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"check" in words and str(store).encode() in words:
                found.append(int(path.parent.name))
    return found


def served_version(service) -> str:
    return service.predict(tiny_bundle.make_image("red")).json()["model"]["version"]
