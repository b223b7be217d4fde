"""Helpers for the tests of hot reload."""

import contextlib
import os
import signal
from pathlib import Path

from support import tiny_bundle
from support.server import Server, wait_until

FAST_RELOAD = ("--reload-seconds", "0.2")


def replace_worker(server: Server) -> None:
    """Kill the only worker and wait for the next."""
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: server.workers() not in ([worker], []))
    wait_until(server.is_ready)


def check_processes(store: Path) -> list[int]:
    """Process ids of those that check a version of this store before it is loaded."""
    pids: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"check" in words and str(store).encode() in words:
                pids.append(int(path.parent.name))
    return pids


def served_version(server: Server) -> str:
    return server.predict(tiny_bundle.make_image("red")).json()["model"]["version"]
