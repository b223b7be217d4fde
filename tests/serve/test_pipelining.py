"""Requests that a client sends ahead, in any pieces: each gets its own answer in order, and none hurts another."""

import contextlib
import re
import socket
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_bundle
from support.server import Server, suspended_workers, wait_until

IMAGE = tiny_bundle.make_image("red")
TOO_MANY_HEADERS = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n"


def post(body: bytes, *lines: bytes) -> bytes:
    return b"\r\n".join(
        [
            b"POST /predict HTTP/1.1",
            b"Host: x",
            b"Content-Type: image/png",
            b"Content-Length: %d" % len(body),
            *lines,
            b"",
            body,
        ]
    )


def chunked(body: bytes, trailers: bytes = b"") -> bytes:
    return (
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"%x;note=1\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers)
    )


def get(path: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def statuses(connection: socket.socket, count: int | None = None) -> list[int]:
    """Of so many answers, or of all until the server hangs up."""
    data = b""
    found: list[int] = []
    with contextlib.suppress(ConnectionResetError):
        while count is None or len(found) < count:
            more = connection.recv(1 << 16)
            if not more:
                break
            data += more
            found = [int(s) for s in re.findall(rb"HTTP/1.1 (\d+)", data)]
    return found


def is_reset(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"x")
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return False


REQUESTS = [
    (post(IMAGE), 200),
    (post(tiny_bundle.make_image("blue")), 200),
    (chunked(IMAGE), 200),
    (post(b"hello"), 415),
    (post(b""), 400),
    (get(b"/health/live"), 200),
    (get(b"/nothing"), 404),
    (get(b"/model"), 200),
    (chunked(IMAGE, b"checksum: 1\r\n"), 200),
    (post(IMAGE, b"Content-Encoding: gzip"), 415),
]
ENDS = [
    (b"", None),
    (b"GARBAGE\r\n\r\n", 400),
    (TOO_MANY_HEADERS, 431),
    (b"GET /" + b"b" * 40_000, 431),
    (post(IMAGE, b"Connection: close") + get(b"/model"), 200),
]  # what comes after a close is not looked at


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    requests=st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=6),
    end=st.sampled_from(ENDS),
    cuts=st.lists(st.integers(1, 9000), max_size=4),
)
def test_each_gets_its_answer_in_order(server, requests, end, cuts):
    data = b"".join(request for request, _ in requests) + end[0]
    wanted = [status for _, status in requests] + ([end[1]] if end[1] else [])
    with connect(server) as connection:
        with contextlib.suppress(
            BrokenPipeError
        ):  # it may be refused, and hung up on, before its end is sent
            for cut in cuts:
                connection.sendall(data[:cut])
                data = data[cut:]
                time.sleep(0.002)
            connection.sendall(data)
        assert statuses(connection, None if end[1] else len(wanted)) == wanted
    assert server.is_ready()


def test_a_head_that_is_refused_leaves_the_requests_before_it_and_the_service_alone(server):
    """Many at once, while clients hang up: what is refused must not touch an answer on its way, or a worker."""
    for _ in range(10):
        crowd = [connect(server) for _ in range(4)]
        for connection in crowd:
            connection.sendall(post(IMAGE) + TOO_MANY_HEADERS)
        for connection in crowd:
            connection.close()
    with connect(server) as connection:
        connection.sendall(post(IMAGE) + TOO_MANY_HEADERS)
        assert statuses(connection) == [200, 431]
    assert server.is_ready()
    assert server.predict(IMAGE).status_code == 200
    assert server.metric("imago_restarts_total", process="worker", reason="crash") == 0
    wait_until(lambda: server.metric("imago_pending_images") == 0)


def test_a_large_body_before_a_head_is_not_taken_for_one(server):
    with connect(server) as connection:
        second = post(IMAGE)
        connection.sendall(post(tiny_bundle.make_image("red", 400)) + second[:18])
        time.sleep(0.1)
        connection.sendall(second[18:])
        assert statuses(connection, 2) == [200, 200]


def test_trailers_and_chunk_extensions_are_bounded(server):
    for flood in (b"a: b\r\n" * 20_000, b"a: " + b"b" * 100_000):
        with connect(server) as connection:
            connection.sendall(chunked(IMAGE)[:-2])
            time.sleep(0.05)
            connection.sendall(flood)
            assert statuses(connection) == [431]
    with connect(server) as connection:
        connection.sendall(chunked(IMAGE).partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        with contextlib.suppress(OSError):  # the server hangs up in between
            connection.sendall(b"5;")
            for _ in range(20):
                connection.sendall(b"x" * 10_000)
                time.sleep(0.02)
        assert statuses(connection) == [431]
    assert server.predict(IMAGE).status_code == 200


def test_a_whole_head_is_bounded_too(server):
    with connect(server) as connection:
        connection.sendall(
            b"GET /model HTTP/1.1\r\n" + b"a: %b\r\n" % (b"b" * 10_000) * 4 + b"\r\n"
        )
        assert statuses(connection) == [431]


def test_a_client_that_does_not_read_gets_no_more_answers_and_is_cut(start):
    server = start("--read-timeout-seconds", "1", "--deadline-ms", "500")
    before = server.metric("imago_requests_total", code="400")
    with connect(server) as connection:
        connection.settimeout(0.2)
        requests, sent = post(b"") * 1000, 0
        with contextlib.suppress(TimeoutError, ConnectionError):
            while sent < 200:
                connection.sendall(requests)
                sent += 1
        assert sent < 200, "the server goes on to read from a client that takes no answers"
        assert server.metric("imago_requests_total", code="400") - before < 50_000
        wait_until(lambda: is_reset(connection))
    assert server.predict(IMAGE).status_code == 200


def test_a_request_sent_ahead_is_not_too_slow_while_it_waits_for_us(start):
    server = start("--read-timeout-seconds", "1", "--deadline-ms", "20000")
    second = post(IMAGE)
    with connect(server) as connection:
        with suspended_workers(server):
            connection.sendall(post(IMAGE) + second[:-10])
            wait_until(lambda: server.metric("imago_pending_images") == 1)
            time.sleep(2.5)  # more than a slow client is given
        time.sleep(0.3)
        connection.sendall(second[-10:])
        assert statuses(connection, 2) == [200, 200]


@pytest.mark.parametrize("path", [b"/predict", b"/model"])
def test_an_upgrade_is_not_taken_and_the_request_is_answered(server, path):
    """As `curl --http2` asks for it."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk"
    request = (
        post(IMAGE, upgrade) if path == b"/predict" else get(path)[:-2] + upgrade + b"\r\n\r\n"
    )
    with connect(server) as connection:
        connection.sendall(request + request[:50])
        time.sleep(0.05)
        connection.sendall(request[50:] + request)
        assert statuses(connection, 3) == [200] * 3


def test_thousands_of_upgrades_at_once(server):
    upgrade = (
        get(b"/health/live")[:-2] + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"
    )
    with connect(server) as connection:
        connection.sendall(upgrade * 3000)
        assert statuses(connection, 3000) == [200] * 3000


def test_a_tunnel_is_refused(server):
    with connect(server) as connection:
        connection.sendall(b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n")
        assert statuses(connection) == [400]


def test_a_method_that_is_not_taken_says_which_is(server):
    answer = server.http.get("/predict")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert server.http.post("/model").headers["allow"] == "GET"
