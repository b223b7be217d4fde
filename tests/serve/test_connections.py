"""Connections: which heads are accepted, how many connections there may be, and for how long."""

import re
import socket
import sys

import pytest

from support import tiny_bundle
from support.raw_http import RawConnection, request_head
from support.server import Server, suspended_workers, wait_until

IMAGE = tiny_bundle.make_image("red")
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
PREDICT = request_head(len(IMAGE)) + IMAGE
# Flags with which requests wait for suspended workers as long as a test takes.
PATIENT = ("--max-pending", "1000", "--deadline-ms", "200000", "--worker-timeout-seconds", "200")
LIVE_AND_CLOSE = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def get_status(server: Server, request: bytes) -> int:
    """Send a request on a new connection and return the status."""
    return RawConnection(server, request).read_response()[0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"HELLO\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 100_000, 431),
        (b"GET /" + b"b" * 100_000, 431),
        (b"POST /predict HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /health/live HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nhost: a\r\nContent-Length: 0\r\n\r\n", 400),
        (b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ],
)
def test_malformed_and_oversized_heads_are_refused(server, data, expected):
    status, text = RawConnection(server, data).read_response()
    assert status == expected
    assert "application/problem+json" in text
    assert "uvicorn" not in text.lower()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"http://x", 200),
        (b"http://x?query", 200),
        (b"http://x/health/live?query", 200),
        (b"//x", 404),
        (b"*", 404),
    ],
)
def test_targets_in_any_form_are_understood(server, target, expected):
    log_size = len(server.log.read_bytes())
    assert get_status(server, b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target) == expected
    assert b"Traceback" not in server.log.read_bytes()[log_size:]


def test_slow_clients_are_disconnected_and_others_are_answered(start):
    server = start("--read-timeout-seconds", "1")
    silent = RawConnection(server)
    slow_head = RawConnection(server, b"POST /pre")
    slow_body = RawConnection(server, request_head(1000) + b"x")

    assert server.predict(IMAGE).status_code == 200
    wait_until(lambda: server.metric("imago_rejected_total", reason="slow") == 2)
    assert silent.is_closed()
    assert slow_head.read_response()[0] == 408
    assert slow_body.read_response()[0] == 408
    assert server.metric("imago_pending_images") == 0


def test_idle_connections_are_closed(start):
    server = start("--keep-alive-seconds", "1")
    connection = RawConnection(server, LIVE)
    assert connection.read_response()[0] == 200
    assert connection.is_closed()


def test_connections_are_limited(start):
    server = start("--max-connections", "3", *PATIENT)
    server.http.close()
    wait_until(lambda: get_status(server, LIVE_AND_CLOSE) == 200)

    with suspended_workers(server):
        busy = [RawConnection(server, PREDICT) for _ in range(3)]
        wait_until(lambda: server.metric("imago_pending_images") == 3)
        assert get_status(server, PREDICT) == 503

        # Health checks are answered above the limit, so that the service is not restarted for it.
        for path in (b"live", b"ready"):
            probe = RawConnection(server, b"GET /health/%b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
            assert probe.read_response()[0] == 200
            assert probe.is_closed()

    assert [connection.receive(12) for connection in busy] == [b"HTTP/1.1 200"] * 3


@pytest.mark.parametrize("data", [b"", b"GET /health/live HTTP/1.1\r\n"], ids=["silent", "slow"])
def test_idle_connections_make_room(start, data):
    server = start("--max-connections", "4", "--read-timeout-seconds", "1000")
    server.http.close()
    wait_until(lambda: get_status(server, LIVE_AND_CLOSE) == 200)

    idle = [RawConnection(server, LIVE) for _ in range(4)]
    assert [connection.receive(12) for connection in idle] == [b"HTTP/1.1 200"] * 4
    above_limit = [RawConnection(server, data) for _ in range(40)]
    for probe in (LIVE, PREDICT):
        wait_until(lambda probe=probe: get_status(server, probe) == 200)
    for connection in idle:  # the oldest
        while connection.receive(1 << 16):
            pass
    for connection in above_limit:
        connection.close()


def test_new_connections_do_not_keep_a_probe_out(start):
    """Clients open connections all the time, so that none of them is idle for long."""
    server = start("--max-connections", "2", "--read-timeout-seconds", "1000")
    server.http.close()
    wait_until(lambda: get_status(server, LIVE_AND_CLOSE) == 200)

    connections: list[RawConnection] = []
    for _ in range(5):
        connections += [RawConnection(server) for _ in range(40)]
        assert get_status(server, LIVE) == 200
    for connection in connections:
        connection.close()


def test_idle_scrapers_make_room(server):
    address = ("127.0.0.1", server.metrics_port)
    scrapers = [socket.create_connection(address) for _ in range(40)]
    assert "imago_ready 1" in server.metrics()
    for scraper in scrapers:
        scraper.close()


@pytest.mark.parametrize(
    ("ulimit", "flags", "max_connections"),
    [
        ("-Sn 64", ("--max-connections", "300"), 300),
        ("-n 256", (), 112),
    ],
)
def test_the_limit_of_open_files_is_raised_or_limits_connections(
    start, ulimit, flags, max_connections
):
    shell = f'ulimit {ulimit}; exec "$@"'
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "serve"]
    server = start(*flags, *PATIENT, command=command)
    server.http.close()

    with suspended_workers(server):
        accepted = [RawConnection(server, PREDICT) for _ in range(max_connections)]
        wait_until(lambda: server.metric("imago_pending_images") == max_connections)
        refused = [RawConnection(server, PREDICT) for _ in range(64)]
        assert {connection.receive(12) for connection in refused} == {b"HTTP/1.1 503"}
    assert {connection.receive(12) for connection in accepted} == {b"HTTP/1.1 200"}

    is_lowered = "max_connections is 112, not 1024" in server.log.read_text()
    assert is_lowered == (max_connections == 112)


def test_pipelined_requests_are_answered_in_order(server):
    bodies = [IMAGE, b"", tiny_bundle.make_image("blue"), b"hello"]
    requests = b""
    for i, body in enumerate(bodies):
        requests += request_head(len(body), f"X-Request-ID: n{i}") + body

    _, text = RawConnection(server, requests + LIVE).read_response(5)
    assert re.findall(r"HTTP/1.1 (\d+)", text) == ["200", "400", "200", "415", "200"]
    assert re.findall(r"x-request-id: (\S+)", text)[:4] == ["n0", "n1", "n2", "n3"]


def test_expect_100_continue(server):
    connection = RawConnection(server, request_head(len(IMAGE), "Expect: 100-continue"))
    assert connection.receive(100).startswith(b"HTTP/1.1 100 ")
    connection.send(IMAGE)
    assert connection.read_response()[0] == 200


@pytest.mark.parametrize(
    ("path", "length", "expected"),
    [
        (b"/predict", 1 << 30, 413),
        (b"/v2/models/colours/infer", 1 << 30, 413),
        (b"/nothing", 9, 404),
    ],
)
def test_an_error_instead_of_100_continue_closes_the_connection(server, path, length, expected):
    """The client may send the body or not, so the server can't tell what follows."""
    request = request_head(length, "Expect: 100-continue").replace(b"/predict", path)
    connection = RawConnection(server, request)
    status, text = connection.read_response()
    assert status == expected
    assert "connection: close" in text
    assert connection.is_closed()


@pytest.mark.parametrize(
    "head",
    [
        request_head(len(IMAGE)).replace(b"HTTP/1.1", b"HTTP/1.0"),
        request_head(len(IMAGE), "Connection: close"),
    ],
)
def test_http_1_0_and_connection_close(server, head):
    status, text = RawConnection(server, head + IMAGE).read_response()
    assert status == 200
    assert "connection: close" in text
