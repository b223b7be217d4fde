"""A real server process under test, as a client, an operator and Prometheus see it."""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 from 18000 to 18199 that nobody listens on."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in sorted(range(18000, 18200), key=lambda p: hash((p, os.getpid(), time.monotonic_ns()))):
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free port")


class Server:
    """A `python -m serve` process on free ports. `log` holds what it wrote."""

    def __init__(self, store: Path, log: Path, *flags: str, env: dict[str, str] | None = None,
                 command: list[str] | None = None):
        self.port, self.metrics_port = free_ports(2)
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        self.http = httpx.Client(base_url=self.url, timeout=30)
        own = ["--store", str(store), "--host", "127.0.0.1", "--port", str(self.port),
               "--metrics-port", str(self.metrics_port)]
        with log.open("ab") as output:
            self.process = subprocess.Popen([*(command or [sys.executable, "-m", "serve"]), *own, *flags], cwd=ROOT,
                                            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})

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

    def predict(self, data: bytes, query: str = "", **headers: str) -> httpx.Response:
        """POST the bytes of one image."""
        return self.http.post("/predict" + query, content=data, headers={"Content-Type": "image/*", **headers})

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        return [pid for pid in self.children() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def children(self) -> list[int]:
        """Process ids of all processes that the first one has started."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for thread in threads for pid in thread.read_text().split()]

    def metrics(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30).text

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series, e.g. metric("imago_requests_total", code="200"); 0 where there is none."""
        text = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        start = f"{name}{{{text}}} " if text else f"{name} "
        return next((float(line[len(start):]) for line in self.metrics().splitlines() if line.startswith(start)), 0.0)

    def stop(self, seconds: float = 40) -> int:
        """SIGTERM; the exit status."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
