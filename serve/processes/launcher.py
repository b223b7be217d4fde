"""Start worker processes in milliseconds: by fork from a process that has imported everything.

The supervisor can't fork them itself: it has threads and listening sockets, and each fork would
copy the state of their locks and keep the sockets open. So it forks the launcher before it has
either. The launcher has one thread, loads no model, and forks a process for each request.

If the launcher is killed, its processes end as well, and the next request starts another one. That
is a new interpreter, which imports everything once more.
"""

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from serve import logs
from serve.processes.process_name import set_process_name

PARENT_CHECK_SECONDS = 1.0
CLOSE_SECONDS = 1.0
REPLY_SECONDS = 30.0  # a fork takes milliseconds; a launcher that imports takes a second
MAX_REQUEST_BYTES = 1 << 16
GROUP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # Ctrl+C and systemd send them to all processes

Pipe = connection.Connection


class Request(NamedTuple):
    """A function to run in a process of its own."""

    process_name: str
    function: Callable[..., object]
    arguments: tuple[Any, ...]


class LaunchedProcess:
    """A process that the launcher has started, with the interface of `multiprocessing.Process`."""

    def __init__(self, name: str, pid: int, status_pipe: Pipe):
        self.name = name
        self.pid = pid
        # The launcher sends the exit status through it; no other process has its other end.
        self._status_pipe = status_pipe
        self._exitcode: int | None = None
        # The first thread ends processes while the monitor may still check them.
        self._lock = threading.Lock()

    @property
    def exitcode(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        with self._lock:
            if self._exitcode is None and self._status_pipe.poll():
                self._exitcode = self._receive_status()
            return self._exitcode

    def _receive_status(self) -> int:
        try:
            status: int = self._status_pipe.recv()
        except EOFError:
            # The launcher was killed. The process will notice, but must not run meanwhile.
            self._send_signal(signal.SIGKILL)
            return -signal.SIGKILL
        return status

    @property
    def sentinel(self) -> int:
        """A descriptor that becomes readable when the process ends."""
        return self._status_pipe.fileno()

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        """Wait until the process ends, at most `timeout` seconds."""
        if self.is_alive():
            self._status_pipe.poll(timeout)

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self.is_alive():
            self._send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.is_alive():
            self._send_signal(signal.SIGKILL)

    def _send_signal(self, signal_number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal_number)


class Launcher:
    """The supervisor's view of the launcher. Create it before any thread or listening socket."""

    def __init__(self) -> None:
        self._start_process("fork")

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, name: str, function: Callable[..., object], *arguments: Any) -> LaunchedProcess:
        """Run `function(*arguments)` in a process with this name. All of it is pickled.

        Raises OSError if the system can start no process now.
        """
        request = pickle.dumps(Request(name, function, arguments))
        try:
            return self._send(name, request)
        except (ConnectionError, EOFError):
            logs.logger.error("the launcher of processes was killed or hangs; starting another")
            self.close()
            self._start_process("spawn")
            return self._send(name, request)

    def close(self) -> None:
        """End the launcher and all processes that it has started."""
        # Closing would not do: the HTTP processes have copies of the descriptor.
        with contextlib.suppress(OSError):  # the launcher was killed
            self._requests.shutdown(socket.SHUT_WR)
        self._requests.close()
        self._process.join(CLOSE_SECONDS)
        self._process.kill()

    def _start_process(self, method: str) -> None:
        """Start the launcher by this start method of multiprocessing."""
        self._requests, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        context = multiprocessing.get_context(method)
        self._process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=run_launcher, args=(requests, os.getpid()), name="launcher"
        )
        # They must not end the launcher before it ignores them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
        try:
            with requests:
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _send(self, name: str, request: bytes) -> LaunchedProcess:
        """Send a request. Raises ConnectionError or EOFError if the launcher is dead or hangs."""
        status_pipe, writer = multiprocessing.Pipe(duplex=False)
        with writer:
            socket.send_fds(self._requests, [request], [writer.fileno()])
        if not status_pipe.poll(REPLY_SECONDS):
            raise ConnectionError("no reply from the launcher")
        reply = status_pipe.recv()
        if isinstance(reply, OSError):
            raise reply
        return LaunchedProcess(name, reply, status_pipe)


def run_launcher(requests: socket.socket, supervisor_pid: int) -> None:
    """Run the launcher until the supervisor closes it or ends."""
    for signal_number in GROUP_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
    set_process_name("launcher")
    # The memory stays shared: the garbage collector of a process would write to all objects.
    gc.freeze()

    processes: dict[BaseProcess, Pipe] = {}  # each with the pipe for its exit status
    while os.getppid() == supervisor_pid:
        sentinels = [process.sentinel for process in processes]
        ready = connection.wait([requests, *sentinels], PARENT_CHECK_SECONDS)
        _report_ended(processes)
        if requests in ready and not _handle_request(requests, processes):
            break

    for process in processes:
        process.kill()


def _report_ended(processes: dict[BaseProcess, Pipe]) -> None:
    """Send the exit statuses of the processes that have ended."""
    for process in list(processes):
        if process.is_alive():
            continue
        with processes.pop(process) as status_pipe, contextlib.suppress(BrokenPipeError):
            status_pipe.send(process.exitcode)


def _handle_request(requests: socket.socket, processes: dict[BaseProcess, Pipe]) -> bool:
    """Start a process and send its id, or the OSError. Return False if there are no requests."""
    data, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, maxfds=1)
    if not data:
        return False
    status_pipe = Pipe(descriptors[0], readable=False)
    request = Request(*pickle.loads(data))

    unused = [requests, status_pipe, *processes.values()]
    process = multiprocessing.get_context("fork").Process(
        target=_run_process, args=(request, os.getpid(), unused), name=request.process_name
    )
    try:
        process.start()
    except OSError as error:
        with status_pipe:
            status_pipe.send(error)
        return True
    status_pipe.send(process.pid)
    processes[process] = status_pipe
    return True


def _run_process(request: Request, launcher_pid: int, unused: list[socket.socket | Pipe]) -> None:
    """Run a request; the main function of a process that the launcher has forked."""
    for each in unused:
        each.close()
    set_process_name(request.process_name)
    if os.getppid() == launcher_pid:
        request.function(*request.arguments)
