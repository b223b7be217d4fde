"""The queue of a worker: it receives jobs from HTTP processes and forms batches of them.

There is no thread for input. A predictor thread that is free reads the sockets itself, one thread
at a time, and takes the jobs it finds. While all predictors are busy, jobs collect in the sockets
and make the next batch larger. So no job is handed from thread to thread, which would cost a small
network more than its run. A batch waits for more jobs only if the setting `batch_wait_ms` says so.
"""

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

from serve.active_jobs import build_key
from serve.wire import CANCEL, FORGET, LABEL, Job, take_jobs

SEND_TIMEOUT_SECONDS = 5  # an HTTP process that reads nothing for so long loses its answers
SEND_BUFFER_BYTES = 1 << 20
RECEIVE_BYTES = 1 << 20
MAX_WAITING_CONNECTIONS = 64
PEER_CREDENTIALS = struct.Struct("3i")  # process, user and group of SO_PEERCRED


class HttpProcessConnection:
    """The connection of a worker to one HTTP process."""

    def __init__(self, sock: socket.socket):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        sock.settimeout(SEND_TIMEOUT_SECONDS)
        self.sock = sock
        self.process_id = _read_peer_process_id(sock)
        self.buffer = bytearray()  # received bytes that are not yet a complete frame
        self.send_lock = threading.Lock()

    def send(self, frames: bytes) -> None:
        """Send frames. If the HTTP process is gone or stuck, its answers are lost with it."""
        with self.send_lock:
            try:
                self.sock.sendall(frames)
            except OSError:
                # The next read sees the end of the stream and closes the connection.
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_RDWR)


def _read_peer_process_id(sock: socket.socket) -> int:
    """Return the id of the process at the other end of a Unix socket."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    process_id, _, _ = PEER_CREDENTIALS.unpack(credentials)
    return process_id


class QueuedJob:
    """A job, and the connection that its answer goes to."""

    __slots__ = ("arrived", "connection", "job", "key")

    def __init__(self, connection: HttpProcessConnection, job: Job, arrived: float):
        self.connection = connection
        self.job = job
        self.arrived = arrived  # seconds of time.monotonic()
        self.key = build_key(connection.process_id, job.id)


class Batcher:
    """Forms batches of the jobs that arrive on a Unix socket.

    It is work-conserving: free predictors share the waiting jobs, and none stays idle.
    """

    def __init__(
        self,
        path: str,
        active_predictors: int,
        max_batch_size: int,
        wait_seconds: float,
        pack_model_info: Callable[[], bytes],
        on_notice: Callable[[Job], None],
    ):
        """Listen on the Unix socket `path`.

        `active_predictors` is the number of threads that take batches; `pack_model_info` returns
        the frame that each HTTP process gets when it connects. `on_notice` gets jobs with LABEL or
        FORGET, and returns at once.
        """
        self.active_predictors = active_predictors
        self.max_batch_size = max_batch_size
        self.wait_seconds = wait_seconds
        self.pack_model_info = pack_model_info
        self.on_notice = on_notice

        self.queue: deque[QueuedJob] = deque()
        self.connections: set[HttpProcessConnection] = set()
        self.free_predictors = 0
        self.read_lock = threading.Lock()  # held by the thread that reads the sockets
        self.count_lock = threading.Lock()  # guards free_predictors

        if os.path.exists(path):
            os.unlink(path)  # left by a worker that crashed
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(MAX_WAITING_CONNECTIONS)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)

    def set_active_predictors(self, count: int) -> None:
        """Change the number of threads that take batches."""
        self.active_predictors = count

    def broadcast(self, frame: bytes) -> None:
        """Send a frame to all HTTP processes."""
        for connection in list(self.connections):
            connection.send(frame)

    def has_other_work(self) -> bool:
        """Whether a job waits or another predictor than the calling one is busy."""
        return bool(self.queue) or self.free_predictors < self.active_predictors - 1

    def take(self) -> tuple[list[QueuedJob], bool]:
        """Block until there are jobs. Return a batch, and whether no other job waits or runs."""
        with self.count_lock:
            self.free_predictors += 1

        with self.read_lock:
            self._read(0 if self.queue else None)
            while not self.queue:
                self._read(None)
            if self.wait_seconds:
                self._wait_for_more_jobs()

            with self.count_lock:
                share = -(-len(self.queue) // self.free_predictors)  # rounded up
                size = min(self.max_batch_size, share)
                jobs = [self.queue.popleft() for _ in range(size)]
                is_alone = self.free_predictors == self.active_predictors and not self.queue
                self.free_predictors -= 1
        return jobs, is_alone

    def take_more(self, limit: int) -> list[QueuedJob]:
        """Return at most `limit` jobs that have arrived, for a batch that has not run yet.

        Return none if a free predictor is reading the sockets: it takes them at once.
        """
        if limit <= 0 or not self.read_lock.acquire(blocking=False):
            return []
        try:
            self._read(0)
            return [self.queue.popleft() for _ in range(min(limit, len(self.queue)))]
        finally:
            self.read_lock.release()

    def _wait_for_more_jobs(self) -> None:
        """Read for `wait_seconds`, or until the batch is full."""
        end = time.monotonic() + self.wait_seconds
        while not self.queue or (len(self.queue) < self.max_batch_size and time.monotonic() < end):
            timeout = max(0.0, end - time.monotonic()) if self.queue else None
            self._read(timeout)

    def _read(self, timeout_seconds: float | None) -> None:
        """Move jobs from the sockets to the queue. Wait for the first; None: without a limit."""
        for key, _ in self.selector.select(timeout_seconds):
            if key.data is None:
                self._accept()
            elif not self._receive(key.data):
                self._close(key.data)

    def _accept(self) -> None:
        sock, _ = self.listener.accept()
        connection = HttpProcessConnection(sock)
        self.selector.register(sock, selectors.EVENT_READ, connection)
        self.connections.add(connection)
        connection.send(self.pack_model_info())

    def _receive(self, connection: HttpProcessConnection) -> bool:
        """Queue the jobs of a connection. Return False at the end of the stream."""
        try:
            data = connection.sock.recv(RECEIVE_BYTES)
        except OSError:
            return False

        connection.buffer += data
        arrived = time.monotonic()
        for job in take_jobs(connection.buffer):
            if job.flags & CANCEL:
                self._remove_jobs(connection, job.id)
            elif job.flags & (LABEL | FORGET):
                self.on_notice(job)
            else:
                self.queue.append(QueuedJob(connection, job, arrived))
        return bool(data)

    def _close(self, connection: HttpProcessConnection) -> None:
        self.selector.unregister(connection.sock)
        connection.sock.close()
        self.connections.discard(connection)
        self._remove_jobs(connection)

    def _remove_jobs(self, connection: HttpProcessConnection, job_id: int | None = None) -> None:
        """Remove the job with this id, or all jobs of a connection, from the queue."""
        remaining: deque[QueuedJob] = deque()
        for queued in self.queue:
            removed = queued.connection is connection and (
                job_id is None or job_id == queued.job.id
            )
            if not removed:
                remaining.append(queued)
        self.queue = remaining
