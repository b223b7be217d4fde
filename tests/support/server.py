"""A real server process under test, as a client, an operator and Prometheus see it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.metrics.definitions import METRICS
from support import ROOT


def find_free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 from 18000 up that nobody listens on; each process of pytest-xdist has its own hundred."""
    first = 18000 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in sorted(
            range(first, first + 100), key=lambda p: hash((p, os.getpid(), time.monotonic_ns()))
        ):
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free port")


def loopback_flags() -> list[str]:
    """Flags of a server that only this machine reaches, on free ports."""
    port, metrics_port = find_free_ports(2)
    return ["--host", "127.0.0.1", "--port", str(port), "--metrics-port", str(metrics_port)]


def run_serve(*flags: str, **env: str) -> subprocess.CompletedProcess:
    """`python -m serve` with no environment but `env`, until it ends."""
    return subprocess.run(
        [sys.executable, "-m", "serve", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin", **env},
    )


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit status 2 and one line with these words."""
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def suspend_processes(pids: list[int]) -> None:
    """By SIGSTOP, and wait until each of their threads rests."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    wait_until(
        lambda: all(
            stat.read_text().rpartition(")")[2].split()[0] == "T"
            for pid in pids
            for stat in Path(f"/proc/{pid}/task").glob("*/stat")
        )
    )


@contextlib.contextmanager
def suspended_workers(server: "Server") -> Iterator[None]:
    """Its workers by SIGSTOP: what they were sent stays pending meanwhile."""
    workers = server.workers()
    try:
        suspend_processes(workers)
        yield
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[Any]:
    """An S3 that runs here, which the environment names meanwhile, with an empty bucket; gives boto3's client of it."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    running = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ):
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket=bucket)
        yield client
    running.stop()


class Server:
    """A `python -m serve` process on free ports. `log` holds what it wrote."""

    def __init__(
        self,
        store: Path,
        log: Path,
        *flags: str,
        env: dict[str, str] | None = None,
        command: list[str] | None = None,
    ):
        self.port, self.metrics_port = find_free_ports(2)
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        self.http = httpx.Client(base_url=self.url, timeout=30)
        own = [
            "--store",
            str(store),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--metrics-port",
            str(self.metrics_port),
        ]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*(command or [sys.executable, "-m", "serve"]), *own, *flags],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self, seconds: float = 60) -> "Server":
        end = time.monotonic() + seconds
        while not self.is_ready():
            assert self.process.poll() is None, f"the server ended: {self.log.read_text()}"
            assert time.monotonic() < end, f"not ready after {seconds} s: {self.log.read_text()}"
            time.sleep(0.05)
        return self

    def is_ready(self) -> bool:
        try:
            return self.http.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def is_live(self) -> bool:
        try:
            return self.http.get("/health/live").status_code == 200
        except httpx.TransportError:
            return False

    def predict(self, data: bytes, query: str = "", **headers: str) -> httpx.Response:
        """POST the bytes of one image."""
        return self.http.post(
            "/predict" + query, content=data, headers={"Content-Type": "image/*", **headers}
        )

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        return [
            pid
            for pid in self.children()
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def children(self) -> list[int]:
        """Process ids of all processes that the first one has started."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for thread in threads for pid in thread.read_text().split()]

    def metrics(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30).text

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series, e.g. metric("imago_requests_total", code="200"); 0 where there is none yet.

        Raises AssertionError for one that can never be: no such metric, or other names of labels.
        """
        page, short = (
            self.metrics(),
            re.sub("_(total|bucket|sum|count)$", "", name.removeprefix("imago_")),
        )
        assert re.search(rf"^# TYPE ({name}|imago_{short}) ", page, re.MULTILINE), (
            f"there is no metric {name}"
        )
        names = {
            *(METRICS[short].labels if short in METRICS else ()),
            *(["le"] if name.endswith("_bucket") else []),
        }
        assert set(labels) == names, f"{name} has the labels {sorted(names)}"
        text = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        start = f"{name}{{{text}}} " if text else f"{name} "
        return next(
            (float(line[len(start) :]) for line in page.splitlines() if line.startswith(start)), 0.0
        )

    def stop(self, seconds: float = 40) -> int:
        """SIGTERM; the exit status."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
