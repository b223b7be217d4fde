"""The first process: starts LitServe's processes, replaces those that crash or hang, and drains on SIGTERM.

It subclasses LitServer where version 0.2.19 leaves no public hook: to keep the HTTP processes, which LitServe never
replaces; to watch the workers in its own way, since LitServe sees no hang and restarts without a pause; and to do
without LitServe's manager process and queues, which nothing here uses.
"""

import copy
import math
import multiprocessing
import multiprocessing.connection
import shutil
import signal
import socket
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from typing import Any

import litserve
import uvicorn
from starlette.middleware.gzip import GZipMiddleware

from models.cpu_quota import available_cores
from serve import logs
from serve.http.app import ServiceApp
from serve.http.protocol import HttpProtocol
from serve.metrics import exposition
from serve.metrics.shared_counters import SharedCounters
from serve.processes.ports import is_port_free
from serve.processes.run_directory import create_run_directory
from serve.processes.connection_limit import limit_connections
from serve.processes.http_process import Api, dismiss, run_api
from serve.processes.litserve_adapter import Quiet
from serve.settings import Settings
from serve.shared_state import SharedState
from serve.worker import shadow
from serve.worker.worker import UNUSABLE, Worker

TICK = 0.05  # seconds between two looks at a drain
WAKE = 0.2  # seconds until a signal is heard that another thread was given
WATCH = 1.0  # seconds between two looks at the processes; one that ends is seen at once
BEGINNING = 0.1  # the same until all have started
FAREWELL = 1.0  # seconds in which clients that keep a connection get one more answer on it, and are told to close it
LINGER = 0.3  # seconds in which clients are still told that we are leaving
LEAVE = 0.9  # seconds for the HTTP processes to end, in which clients take their last answers
END = 1.8  # seconds of the drain that are kept for ending the processes
SLOW = 5  # times as long as a batch took at the start: no hang yet, whatever else the cores do
OWN_FILES = 128  # that a process has open besides the connections of clients
MAX_PAUSE = 10.0  # seconds between two tries to start a process that keeps crashing


class Supervisor(litserve.LitServer):
    def __init__(self, settings: Settings, run: str, threads: int):
        super().__init__(
            Worker(settings, run, threads),
            accelerator="cpu",
            workers_per_device=settings.workers,
            timeout=False,
            middlewares=[(ServiceApp, {"settings": settings, "run_directory": run})],
        )
        self.app.user_middleware = [
            m for m in self.app.user_middleware if m.cls is not GZipMiddleware
        ]
        self.settings, self.threads = settings, threads
        self.state, self.counters = SharedState(run), SharedCounters(f"{run}/supervisor.metrics")
        self.counters.set(
            "ready", to=1
        )  # the least over all processes counts, and others know better
        for number in range(settings.api_processes):
            self.not_ready(number)
        self.apis: dict[int, BaseProcess] = {}
        self.shadows: list[BaseProcess] = []  # one, or none
        self.unusable = False  # a worker could not load the model, and has said why
        for worker in range(settings.workers):
            self.state.reset_worker(worker)

    # What LitServer.run calls.

    def _init_manager(self, num_api_servers: int) -> Quiet:
        self.workers_setup_status, self._shutdown_event = dict[str, str](), Shutdown()
        self.litapi_request_queues = {self.lit_api.api_path: None}
        self._transport = Quiet()
        return self._transport

    def verify_worker_status(self) -> None:
        """The HTTP processes need not wait for the workers: they can tell that they are alive and not ready."""

    def _start_server(
        self,
        port: int,
        count: int,
        level: str,
        sockets: list[socket.socket],
        kind: str,
        **options: Any,
    ) -> dict:
        self.sockets, self.options = sockets, {"port": port, "log_level": level, **options}
        for number in range(count):
            self.launch_api(number)
        return {}

    def launch_api(self, number: int) -> None:
        """Fork an HTTP process; all accept from the same socket."""
        app = copy.copy(self.app)
        app.response_queue_id = number
        server = Api(uvicorn.Config(app, timeout_graceful_shutdown=1, **self.options))
        self.apis[number] = multiprocessing.get_context("fork").Process(
            target=run_api, args=(server, self.sockets), name=f"http-{number}"
        )
        self.apis[number].start()

    def launch_shadow(self) -> None:
        given = self.settings, self.settings.shadow_version, self.lit_api.run
        self.shadows = [
            multiprocessing.get_context("spawn").Process(
                target=shadow.serve, args=given, name="shadow", daemon=True
            )
        ]
        self.shadows[0].start()

    def _start_worker_monitoring(self, *_: Any) -> None:
        threading.Thread(target=self.watch, name="watch", daemon=True).start()

    def _perform_graceful_shutdown(self, manager: Any, *args: Any) -> None:
        self.state.set_stopping()
        for worker in self.inference_workers:
            worker.kill()  # all that it could answer is answered; what it could not gets 503
        for api in self.apis.values():
            api.terminate()
        end = time.monotonic() + LEAVE
        for api in self.apis.values():
            api.join(max(0.0, end - time.monotonic()))
            api.kill()
        for listener in self.sockets:
            dismiss(listener)
        super()._perform_graceful_shutdown(manager, *args)

    # Watching.

    def watch(self) -> None:
        """Replace processes that died or show no progress."""
        watches = {("worker", i): Watch() for i in range(self.settings.workers)}
        watches |= {("http", i): Watch() for i in self.apis}
        watches |= {("shadow", i): Watch() for i in range(len(self.shadows))}
        told = False
        while not self.state.draining and not self.unusable:
            if not told and all(map(self.state.has_started, range(self.settings.workers))):
                host = (
                    "localhost" if self.settings.host in ("0.0.0.0", "::") else self.settings.host
                )
                logs.logger.info(
                    "serving %s on http://%s:%d", self.settings.model, host, self.settings.port
                )
                told = True
            for (kind, i), watch in watches.items():
                try:
                    self.look_after(kind, i, watch)
                except Exception:  # no process could be started, say: the next look tries again
                    logs.logger.exception("a %s process could not be replaced", kind)
                    watch.replaced()
            due = [self.process(*key).sentinel for key, watch in watches.items() if watch.due()]
            multiprocessing.connection.wait(due, WATCH if told else BEGINNING)

    def process(self, kind: str, number: int) -> BaseProcess:
        return {"worker": self.inference_workers, "http": self.apis, "shadow": self.shadows}[kind][
            number
        ]

    def look_after(self, kind: str, number: int, watch: "Watch") -> None:
        if not watch.due():
            return
        process = self.process(kind, number)
        reason = self.failure(kind, number, process)
        if reason and kind == "shadow" and process.exitcode == shadow.UNUSABLE:
            watch.next = math.inf  # it has said why
        elif reason and process.exitcode == UNUSABLE and not self.ready_once:
            self.unusable = True
            self._shutdown_event.set()
        elif reason and not self.state.draining:
            logs.logger.error(
                "%s process replaced",
                kind,
                extra={
                    "fields": {"number": number, "reason": reason, "exit_code": process.exitcode}
                },
            )
            self.counters.add("restarts", kind, reason)
            self.replace(kind, number)
            watch.replaced()

    @property
    def ready_once(self) -> bool:
        return self.counters.values[self.counters.slot("restarts", "worker", "crash")] > 0 or any(
            map(self.state.has_started, range(self.settings.workers))
        )

    def failure(self, kind: str, number: int, process: BaseProcess) -> str | None:
        if not process.is_alive():
            return "crash"
        if kind == "worker":
            silent = self.state.stalled_seconds(number, self.threads)
            if silent > max(
                self.settings.worker_timeout_seconds, SLOW * self.state.run_seconds(number)
            ):
                process.kill()
                process.join()
                return "hang"
        return None

    def replace(self, kind: str, number: int) -> None:
        if kind == "http":
            self.state.set_pending(number, 0, 0, 0)
            self.not_ready(number)
            self.launch_api(number)
        elif kind == "shadow":
            self.launch_shadow()
        else:
            self.state.reset_worker(number)
            self.inference_workers[number] = self.launch_single_inference_worker(
                self.lit_api, number
            )

    def not_ready(self, number: int) -> None:
        """In the name of an HTTP process that has not begun to count."""
        SharedCounters(f"{self.lit_api.run}/api-{number}.metrics").set("ready", to=0)

    # Ending.

    def drain(self, *_: Any) -> None:
        """SIGTERM: no longer ready; say farewell; wait until what was accepted is answered; then end everything."""
        if self.state.draining:
            return
        self.state.set_draining()
        self.counters.set("ready", to=0)
        logs.logger.info("draining")
        now = time.monotonic()
        end = now + self.settings.drain_seconds - END
        farewell, linger = min(now + FAREWELL, end), min(now + FAREWELL + LINGER, end)
        while time.monotonic() < farewell:
            time.sleep(TICK)
        self.state.set_refusing()
        while time.monotonic() < linger or (
            self.state.pending_requests(self.settings.api_processes) and time.monotonic() < end
        ):
            time.sleep(TICK)
        raise KeyboardInterrupt  # LitServe's way to end


class Shutdown(threading.Event):
    """What the first thread waits for. It wakes often, as only it handles signals: one that comes while another thread
    replaces a process may be given to that thread by the kernel, and would wake nobody."""

    def wait(self, timeout: float | None = None) -> bool:
        while not super().wait(WAKE if timeout is None else timeout):
            if timeout is not None:
                return False
        return True


class Watch:
    """When to look at a process again: one that keeps crashing is started less and less often."""

    def __init__(self):
        self.started = self.next = 0.0
        self.failures = 0

    def due(self) -> bool:
        return time.monotonic() >= self.next

    def replaced(self) -> None:
        now = time.monotonic()
        self.failures = self.failures + 1 if now - self.started < MAX_PAUSE else 0
        self.started = now
        self.next = now + (min(MAX_PAUSE, 0.1 * 2**self.failures) if self.failures > 5 else 0)


def serve(settings: Settings) -> int:
    """Run the service until it is told to end. Returns the exit status."""
    logs.configure(settings)
    for port in (settings.port, settings.metrics_port):
        if port and not is_port_free(settings.host, port):
            print(
                f"error: port {port} is in use; stop what uses it or choose another",
                file=sys.stderr,
            )
            return 2
    run = create_run_directory()
    try:
        return _serve(settings, run)
    except KeyboardInterrupt:
        return 0  # told to end before it had begun
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        shutil.rmtree(run, ignore_errors=True)


def _serve(settings: Settings, run: str) -> int:
    settings = limit_connections(settings)
    SharedState.create(run)
    threads = settings.threads or max(1, available_cores() // settings.workers)
    supervisor = Supervisor(settings, run, threads)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, supervisor.drain)
    if settings.shadow_version:
        supervisor.launch_shadow()
    metrics = (
        exposition.start(settings.host, settings.metrics_port, run)
        if settings.metrics_port
        else None
    )
    try:
        supervisor.run(
            host=settings.host,
            port=settings.port,
            num_api_servers=settings.api_processes,
            generate_client_file=False,
            log_level="warning",
            http=HttpProtocol,
            ws="none",
            loop="uvloop",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=settings.keep_alive_seconds,
            backlog=settings.max_connections,
        )
    finally:
        if metrics:
            metrics.shutdown()
    return 2 if supervisor.unusable else 0
