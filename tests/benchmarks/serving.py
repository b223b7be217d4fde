"""Server processes and HTTP load for the serving benchmarks.

The load comes from wrk, since a client in Python would cost as much as the server it measures;
where the client's cost does not matter, the benchmarks use `support.load_generator`.
"""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from project_path import ROOT

CORES = len(os.sched_getaffinity(0))
CLIENTS = 32
START_TIMEOUT_SECONDS = 60
SETTLE_SECONDS = 1
"""After which a server that was suspended has done what was due meanwhile."""

WRK_SCRIPT = """wrk.method = "POST"
wrk.headers["Content-Type"] = "{content_type}"
wrk.path = "{path}"
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
file:close()
"""
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
"""Of the units that wrk prints."""


@dataclass(frozen=True)
class RunningServer:
    """A server process that answers on `port`; the metrics of other projects' servers are 0."""

    pid: int
    port: int
    metrics_port: int = 0


@dataclass(frozen=True)
class LoadResult:
    """What wrk measured in one run."""

    rate: float
    """Requests per second."""
    p50: float
    """Milliseconds."""
    p99: float
    """Milliseconds."""
    client: float
    """The client's share of all cores, 0 to 1."""
    cpu: float
    """CPU seconds of the server per request."""
    has_errors: bool
    """Whether a response had a status other than 2xx."""


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def find_descendants(pid: int) -> list[int]:
    """Process ids of all children and their children."""
    pids: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            pids += [child, *find_descendants(child)]
    return pids


def process_cpu_seconds(pid: int) -> float:
    """User and system time of one process."""
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def tree_cpu_seconds(pid: int) -> float:
    """User and system time of a process and its living descendants."""
    return sum(process_cpu_seconds(each) for each in [pid, *find_descendants(pid)])


def find_http_process(pid: int) -> int:
    """The HTTP process of Imago's service, whose supervisor is `pid`."""
    return _find_by_name(pid, "imago-http-")


def find_worker(pid: int) -> int:
    """The worker process of Imago's service, whose supervisor is `pid`."""
    return _find_by_name(pid, "imago-worker-")


def _find_by_name(pid: int, prefix: str) -> int:
    for each in find_descendants(pid):
        if Path(f"/proc/{each}/comm").read_text().startswith(prefix):
            return each
    raise LookupError(f"process {pid} has no process {prefix}*")


@contextmanager
def running_server(
    command: list[str], port: int, health: str, python: str = sys.executable
) -> Iterator[int]:
    """Run `python COMMAND`; yield its process id once the path `health` answers."""
    process = subprocess.Popen([python, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for_url(f"http://127.0.0.1:{port}{health}", process)
        yield process.pid
    finally:
        pids = [process.pid, *find_descendants(process.pid)]  # LitServe's survive SIGTERM
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_for_url(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until a server answers there; `process` is the server, if it may end before."""
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            has_ended = process is not None and process.poll() is not None
            assert not has_ended, f"the server of {url} ended; its messages say why"
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.02)
        else:
            return


@contextmanager
def running_service(
    store: Path, model: str, *flags: str, program: list[str] | None = None
) -> Iterator[RunningServer]:
    """Run Imago's service; `program` replaces `-m serve`."""
    port = find_free_port()
    metrics_port = find_free_port()
    command = [
        *(program or ["-m", "serve"]),
        *("--store", str(store)),
        *("--model", model),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        *("--metrics-port", str(metrics_port)),
        *("--log-level", "error"),
        *flags,
    ]
    with running_server(command, port, "/health/ready") as pid:
        yield RunningServer(pid, port, metrics_port)


def suspend(server: RunningServer) -> None:
    """Stop a server's processes: an idle LitServe wakes a thousand times a second."""
    for pid in [server.pid, *find_descendants(server.pid)]:
        os.kill(pid, signal.SIGSTOP)


@contextmanager
def resumed(server: RunningServer) -> Iterator[None]:
    """Let a suspended server run within the block."""
    for pid in [server.pid, *find_descendants(server.pid)]:
        os.kill(pid, signal.SIGCONT)
    time.sleep(SETTLE_SECONDS)
    yield
    suspend(server)


def write_wrk_script(
    directory: Path, body: bytes, content_type: str = "image/jpeg", path: str = "/predict"
) -> Path:
    """Write the Lua script that makes wrk POST this body to `path`; return where it is."""
    name = content_type.replace("/", "-")
    body_file = directory / f"{name}.body"
    body_file.write_bytes(body)
    script = directory / f"{name}.lua"
    script.write_text(WRK_SCRIPT.format(content_type=content_type, path=path, body=body_file))
    return script


def wrk_command(port: int, script: Path, seconds: float, clients: int = CLIENTS) -> list[str]:
    return [
        "wrk",
        "-t1",
        f"-c{clients}",
        f"-d{seconds}s",
        "--latency",
        *("--timeout", "10s"),
        *("-s", str(script)),
        f"http://127.0.0.1:{port}/predict",
    ]


def run_wrk(
    server: RunningServer, script: Path, seconds: float, clients: int = CLIENTS
) -> LoadResult:
    """Load the server with clients that send a request as soon as the last is answered."""
    server_before = tree_cpu_seconds(server.pid)
    client_before = children_cpu_seconds()
    started = time.perf_counter()

    command = wrk_command(server.port, script, seconds, clients)
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    wall = time.perf_counter() - started
    client_cpu = children_cpu_seconds() - client_before
    server_cpu = tree_cpu_seconds(server.pid) - server_before
    count = int(re.search(r"(\d+) requests in", output)[1])
    percentiles = parse_wrk_percentiles(output)
    return LoadResult(
        rate=float(re.search(r"Requests/sec: +([\d.]+)", output)[1]),
        p50=percentiles["50"],
        p99=percentiles["99"],
        client=client_cpu / wall / CORES,
        cpu=server_cpu / max(count, 1),
        has_errors="Non-2xx" in output,
    )


def measure_load(
    server: RunningServer, script: Path, seconds: float, clients: int = CLIENTS
) -> LoadResult:
    """Run wrk and assert that every response was 2xx."""
    result = run_wrk(server, script, seconds, clients)
    assert not result.has_errors, "a response was not 2xx"
    return result


def children_cpu_seconds() -> float:
    """User and system time of all ended child processes of this one."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def parse_wrk_percentiles(output: str) -> dict[str, float]:
    """Percentile to milliseconds, from the latency table that wrk prints."""
    rows = re.findall(r"(\d+)% +([\d.]+)(us|ms|s)", output)
    return {percent: float(number) * MILLISECONDS[unit] for percent, number, unit in rows}
