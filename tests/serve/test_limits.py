"""Bounds: what is too much, too large, too slow or too late is refused, early and with the right status.

A worker that is stopped by SIGSTOP stands for one that is busy: what it was sent stays pending.
"""
import contextlib
import re
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import httpx
import pytest
import tiny
from service import stopped, wait

IMAGE = tiny.image("red")


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
    return "\r\n".join(["POST /predict HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {length}",
                        *lines, "", ""]).encode()


def test_pending_images_are_bounded_and_those_accepted_are_answered(start):
    server = start("--max-pending", "4")
    with ThreadPoolExecutor(8) as threads:
        with stopped(server):
            accepted = [threads.submit(server.predict, IMAGE) for _ in range(3)]
            wait(lambda: server.metric("imago_pending_images") == 3)
            two = [("f", ("a.png", IMAGE)), ("f", ("b.png", IMAGE))]
            assert server.http.post("/predict", files=two).status_code == 429
            accepted.append(threads.submit(server.predict, IMAGE))
            wait(lambda: server.metric("imago_pending_images") == 4)
            refused = server.predict(IMAGE)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            status, _ = Raw(server, head(1_000_000)).answer()  # its body was never sent
            assert status == 429
            assert [server.http.get(f"/health/{word}").status_code for word in ("live", "ready")] == [200, 200]
        assert [f.result().status_code for f in accepted] == [200] * 4
    assert server.metric("imago_rejected_total", reason="pending") == 3
    assert server.metric("imago_pending_images") == 0


def test_pending_bytes_are_bounded(start):
    server = start("--max-pending-bytes", str(2 * len(IMAGE) + 10))
    with ThreadPoolExecutor(2) as threads:
        with stopped(server):
            accepted = [threads.submit(server.predict, IMAGE) for _ in range(2)]
            wait(lambda: server.metric("imago_pending_images") == 2)
            assert server.predict(IMAGE).status_code == 429
        assert [f.result().status_code for f in accepted] == [200] * 2
    assert server.metric("imago_rejected_total", reason="bytes") == 1


def test_bytes_of_tensors_count_while_they_come(start):
    server = start("--max-pending-bytes", "100000")
    half = head(60_000).replace(b"/predict", b"/v2/models/colours/infer") + b"x" * 59_000

    def room() -> bool:
        """For 50,000 bytes, of which none is sent."""
        return Raw(server, head(50_000, "Expect: 100-continue")).socket.recv(12) == b"HTTP/1.1 100"

    assert room()
    arriving = Raw(server, half)
    wait(lambda: not room())
    assert Raw(server, half).answer()[0] == 429
    arriving.socket.close()
    wait(room)


def test_what_a_hung_worker_does_not_take_is_bounded(start):
    server = start("--deadline-ms", "50", "--max-pending-bytes", "1000000")
    body = tiny.image("red", 200)
    with stopped(server):
        answers = []
        while len(answers) < 200 and 429 not in answers:  # each gives up, and its bytes stay where they are
            answers.append(server.predict(body).status_code)
        assert answers[0] == 504
        assert answers[-1] == 429
    wait(lambda: server.predict(body).status_code == 200)


def test_a_body_too_large(start):
    server = start("--max-body-bytes", "1000")
    assert Raw(server, head(1001)).answer()[0] == 413
    pieces = [b"x" * 400] * 4
    chunked = server.http.post("/predict", content=iter(pieces), headers={"Content-Type": "image/png"})
    assert chunked.status_code == 413
    tensor = server.http.post("/v2/models/colours/infer", content=iter(pieces))
    assert tensor.status_code == 413
    assert server.metric("imago_rejected_total", reason="body") == 3
    assert server.predict(b"x" * 1000).status_code == 415


def test_images_in_a_request_and_pixels_of_an_image_are_bounded(start):
    server = start("--max-images", "2", "--max-pixels", "2000")
    files = [("f", ("a.png", IMAGE))] * 3
    assert server.http.post("/predict", files=files).status_code == 413
    assert server.http.post("/predict", files=files[:2]).status_code == 200
    assert server.predict(tiny.image("red", 64)).status_code == 413


def test_a_deadline_that_passes_is_504_and_the_work_is_not_done_late(start):
    server = start("--deadline-ms", "300")
    before = server.metric("imago_images_total", outcome="answered")
    with stopped(server):
        began = time.monotonic()
        answer = server.predict(IMAGE)
        assert answer.status_code == 504
        assert 0.25 < time.monotonic() - began < 5
        assert answer.headers["content-type"] == "application/problem+json"
        assert server.metric("imago_pending_images") == 0
    assert server.predict(IMAGE).status_code == 200
    assert server.metric("imago_images_total", outcome="answered") == before + 1
    assert server.metric("imago_requests_total", code="504") == 1


@pytest.mark.parametrize("path", ["/predict", "/v2/models/colours/infer"])
def test_a_client_that_goes_away_frees_its_place(start, path):
    server = start("--max-pending", "1")
    body = IMAGE if path == "/predict" else (
        b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,32,32,3],"data":[%b]}]}' % b",".join([b"1"] * 3072))
    request = head(len(body)).replace(b"/predict", path.encode()) + body
    with stopped(server):
        gone = Raw(server, request)
        wait(lambda: server.metric("imago_pending_images") == 1)
        gone.socket.close()
        wait(lambda: server.metric("imago_pending_images") == 0)
    assert server.predict(IMAGE).status_code == 200
    assert server.metric("imago_images_total", outcome="answered") == 1


def test_one_bad_image_does_not_hurt_its_batch(start):
    server = start()
    bodies = [IMAGE, b"hello", tiny.image("blue"), IMAGE[:60], tiny.image("green")] * 3
    with ThreadPoolExecutor(len(bodies)) as threads:
        with stopped(server):
            sent = [threads.submit(server.predict, body) for body in bodies]
            wait(lambda: server.metric("imago_pending_images") == len(bodies))
        statuses = [future.result().status_code for future in sent]
    assert statuses == [200, 415, 200, 422, 200] * 3


@pytest.mark.parametrize(("data", "status"), [
    (b"HELLO\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
    (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
    (b"GET / HTTP/1.1\r\na: " + b"b" * 100_000, 431),
    (b"GET /" + b"b" * 100_000, 431),
    (b"POST /predict HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
])
def test_heads_that_are_not_taken(server, data, status):
    connection = Raw(server, data)
    found, text = connection.answer()
    assert found == status
    assert "application/problem+json" in text
    assert "uvicorn" not in text.lower()


def test_slow_clients_are_cut_and_others_are_not(start):
    server = start("--read-timeout-seconds", "1")
    slow = [Raw(server), Raw(server, b"POST /pre"), Raw(server, head(1000) + b"x")]
    assert server.predict(IMAGE).status_code == 200
    wait(lambda: server.metric("imago_rejected_total", reason="slow") == 2)
    assert slow[0].is_closed()
    assert [connection.answer()[0] for connection in slow[1:]] == [408, 408]
    assert server.metric("imago_pending_images") == 0


def test_idle_connections_are_closed_after_a_while(start):
    server = start("--keep-alive-seconds", "1")
    connection = Raw(server, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    began = time.monotonic()
    assert connection.answer()[0] == 200
    assert connection.is_closed()
    assert time.monotonic() - began < 10


def test_connections_are_bounded(start):
    server = start("--max-connections", "3")
    server.http.close()
    wait(lambda: Raw(server, b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").answer()[0] == 200)
    held = [Raw(server, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(3)]
    assert [c.socket.recv(12) for c in held] == [b"HTTP/1.1 200"] * 3
    assert Raw(server, head(len(IMAGE)) + IMAGE).answer()[0] == 503
    for path in (b"live", b"ready"):  # a crowd is no reason to restart it, or to send what it has to others
        probe = Raw(server, b"GET /health/%b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        assert probe.answer()[0] == 200
        assert probe.is_closed()
    spare = [Raw(server) for _ in range(16)]
    wait(lambda: Raw(server).answer()[0] == 503)  # it said nothing, and there is room for no more
    for connection in spare:
        connection.socket.close()
    held[0].socket.close()
    wait(lambda: Raw(server, b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").answer()[0] == 200)


def crowd(server, count: int) -> list[Raw]:
    """Connections that each had one answer and are idle now."""
    server.http.close()
    return [Raw(server, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(count)]


@pytest.mark.parametrize(("limit", "flags", "room"), [
    ("-Sn 64", ("--max-connections", "300"), 300),
    ("-n 256", (), 112),
])
def test_open_files_allow_the_connections_that_are_promised(start, limit, flags, room):
    server = start(*flags, command=["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", sys.executable, "-m", "serve"])
    held = crowd(server, room + 16)
    assert {connection.socket.recv(12) for connection in held} == {b"HTTP/1.1 200"}
    beyond = [Raw(server) for _ in range(64)]
    assert {connection.socket.recv(12) for connection in beyond[32:]} == {b"HTTP/1.1 503"}
    assert ("max_connections is 112, not 1024" in server.log.read_text()) == (room == 112)


def test_pipelined_requests_are_answered_in_order(server):
    requests = b"".join(head(len(body), f"X-Request-ID: n{i}") + body
                        for i, body in enumerate([IMAGE, b"", tiny.image("blue"), b"hello"]))
    _, text = Raw(server, requests + b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n").answer()
    assert re.findall(r"HTTP/1.1 (\d+)", text) == ["200", "400", "200", "415", "200"]
    ids = [line.split()[1] for line in text.splitlines() if line.startswith("x-request-id")]
    assert ids[:4] == ["n0", "n1", "n2", "n3"]


def test_expect_100_continue(server):
    connection = Raw(server, head(len(IMAGE), "Expect: 100-continue"))
    assert connection.socket.recv(100).startswith(b"HTTP/1.1 100 ")
    connection.send(IMAGE)
    assert connection.answer()[0] == 200


@pytest.mark.parametrize(("path", "length", "status"), [
    (b"/predict", 1 << 30, 413), (b"/v2/models/colours/infer", 1 << 30, 413), (b"/nothing", 9, 404)])
def test_refused_before_100_continue(server, path, length, status):
    """The client may send its body or not. What it sends next must not be taken for one, so the connection ends."""
    connection = Raw(server, head(length, "Expect: 100-continue").replace(b"/predict", path))
    found, text = connection.answer()
    assert (found, "connection: close" in text) == (status, True)
    assert connection.is_closed()


def test_http_1_0_and_connection_close(server):
    for request in (head(len(IMAGE)).replace(b"HTTP/1.1", b"HTTP/1.0"), head(len(IMAGE), "Connection: close")):
        connection = Raw(server, request + IMAGE)
        status, text = connection.answer()
        assert (status, "connection: close" in text) == (200, True)


def test_compressed_bodies_are_not_taken(server):
    assert server.predict(IMAGE, **{"Content-Encoding": "gzip"}).status_code == 415


@pytest.mark.parametrize("source", ["variable", "file"])
def test_api_key(start, tmp_path, source):
    (tmp_path / "key").write_text("s3cret\n")
    server = (start(env={"IMAGO_API_KEY": "s3cret"}) if source == "variable" else
              start("--api-key-file", str(tmp_path / "key")))
    for headers in ({}, {"X-API-Key": "s3cre"}, {"X-API-Key": "s3cretx"}, {"Authorization": "Bearer x"}):
        refused = server.predict(IMAGE, **headers)
        assert refused.status_code == 401
        assert "www-authenticate" in refused.headers
        assert server.http.get("/v2/models/colours", headers=headers).status_code == 401
        assert server.http.post("/feedback", headers=headers).status_code == 401
    assert server.predict(IMAGE, **{"X-API-Key": "s3cret"}).status_code == 200
    assert server.predict(IMAGE, Authorization="Bearer s3cret").status_code == 200
    assert server.http.get("/health/live").status_code == 200
    assert server.http.get("/v2/health/ready").status_code == 200
    assert "s3cret" not in server.log.read_text()


def test_responses_have_security_headers_and_no_banner(server):
    for answer in (server.predict(IMAGE), server.predict(b""), server.http.get("/nothing"), server.http.get("/docs"),
                   httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics")):
        assert not {"server", "x-powered-by"} & set(answer.headers) or answer.headers["server"].strip() == "imago"
    for answer in (server.predict(IMAGE), server.predict(b""), server.http.get("/nothing"), server.http.get("/docs")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
