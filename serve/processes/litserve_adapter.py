"""The only module that imports LitServe. It is written for LitServe 0.2.19.

LitServe binds the port, runs in each worker process, and waits until the service ends. Its path of
a request (endpoints, queues, batching, responses) is not used: HTTP processes and workers talk over
Unix sockets. `LitServeAdapter` connects LitServe to a supervisor, which owns the processes.

Public parts that are extended:

- `LitAPI.setup` loads the model in a worker process.
- `LitLoop.__call__` is the main loop of a worker process, instead of LitServe's loop over a queue.
- `LitServer.run` starts everything and returns when the service has ended.
- `LitServer.launch_inference_worker` would start workers by spawn, which imports everything again.
  They are forked from the launcher, and run LitServe's `inference_worker` in the same way.
- `MessageTransport` is the interface of the transport, which is not used.

Private parts that are replaced, because version 0.2.19 has no public alternative:

- `LitServer._init_manager` would start a manager process for queues, a status dictionary and an
  event. A process, its memory and its polling are saved: plain objects replace them in
  `workers_setup_status`, `_shutdown_event`, `litapi_request_queues` and `_transport`.
- `LitServer.verify_worker_status` would wait for a worker before HTTP processes start. They start
  at once, so that the service can report that it is live and not ready.
- `LitServer._start_server` would start HTTP processes that LitServe never replaces.
- `LitServer._start_worker_monitoring` would restart workers that end, without a pause, but would
  not notice one that hangs.
- `LitServer._perform_graceful_shutdown` ends the processes; the supervisor does this first.

Private parts that are used:

- `LitServer.inference_workers` holds the worker processes, which LitServe ends at the shutdown.
- `LitServer._callback_runner` is an argument of `inference_worker`.
- `LitServer.app` and its attribute `response_queue_id`: the lifespan of LitServe's app runs in each
  HTTP process and reads that number.
"""

import asyncio
import copy
import socket
import time
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import litserve
from litserve.loops import inference_worker
from litserve.loops.base import LitLoop
from litserve.transport.base import MessageTransport
from starlette.types import ASGIApp

from serve.processes.launcher import LaunchedProcess, Launcher

# How often the first thread wakes to handle signals.
SIGNAL_CHECK_SECONDS = 0.2


class WorkerProgram(Protocol):
    """The program of a worker process. It is pickled into the process."""

    def setup(self) -> None:
        """Load the model."""

    def run(self, number: int) -> None:
        """Serve as the worker with this number; never returns."""


class ProcessOwner(Protocol):
    """Owns the processes of the service. LitServe's `run` calls these methods in this order."""

    def start_http_processes(self, sockets: list[socket.socket]) -> None:
        """Start the HTTP processes, which accept from these sockets."""

    def start_monitoring(self) -> None:
        """Begin to replace processes that fail."""

    def end_processes(self) -> None:
        """End all processes; the service shuts down."""


class LitServeAdapter(litserve.LitServer):
    """Runs the service with LitServe's process start and shutdown."""

    def __init__(
        self, worker: WorkerProgram, worker_count: int, owner: ProcessOwner, launcher: Launcher
    ):
        super().__init__(
            _WorkerApi(worker), accelerator="cpu", workers_per_device=worker_count, timeout=False
        )
        self.worker_count = worker_count
        self.owner = owner
        self.launcher = launcher
        self._shutdown_event = _ShutdownFlag()  # from now on, so that a signal is never lost

    def run_service(
        self, host: str, port: int, http_processes: int, uvicorn_options: dict[str, Any]
    ) -> None:
        """Start everything and return after `stop`, also if that was called before."""
        self.run(
            host=host,
            port=port,
            num_api_servers=http_processes,
            generate_client_file=False,
            **uvicorn_options,
        )

    def stop(self) -> None:
        """Make `run_service` end the processes and return. A signal handler may call it."""
        self._shutdown_event.set()

    @property
    def workers(self) -> list[LaunchedProcess]:
        """The worker processes by their numbers."""
        return self.inference_workers

    def replace_worker(self, number: int) -> None:
        """Start a process that replaces a worker that has ended."""
        self.inference_workers[number] = self._start_worker(number)

    def _start_worker(self, number: int) -> LaunchedProcess:
        return self.launcher.start(
            f"worker-{number}",
            inference_worker,
            self.lit_api,
            "cpu",
            number,
            None,  # the queue of requests
            self._transport,
            {},  # the setup status of the workers
            self._callback_runner,
            False,  # restart_workers
        )

    def create_lifespan_app(self, process_number: int) -> ASGIApp:
        """Return LitServe's app for an HTTP process. Give it only the events of the lifespan."""
        app = copy.copy(self.app)
        app.response_queue_id = process_number
        return app

    # The methods that LitServer.run calls.

    def _init_manager(self, num_api_servers: int) -> "_NoManager":
        self.workers_setup_status: dict[str, str] = {}
        self.litapi_request_queues = {self.lit_api.api_path: None}
        self._transport = _UnusedTransport()
        return _NoManager()

    def launch_inference_worker(self, lit_api: litserve.LitAPI) -> list[LaunchedProcess]:
        """Start all workers."""
        return [self._start_worker(number) for number in range(self.worker_count)]

    def verify_worker_status(self) -> None:
        """Do not wait for the workers."""

    def _start_server(
        self,
        port: int,
        num_uvicorn_servers: int,
        log_level: str,
        sockets: list[socket.socket],
        uvicorn_worker_type: str,
        **kwargs: Any,
    ) -> dict[int, BaseProcess]:
        self.owner.start_http_processes(sockets)
        return {}

    def _start_worker_monitoring(
        self, manager: "_NoManager", uvicorn_workers: dict[int, BaseProcess]
    ) -> None:
        self.owner.start_monitoring()

    def _perform_graceful_shutdown(
        self,
        manager: "_NoManager",
        uvicorn_workers: dict[int, BaseProcess],
        shutdown_reason: str = "normal",
    ) -> None:
        self.owner.end_processes()
        super()._perform_graceful_shutdown(manager, uvicorn_workers, shutdown_reason)


class _WorkerLoop(LitLoop):
    """The main loop of a worker process."""

    def __call__(
        self, lit_api: "_WorkerApi", device: str, worker_id: int, *args: Any, **kwargs: Any
    ) -> None:
        lit_api.worker.run(worker_id)


class _WorkerApi(litserve.LitAPI):
    """Carries a worker program into a worker process."""

    def __init__(self, worker: WorkerProgram):
        super().__init__(loop=_WorkerLoop())
        self.worker = worker

    def setup(self, device: str) -> None:
        self.worker.setup()

    def decode_request(self, request: Any) -> Any:
        raise AssertionError("no request goes through LitServe")

    def predict(self, x: Any) -> Any:
        raise AssertionError("no request goes through LitServe")


class _UnusedTransport(MessageTransport):
    """A transport that never has a message, since answers go through Unix sockets."""

    def send(self, item: Any, consumer_id: int) -> None:
        raise AssertionError("no answer goes through LitServe")

    async def areceive(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.Event().wait()

    def close(self, *args: Any, **kwargs: Any) -> None:
        pass


class _NoManager:
    """Replaces the manager process: there is nothing to shut down."""

    def shutdown(self) -> None:
        pass


class _ShutdownFlag:
    """What the first thread waits for, instead of the manager's event.

    It is set by a signal handler, which may interrupt the first thread anywhere. So it has no lock,
    which the interrupted code might hold. Waiting polls: only the first thread handles signals, but
    the kernel may give one to another thread, which does not wake the first.
    """

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self) -> None:
        while not self._is_set:
            time.sleep(SIGNAL_CHECK_SECONDS)
