"""Break a service under load, at random, and compare what clients see with what is promised.

    python tests/reliability/faults.py [--requests 1000000] [--clients 24] [--seed 0]
        [--faults worker-killed drained …] [--faketime FILE] [--out FILE]

Starts the service with a bundle of a few nodes, two HTTP processes and two workers, lets CLIENTS
send requests in a closed loop, half of them with a new connection each time, and applies one fault
after another, chosen at random, until REQUESTS are sent and each fault was there once. After a
fault the service must answer again before the next one.

Each fault names its promise: the statuses that answers may have, and whether connections may be
closed or refused. A request is lost where it has neither an answer nor an end that the promise
names. `clock-stepped` needs libfaketime (FILE, or the package `libfaketime` of PyPI) and is left
out without it.

Prints the report as JSON, which FILE keeps: for each fault its promise, how often it was applied,
the requests sent, answered, closed, refused and lost, and the longest time until the service was
ready and had answered 200 more. Exit status 1 where a promise is broken.
"""

import argparse
import contextlib
import importlib.util
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import project_path  # noqa: F401  makes the imports below possible
from reports import describe_run, print_report

from models.store import LATEST
from support import tiny_bundle
from support.load_generator import LoadGenerator
from support.server import Server, suspend_processes, wait_until

MODEL = "colours"
IMAGE = tiny_bundle.make_image("green")
# A deadline that is far away: on a busy machine a process takes seconds to start.
HTTP_PROCESSES = 2
WORKERS = 2
FLAGS = (
    *("--api-processes", str(HTTP_PROCESSES)),
    *("--workers", str(WORKERS)),
    *("--threads", "1"),
    *("--reload-seconds", "0.2"),
    *("--worker-timeout-seconds", "2"),
    *("--deadline-ms", "45000"),
    *("--read-timeout-seconds", "2"),
    *("--max-connections", "4096"),
    *("--drain-seconds", "20"),
)
LOAD_REQUESTS = 200  # answered before a fault, and after it
FAULT_SECONDS = 1.0  # for faults that are a state
IDLE_CONNECTIONS = 1000
SLOW_CLIENTS = 50
HALF_OPEN_CLIENTS = 200
CLOCK_STEP_SECONDS = 86_400
RECOVERY_SECONDS = 120
REQUEST_HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"


@dataclass(frozen=True)
class Promise:
    """What clients may see of a fault, besides answers with status 200."""

    text: str
    statuses: frozenset[int] = frozenset()
    may_close: bool = False
    """Whether connections may be closed without an answer."""
    may_refuse: bool = False
    """Whether new connections may be refused."""


@dataclass
class Outcome:
    """The results of one kind of fault, over all times it was applied."""

    times: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    closed: int = 0
    refused_connections: int = 0
    lost: int = 0
    longest_recovery_seconds: float = 0.0


class Service:
    """The service under test, which faults replace where they end it."""

    def __init__(self, directory: Path, faketime: Path | None) -> None:
        self.store = directory / "store"
        self.log = directory / "log"
        self.scale = 1.0
        self.clock_file = directory / "clock"
        self.env: dict[str, str] = {}
        if faketime is not None:
            self.clock_file.write_text("+0")
            self.env = {
                "LD_PRELOAD": str(faketime),
                "FAKETIME_TIMESTAMP_FILE": str(self.clock_file),
                "FAKETIME_NO_CACHE": "1",
                "DONT_FAKE_MONOTONIC": "1",
            }
        tiny_bundle.publish(self.store)
        self.server = Server(self.store, self.log, *FLAGS, env=self.env)

    def start_again(self) -> None:
        """Start a server on the ports of the one that has ended, as an operator does."""
        ports = (self.server.port, self.server.metrics_port)
        self.server = Server(self.store, self.log, *FLAGS, env=self.env, ports=ports)
        self.server.wait_ready()

    def has_all_processes(self) -> bool:
        """Whether it is ready, with all of its processes."""
        server = self.server
        counts = (len(server.http_processes()), len(server.workers()))
        return counts == (HTTP_PROCESSES, WORKERS) and server.is_ready()

    def publish(self) -> Path:
        """Publish the next version, whose outputs differ a little."""
        self.scale += 0.01
        return tiny_bundle.publish(self.store, scale=self.scale)


Fault = Callable[[Service, random.Random], None]


def kill_worker(service: Service, rng: random.Random) -> None:
    os.kill(rng.choice(service.server.workers()), signal.SIGKILL)


def crash_worker(service: Service, rng: random.Random) -> None:
    os.kill(rng.choice(service.server.workers()), signal.SIGSEGV)


def stop_worker(service: Service, rng: random.Random) -> None:
    """Suspend a worker until the supervisor replaces it."""
    worker = rng.choice(service.server.workers())
    suspend_processes([worker])
    wait_until(lambda: worker not in service.server.workers(), RECOVERY_SECONDS)


def pause_worker(service: Service, rng: random.Random) -> None:
    """Suspend a worker for a short time, as a hypervisor or a container's freezer does."""
    worker = rng.choice(service.server.workers())
    os.kill(worker, signal.SIGSTOP)
    time.sleep(FAULT_SECONDS / 2)
    os.kill(worker, signal.SIGCONT)


def kill_http_process(service: Service, rng: random.Random) -> None:
    os.kill(rng.choice(service.server.http_processes()), signal.SIGKILL)


def kill_launcher(service: Service, rng: random.Random) -> None:
    for process in service.server.find_processes("launcher"):
        os.kill(process, signal.SIGKILL)


def kill_supervisor(service: Service, rng: random.Random) -> None:
    children = service.server.children()
    service.server.process.kill()
    service.server.process.wait()
    wait_until(lambda: not any(_is_alive(child) for child in children), RECOVERY_SECONDS)
    service.start_again()


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
        return not state.startswith("Z")
    return False


def drain(service: Service, rng: random.Random) -> None:
    service.server.process.send_signal(signal.SIGTERM)
    status = service.server.process.wait(RECOVERY_SECONDS)
    if status != 0:
        raise AssertionError(f"the drain ended with status {status}")
    service.start_again()


def make_store_read_only(service: Service, rng: random.Random) -> None:
    paths = [service.store, *service.store.rglob("*")]
    directories = [path for path in paths if path.is_dir() and not path.is_symlink()]
    for path in directories:
        path.chmod(0o555)
    time.sleep(FAULT_SECONDS)
    for path in directories:
        path.chmod(0o755)


def take_store_away(service: Service, rng: random.Random) -> None:
    away = service.store.with_name("away")
    service.store.rename(away)
    time.sleep(FAULT_SECONDS)
    away.rename(service.store)


def corrupt_store(service: Service, rng: random.Random) -> None:
    """Publish a version of which one file is damaged; it must not be served."""
    served = _read_version(service)
    bundle = service.publish()
    file = rng.choice([path for path in bundle.rglob("*") if path.is_file()])
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 0x55
    file.write_bytes(content)
    time.sleep(FAULT_SECONDS)
    version = _read_version(service)
    # The version is served where it was loaded before it was damaged.
    if version not in (served, int(bundle.name)):
        raise AssertionError(f"version {version} is served")
    shutil.rmtree(bundle)
    _point_latest(service, served)
    time.sleep(FAULT_SECONDS)


def _point_latest(service: Service, version: int) -> None:
    link = service.store / MODEL / LATEST
    new_link = link.with_name("latest.new")
    new_link.symlink_to(str(version))
    new_link.replace(link)


def _read_version(service: Service) -> int:
    return int(service.server.http.get("/model").json()["version"])


def swap_bundle(service: Service, rng: random.Random) -> None:
    bundle = service.publish()
    wait_until(lambda: _read_version(service) == int(bundle.name), RECOVERY_SECONDS)


def fill_disk(service: Service, rng: random.Random) -> None:
    """Let no process of the service write to a file, such as its log, as on a full disk."""
    pids = [service.server.process.pid, *service.server.children()]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, limits[1]))
    time.sleep(FAULT_SECONDS)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def connect_slow_clients(service: Service, rng: random.Random) -> None:
    """Send requests a byte at a time, until the server closes the connections."""
    address = ("127.0.0.1", service.server.port)
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(address)) for _ in range(SLOW_CLIENTS)
        ]
        for byte in REQUEST_HEAD[: int(FAULT_SECONDS / 0.05)]:
            for client in clients:
                with contextlib.suppress(OSError):
                    client.sendall(bytes([byte]))
            time.sleep(0.05)


def connect_half_open_clients(service: Service, rng: random.Random) -> None:
    """Send a part of a request and nothing more; each must be answered or closed."""
    address = ("127.0.0.1", service.server.port)
    with contextlib.ExitStack() as stack:
        for _ in range(HALF_OPEN_CLIENTS):
            client = stack.enter_context(socket.create_connection(address))
            client.sendall(REQUEST_HEAD + b"half")
        client.settimeout(RECOVERY_SECONDS)
        while client.recv(1 << 16):
            pass


def connect_idle_clients(service: Service, rng: random.Random) -> None:
    address = ("127.0.0.1", service.server.port)
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE_CONNECTIONS):
            stack.enter_context(socket.create_connection(address))
        time.sleep(FAULT_SECONDS)
        if not service.server.is_live():
            raise AssertionError("the liveness probe fails beside idle connections")


def step_clock(service: Service, rng: random.Random) -> None:
    """Set the clock of all processes forward or back by a day."""
    step = rng.choice((CLOCK_STEP_SECONDS, -CLOCK_STEP_SECONDS))
    service.clock_file.write_text(f"{step:+d}")
    time.sleep(FAULT_SECONDS)
    service.clock_file.write_text("+0")


ALL_ANSWERED = Promise("all requests are answered with 200")
RESENT = Promise(
    "images go to another worker; 503 only for those that two workers had in hand",
    frozenset({503}),
)
RESTARTED = Promise(
    "open connections are closed; others are refused until somebody starts the service",
    frozenset({503}),
    may_close=True,
    may_refuse=True,
)

FAULTS: dict[str, tuple[Fault, Promise]] = {
    "worker-killed": (kill_worker, RESENT),
    "worker-crashed": (
        crash_worker,
        Promise("422 for an image that the crashed thread had in hand", frozenset({422, 503})),
    ),
    "worker-stopped": (stop_worker, RESENT),
    "worker-paused": (pause_worker, ALL_ANSWERED),
    "launcher-killed": (kill_launcher, RESENT),
    "http-process-killed": (
        kill_http_process,
        Promise("its connections are closed; none is refused", may_close=True),
    ),
    "supervisor-killed": (kill_supervisor, RESTARTED),
    "drained": (
        drain,
        Promise(
            "what was accepted is answered, then 503; connections are refused until it runs again",
            frozenset({503}),
            may_refuse=True,
        ),
    ),
    "store-read-only": (make_store_read_only, ALL_ANSWERED),
    "store-away": (take_store_away, ALL_ANSWERED),
    "store-corrupted": (corrupt_store, ALL_ANSWERED),
    "bundle-swapped": (swap_bundle, ALL_ANSWERED),
    "disk-full": (fill_disk, ALL_ANSWERED),
    "slow-clients": (connect_slow_clients, ALL_ANSWERED),
    "half-open-clients": (connect_half_open_clients, ALL_ANSWERED),
    "idle-connections": (connect_idle_clients, ALL_ANSWERED),
    "clock-stepped": (step_clock, ALL_ANSWERED),
}


class Observer:
    """Compares what clients saw during a fault with its promise."""

    def __init__(self, load: LoadGenerator) -> None:
        self.load = load
        self.outcomes = {name: Outcome() for name in FAULTS}
        self.violations: list[str] = []

    def apply(self, name: str, service: Service, rng: random.Random) -> None:
        """Apply a fault and wait until the service answers again."""
        fault, promise = FAULTS[name]
        wait_until(service.has_all_processes, RECOVERY_SECONDS)
        self.wait_for_answers()
        statuses_before = self.load.statuses.copy()
        errors_before = len(self.load.unanswered)
        refused_before = self.load.refused_connections

        try:
            fault(service, rng)
        except AssertionError as error:
            self.violations.append(f"{name}: {error}")
        start = time.monotonic()
        wait_until(service.has_all_processes, RECOVERY_SECONDS)
        self.wait_for_answers()

        outcome = self.outcomes[name]
        outcome.times += 1
        recovery = time.monotonic() - start
        outcome.longest_recovery_seconds = max(outcome.longest_recovery_seconds, recovery)
        self.compare(
            name,
            promise,
            self.load.statuses - statuses_before,
            self.load.unanswered[errors_before:],
            self.load.refused_connections - refused_before,
        )

    def wait_for_answers(self) -> None:
        before = self.load.statuses[200]
        wait_until(lambda: self.load.statuses[200] > before + LOAD_REQUESTS, RECOVERY_SECONDS)

    def compare(
        self, name: str, promise: Promise, statuses: Counter[int], errors: list[str], refused: int
    ) -> None:
        outcome = self.outcomes[name]
        outcome.statuses += statuses
        outcome.refused_connections += refused
        for error in errors:
            is_timeout = "imeout" in error
            if promise.may_close and not is_timeout:
                outcome.closed += 1
            else:
                outcome.lost += 1
                self.violations.append(f"{name}: a request was lost: {error}")
        for status, count in statuses.items():
            if status != 200 and status not in promise.statuses:
                self.violations.append(f"{name}: {count} answers with status {status}")
        if refused and not promise.may_refuse:
            self.violations.append(f"{name}: {refused} connections were refused")

    def report(self) -> dict[str, Any]:
        faults: dict[str, Any] = {}
        for name, outcome in self.outcomes.items():
            if not outcome.times:
                continue
            faults[name] = {
                "promise": FAULTS[name][1].text,
                "times": outcome.times,
                "sent": outcome.statuses.total() + outcome.closed + outcome.lost,
                "answered": {str(s): count for s, count in sorted(outcome.statuses.items())},
                "closed": outcome.closed,
                "refused_connections": outcome.refused_connections,
                "lost": outcome.lost,
                "longest_recovery_seconds": round(outcome.longest_recovery_seconds, 2),
            }
        return {"faults": faults, "violations": self.violations}


def find_faketime() -> Path | None:
    """Return the library of the package libfaketime, or of the system; None without both."""
    candidates = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    spec = importlib.util.find_spec("libfaketime")
    if spec is not None and spec.origin is not None:
        candidates += Path(spec.origin).parent.rglob("libfaketime*.so.1")
    return candidates[0] if candidates else None


def run_faults(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    rng = random.Random(options.seed)
    faketime = options.faketime or find_faketime()
    names = [name for name in options.faults if name != "clock-stepped" or faketime is not None]
    is_clock_stepped = "clock-stepped" in names
    service = Service(directory, faketime if is_clock_stepped else None)
    skipped = sorted(set(options.faults) - set(names))

    try:
        service.server.wait_ready()
        half = options.clients // 2
        with LoadGenerator(service.server.port, IMAGE, options.clients, reconnecting=half) as load:
            observer = Observer(load)
            remaining = rng.sample(names, len(names))
            while remaining or load.statuses.total() < options.requests:
                name = remaining.pop() if remaining else rng.choice(names)
                print(f"{load.statuses.total()} answers; {name}", file=sys.stderr)
                observer.apply(name, service, rng)
    finally:
        service.server.stop()

    return {
        **describe_run(),
        "seed": options.seed,
        "clients": options.clients,
        "requests": load.statuses.total() + len(load.unanswered),
        "skipped": skipped,
        **observer.report(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000, help="at least so many")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--faketime", type=Path, help="path of libfaketime's shared library")
    parser.add_argument("--out", type=Path, help="file for the report")
    options = parser.parse_args(arguments)

    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with TemporaryDirectory() as directory:
        report = run_faults(options, Path(directory))
    return print_report(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
