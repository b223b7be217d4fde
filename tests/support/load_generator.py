"""The load generator of the tests and of the benchmarks that need no faster client than Python's.

It uses the standard library alone, so that `live_cluster` can run this file inside a pod of the
serving image:

    python load_generator.py HOST:PORT [--clients 4] [--rate 150] [--side 8]

sends a gray PNG until SIGTERM and then prints one line of JSON with the counts.
"""

import argparse
import http.client
import json
import signal
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

TIMEOUT_SECONDS = 50
RECONNECT_SECONDS = 0.02


@dataclass(frozen=True)
class Response:
    """One answered request."""

    status: int
    version: str
    """The model's version, from X-Model-Version; empty where the response has none."""
    latency: float
    """Seconds to the end of the response: from sending it in a closed loop, from the time at which
    it was due in an open one."""


class LoadGenerator:
    """Clients in threads that POST one image to /predict within a `with` block.

    Closed loop: each client sends its next request `pause` seconds after the response to the last.
    Open loop, with `rate`: that many requests per second are due over all clients, whether or not
    earlier ones are answered; at most `clients` are in flight.

    After the block every request that was sent is counted once: in `responses` and `statuses`
    where it was answered, in `unanswered` (the error) where the connection broke.
    """

    def __init__(
        self,
        port: int,
        body: bytes | Callable[[], bytes],
        clients: int = 8,
        *,
        host: str = "127.0.0.1",
        pause: float = 0.0,
        rate: float | None = None,
        reconnecting: int = 0,
    ) -> None:
        """`body`: the image of all requests, or a function that clients call for each.

        `reconnecting`: how many of the clients open a new connection for each request.
        """
        self.responses: list[Response] = []
        self.statuses: Counter[int] = Counter()
        self.unanswered: list[str] = []
        self.refused_connections = 0

        self._address = (host, port)
        self._body = body
        self._pause = pause
        self._rate = rate
        self._started = 0.0
        self._scheduled = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run_client, args=(number >= reconnecting,), daemon=True)
            for number in range(clients)
        ]

    def __enter__(self) -> "LoadGenerator":
        self._started = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_sending()
        for thread in self._threads:
            thread.join(TIMEOUT_SECONDS + 10)
            assert not thread.is_alive(), "a request has neither a response nor an error"

    def stop_sending(self) -> None:
        """Send no further request; those in flight are still awaited at the end of the block."""
        self._stop.set()

    @property
    def versions(self) -> Counter[str]:
        """How many responses came from each version of the model."""
        return Counter(response.version for response in self.responses)

    def latency(self, quantile: float) -> float:
        """The `quantile` (0 to 1) of the latencies of the responses, in seconds."""
        latencies = sorted(response.latency for response in self.responses)
        return latencies[min(int(quantile * len(latencies)), len(latencies) - 1)]

    def _run_client(self, keep_alive: bool) -> None:
        connection = None
        while (due := self._wait_until_due()) is not None:
            if connection is None:
                connection = self._connect()
            if connection is None:
                time.sleep(RECONNECT_SECONDS)
                continue

            reusable = self._send(connection, due)
            if not (reusable and keep_alive):
                connection.close()
                connection = None

        if connection is not None:
            connection.close()

    def _wait_until_due(self) -> float | None:
        """Wait until the next request is due; return that time, or None when the load ends."""
        if self._rate is None:
            return None if self._stop.wait(self._pause) else time.monotonic()

        with self._lock:
            due = self._started + self._scheduled / self._rate
            self._scheduled += 1
        ended = self._stop.wait(max(due - time.monotonic(), 0))
        return None if ended else due

    def _connect(self) -> http.client.HTTPConnection | None:
        connection = http.client.HTTPConnection(*self._address, timeout=TIMEOUT_SECONDS)
        try:
            connection.connect()
        except OSError:
            with self._lock:
                self.refused_connections += 1
            return None
        return connection

    def _send(self, connection: http.client.HTTPConnection, due: float) -> bool:
        """Send one request; return whether the connection can be used again."""
        try:
            body = self._body() if callable(self._body) else self._body
            connection.request("POST", "/predict", body, {"Content-Type": "image/png"})
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            with self._lock:
                self.unanswered.append(repr(error))
            return False

        version = answer.headers.get("x-model-version", "")
        response = Response(answer.status, version, time.monotonic() - due)
        with self._lock:
            self.responses.append(response)
            self.statuses[response.status] += 1
        return answer.headers.get("connection") != "close"


def make_gray_png(side: int) -> bytes:
    """A square gray ramp, written without an image library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    rows: list[bytes] = []
    for y in range(side):
        rows.append(b"\0" + bytes((y * side + x) % 256 for x in range(side)))  # \0: no filter
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + chunk(b"IEND", b"")
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="HOST:PORT of the service")
    parser.add_argument("--clients", type=int, default=4, help="half of them reconnect each time")
    parser.add_argument("--rate", type=float, help="requests per second; closed loop without it")
    parser.add_argument("--side", type=int, default=8, help="pixels a side of the image")
    options = parser.parse_args(arguments)

    host, _, port = options.address.rpartition(":")
    load = LoadGenerator(
        int(port),
        make_gray_png(options.side),
        options.clients,
        host=host,
        rate=options.rate,
        reconnecting=options.clients // 2,
    )
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with load:
        print("started", flush=True)
        ended.wait()

    counts = {
        "statuses": load.statuses,
        "versions": load.versions,
        "unanswered": load.unanswered[:20],
        "unanswered_count": len(load.unanswered) + load.refused_connections,
    }
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    sys.exit(main())
