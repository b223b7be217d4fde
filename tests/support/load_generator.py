"""Steady load on a server from threads, and an account of how each request ended."""

import http.client
import threading
import time
from collections import Counter


class LoadGenerator:
    """Clients that send one request after the other, each as soon as it has the answer to the one before.

    `statuses` counts answers. `refused` counts connections that were not taken. `lost` holds requests that were sent
    and got no answer at all.
    """

    def __init__(self, port: int, body: bytes, clients: int = 8, pause: float = 0.0):
        self.port, self.body, self.pause = port, body, pause
        self.statuses, self.refused, self.lost = Counter(), 0, []
        self.lock, self.over = threading.Lock(), threading.Event()
        self.threads = [threading.Thread(target=self.client, daemon=True) for _ in range(clients)]

    def __enter__(self) -> "LoadGenerator":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a request was met with silence"

    def client(self) -> None:
        connection = None
        while not self.over.is_set():
            try:
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=50)
                    connection.connect()
            except OSError:
                connection = None
                with self.lock:
                    self.refused += 1
                time.sleep(0.02)
                continue
            connection = self.ask(connection)
            time.sleep(self.pause)
        if connection is not None:
            connection.close()

    def ask(self, connection: http.client.HTTPConnection) -> http.client.HTTPConnection | None:
        """Send one request; returns the connection where it can be used again."""
        try:
            connection.request("POST", "/predict", self.body, {"Content-Type": "image/png"})
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            with self.lock:
                self.lost.append(repr(error))
            connection.close()
            return None
        with self.lock:
            self.statuses[answer.status] += 1
        if answer.headers.get("connection") == "close":
            connection.close()
            return None
        return connection
