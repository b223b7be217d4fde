"""The supervisor, the first process: it starts the others, replaces those that fail, and drains.

It also answers /metrics. `serve` is the main function of the service.
"""

import multiprocessing
import multiprocessing.connection
import shutil
import signal
import socket
import threading
import time
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Literal, NamedTuple

import uvicorn

from models.cpu_quota import available_cores
from serve import logs
from serve.http.app import ServiceApp
from serve.http.protocol import HttpProtocol
from serve.metrics import exposition
from serve.metrics.shared_counters import SharedCounters
from serve.processes.connection_limit import limit_connections
from serve.processes.http_process import HttpServer, answer_late_clients, run_http_process
from serve.processes.launcher import LaunchedProcess, Launcher
from serve.processes.litserve_adapter import LitServeAdapter
from serve.processes.ports import is_port_free
from serve.processes.restart_policy import RestartPolicy
from serve.processes.run_directory import create_run_directory
from serve.settings import Settings
from serve.shared_state import SharedState
from serve.stall_timer import StallTimer
from serve.worker.exit_status import HANGING, MODEL_UNUSABLE
from serve.worker.shadow import run_shadow
from serve.worker.worker import HEARTBEAT_SECONDS, Worker

# Connections that the kernel holds until they are accepted. If it holds as many as it may, it drops
# others, which try again after a second: a probe, too, where the limit of connections is small.
MIN_BACKLOG = 128

# Monitoring. A process that ends is noticed at once.
MONITOR_SECONDS = 1.0
STARTUP_MONITOR_SECONDS = 0.1  # until all workers have started
# A worker without a heartbeat for so long hangs, where `worker_timeout_seconds` is even shorter.
MIN_HEARTBEAT_TIMEOUT_SECONDS = 4 * HEARTBEAT_SECONDS
KILL_SECONDS = 5.0  # a process ends so long after SIGKILL

# The drain.
DRAIN_POLL_SECONDS = 0.05
# Clients that keep a connection get one more response on it, which tells them to close it.
CLOSE_NOTICE_SECONDS = 1.0
# New requests get 503, so that clients and load balancers see that the service is leaving.
REFUSAL_SECONDS = 0.3
# The last part of `drain_seconds`, in which the processes end.
SHUTDOWN_SECONDS = 1.8
# HTTP processes may take this part of SHUTDOWN_SECONDS to send their last responses.
HTTP_EXIT_SECONDS = 0.9
# uvicorn cancels requests after this time; HTTP_EXIT_SECONDS ends its process before.
UVICORN_SHUTDOWN_SECONDS = 1

EXIT_OK = 0
EXIT_UNUSABLE = 2

ProcessKind = Literal["worker", "http", "shadow"]
FailureReason = Literal["crash", "hang"]


class ProcessKey(NamedTuple):
    """Identifies a process of the service. The process that replaces it has the same key."""

    kind: ProcessKind
    number: int


class Supervisor:
    """Owns the processes of the service."""

    def __init__(self, settings: Settings, run_directory: str, threads: int, launcher: Launcher):
        self.settings = settings
        self.run_directory = run_directory
        self.threads = threads  # of each worker
        self.launcher = launcher
        self.state = SharedState(run_directory)
        self.counters = SharedCounters(f"{run_directory}/supervisor.metrics")
        # The metric is the minimum over all processes, so those that are not ready decide.
        self.counters.set("ready", to=1)

        self.sockets: list[socket.socket] = []
        self.http_processes: dict[int, BaseProcess] = {}
        self.shadow_processes: list[LaunchedProcess] = []  # one, or none
        self.worker_failures = 0  # crashes and hangs
        self.stall_timers: dict[int, StallTimer] = {}  # by the number of the worker
        self.model_is_unusable = False  # a worker could not load the model at the start
        self.latest_end = 0.0  # of the drain, in seconds of time.monotonic()
        for number in range(settings.api_processes):
            self._publish_not_ready(number)
        for number in range(settings.workers):
            self.state.reset_worker(number)

        worker = Worker(settings, run_directory, threads)
        self.litserve = LitServeAdapter(worker, settings.workers, self, launcher)
        self.uvicorn_options: dict[str, Any] = {
            "log_level": "warning",
            "http": HttpProtocol,
            "ws": "none",
            "loop": "uvloop",
            "log_config": None,
            "access_log": False,
            "proxy_headers": False,
            "server_header": False,
            "timeout_keep_alive": settings.keep_alive_seconds,
            "backlog": max(settings.max_connections, MIN_BACKLOG),
        }

    def handle_signals(self) -> None:
        """Drain the service on SIGTERM and SIGINT."""
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self.drain)

    def run(self) -> int:
        """Run the service until it is drained. Return the exit status."""
        if self.settings.shadow_version:
            self._start_shadow_process()
        self.litserve.run_service(
            self.settings.host,
            self.settings.port,
            self.settings.api_processes,
            self.uvicorn_options,
        )
        return EXIT_UNUSABLE if self.model_is_unusable else EXIT_OK

    # The methods of ProcessOwner, which LitServe calls.

    def start_http_processes(self, sockets: list[socket.socket]) -> None:
        """Start the HTTP processes; all accept from the same sockets."""
        self.sockets = sockets
        for number in range(self.settings.api_processes):
            self._start_http_process(number)

    def start_monitoring(self) -> None:
        """Start the thread that replaces processes that fail."""
        threading.Thread(target=self._monitor, name="monitor", daemon=True).start()

    def end_processes(self) -> None:
        """End the workers and the HTTP processes, and answer clients that connect too late."""
        self.state.set_stopping()
        # All jobs that could be answered are. HTTP processes answer the others with 503. Workers
        # that keep images write those that wait.
        for worker in self.litserve.workers:
            worker.terminate()
        for worker in self.litserve.workers:
            worker.join(max(0.0, self.latest_end - time.monotonic()))
            worker.kill()

        for http_process in self.http_processes.values():
            http_process.terminate()
        end = time.monotonic() + HTTP_EXIT_SECONDS
        for http_process in self.http_processes.values():
            http_process.join(max(0.0, end - time.monotonic()))
            http_process.kill()

        for listener in self.sockets:
            answer_late_clients(listener)

    # Starting processes.

    def _start_http_process(self, number: int) -> None:
        lifespan_app = self.litserve.create_lifespan_app(number)
        app = ServiceApp(lifespan_app, self.settings, self.run_directory, number)
        config = uvicorn.Config(
            app, timeout_graceful_shutdown=UVICORN_SHUTDOWN_SECONDS, **self.uvicorn_options
        )
        process = multiprocessing.get_context("fork").Process(
            target=run_http_process,
            args=(number, HttpServer(config), self.sockets),
            name=f"http-{number}",
        )
        process.start()
        self.http_processes[number] = process

    def _start_shadow_process(self) -> None:
        process = self.launcher.start(
            "shadow",
            run_shadow,
            self.settings,
            self.settings.shadow_version,
            self.run_directory,
        )
        self.shadow_processes = [process]

    def _publish_not_ready(self, number: int) -> None:
        """Set `ready` to 0 for an HTTP process that has not started to count."""
        SharedCounters(f"{self.run_directory}/api-{number}.metrics").set("ready", to=0)

    # Monitoring, in a thread.

    def _monitor(self) -> None:
        """Replace processes that end or hang, until the service drains."""
        policies = {key: RestartPolicy() for key in self._process_keys()}
        ready_logged = False
        while not self.state.draining and not self.model_is_unusable:
            if not ready_logged and self._all_workers_have_started():
                self._log_address()
                ready_logged = True

            for key, policy in policies.items():
                if policy.is_check_due():
                    self._check_process(key, policy)

            timeout = MONITOR_SECONDS if ready_logged else STARTUP_MONITOR_SECONDS
            self._wait_for_exit(policies, timeout)

    def _process_keys(self) -> list[ProcessKey]:
        keys = [ProcessKey("worker", number) for number in range(self.settings.workers)]
        keys += [ProcessKey("http", number) for number in self.http_processes]
        keys += [ProcessKey("shadow", number) for number in range(len(self.shadow_processes))]
        return keys

    def _process(self, key: ProcessKey) -> BaseProcess | LaunchedProcess:
        if key.kind == "worker":
            return self.litserve.workers[key.number]
        if key.kind == "http":
            return self.http_processes[key.number]
        return self.shadow_processes[key.number]

    def _all_workers_have_started(self) -> bool:
        return all(self.state.has_started(number) for number in range(self.settings.workers))

    def _log_address(self) -> None:
        settings = self.settings
        host = "localhost" if settings.host in ("0.0.0.0", "::") else settings.host
        logs.logger.info("serving %s on http://%s:%d", settings.model, host, settings.port)

    def _wait_for_exit(
        self, policies: dict[ProcessKey, RestartPolicy], timeout_seconds: float
    ) -> None:
        """Wait until one of the processes ends that may be checked, or until the timeout."""
        sentinels: list[int] = []
        for key, policy in policies.items():
            if policy.is_check_due():
                sentinels.append(self._process(key).sentinel)
        multiprocessing.connection.wait(sentinels, timeout_seconds)

    def _check_process(self, key: ProcessKey, policy: RestartPolicy) -> None:
        """Replace the process if it has ended or hangs."""
        try:
            reason = self._failure_reason(key)
            if reason is not None:
                self._handle_failure(key, reason, policy)
        except Exception:  # for example, the system can start no process now
            logs.logger.exception("a %s process could not be replaced; trying again", key.kind)
            policy.record_restart()

    def _failure_reason(self, key: ProcessKey) -> FailureReason | None:
        """Return why a process must be replaced, or None if it runs well."""
        process = self._process(key)
        if not process.is_alive():
            is_hang = key.kind == "worker" and process.exitcode == HANGING
            return "hang" if is_hang else "crash"
        if key.kind == "worker" and self._worker_hangs(key.number):
            return "hang"
        return None

    def _worker_hangs(self, number: int) -> bool:
        """Whether a worker as a whole hangs. It ends by itself if only a predictor hangs."""
        pid = self.litserve.workers[number].pid
        timer = self.stall_timers.get(number)
        if timer is None or timer.process != pid:
            timer = StallTimer(pid, pid)  # its main thread sends the heartbeats
            self.stall_timers[number] = timer
        limit = max(self.settings.worker_timeout_seconds, MIN_HEARTBEAT_TIMEOUT_SECONDS)
        return timer.update(self.state.heartbeat(number)) > limit

    def _handle_failure(
        self, key: ProcessKey, reason: FailureReason, policy: RestartPolicy
    ) -> None:
        """Replace a process, unless its replacement would fail in the same way."""
        process = self._process(key)
        if reason == "hang":
            process.kill()
            process.join(KILL_SECONDS)  # not reported by a launcher that hangs

        if process.exitcode == MODEL_UNUSABLE:
            if key.kind == "shadow":
                policy.give_up()
                return
            if key.kind == "worker" and self._is_first_start():
                self.model_is_unusable = True
                self.litserve.stop()
                return
        if self.state.draining:
            return

        fields = {"number": key.number, "reason": reason, "exit_code": process.exitcode}
        logs.logger.error("%s process replaced", key.kind, extra={"fields": fields})
        self.counters.add("restarts", key.kind, reason)
        if key.kind == "worker":
            self.worker_failures += 1
        self._replace(key)
        policy.record_restart()

    def _is_first_start(self) -> bool:
        """Whether no worker has started or was replaced yet."""
        if self.worker_failures > 0:
            return False
        return not any(self.state.has_started(number) for number in range(self.settings.workers))

    def _replace(self, key: ProcessKey) -> None:
        """Start a process that replaces one that has ended."""
        if key.kind == "worker":
            self.state.reset_worker(key.number)
            self.litserve.replace_worker(key.number)
        elif key.kind == "http":
            self.state.set_pending(key.number, images=0, requests=0, body_bytes=0)
            self._publish_not_ready(key.number)
            self._start_http_process(key.number)
        else:
            self._start_shadow_process()

    # Draining.

    def drain(self, signal_number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT: answer what was accepted, then end the service.

        The timeline, in seconds from the signal:

        0      The service is not ready. Each response closes its connection.
        1.0    New requests get 503 (after CLOSE_NOTICE_SECONDS).
        1.3    The processes end once all accepted requests are answered (after REFUSAL_SECONDS).
        drain_seconds - 1.8
               The processes end in any case (SHUTDOWN_SECONDS before the end).

        Before they end, workers write the images that they keep.

        Where `drain_seconds` is short, the last of these times bounds the others.
        """
        if self.state.draining:
            return
        self.state.set_draining()
        self.counters.set("ready", to=0)
        logs.logger.info("draining")

        start = time.monotonic()
        self.latest_end = start + self.settings.drain_seconds - SHUTDOWN_SECONDS
        refusal_start = min(start + CLOSE_NOTICE_SECONDS, self.latest_end)
        earliest_end = min(start + CLOSE_NOTICE_SECONDS + REFUSAL_SECONDS, self.latest_end)

        _sleep_until(refusal_start)
        self.state.set_refusing()
        _sleep_until(earliest_end)
        while self._has_pending_requests() and time.monotonic() < self.latest_end:
            time.sleep(DRAIN_POLL_SECONDS)
        # Not by an exception: it would be lost where the signal interrupts code that ignores
        # exceptions, such as the hooks of a fork.
        self.litserve.stop()

    def _has_pending_requests(self) -> bool:
        return self.state.pending_requests(self.settings.api_processes) > 0


def _sleep_until(end: float) -> None:
    """Sleep until this time of time.monotonic()."""
    time.sleep(max(0.0, end - time.monotonic()))


def serve(settings: Settings) -> int:
    """Run the service until it is drained. Return the exit status.

    Raises ValueError for a port that is in use.
    """
    logs.configure(settings)
    for port in (settings.port, settings.metrics_port):
        if port and not is_port_free(settings.host, port):
            raise ValueError(f"port {port} is in use; stop what uses it or choose another")

    run_directory = create_run_directory()
    try:
        return _run_service(limit_connections(settings), run_directory)
    except KeyboardInterrupt:
        return EXIT_OK  # a signal during the start
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        shutil.rmtree(run_directory, ignore_errors=True)


def _run_service(settings: Settings, run_directory: str) -> int:
    """Run the supervisor and the server of /metrics."""
    SharedState.create(run_directory)
    threads = settings.threads or max(1, available_cores() // settings.workers)
    with Launcher() as launcher:
        supervisor = Supervisor(settings, run_directory, threads, launcher)
        supervisor.handle_signals()
        if not settings.metrics_port:
            return supervisor.run()

        metrics_server = exposition.start(settings.host, settings.metrics_port, run_directory)
        try:
            return supervisor.run()
        finally:
            metrics_server.shutdown()
