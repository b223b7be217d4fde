"""An HTTP client that sends requests at a rate, whether or not earlier ones are answered.

    python tests/benchmarks/open_loop.py PORT BODY --rate 200 --seconds 10 [--arrivals poisson]

A client that waits for an answer before it sends the next request offers less load exactly while
the server is slow, and so misses what users would see (coordinated omission). Here each request is
due at a time that is drawn in advance, and its latency counts from that time, also where it was
sent later because no connection was free. One thread with non-blocking sockets and a request that
is built once costs about 60 microseconds a request, so that the client disturbs a server on the
same cores little. Prints one JSON line.
"""

import argparse
import json
import math
import random
import selectors
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

RECEIVE_BYTES = 1 << 16
MAX_CONNECTIONS = 512
ANSWER_TIMEOUT_SECONDS = 15
"""After the last request was due; then the answers that are missing count as lost."""
QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass
class OpenLoopResult:
    """What happened to the requests of one run."""

    offered: int = 0
    """Requests that were due."""
    statuses: Counter[int] = field(default_factory=Counter)
    lost: int = 0
    """Requests without an answer."""
    latencies: list[float] = field(default_factory=list)
    """Seconds from due to answered, of the requests with status 200."""

    def latency_ms(self, quantile: float) -> float:
        """The `quantile` (0 to 1) of the latencies. Raises ValueError where none was answered."""
        if not self.latencies:
            raise ValueError("no request was answered with status 200")
        ordered = sorted(self.latencies)
        return 1e3 * ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]


class _Connection:
    """A kept-alive connection with at most one request in flight."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_TIMEOUT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = bytearray()
        self.due: float | None = None

    def take_status(self) -> int | None:
        """Return the status once the answer is complete, and forget its bytes."""
        head_end = self.received.find(b"\r\n\r\n")
        if head_end < 0:
            return None

        head = bytes(self.received[:head_end]).lower()
        _, has_length, after = head.partition(b"content-length:")
        if has_length:
            end = head_end + 4 + int(after.split(b"\r\n", 1)[0])
        else:
            end = find_chunks_end(self.received, head_end + 4)
        if len(self.received) < end:
            return None

        del self.received[:end]
        return int(head.split(b" ", 2)[1])


def find_chunks_end(received: bytearray, position: int) -> float:
    """The end of a body in chunks that starts at `position`; infinite while it is incomplete."""
    while True:
        line_end = received.find(b"\r\n", position)
        if line_end < 0:
            return math.inf
        length = int(received[position:line_end].split(b";")[0], 16)
        position = line_end + 2 + length + 2
        if not length:
            return position
        if position > len(received):
            return math.inf


class OpenLoopClient:
    """Sends one request again and again to a port of this machine."""

    def __init__(
        self, port: int, body: bytes, content_type: str = "image/jpeg", path: str = "/predict"
    ) -> None:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.port = port
        self.request = head.encode() + body
        # epoll would round each pause up to a millisecond, which then counts as latency.
        self.selector = selectors.SelectSelector()
        self.free: list[_Connection] = []
        self.connection_count = 0
        self.in_flight = 0

    def run(self, rate: float, seconds: float, arrivals: str = "constant") -> OpenLoopResult:
        """Offer `rate` requests per second; `arrivals` is `constant` or `poisson`."""
        result = OpenLoopResult()
        times = draw_arrivals(rate, seconds, arrivals)
        waiting: deque[float] = deque()  # due, but no connection is free
        started = time.perf_counter()
        next_due = next(times, None)
        last_due = 0.0

        while next_due is not None or waiting or self.in_flight:
            now = time.perf_counter() - started
            while next_due is not None and next_due <= now:
                result.offered += 1
                waiting.append(next_due)
                last_due = next_due
                next_due = next(times, None)
            self._send(waiting, started, result)

            if next_due is None and now > last_due + ANSWER_TIMEOUT_SECONDS:
                break
            pause = 0.1 if next_due is None else max(next_due - now, 0)
            self._receive(pause, started, result)

        result.lost += self.in_flight + len(waiting)
        self._close()
        return result

    def _send(self, waiting: deque[float], started: float, result: OpenLoopResult) -> None:
        while waiting:
            connection = self._get_connection()
            if connection is None:
                return
            connection.due = waiting.popleft()
            self.in_flight += 1
            try:
                connection.socket.sendall(self.request)
            except OSError:
                self._drop(connection, result)

    def _get_connection(self) -> _Connection | None:
        if self.free:
            return self.free.pop()
        if self.connection_count >= MAX_CONNECTIONS:
            return None

        connection = _Connection(self.port)
        self.connection_count += 1
        self.selector.register(connection.socket, selectors.EVENT_READ, connection)
        return connection

    def _receive(self, pause: float, started: float, result: OpenLoopResult) -> None:
        for key, _ in self.selector.select(pause):
            connection: _Connection = key.data
            try:
                data = connection.socket.recv(RECEIVE_BYTES)
            except OSError:
                data = b""
            if not data:
                self._drop(connection, result)
                continue

            connection.received += data
            status = connection.take_status()
            if status is not None and connection.due is not None:
                self._finish(connection, status, time.perf_counter() - started, result)

    def _finish(
        self, connection: _Connection, status: int, now: float, result: OpenLoopResult
    ) -> None:
        assert connection.due is not None
        result.statuses[status] += 1
        if status == 200:
            result.latencies.append(now - connection.due)
        connection.due = None
        self.in_flight -= 1
        self.free.append(connection)

    def _drop(self, connection: _Connection, result: OpenLoopResult) -> None:
        """Close a connection that the server has closed."""
        self.selector.unregister(connection.socket)
        connection.socket.close()
        self.connection_count -= 1
        if connection.due is not None:
            self.in_flight -= 1
            result.lost += 1
        elif connection in self.free:
            self.free.remove(connection)

    def _close(self) -> None:
        for key in list(self.selector.get_map().values()):
            self.selector.unregister(key.fileobj)
            key.data.socket.close()
        self.free.clear()
        self.connection_count = 0
        self.in_flight = 0


def draw_arrivals(rate: float, seconds: float, arrivals: str, seed: int = 0) -> Iterator[float]:
    """Times in seconds at which requests are due; the same ones for the same seed."""
    generator = random.Random(seed)
    due = 0.0
    while True:
        due += generator.expovariate(rate) if arrivals == "poisson" else 1 / rate
        if due > seconds:
            return
        yield due


def describe(result: OpenLoopResult, rate: float, seconds: float) -> dict[str, object]:
    """The line that is printed: counts, the rate that was answered, and latencies in ms."""
    line: dict[str, object] = {
        "rate": rate,
        "offered": result.offered,
        "answered_s": round(len(result.latencies) / seconds, 1),
        "statuses": dict(result.statuses),
        "lost": result.lost,
    }
    if result.latencies:
        for quantile in QUANTILES:
            name = f"p{100 * quantile:g}_ms"
            line[name] = round(result.latency_ms(quantile), 2)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("body", type=Path, help="file with the body of each request")
    parser.add_argument("--rate", type=float, default=100, help="requests per second")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--arrivals", choices=("constant", "poisson"), default="constant")
    parser.add_argument("--content-type", default="image/jpeg")
    options = parser.parse_args()

    client = OpenLoopClient(options.port, options.body.read_bytes(), options.content_type)
    result = client.run(options.rate, options.seconds, options.arrivals)
    print(json.dumps(describe(result, options.rate, options.seconds)))


if __name__ == "__main__":
    main()
