"""An HTTP process: uvicorn with the service's app. The code that it runs is in `serve.http`.

The supervisor forks it. `answer_late_clients` runs in the supervisor itself, after the last HTTP
process has ended.
"""

import asyncio
import contextlib
import json
import signal
import socket
import time
from types import FrameType

import uvicorn

from serve.http.app import STATE_KEY
from serve.processes.process_name import set_process_name

TICK_SECONDS = 1.0
LATE_CLIENTS_SECONDS = 0.2  # for all clients that connect too late
LATE_CLIENT_TIMEOUT_SECONDS = 0.05  # for one read from or write to such a client
RECEIVE_BYTES = 1 << 16


class HttpServer(uvicorn.Server):
    """A uvicorn server that wakes once a second instead of ten times.

    Waking ten times a second takes most of the CPU time of an idle service. Written for uvicorn
    0.54: it overrides `main_loop` and `handle_exit`, and calls `on_tick`, which updates the Date
    header.
    """

    exit_event: asyncio.Event | None = None

    async def main_loop(self) -> None:
        """Run until the server should exit. Clients can connect when it is called."""
        self.lifespan.state[STATE_KEY].dispatcher.start_publishing()
        self.event_loop = asyncio.get_running_loop()
        self.exit_event = asyncio.Event()
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.exit_event.wait(), TICK_SECONDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM or SIGINT: wake `main_loop`, which then exits."""
        super().handle_exit(sig, frame)
        if self.exit_event is not None:
            self.event_loop.call_soon_threadsafe(self.exit_event.set)


def run_http_process(number: int, server: HttpServer, sockets: list[socket.socket]) -> None:
    """Run an HTTP process, the main function of a forked child of the supervisor."""
    set_process_name(f"http-{number}")
    # The fork copied the supervisor's handlers, which drain the service. uvicorn sets others soon.
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, signal.SIG_IGN)
    server.run(sockets)


def _build_shutdown_response() -> bytes:
    """Return the bytes of a response with status 503 that closes the connection."""
    problem = {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "the service is shutting down",
    }
    body = json.dumps(problem, separators=(",", ":"))
    lines = [
        "HTTP/1.1 503 Service Unavailable",
        "content-type: application/problem+json",
        "retry-after: 1",
        "connection: close",
        f"content-length: {len(body)}",
        "",
        body,
    ]
    return "\r\n".join(lines).encode()


SHUTDOWN_RESPONSE = _build_shutdown_response()


def answer_late_clients(listener: socket.socket) -> None:
    """Send 503 to clients that connected after the HTTP processes had ended, and close the socket.

    Without an answer, closing the socket would reset their connections.
    """
    clients: list[socket.socket] = []
    listener.setblocking(False)
    with contextlib.suppress(OSError):  # BlockingIOError: no more clients
        while True:
            client, _ = listener.accept()
            clients.append(client)
    listener.close()

    end = time.monotonic() + LATE_CLIENTS_SECONDS
    for client in clients:
        with contextlib.suppress(OSError), client:
            client.settimeout(LATE_CLIENT_TIMEOUT_SECONDS)
            client.sendall(SHUTDOWN_RESPONSE)
            client.shutdown(socket.SHUT_WR)
            # Unread bytes would turn the close into a reset, and the response would be lost.
            while time.monotonic() < end and client.recv(RECEIVE_BYTES):
                pass
