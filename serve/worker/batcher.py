"""Jobs on their way into a worker, and how batches form from them: from the backlog, never from a timer unless asked.

There is no thread for input. A predictor that has nothing to do reads the sockets itself, one at a time, and takes what
it finds; while all are busy, jobs gather in the sockets and make the next batch larger. So no job is handed from thread
to thread, which would cost a small network more than its run.
"""

import contextlib
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from serve.wire import CANCEL, Job, take_jobs

SEND_SECONDS = 5  # an HTTP process that reads nothing for so long has lost its answers


class Peer:
    """One HTTP process, seen from the worker."""

    def __init__(self, sock: socket.socket):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.settimeout(SEND_SECONDS)
        self.sock, self.buffer, self.lock = sock, bytearray(), threading.Lock()

    def send(self, frames: bytes) -> None:
        with self.lock:
            try:
                self.sock.sendall(frames)
            except OSError:  # it is gone or stuck; what it waited for is lost with it
                with contextlib.suppress(OSError):
                    self.sock.shutdown(
                        socket.SHUT_RDWR
                    )  # whoever reads next sees the end and closes it


class Waiting:
    """One job in the backlog, with the connection that its answer goes to."""

    __slots__ = ("arrived", "job", "peer")

    def __init__(self, peer: Peer, job: Job, arrived: float):
        self.peer, self.job, self.arrived = peer, job, arrived


class Backlog:
    """Listens on a unix socket. Work-conserving: predictors that are free share what is there."""

    def __init__(
        self,
        path: str,
        predictors: int,
        max_batch: int,
        wait_seconds: float,
        hello: Callable[[], bytes],
    ):
        self.predictors, self.max_batch, self.wait, self.hello = (
            predictors,
            max_batch,
            wait_seconds,
            hello,
        )
        self.queue: deque[Waiting] = deque()
        self.peers: set[Peer] = set()
        self.reading, self.counting, self.free = threading.Lock(), threading.Lock(), 0
        self.selector = selectors.DefaultSelector()
        if os.path.exists(path):
            os.unlink(path)  # a worker that crashed left it
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.selector.register(self.listener, selectors.EVENT_READ)

    def take(self) -> tuple[list[Waiting], bool]:
        """Block until there is work. Returns a batch, and whether it is alone: nothing else waits or runs."""
        with self.counting:
            self.free += 1
        with self.reading:
            self.read(0 if self.queue else None)
            while not self.queue:
                self.read(None)
            if self.wait:
                self.wait_for_company()
            with self.counting:
                share = -(-len(self.queue) // self.free)
                batch = [self.queue.popleft() for _ in range(min(self.max_batch, share))]
                alone = self.free == self.predictors and not self.queue
                self.free -= 1
        return batch, alone

    def wait_for_company(self) -> None:
        end = time.monotonic() + self.wait
        while not self.queue or (len(self.queue) < self.max_batch and time.monotonic() < end):
            self.read(max(0.0, end - time.monotonic()) if self.queue else None)

    def more(self, room: int) -> list[Waiting]:
        """What came meanwhile, for a batch that has room and has not run yet; nothing where another is free for it."""
        if room <= 0 or not self.reading.acquire(blocking=False):
            return []
        try:
            self.read(0)
            return [self.queue.popleft() for _ in range(min(room, len(self.queue)))]
        finally:
            self.reading.release()

    def read(self, seconds: float | None) -> None:
        """Move what the sockets have to the queue; wait so long for something (None: for ever)."""
        for key, _ in self.selector.select(seconds):
            if key.data is None:
                peer = Peer(self.listener.accept()[0])
                self.selector.register(peer.sock, selectors.EVENT_READ, peer)
                self.peers.add(peer)
                peer.send(self.hello())
            elif not self.receive(key.data):
                self.selector.unregister(key.fileobj)
                key.data.sock.close()
                self.peers.discard(key.data)
                self.drop(key.data)

    def receive(self, peer: Peer) -> bool:
        """Take what a connection has for us; False when it is closed."""
        try:
            data = peer.sock.recv(1 << 20)
        except OSError:
            return False
        peer.buffer += data
        arrived = time.monotonic()
        for job in take_jobs(peer.buffer):
            if job.flags & CANCEL:
                self.drop(peer, job.id)
            else:
                self.queue.append(Waiting(peer, job, arrived))
        return bool(data)

    def drop(self, peer: Peer, number: int | None = None) -> None:
        """Forget the job of this number, or every job of a connection that is gone."""
        self.queue = deque(
            w
            for w in self.queue
            if w.peer is not peer or (number is not None and w.job.id != number)
        )
