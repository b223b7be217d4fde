"""Connections: which heads are taken, how many there may be, how long they stay, what they carry."""

import re
import sys
import time

import pytest
from support import tiny_bundle
from support.raw_http import RawConnection, request_head
from support.server import wait_until

IMAGE = tiny_bundle.make_image("red")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"HELLO\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 100_000, 431),
        (b"GET /" + b"b" * 100_000, 431),
        (b"POST /predict HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ],
)
def test_heads_that_are_not_taken(server, data, status):
    connection = RawConnection(server, data)
    found, text = connection.read_response()
    assert found == status
    assert "application/problem+json" in text
    assert "uvicorn" not in text.lower()


def test_slow_clients_are_cut_and_others_are_not(start):
    server = start("--read-timeout-seconds", "1")
    slow = [
        RawConnection(server),
        RawConnection(server, b"POST /pre"),
        RawConnection(server, request_head(1000) + b"x"),
    ]
    assert server.predict(IMAGE).status_code == 200
    wait_until(lambda: server.metric("imago_rejected_total", reason="slow") == 2)
    assert slow[0].is_closed()
    assert [connection.read_response()[0] for connection in slow[1:]] == [408, 408]
    assert server.metric("imago_pending_images") == 0


def test_idle_connections_are_closed_after_a_while(start):
    server = start("--keep-alive-seconds", "1")
    connection = RawConnection(server, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    began = time.monotonic()
    assert connection.read_response()[0] == 200
    assert connection.is_closed()
    assert time.monotonic() - began < 10


def test_connections_are_bounded(start):
    server = start("--max-connections", "3")
    server.http.close()
    wait_until(
        lambda: (
            RawConnection(
                server, b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            ).read_response()[0]
            == 200
        )
    )
    held = [
        RawConnection(server, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(3)
    ]
    assert [c.receive(12) for c in held] == [b"HTTP/1.1 200"] * 3
    assert RawConnection(server, request_head(len(IMAGE)) + IMAGE).read_response()[0] == 503
    for path in (
        b"live",
        b"ready",
    ):  # a crowd is no reason to restart it, or to send what it has to others
        probe = RawConnection(server, b"GET /health/%b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        assert probe.read_response()[0] == 200
        assert probe.is_closed()
    spare = [RawConnection(server) for _ in range(16)]
    wait_until(
        lambda: RawConnection(server).read_response()[0] == 503
    )  # it said nothing, and there is room for no more
    for connection in spare:
        connection.close()
    held[0].close()
    wait_until(
        lambda: (
            RawConnection(
                server, b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            ).read_response()[0]
            == 200
        )
    )


def crowd(server, count: int) -> list[RawConnection]:
    """Connections that each had one answer and are idle now."""
    server.http.close()
    return [
        RawConnection(server, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("limit", "flags", "room"),
    [
        ("-Sn 64", ("--max-connections", "300"), 300),
        ("-n 256", (), 112),
    ],
)
def test_open_files_allow_the_connections_that_are_promised(start, limit, flags, room):
    server = start(
        *flags,
        command=["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", sys.executable, "-m", "serve"],
    )
    held = crowd(server, room + 16)
    assert {connection.receive(12) for connection in held} == {b"HTTP/1.1 200"}
    beyond = [RawConnection(server) for _ in range(64)]
    assert {connection.receive(12) for connection in beyond[32:]} == {b"HTTP/1.1 503"}
    assert ("max_connections is 112, not 1024" in server.log.read_text()) == (room == 112)


def test_pipelined_requests_are_answered_in_order(server):
    requests = b"".join(
        request_head(len(body), f"X-Request-ID: n{i}") + body
        for i, body in enumerate([IMAGE, b"", tiny_bundle.make_image("blue"), b"hello"])
    )
    _, text = RawConnection(
        server, requests + b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    ).read_response()
    assert re.findall(r"HTTP/1.1 (\d+)", text) == ["200", "400", "200", "415", "200"]
    ids = [line.split()[1] for line in text.splitlines() if line.startswith("x-request-id")]
    assert ids[:4] == ["n0", "n1", "n2", "n3"]


def test_expect_100_continue(server):
    connection = RawConnection(server, request_head(len(IMAGE), "Expect: 100-continue"))
    assert connection.receive(100).startswith(b"HTTP/1.1 100 ")
    connection.send(IMAGE)
    assert connection.read_response()[0] == 200


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [
        (b"/predict", 1 << 30, 413),
        (b"/v2/models/colours/infer", 1 << 30, 413),
        (b"/nothing", 9, 404),
    ],
)
def test_refused_before_100_continue(server, path, length, status):
    """The client may send its body or not. What it sends next must not be taken for one, so the connection ends."""
    connection = RawConnection(
        server, request_head(length, "Expect: 100-continue").replace(b"/predict", path)
    )
    found, text = connection.read_response()
    assert (found, "connection: close" in text) == (status, True)
    assert connection.is_closed()


def test_http_1_0_and_connection_close(server):
    for request in (
        request_head(len(IMAGE)).replace(b"HTTP/1.1", b"HTTP/1.0"),
        request_head(len(IMAGE), "Connection: close"),
    ):
        connection = RawConnection(server, request + IMAGE)
        status, text = connection.read_response()
        assert (status, "connection: close" in text) == (200, True)
