"""Pipelined requests, in pieces of any size: each gets its answer in order and affects no other."""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import tiny_bundle
from support.server import CLIENT_SECONDS, Server, suspended_workers, wait_until

IMAGE = tiny_bundle.make_image("red")
TOO_MANY_HEADERS = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n"


def build_post(body: bytes, *lines: bytes) -> bytes:
    """Build a POST /predict with this body and further header lines."""
    head = [
        b"POST /predict HTTP/1.1",
        b"Host: x",
        b"Content-Type: image/png",
        b"Content-Length: %d" % len(body),
        *lines,
    ]
    return b"\r\n".join([*head, b"", body])


def build_chunked_post(body: bytes, trailers: bytes = b"") -> bytes:
    """Build a POST /predict with one chunk, which has an extension, and trailers."""
    head = (
        b"POST /predict HTTP/1.1\r\n"
        b"Host: x\r\n"
        b"Content-Type: image/png\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    return head + b"%x;note=1\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers)


def build_get(path: bytes, *lines: bytes) -> bytes:
    """Build a GET with further header lines."""
    return b"\r\n".join([b"GET %b HTTP/1.1" % path, b"Host: x", *lines, b"", b""])


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=CLIENT_SECONDS)


def send_piece(connection: socket.socket, data: bytes) -> None:
    """Send bytes and wait until the server has read them, so that it gets them as one piece."""
    connection.sendall(data)
    wait_until(lambda: not has_unread_bytes(connection))


def has_unread_bytes(connection: socket.socket) -> bool:
    """Return whether the server's end of the connection is open and holds bytes it has not read."""
    client_port = connection.getsockname()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, _, remote_address, state, queues, *_ = line.split()
        is_established = state == "01"
        if is_established and remote_address.endswith(f":{client_port:04X}"):
            return not queues.endswith(":00000000")  # transmit and receive queue, in bytes
    return False


def read_statuses(connection: socket.socket, count: int | None = None) -> list[int]:
    """Return the statuses of `count` responses, or of all until the server closes."""
    data = b""
    statuses: list[int] = []
    with contextlib.suppress(ConnectionResetError):
        while count is None or len(statuses) < count:
            received = connection.recv(1 << 16)
            if not received:
                break
            data += received
            statuses = [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", data)]
    return statuses


def is_reset(connection: socket.socket) -> bool:
    """Return whether the server has reset the connection."""
    try:
        connection.sendall(b"x")
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return False


REQUESTS = [
    (build_post(IMAGE), 200),
    (build_post(tiny_bundle.make_image("blue")), 200),
    (build_chunked_post(IMAGE), 200),
    (build_post(b"hello"), 415),
    (build_post(b""), 400),
    (build_get(b"/health/live"), 200),
    (build_get(b"/nothing"), 404),
    (build_get(b"/model"), 200),
    (build_chunked_post(IMAGE, b"checksum: 1\r\n"), 200),
    (build_post(IMAGE, b"Content-Encoding: gzip"), 415),
]

# What follows the requests, and the status of its response. All but the first end the connection.
LAST_REQUESTS = [
    (b"", None),
    (b"GARBAGE\r\n\r\n", 400),
    (TOO_MANY_HEADERS, 431),
    (b"GET /" + b"b" * 40_000, 431),
    (build_post(IMAGE, b"Connection: close") + build_get(b"/model"), 200),
]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    requests=st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=6),
    last=st.sampled_from(LAST_REQUESTS),
    piece_sizes=st.lists(st.integers(1, 9000), max_size=4),
)
def test_each_request_gets_its_answer_in_order(server, requests, last, piece_sizes):
    data = b""
    expected = []
    for request, status in requests:
        data += request
        expected.append(status)
    last_request, last_status = last
    data += last_request
    if last_status is not None:
        expected.append(last_status)

    with connect(server) as connection:
        # The server may refuse the last request, and close, before all of it is sent.
        with contextlib.suppress(ConnectionError):
            for size in piece_sizes:
                send_piece(connection, data[:size])
                data = data[size:]
            connection.sendall(data)
        count = len(expected) if last_status is None else None
        assert read_statuses(connection, count) == expected
    assert server.is_ready()


def test_a_refused_head_does_not_affect_earlier_requests_or_workers(server):
    for _ in range(10):
        connections = [connect(server) for _ in range(4)]
        for connection in connections:
            connection.sendall(build_post(IMAGE) + TOO_MANY_HEADERS)
        for connection in connections:
            connection.close()

    with connect(server) as connection:
        connection.sendall(build_post(IMAGE) + TOO_MANY_HEADERS)
        assert read_statuses(connection) == [200, 431]
    assert server.is_ready()
    assert server.predict(IMAGE).status_code == 200
    assert server.metric("imago_restarts_total", process="worker", reason="crash") == 0
    wait_until(lambda: server.metric("imago_pending_images") == 0)


def test_a_large_body_does_not_count_as_part_of_the_next_head(server):
    second = build_post(IMAGE)
    with connect(server) as connection:
        send_piece(connection, build_post(tiny_bundle.make_image("red", 400)) + second[:18])
        connection.sendall(second[18:])
        assert read_statuses(connection, 2) == [200, 200]


@pytest.mark.parametrize("trailers", [b"a: b\r\n" * 20_000, b"a: " + b"b" * 100_000])
def test_trailers_are_limited(server, trailers):
    with connect(server) as connection:
        send_piece(connection, build_chunked_post(IMAGE)[:-2])
        connection.sendall(trailers)
        assert read_statuses(connection) == [431]
    assert server.predict(IMAGE).status_code == 200


def test_chunk_extensions_are_limited(server):
    head = build_chunked_post(IMAGE).partition(b"\r\n\r\n")[0]
    with connect(server) as connection:
        connection.sendall(head + b"\r\n\r\n")
        with contextlib.suppress(OSError):  # the server closes in between
            connection.sendall(b"5;")
            for _ in range(20):
                send_piece(connection, b"x" * 10_000)
        assert read_statuses(connection) == [431]
    assert server.predict(IMAGE).status_code == 200


def test_a_head_in_one_piece_is_limited(server):
    header = b"a: %b\r\n" % (b"b" * 10_000)
    with connect(server) as connection:
        connection.sendall(b"GET /model HTTP/1.1\r\n" + header * 4 + b"\r\n")
        assert read_statuses(connection) == [431]


def test_a_client_that_reads_no_answers_is_not_served_and_disconnected(start):
    server = start("--read-timeout-seconds", "1", "--deadline-ms", "500")
    before = server.metric("imago_requests_total", code="400")
    requests = build_post(b"") * 1000
    sent = 0
    with connect(server) as connection:
        connection.settimeout(0.2)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while sent < 200:
                connection.sendall(requests)
                sent += 1
        assert sent < 200, "the server still reads from a client that reads no answers"
        assert server.metric("imago_requests_total", code="400") - before < 50_000
        wait_until(lambda: is_reset(connection))
    wait_until(lambda: server.predict(IMAGE).status_code == 200)


@pytest.mark.slow
def test_a_pipelined_request_does_not_time_out_while_the_service_works(start):
    server = start("--read-timeout-seconds", "1", "--deadline-ms", "20000")
    second = build_post(IMAGE)
    with connect(server) as connection:
        with suspended_workers(server):
            connection.sendall(build_post(IMAGE) + second[:-10])
            wait_until(lambda: server.metric("imago_pending_images") == 1)
            # A request that is incomplete, sent later, times out: so the read timeout has passed.
            with connect(server) as slow:
                slow.sendall(second[:-10])
                assert read_statuses(slow) == [408]
        assert read_statuses(connection, 1) == [200]
        connection.sendall(second[-10:])
        assert read_statuses(connection, 1) == [200]


# What `curl --http2` sends.
UPGRADE = (
    b"Connection: Upgrade, HTTP2-Settings",
    b"Upgrade: h2c",
    b"HTTP2-Settings: AAMAAABk",
)


@pytest.mark.parametrize(
    "request_", [build_post(IMAGE, *UPGRADE), build_get(b"/model", *UPGRADE)], ids=["post", "get"]
)
def test_a_request_for_an_upgrade_is_answered_over_http_1_1(server, request_):
    with connect(server) as connection:
        send_piece(connection, request_ + request_[:50])
        connection.sendall(request_[50:] + request_)
        assert read_statuses(connection, 3) == [200, 200, 200]


def test_thousands_of_pipelined_upgrades(server):
    request = build_get(b"/health/live", *UPGRADE[:2])
    with connect(server) as connection:
        connection.sendall(request * 3000)
        assert read_statuses(connection, 3000) == [200] * 3000


def test_few_requests_are_parsed_in_advance(start):
    """Each that waits takes 4 KB: those of one read would take 30 MB a connection."""
    server = start()
    (process,) = server.http_processes()
    request = b"GET /nothing HTTP/1.1\r\n\r\n"
    before = peak_megabytes(process)
    connections = [connect(server) for _ in range(8)]
    os.kill(process, signal.SIGSTOP)  # so that the process reads all that is sent at once
    try:
        for connection in connections:
            connection.settimeout(1)
            with contextlib.suppress(TimeoutError):
                connection.sendall(request * 9000)
    finally:
        os.kill(process, signal.SIGCONT)

    for connection in connections:
        connection.settimeout(CLIENT_SECONDS)
        assert read_statuses(connection, 1)[0] == 404
    assert peak_megabytes(process) - before < 60
    for connection in connections:
        connection.close()


def peak_megabytes(pid: int) -> float:
    """Return the most memory that a process has held."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


@pytest.mark.parametrize("count", [16, 17, 1000])
def test_pipelined_requests_with_bodies_are_all_answered(server, count):
    requests = [build_post(b"\r\n\r\n" * 9), build_chunked_post(IMAGE), build_get(b"/nothing")]
    data = b"".join(requests[i % 3] for i in range(count))
    expected = [[415, 200, 404][i % 3] for i in range(count)]
    with connect(server) as connection, ThreadPoolExecutor(1) as thread:
        sent = thread.submit(connection.sendall, data)
        assert read_statuses(connection, count) == expected
        sent.result()


@pytest.mark.parametrize(
    "trailer",
    [b"X-Request-ID: trailer", b"Content-Type: text/plain", b"Content-Encoding: gzip"],
)
def test_trailers_are_no_headers(server, trailer):
    """Also of a request that waits in the pipeline while its trailers arrive."""
    data = build_chunked_post(IMAGE, trailer + b"\r\n") * 2
    with connect(server) as connection:
        connection.sendall(data + build_get(b"/health/live", b"Connection: close"))
        answers = b""
        while received := connection.recv(1 << 16):
            answers += received
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200"] * 3
    assert b"x-request-id: trailer" not in answers


@pytest.mark.parametrize(
    "rest", [b"g\r\n", b"1\r\na\r\n0\r\nContent-Length: abc\r\n\r\n", b"1\r\nab"]
)
@pytest.mark.parametrize("waiting", [1, 3])
def test_a_malformed_body_of_a_waiting_request_is_answered(server, waiting, rest):
    head = build_chunked_post(b"").partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(build_post(IMAGE) * waiting + head + rest)
        assert read_statuses(connection) == [200] * waiting + [400]


def test_connect_is_refused(server):
    with connect(server) as connection:
        connection.sendall(b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n")
        assert read_statuses(connection) == [400]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/predict/", 200),
        ("GET", "/model/", 200),
        ("GET", "/health/ready/", 200),
        ("GET", "/samples/0/", 200),
        ("GET", "/v2/", 200),
        ("GET", "/v2/models/colours/", 200),
        ("POST", "/model/", 405),
        ("GET", "/nothing/", 404),
    ],
)
def test_a_slash_at_the_end_of_a_path_is_ignored(server, method, path, status):
    headers = {"Content-Type": "image/png"}
    response = server.http.request(method, path, content=IMAGE, headers=headers)
    assert response.status_code == status


def test_docs_with_a_slash_at_the_end_lead_to_docs(server):
    response = server.http.get("/docs/", follow_redirects=True)
    assert response.status_code == 200
    assert response.url.path == "/docs"


def test_status_405_names_the_allowed_method(server):
    response = server.http.get("/predict")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert server.http.post("/model").headers["allow"] == "GET"


def test_a_client_that_resets_pipelined_requests_leaves_no_traceback(server):
    """The first request is answered when it has no connection any more."""
    data = [base64.b64encode(IMAGE).decode()]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": data}
    body = json.dumps({"inputs": [tensor]}).encode()
    infer = b"POST /v2/models/colours/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    log_size = server.log.stat().st_size

    with suspended_workers(server):
        connection = connect(server)
        send_piece(connection, infer % len(body) + body + build_get(b"/docs"))
        wait_until(lambda: server.metric("imago_pending_images") == 1)
        no_linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        connection.close()  # sends RST instead of FIN
        assert server.is_live()  # asked after the server has seen the reset

    wait_until(lambda: server.metric("imago_pending_images") == 0)
    assert b"Traceback" not in server.log.read_bytes()[log_size:]
