"""An HTTP process of the service, and a word for those who come after the last one has ended."""

import asyncio
import contextlib
import signal
import socket
import time
from typing import Any

import uvicorn

GUESTS = 0.2  # seconds to tell those who connected after the HTTP processes had ended

_GONE = b'{"type":"about:blank","title":"Service Unavailable","status":503,"detail":"the service is shutting down"}'
GONE = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(_GONE), _GONE)
)


class Api(uvicorn.Server):
    """Looks around once a second; uvicorn does ten times, which is most of what an idle service costs."""

    told: asyncio.Event | None = None

    async def main_loop(self) -> None:
        self.loop, self.told = asyncio.get_running_loop(), asyncio.Event()
        while not await self.on_tick(0):  # which also writes the Date header of this second
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.told.wait(), 1.0)

    def handle_exit(self, number: int, frame: Any) -> None:
        super().handle_exit(number, frame)
        if self.told is not None:
            self.loop.call_soon_threadsafe(self.told.set)


def run_api(server: Api, sockets: list[socket.socket]) -> None:
    """An HTTP process. `drain` came along with the fork, but is the supervisor's; uvicorn sets handlers of its own."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    server.run(sockets)


def dismiss(listener: socket.socket) -> None:
    """Answer those who connected when nobody accepted any more, then close: closing alone would reset them."""
    guests = []
    listener.setblocking(False)
    with contextlib.suppress(OSError):  # there is nobody left
        while True:
            guests.append(listener.accept()[0])
    listener.close()
    end = time.monotonic() + GUESTS
    for guest in guests:
        with contextlib.suppress(OSError), guest:
            guest.settimeout(0.05)
            guest.sendall(GONE)
            guest.shutdown(socket.SHUT_WR)
            while time.monotonic() < end and guest.recv(1 << 16):
                pass  # what is unread when a socket is closed resets it, and the answer is lost
