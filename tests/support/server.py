"""A real `python -m serve` process under test, as a client, an operator and Prometheus see it."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from serve.metrics.definitions import METRICS
from support import ROOT
from support.forked_commands import ForkedCommand, ForkedCommands

FIRST_PORT = 18000
PORTS_PER_WORKER = 100
SERVE = [sys.executable, "-m", "serve"]
# A suspended worker stays, and the requests that it holds stay pending, as long as a test takes on
# a busy machine. Tests that are about these times set them.
PATIENT = ("--deadline-ms", "200000", "--worker-timeout-seconds", "200")
# For `verify` of httpx, which otherwise loads the certificates of all authorities for each client
# and each request without one. That takes 40 ms of CPU time.
NO_TLS = False
# Longer than any answer takes on a busy machine.
CLIENT_SECONDS = 240
# For the shadow process, which gets only the CPU time that no other process wants.
SHADOW_SECONDS = 500


def find_free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 on which no process listens.

    Each worker of pytest-xdist has a range of 100 ports, from 18000 up, so that two workers never
    take the same port between this call and the server's bind.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = FIRST_PORT + PORTS_PER_WORKER * worker
    candidates = random.SystemRandom().sample(
        range(first, first + PORTS_PER_WORKER), PORTS_PER_WORKER
    )

    ports: list[int] = []
    with contextlib.ExitStack() as probes:
        for port in candidates:
            probe = probes.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise RuntimeError(f"no {count} free ports from {first} up")


def loopback_flags() -> list[str]:
    """Flags of a server that listens on free ports of 127.0.0.1 only."""
    port, metrics_port = find_free_ports(2)
    return ["--host", "127.0.0.1", "--port", str(port), "--metrics-port", str(metrics_port)]


def spawn_serve(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a new interpreter with `-m serve` to its end, with PATH and `env` as its environment.

    The fixture `run_serve` does the same without the second that imports take.
    """
    return subprocess.run(
        [*SERVE, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin", **env},
    )


def assert_refused(result: subprocess.CompletedProcess[str], *words: str, status: int = 2) -> None:
    """Assert the exit status and one line on stderr that holds these words."""
    assert result.returncode == status, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def wait_until(
    condition: Callable[[], object], seconds: float = 240, poll_seconds: float = 0.02
) -> None:
    """Poll until the condition holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
        time.sleep(poll_seconds)


def _read_name(pid: int) -> str:
    """Return the name of a process, empty for one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def _find_descendants(pid: int) -> list[int]:
    """Return the process ids of the children of a process, of their children, and so on."""
    children: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            children += [int(child) for child in thread.read_text().split()]
    for child in list(children):
        children += _find_descendants(child)
    return children


def suspend_processes(pids: list[int]) -> None:
    """Send SIGSTOP and wait until every thread of the processes has stopped."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(_is_suspended(pid) for pid in pids))


def _is_suspended(pid: int) -> bool:
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in threads]
    return all(state == "T" for state in states)


@contextlib.contextmanager
def suspended_workers(server: "Server") -> Iterator[None]:
    """Suspend the server's workers: requests that reach them stay pending within the block."""
    workers = server.workers()
    try:
        suspend_processes(workers)
        yield
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)


class Server:
    """A `python -m serve` process on free ports. `log` holds its output."""

    def __init__(
        self,
        store: Path,
        log: Path,
        *flags: str,
        env: dict[str, str] | None = None,
        command: list[str] | None = None,
        forker: ForkedCommands | None = None,
        ports: tuple[int, int] | None = None,
    ) -> None:
        """`ports`: of the service and of its metrics; without them free ones are found.

        `command` replaces `python -m serve`; the flags follow it.

        `forker` starts the process without the second that imports take, unless `command` or a
        variable in `env` needs a new interpreter.
        """
        self.port, self.metrics_port = ports or find_free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.http = httpx.Client(base_url=self.url, timeout=CLIENT_SECONDS, verify=NO_TLS)

        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        metrics = ["--metrics-port", str(self.metrics_port)]
        arguments = ["--store", str(store), *address, *metrics, *PATIENT, *flags]
        env = env or {}
        is_plain = command is None and all(name.startswith("IMAGO_") for name in env)
        self.process: ForkedCommand | subprocess.Popen[bytes]
        if forker is not None and is_plain:
            self.process = self._fork(forker, arguments, env)
        else:
            self.process = self._spawn([*(command or SERVE), *arguments], env)

    def _fork(
        self, forker: ForkedCommands, arguments: list[str], env: dict[str, str]
    ) -> ForkedCommand:
        unset = {name: os.environ.get(name) for name in ("PYTHONPATH", "XDG_CACHE_HOME")}
        variables = {**os.environ, **unset, **env}
        return forker.start(*arguments, env=variables, cwd=ROOT, log=self.log)

    def _spawn(self, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self, seconds: float = 240) -> "Server":
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            assert self.process.poll() is None, f"the server ended: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"not ready in time: {self.log.read_text()}"
            time.sleep(0.02)
        return self

    def is_ready(self) -> bool:
        return self._has_health("ready")

    def is_live(self) -> bool:
        return self._has_health("live")

    def _has_health(self, probe: str) -> bool:
        try:
            return self.http.get(f"/health/{probe}").status_code == 200
        except httpx.TransportError:
            return False

    def predict(self, data: bytes, query: str = "", **headers: str) -> httpx.Response:
        """POST the bytes of one image."""
        return self.http.post(
            "/predict" + query, content=data, headers={"Content-Type": "image/*", **headers}
        )

    def workers(self) -> list[int]:
        """Process ids of the inference workers."""
        return self.find_processes("worker")

    def http_processes(self) -> list[int]:
        """Process ids of the HTTP processes."""
        return self.find_processes("http")

    def find_processes(self, name: str) -> list[int]:
        """Process ids of all processes of the service named `imago-<name>…`."""
        return [pid for pid in self.children() if _read_name(pid).startswith(f"imago-{name}")]

    def children(self) -> list[int]:
        """Process ids of all processes that the supervisor started, and those that they started."""
        return _find_descendants(self.process.pid)

    def run_directory(self) -> Path:
        """Return the run directory of the service, whose files the supervisor has mapped."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text()
        match = re.search(r"(/dev/shm/imago-\w+)/", maps)
        assert match is not None, "the supervisor has mapped no file of a run directory"
        return Path(match[1])

    def metrics(self) -> str:
        """The text of the metrics page."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        return httpx.get(url, timeout=CLIENT_SECONDS, verify=NO_TLS).text

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series, e.g. metric("imago_requests_total", code="200").

        Returns 0 for a series without a sample yet. Raises AssertionError for a metric or label
        names that the server does not define.
        """
        page = self.metrics()
        family = re.sub("_(total|bucket|sum|count)$", "", name.removeprefix("imago_"))
        declared = re.search(rf"^# TYPE ({name}|imago_{family}) ", page, re.MULTILINE)
        assert declared, f"there is no metric {name}"

        label_names = set(METRICS[family].labels) if family in METRICS else set()
        if name.endswith("_bucket"):
            label_names.add("le")
        assert set(labels) == label_names, f"{name} has the labels {sorted(label_names)}"

        pairs = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        series = f"{name}{{{pairs}}} " if pairs else f"{name} "
        for line in page.splitlines():
            if line.startswith(series):
                return float(line.removeprefix(series))
        return 0.0

    def begin_stop(self) -> None:
        """Send SIGTERM. The server drains for about two seconds, idle for most of them."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def stop(self, seconds: float = 240) -> int:
        """Send SIGTERM, wait for the end and return the exit status."""
        self.begin_stop()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
