"""Requests that ask for an upgrade to HTTP/2: they are answered over HTTP/1.1, as if they did not.

Java's HttpClient and `curl --http2` ask for the upgrade in each request:

    POST /predict HTTP/1.1
    Host: imago:8000
    Content-Type: image/png
    Content-Length: 3
    Connection: Upgrade, HTTP2-Settings
    Upgrade: h2c
    HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA

    <3 bytes>

A server may ignore the upgrade (RFC 9110, section 7.8). But after such a head httptools raises
HttpParserUpgrade and takes everything after it for another protocol. So a new parser gets the same
head without the two headers, and then the bytes after it:

    POST /predict HTTP/1.1
    host: imago:8000
    content-type: image/png
    content-length: 3
    http2-settings: AAMAAABkAAQAoAAAAAIAAAAA

    <3 bytes>

Written for httptools 0.9. Used by `serve.http.protocol`.
"""

from typing import Protocol

import httptools

from serve.http.responses import Header

UPGRADE_HEADERS = (b"upgrade", b"connection")


class UpgradedConnection(Protocol):
    """A connection whose parser has stopped at a request for an upgrade."""

    parser: httptools.HttpRequestParser
    url: bytes  # of the request
    headers: list[Header]  # of the request

    def restart_parser(self) -> None:
        """Replace `parser` by one in its initial state."""

    def is_closed(self) -> bool:
        """Whether input is ignored from now on."""


class TunnelRequested(Exception):
    """The request has the method CONNECT, after which the parser stops as well."""


def replay_without_upgrade(connection: UpgradedConnection, rest: memoryview) -> None:
    """Parse the last head again without its upgrade, then `rest`, the bytes after it.

    Each request in `rest` may ask for an upgrade as well. Raises TunnelRequested and
    httptools.HttpParserError.
    """
    while not connection.is_closed():
        method = connection.parser.get_method()
        if method == b"CONNECT":
            raise TunnelRequested

        head = build_head(method, connection.url, connection.headers)
        connection.restart_parser()
        connection.parser.feed_data(head)
        try:
            connection.parser.feed_data(rest)
        except httptools.HttpParserUpgrade as upgrade:
            rest = rest[upgrade.args[0] :]
        else:
            return


def build_head(method: bytes, url: bytes, headers: list[Header]) -> bytes:
    """Return the head of a request without the headers that ask for an upgrade."""
    lines = [b"%b %b HTTP/1.1\r\n" % (method, url)]
    for name, value in headers:
        if name not in UPGRADE_HEADERS:
            lines.append(b"%b: %b\r\n" % (name, value))
    lines.append(b"\r\n")
    return b"".join(lines)
