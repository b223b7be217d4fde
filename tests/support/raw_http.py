"""TCP connections to a server, for requests that no HTTP client library sends."""

import contextlib
import re
import socket
import weakref

from support.server import CLIENT_SECONDS, Server


class RawConnection:
    """A TCP connection on which bytes go out as they are.

    It closes when the test drops its last reference to it.
    """

    def __init__(self, server: Server, data: bytes = b"") -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=CLIENT_SECONDS)
        weakref.finalize(self, self.socket.close)
        self.socket.sendall(data)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, size: int) -> bytes:
        """Return at most `size` bytes, as soon as some have arrived."""
        return self.socket.recv(size)

    def read_response(self, count: int = 1) -> tuple[int, str]:
        """Read `count` responses, or fewer where the server closes the connection.

        Return the status of the first and the text of all, (0, "") where there is none.
        """
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while count_responses(data) < count:
                received = self.socket.recv(1 << 16)
                if not received:
                    break
                data += received
        if not data:
            return 0, ""
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


def count_responses(data: bytes) -> int:
    """Return how many complete responses the bytes begin with."""
    count = 0
    while True:
        head, separator, rest = data.partition(b"\r\n\r\n")
        match = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        length = int(match[1]) if match else 0
        if not separator or len(rest) < length:
            return count
        count += 1
        data = rest[length:]


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
