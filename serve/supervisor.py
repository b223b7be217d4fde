"""The first process: starts LitServe's processes, replaces workers that crash or hang, and drains on SIGTERM.

It subclasses LitServer in two places, since LitServe 0.2.19 keeps the list of its processes there: to learn of the HTTP
processes, and to watch the workers in its own way (LitServe's watch sees no hang and restarts without a pause).
"""
import multiprocessing
import shutil
import signal
import socket
import sys
import threading
import time
from multiprocessing import Process
from typing import Any

import litserve
from starlette.middleware.gzip import GZipMiddleware

from serve import exposition, logs, machine, shadow
from serve.connection import Connection
from serve.front import Front
from serve.metrics import Slab
from serve.settings import Settings
from serve.state import State
from serve.worker import Worker

TICK = 0.05
LINGER = 0.3  # seconds in which a client that just connected is still told that we are leaving
MAX_PAUSE = 10.0  # seconds between two tries to start a worker that keeps crashing


class Supervisor(litserve.LitServer):
    def __init__(self, settings: Settings, run: str, threads: int):
        super().__init__(Worker(settings, run, threads), accelerator="cpu", workers_per_device=settings.workers,
                         timeout=False, middlewares=[(Front, {"settings": settings, "run": run})])
        self.app.user_middleware = [m for m in self.app.user_middleware if m.cls is not GZipMiddleware]
        self.settings, self.run_directory, self.threads = settings, run, threads
        self.state, self.slab = State(run), Slab(f"{run}/supervisor.metrics")
        self.uvicorn_graceful_timeout = 5

    def _start_worker_monitoring(self, manager: Any, uvicorn_workers: dict[str, Process]) -> None:
        threading.Thread(target=self.watch, args=(uvicorn_workers,), name="watch", daemon=True).start()

    def watch(self, apis: dict[str, Process]) -> None:
        """Replace workers that died or show no progress. A service without its HTTP processes ends."""
        starts = [0.0] * len(self.inference_workers)
        failures = [0] * len(self.inference_workers)
        while not self.state.draining:
            for i, worker in enumerate(self.inference_workers):
                if self.state.silent_seconds(i, self.threads) > self.settings.worker_timeout_seconds:
                    logs.logger.error("worker hangs; it is replaced", extra={"fields": {"worker": i}})
                    self.slab.add("worker_restarts", "hang")
                    worker.kill()
                    worker.join()
                elif not worker.is_alive():
                    logs.logger.error("worker ended; it is replaced",
                                      extra={"fields": {"worker": i, "exit_code": worker.exitcode}})
                    self.slab.add("worker_restarts", "crash")
                else:
                    continue
                failures[i] = failures[i] + 1 if time.monotonic() - starts[i] < MAX_PAUSE else 0
                self.state.reset(i)
                time.sleep(min(MAX_PAUSE, 0.1 * 2 ** failures[i]) if failures[i] > 3 else 0)
                starts[i] = time.monotonic()
                self.inference_workers[i] = self.launch_single_inference_worker(self.lit_api, i)
            time.sleep(TICK)

    def drain(self, *_: Any) -> None:
        """SIGTERM: no longer ready; wait until what was accepted is answered; then end everything."""
        if self.state.draining:
            return
        self.state.drain()
        logs.logger.info("draining")
        end = time.monotonic() + self.settings.drain_seconds - 1
        linger = time.monotonic() + LINGER
        while time.monotonic() < linger or (
                self.state.requests(self.settings.api_processes) and time.monotonic() < end):
            time.sleep(TICK)
        raise KeyboardInterrupt  # LitServe's way to end


def serve(settings: Settings) -> int:
    """Run the service until it is told to end. Returns the exit status."""
    logs.configure(settings)
    for port in (settings.port, settings.metrics_port):
        if port and not free(settings.host, port):
            print(f"error: port {port} is in use; stop what uses it or choose another", file=sys.stderr)
            return 2
    run = machine.run_directory()
    try:
        State.create(run)
        threads = settings.threads or max(1, machine.cores() // settings.workers)
        supervisor = Supervisor(settings, run, threads)
        signal.signal(signal.SIGTERM, supervisor.drain)
        signal.signal(signal.SIGINT, supervisor.drain)
        if settings.shadow_version:
            multiprocessing.get_context("spawn").Process(
                target=shadow.serve, args=(settings, run), name="shadow", daemon=True).start()
        metrics = exposition.start(settings.host, settings.metrics_port, run) if settings.metrics_port else None
        try:
            supervisor.run(
                host=settings.host, port=settings.port, num_api_servers=settings.api_processes,
                generate_client_file=False, log_level="warning", http=Connection, ws="none", loop="uvloop",
                log_config=None, access_log=False, proxy_headers=False, server_header=False,
                timeout_keep_alive=settings.keep_alive_seconds, backlog=settings.max_connections)
        except RuntimeError:
            return 2  # a worker could not load its model, and has said why
        finally:
            if metrics:
                metrics.shutdown()
        return 0
    finally:
        shutil.rmtree(run, ignore_errors=True)


def free(host: str, port: int) -> bool:
    """Whether the port can be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


