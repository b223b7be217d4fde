"""Bounds: what is too much, too large, too slow or too late is refused, early and with the right status.

A worker that is stopped by SIGSTOP stands for one that is busy: what it was sent stays pending.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from support import tiny_bundle
from support.load_generator import LoadGenerator
from support.raw_http import RawConnection, request_head
from support.server import suspended_workers, wait_until

IMAGE = tiny_bundle.make_image("red")


def test_pending_images_are_bounded_and_those_accepted_are_answered(start):
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
            status, _ = RawConnection(
                server, request_head(1_000_000)
            ).read_response()  # its body was never sent
            assert status == 429
            assert [
                server.http.get(f"/health/{word}").status_code for word in ("live", "ready")
            ] == [200, 200]
        assert [f.result().status_code for f in accepted] == [200] * 4
    assert server.metric("imago_rejected_total", reason="pending") == 3
    assert server.metric("imago_pending_images") == 0


def test_pending_bytes_are_bounded(start):
    server = start("--max-pending-bytes", str(2 * len(IMAGE) + 10))
    with ThreadPoolExecutor(2) as threads:
        with suspended_workers(server):
            accepted = [threads.submit(server.predict, IMAGE) for _ in range(2)]
            wait_until(lambda: server.metric("imago_pending_images") == 2)
            assert server.predict(IMAGE).status_code == 429
        assert [f.result().status_code for f in accepted] == [200] * 2
    assert server.metric("imago_rejected_total", reason="bytes") == 1


def test_bytes_of_tensors_count_while_they_come(start):
    server = start("--max-pending-bytes", "100000")
    half = request_head(60_000).replace(b"/predict", b"/v2/models/colours/infer") + b"x" * 59_000

    def room() -> bool:
        """For 50,000 bytes, of which none is sent."""
        return (
            RawConnection(server, request_head(50_000, "Expect: 100-continue")).receive(12)
            == b"HTTP/1.1 100"
        )

    assert room()
    arriving = RawConnection(server, half)
    wait_until(lambda: not room())
    assert RawConnection(server, half).read_response()[0] == 429
    arriving.close()
    wait_until(room)


def test_what_a_hung_worker_does_not_take_is_bounded(start):
    server = start("--deadline-ms", "50", "--max-pending-bytes", "1000000")
    body = tiny_bundle.make_image("red", 200)
    with suspended_workers(server):
        answers = []
        while (
            len(answers) < 200 and 429 not in answers
        ):  # each gives up, and its bytes stay where they are
            answers.append(server.predict(body).status_code)
        assert answers[0] == 504
        assert answers[-1] == 429
    wait_until(lambda: server.predict(body).status_code == 200)


def test_a_body_too_large(start):
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


def test_images_in_a_request_and_pixels_of_an_image_are_bounded(start):
    server = start("--max-images", "2", "--max-pixels", "2000")
    files = [("f", ("a.png", IMAGE))] * 3
    assert server.http.post("/predict", files=files).status_code == 413
    assert server.http.post("/predict", files=files[:2]).status_code == 200
    assert server.predict(tiny_bundle.make_image("red", 64)).status_code == 413


def test_a_deadline_that_passes_is_504_and_the_work_is_not_done_late(start):
    server = start("--deadline-ms", "300")
    before = server.metric("imago_images_total", outcome="answered")
    with suspended_workers(server):
        began = time.monotonic()
        answer = server.predict(IMAGE)
        assert answer.status_code == 504
        assert 0.25 < time.monotonic() - began < 5
        assert answer.headers["content-type"] == "application/problem+json"
        assert server.metric("imago_pending_images") == 0
    assert server.predict(IMAGE).status_code == 200
    assert server.metric("imago_images_total", outcome="answered") == before + 1
    assert server.metric("imago_requests_total", code="504") == 1
    assert server.metric("imago_images_total", outcome="expired") == 1


def test_every_image_that_expires_is_counted_once(start):
    server = start("--deadline-ms", "300")
    with suspended_workers(server):
        files = [("f", (f"{i}", IMAGE)) for i in range(3)]
        assert server.http.post("/predict", files=files).status_code == 504
    wait_until(lambda: server.predict(IMAGE).status_code == 200)
    assert server.metric("imago_images_total", outcome="expired") == 3
    assert server.metric("imago_images_total", outcome="answered") == 1


@pytest.mark.parametrize("path", ["/predict", "/v2/models/colours/infer"])
def test_a_client_that_goes_away_frees_its_place(start, path):
    server = start("--max-pending", "1")
    body = (
        IMAGE
        if path == "/predict"
        else (
            b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,32,32,3],"data":[%b]}]}'
            % b",".join([b"1"] * 3072)
        )
    )
    request = request_head(len(body)).replace(b"/predict", path.encode()) + body
    with suspended_workers(server):
        gone = RawConnection(server, request)
        wait_until(lambda: server.metric("imago_pending_images") == 1)
        gone.close()
        wait_until(lambda: server.metric("imago_pending_images") == 0)
    assert server.predict(IMAGE).status_code == 200
    assert server.metric("imago_images_total", outcome="answered") == 1


def test_one_bad_image_does_not_hurt_its_batch(start):
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


def test_compressed_bodies_are_not_taken(server):
    assert server.predict(IMAGE, **{"Content-Encoding": "gzip"}).status_code == 415


@pytest.mark.parametrize("source", ["variable", "file"])
def test_api_key(start, tmp_path, source):
    (tmp_path / "key").write_text("s3cret\n")
    server = (
        start(env={"IMAGO_API_KEY": "s3cret"})
        if source == "variable"
        else start("--api-key-file", str(tmp_path / "key"))
    )
    for headers in (
        {},
        {"X-API-Key": "s3cre"},
        {"X-API-Key": "s3cretx"},
        {"Authorization": "Bearer x"},
    ):
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


def test_nothing_but_the_constant_time_comparison_decides_on_a_key(start, tmp_path):
    """Where that takes every key for the right one, every key is."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text(
        "import hmac\nhmac.compare_digest = lambda given, key: True\n"
    )
    server = start(env={"IMAGO_API_KEY": "s3cret", "PYTHONPATH": str(tmp_path / "own")})
    for key in ("s3cret", "s3cre", "x", "a key that is longer"):
        assert server.predict(IMAGE, **{"X-API-Key": key}).status_code == 200


def test_responses_have_security_headers_and_no_banner(server):
    for answer in (
        server.predict(IMAGE),
        server.predict(b""),
        server.http.get("/nothing"),
        server.http.get("/docs"),
        httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics"),
    ):
        assert (
            not {"server", "x-powered-by"} & set(answer.headers)
            or answer.headers["server"].strip() == "imago"
        )
    for answer in (
        server.predict(IMAGE),
        server.predict(b""),
        server.http.get("/nothing"),
        server.http.get("/docs"),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


def test_metrics_are_answered_under_overload(start):
    server = start("--max-pending", "4")
    with LoadGenerator(server.port, IMAGE, clients=32) as load:
        wait_until(lambda: load.statuses[429] > 100)
        pages = [
            httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=5).text
            for _ in range(20)
        ]
        assert server.http.get("/health/live").status_code == 200
    assert all('imago_rejected_total{reason="pending"}' in page for page in pages)
    assert load.statuses[200]
    assert not load.lost
