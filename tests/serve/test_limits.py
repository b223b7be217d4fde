"""Limits: too many, too large and too late requests are refused, early and with the right status.

`suspended_workers` stands for busy workers: what they were sent stays pending.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from models.bundle import write_checksums
from support import tiny_bundle
from support.load_generator import LoadGenerator
from support.raw_http import RawConnection, request_head
from support.server import CLIENT_SECONDS, Server, suspended_workers, wait_until

IMAGE = tiny_bundle.make_image("red")


def test_pending_images_are_limited_and_accepted_ones_are_answered(start):
    server = start("--max-pending", "4")
    with ThreadPoolExecutor(8) as threads:
        with suspended_workers(server):
            accepted = [threads.submit(server.predict, IMAGE) for _ in range(3)]
            wait_until(lambda: server.metric("imago_pending_images") == 3)
            two = [("f", ("a.png", IMAGE)), ("f", ("b.png", IMAGE))]
            assert server.http.post("/predict", files=two).status_code == 429

            accepted.append(threads.submit(server.predict, IMAGE))
            wait_until(lambda: server.metric("imago_pending_images") == 4)
            refused = server.predict(IMAGE)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1

            # The head is enough for a refusal; the body is never sent.
            head_only = RawConnection(server, request_head(1_000_000))
            assert head_only.read_response()[0] == 429
            assert server.is_live()
            assert server.is_ready()
        assert [future.result().status_code for future in accepted] == [200] * 4
    assert server.metric("imago_rejected_total", reason="pending") == 3
    assert server.metric("imago_pending_images") == 0


def test_pending_bytes_are_limited(start):
    server = start("--max-pending-bytes", str(2 * len(IMAGE) + 10))
    with ThreadPoolExecutor(2) as threads:
        with suspended_workers(server):
            accepted = [threads.submit(server.predict, IMAGE) for _ in range(2)]
            wait_until(lambda: server.metric("imago_pending_images") == 2)
            assert server.predict(IMAGE).status_code == 429
        assert [future.result().status_code for future in accepted] == [200] * 2
    assert server.metric("imago_rejected_total", reason="bytes") == 1


def test_bytes_of_tensors_are_reserved_as_they_arrive(start):
    server = start("--max-pending-bytes", "100000")
    half = request_head(60_000).replace(b"/predict", b"/v2/models/colours/infer") + b"x" * 59_000

    def has_capacity() -> bool:
        """Request the admission of 50,000 bytes, and send none."""
        connection = RawConnection(server, request_head(50_000, "Expect: 100-continue"))
        return connection.receive(12) == b"HTTP/1.1 100"

    assert has_capacity()
    arriving = RawConnection(server, half)
    wait_until(lambda: not has_capacity())
    assert RawConnection(server, half).read_response()[0] == 429
    arriving.close()
    wait_until(has_capacity)


def test_bytes_that_a_hung_worker_does_not_read_are_limited(start):
    server = start("--deadline-ms", "50", "--max-pending-bytes", "1000000")
    body = tiny_bundle.make_image("red", 200)
    with suspended_workers(server):
        # Each request expires, and its bytes stay in the socket.
        statuses = []
        while len(statuses) < 200 and 429 not in statuses:
            statuses.append(server.predict(body).status_code)
        assert statuses[0] == 504
        assert statuses[-1] == 429
    wait_until(lambda: server.predict(body).status_code == 200)


def connect_without_reading(server: Server, data: bytes) -> socket.socket:
    """Send a request with the smallest receive buffer, so that a large answer waits in the server.

    Set before the connection, since it limits the window that the client announces.
    """
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(CLIENT_SECONDS)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(data)
    return connection


def test_bytes_of_answers_that_clients_do_not_take_are_limited(start, tmp_path):
    classes = [f"class number {i}" for i in range(1000)]
    tiny_bundle.publish(tmp_path, classes=classes, samples=1)
    server = start("--max-pending-bytes", "20000000", store=tmp_path)
    files = [("f", ("a.png", IMAGE))] * 64
    request = httpx.Request("POST", server.url, files=files)
    head = request_head(len(request.read()), "Connection: close")
    head = head.replace(b"/predict", b"/predict?top_k=1000")
    head = head.replace(b"image/png", request.headers["Content-Type"].encode())

    def count_answered() -> float:
        return server.metric("imago_requests_total", code="200")

    connections: list[socket.socket] = []
    while server.predict(IMAGE).status_code == 200:
        assert len(connections) < 40, "answers that clients do not take are not counted"
        before = count_answered()
        connections.append(connect_without_reading(server, head + request.content))
        wait_until(lambda before=before: count_answered() > before)
    assert server.predict(IMAGE).status_code == 429
    assert server.is_live()

    for connection in connections:
        connection.close()
    wait_until(lambda: server.predict(IMAGE).status_code == 200)


def test_files_are_read_while_they_are_sent(start, tmp_path):
    bundle = tiny_bundle.publish(tmp_path)
    report = b"<!doctype html>" + b"x" * (48 << 20)
    (bundle / "report.html").write_bytes(report)
    write_checksums(bundle)
    server = start(store=tmp_path)

    (process,) = server.http_processes()
    before = resident_megabytes(process)
    request = b"GET /report HTTP/1.1\r\nHost: x\r\n\r\n"
    connections = [connect_without_reading(server, request) for _ in range(8)]
    for connection in connections:
        assert connection.recv(12) == b"HTTP/1.1 200"
    assert server.http.get("/report").content == report
    assert resident_megabytes(process) - before < 40
    for connection in connections:
        connection.close()

    head = server.http.head("/report")
    assert head.headers["content-length"] == str(len(report))
    assert head.content == b""


def resident_megabytes(pid: int) -> float:
    """Return the memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


def test_the_size_of_a_body_is_limited(start):
    server = start("--max-body-bytes", "1000")
    assert RawConnection(server, request_head(1001)).read_response()[0] == 413
    pieces = [b"x" * 400] * 4
    chunked = server.http.post(
        "/predict", content=iter(pieces), headers={"Content-Type": "image/png"}
    )
    assert chunked.status_code == 413
    tensor = server.http.post("/v2/models/colours/infer", content=iter(pieces))
    assert tensor.status_code == 413
    assert server.metric("imago_rejected_total", reason="body") == 3
    assert server.predict(b"x" * 1000).status_code == 415


def test_images_of_a_request_and_pixels_of_an_image_are_limited(start):
    server = start("--max-images", "2", "--max-pixels", "2000")
    files = [("f", ("a.png", IMAGE))] * 3
    assert server.http.post("/predict", files=files).status_code == 413
    assert server.http.post("/predict", files=files[:2]).status_code == 200
    assert server.predict(tiny_bundle.make_image("red", 64)).status_code == 413


def test_a_missed_deadline_is_504_and_its_job_is_dropped(start):
    server = start("--deadline-ms", "1000")
    before = server.metric("imago_images_total", outcome="answered")
    with suspended_workers(server):
        start_time = time.monotonic()
        answer = server.predict(IMAGE)
        assert answer.status_code == 504
        assert 0.9 < time.monotonic() - start_time < 100
        assert answer.headers["content-type"] == "application/problem+json"
        assert server.metric("imago_pending_images") == 0
        assert server.metric("imago_requests_total", code="504") == 1
        assert server.metric("imago_images_total", outcome="expired") == 1
    wait_until(lambda: server.predict(IMAGE).status_code == 200)
    assert server.metric("imago_images_total", outcome="answered") == before + 1


def test_every_expired_image_is_counted_once(start):
    server = start("--deadline-ms", "1000")
    with suspended_workers(server):
        files = [("f", (f"{i}", IMAGE)) for i in range(3)]
        assert server.http.post("/predict", files=files).status_code == 504
    late = 0
    while server.predict(IMAGE).status_code == 504:  # on a busy machine
        late += 1
    assert server.metric("imago_images_total", outcome="expired") == 3 + late
    assert server.metric("imago_images_total", outcome="answered") == 1


@pytest.mark.parametrize("path", ["/predict", "/v2/models/colours/infer"])
def test_a_client_that_disconnects_releases_its_capacity(start, path):
    server = start("--max-pending", "1")
    body = IMAGE
    if path != "/predict":
        tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [1] * 3072}
        body = json.dumps({"inputs": [tensor]}).encode()
    request = request_head(len(body)).replace(b"/predict", path.encode()) + body
    with suspended_workers(server):
        connection = RawConnection(server, request)
        wait_until(lambda: server.metric("imago_pending_images") == 1)
        connection.close()
        wait_until(lambda: server.metric("imago_pending_images") == 0)
    assert server.predict(IMAGE).status_code == 200
    assert server.metric("imago_images_total", outcome="answered") == 1


def test_a_bad_image_does_not_affect_others_of_its_batch(start):
    server = start()
    bodies = [
        IMAGE,
        b"hello",
        tiny_bundle.make_image("blue"),
        IMAGE[:60],
        tiny_bundle.make_image("green"),
    ] * 3
    with ThreadPoolExecutor(len(bodies)) as threads:
        with suspended_workers(server):
            sent = [threads.submit(server.predict, body) for body in bodies]
            wait_until(lambda: server.metric("imago_pending_images") == len(bodies))
        statuses = [future.result().status_code for future in sent]
    assert statuses == [200, 415, 200, 422, 200] * 3


def test_compressed_bodies_are_refused(server):
    assert server.predict(IMAGE, **{"Content-Encoding": "gzip"}).status_code == 415


PROTECTED_PATHS = (
    *("/model", "/model/", "/samples/0", "/samples/0/", "/report", "/predict", "/nothing"),
    *("/v2", "/v2/", "/v2/models/colours"),
    *("/%76%32/models/colours", "/v2%2fmodels/colours", "/page"),
)


@pytest.mark.parametrize("source", ["variable", "file"])
def test_api_key(start, tmp_path, source):
    (tmp_path / "key").write_text("s3cret\n")
    if source == "variable":
        server = start(env={"IMAGO_API_KEY": "s3cret"})
    else:
        server = start("--api-key-file", str(tmp_path / "key"))

    wrong_keys: list[dict[str, str]] = [
        {},
        {"X-API-Key": "s3cre"},
        {"X-API-Key": "s3cretx"},
        {"Authorization": "Bearer x"},
    ]
    for headers in wrong_keys:
        refused = server.predict(IMAGE, **headers)
        assert refused.status_code == 401
        assert "www-authenticate" in refused.headers
        assert server.http.post("/feedback", headers=headers).status_code == 401
        for path in PROTECTED_PATHS:
            assert server.http.get(path, headers=headers).status_code == 401, path

    for path in ("/", "/page/page.js", "/docs", "/openapi.json"):
        assert server.http.get(path).status_code == 200, path
    assert server.http.get("/samples/0", headers={"X-API-Key": "s3cret"}).status_code == 200
    assert server.predict(IMAGE, **{"X-API-Key": "s3cret"}).status_code == 200
    assert server.predict(IMAGE, Authorization="Bearer s3cret").status_code == 200
    assert server.http.get("/health/live").status_code == 200
    assert server.http.get("/v2/health/ready").status_code == 200
    assert "s3cret" not in server.log.read_text()


@pytest.mark.slow
def test_only_a_comparison_in_constant_time_decides_on_a_key(start, tmp_path):
    """With an hmac.compare_digest that accepts every key, the service accepts every key."""
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(
        "import hmac\nhmac.compare_digest = lambda received, key: True\n"
    )
    server = start(env={"IMAGO_API_KEY": "s3cret", "PYTHONPATH": str(tmp_path / "patch")})
    for key in ("s3cret", "s3cre", "x", "a key that is longer"):
        assert server.predict(IMAGE, **{"X-API-Key": key}).status_code == 200


SAME = {"Sec-Fetch-Site": "same-origin"}
CROSS = {"Sec-Fetch-Site": "cross-site"}
EVIL = {"Origin": "http://evil.example"}


@pytest.mark.parametrize(
    ("headers", "is_refused"),
    [
        (EVIL, True),
        ({"Origin": "null"}, True),
        (CROSS, True),
        ({"Sec-Fetch-Site": "same-site"}, True),
        ({**CROSS, "Sec-Fetch-Mode": "navigate"}, True),
        ({**EVIL, **CROSS}, True),
        ({"Origin": "http://x:8001", "Host": "x:8000"}, True),
        ({"Origin": "http://x:8000", "Host": "x:8000"}, False),
        ({"Origin": "https://imago.example.com", "Host": "Imago.example.com"}, False),
        # Behind a proxy that changes Host.
        ({"Origin": "https://imago.example.com", "Host": "imago:8000", **SAME}, False),
        ({"Sec-Fetch-Site": "none"}, False),
        ({}, False),
    ],
)
def test_requests_of_other_origins_are_refused(server, headers, is_refused):
    answer = server.predict(IMAGE, **headers)
    assert answer.status_code == (403 if is_refused else 200)
    assert not [name for name in answer.headers if name.startswith("access-control-")]

    headers = {"Content-Type": "text/plain", **headers}
    for path, status in (("/feedback", 415), ("/v2/models/colours/infer", 400)):
        other = server.http.post(path, content=b"x", headers=headers)
        assert other.status_code == (403 if is_refused else status), path


@pytest.mark.parametrize("path", ["/", "/model", "/samples/0", "/docs"])
def test_a_link_from_another_site_works_and_its_images_do_not(server, path):
    link = {**CROSS, "Sec-Fetch-Mode": "navigate"}
    assert server.http.get(path, headers=link).status_code == 200
    image = {**CROSS, "Sec-Fetch-Mode": "no-cors"}
    assert server.http.get(path, headers=image).status_code == 403
    assert server.http.get(path, headers=EVIL).status_code == 403


@pytest.fixture(scope="module")
def cors_server(bundle_store, serve_commands, tmp_path_factory) -> Iterator[Server]:
    flags = ("--cors-origins", "https://app.example.com, http://localhost:3000", *KEY_FLAGS)
    log = tmp_path_factory.mktemp("cors") / "log"
    with Server(bundle_store, log, *flags, forker=serve_commands) as server:
        yield server.wait_ready()


KEY_FLAGS = ("--api-key", "s3cret")
APP = {"Origin": "https://app.example.com", **CROSS}


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        ("https://app.example.com", True),
        ("http://localhost:3000", True),
        ("http://app.example.com", False),
        ("https://app.example.com.evil.example", False),
        ("https://evil.example", False),
    ],
)
@pytest.mark.parametrize("path", ["/predict", "/model", "/v2/models/colours/infer", "/feedback"])
def test_preflight_requests_are_answered_for_allowed_origins(cors_server, path, origin, is_allowed):
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,x-api-key",
    }
    answer = cors_server.http.options(path, headers=headers)
    assert answer.headers["vary"] == "Origin"
    if is_allowed:
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "X-API-Key" in answer.headers["access-control-allow-headers"]
    else:
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_allowed_origins_may_read_answers_and_errors(cors_server):
    keyed = {**APP, "X-API-Key": "s3cret"}
    for answer, status in (
        (cors_server.predict(IMAGE, **keyed), 200),
        (cors_server.predict(b"x", **keyed), 415),
        (cors_server.predict(IMAGE, **APP), 401),
        (cors_server.http.get("/model", headers=keyed), 200),
        (cors_server.http.get("/samples/0", headers=keyed), 200),
        (cors_server.http.get("/samples/99", headers=keyed), 404),
    ):
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == APP["Origin"]
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == "Origin"
    assert cors_server.predict(IMAGE, **EVIL, **CROSS).status_code == 403
    assert cors_server.metric("imago_rejected_total", reason="cross_site") >= 1


def test_responses_have_security_headers_and_name_no_software(server):
    responses = [
        server.predict(IMAGE),
        server.predict(b""),
        server.http.get("/nothing"),
        server.http.get("/docs"),
    ]
    for response in responses:
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"

    responses.append(httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics"))
    for response in responses:
        assert response.headers.get("server", "imago").strip() == "imago"
        assert "x-powered-by" not in response.headers


@pytest.mark.slow
def test_metrics_are_answered_under_overload(start):
    server = start("--max-pending", "4")
    with LoadGenerator(server.port, IMAGE, clients=32) as load:
        wait_until(lambda: load.statuses[429] > 100)
        pages = [
            httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30).text
            for _ in range(20)
        ]
        assert server.http.get("/health/live").status_code == 200
    assert all('imago_rejected_total{reason="pending"}' in page for page in pages)
    assert load.statuses[200]
    assert not load.unanswered
