"""TCP connections to a server, for requests that no HTTP client library sends."""

import contextlib
import socket
import weakref

from support.server import Server


class RawConnection:
    """A TCP connection on which bytes go out as they are.

    It closes when the test drops its last reference to it.
    """

    def __init__(self, server: Server, data: bytes = b"") -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        weakref.finalize(self, self.socket.close)
        self.socket.sendall(data)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, size: int) -> bytes:
        """Return at most `size` bytes, as soon as some have arrived."""
        return self.socket.recv(size)

    def read_response(self) -> tuple[int, str]:
        """Return the status and the text of what arrives, (0, "") where the server closes at once.

        Reading ends when the server closes the connection or pauses for a second.
        """
        data = self.socket.recv(1 << 16)
        if not data:
            return 0, ""

        self.socket.settimeout(1)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while more := self.socket.recv(1 << 16):
                data += more
        self.socket.settimeout(30)

        status = int(data.split(b" ", 2)[1])
        return status, data.decode()

    def is_closed(self) -> bool:
        """Wait for more bytes; True where the server closes the connection instead."""
        try:
            return self.socket.recv(1 << 16) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()


def request_head(length: int, *lines: str) -> bytes:
    """The head of a POST /predict with a body of `length` bytes and further header lines."""
    head = [
        "POST /predict HTTP/1.1",
        "Host: x",
        "Content-Type: image/png",
        f"Content-Length: {length}",
        *lines,
    ]
    return "\r\n".join([*head, "", ""]).encode()
