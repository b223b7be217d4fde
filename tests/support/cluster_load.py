"""Runs inside the cluster, with Python's own library alone: predictions without a pause until it is told to stop.

Half of the clients keep their connection, half open one for each request. Prints one line of JSON at the end.
"""

import http.client
import json
import signal
import struct
import sys
import threading
import zlib
from collections import Counter


def png(side: int) -> bytes:
    """A square gray ramp."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + bytes((y * side + x) % 256 for x in range(side)) for y in range(side))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def client(host: str, keep: bool) -> None:
    connection = None
    while not over.wait(pause):
        try:
            connection = connection or http.client.HTTPConnection(host, 80, timeout=30)
            connection.request("POST", "/predict", body, {"Content-Type": "image/png"})
            answer = connection.getresponse()
            version = json.loads(answer.read()).get("model", {}).get("version")
            with lock:
                statuses[answer.status] += 1
                versions[version] += 1
            if keep and answer.headers.get("connection") != "close":
                continue
        except (OSError, http.client.HTTPException, ValueError) as error:
            with lock:
                lost.append(repr(error))
        if connection:
            connection.close()
        connection = None


host, clients, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
body, lock, over = png(int(sys.argv[4])), threading.Lock(), threading.Event()
statuses: Counter = Counter()
versions: Counter = Counter()
lost: list[str] = []
signal.signal(signal.SIGTERM, lambda *_: over.set())
threads = [threading.Thread(target=client, args=(host, i % 2 == 0)) for i in range(clients)]
for thread in threads:
    thread.start()
print("started", flush=True)
over.wait()
for thread in threads:
    thread.join()
print(
    json.dumps({"statuses": statuses, "versions": versions, "lost": lost[:20], "count": len(lost)}),
    flush=True,
)
