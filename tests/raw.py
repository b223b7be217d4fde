"""Connections on which bytes go as they are."""

import contextlib
import socket
from collections.abc import Iterator
from typing import ClassVar

import pytest


class Raw:
    """A connection on which bytes go as they are; closed when the test ends."""

    opened: ClassVar[list[socket.socket]] = []

    def __init__(self, server, data: bytes = b""):
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        self.opened.append(self.socket)
        self.socket.sendall(data)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> tuple[int, str]:
        """Status and all that came until the server hung up or was silent for a second after something came."""
        data = self.socket.recv(1 << 16)
        self.socket.settimeout(1)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while more := self.socket.recv(1 << 16):
                data += more
        return (int(data.split(b" ", 2)[1]), data.decode()) if data else (0, "")

    def is_closed(self) -> bool:
        with contextlib.suppress(ConnectionResetError):
            return self.socket.recv(1 << 16) == b""
        return True


@pytest.fixture(autouse=True)
def hang_up() -> Iterator[None]:
    yield
    while Raw.opened:
        Raw.opened.pop().close()


def head(length: int, *lines: str) -> bytes:
    return "\r\n".join(
        [
            "POST /predict HTTP/1.1",
            "Host: x",
            "Content-Type: image/png",
            f"Content-Length: {length}",
            *lines,
            "",
            "",
        ]
    ).encode()
