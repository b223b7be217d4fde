"""The files that the service sends: page, documentation, and samples and report of the bundle."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from models.bundle import write_checksums
from support import tiny_bundle
from support.blocked_path import BlockedPath
from support.server import Server, wait_until


def test_a_blocked_store_delays_only_requests_for_its_files(start, tmp_path):
    path = tiny_bundle.publish(tmp_path / "store")
    (path / "report.html").write_text("Accuracy of the model")
    write_checksums(path)
    blocked_path = BlockedPath(tmp_path / "hang", tmp_path / "store")
    server = start("--reload-seconds", "0", store=tmp_path / "store", env=blocked_path.env)
    sample = (path / "samples" / "00.png").read_bytes()
    with ThreadPoolExecutor(2) as threads:
        with blocked_path.blocked():
            requests = [threads.submit(server.http.get, url) for url in ("/samples/0", "/report")]
            wait_until(blocked_path.is_reached)
            assert server.predict(tiny_bundle.make_image("red")).status_code == 200
            assert not any(request.done() for request in requests)
        contents = [request.result().content for request in requests]
        assert contents == [sample, b"Accuracy of the model"]


def test_status_is_503_if_the_store_does_not_respond_in_time(start, tmp_path):
    blocked_path = BlockedPath(tmp_path / "hang", tiny_bundle.publish(tmp_path / "store"))
    flags = ("--reload-seconds", "0", "--deadline-ms", "300")
    server = start(*flags, store=tmp_path / "store", env=blocked_path.env)
    with blocked_path.blocked():
        for path in ("/samples/0", "/report"):
            response = server.http.get(path)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert "the store does not answer" in response.json()["detail"]
    wait_until(lambda: server.http.get("/samples/0").status_code == 200)


SAMPLE_KINDS = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".tiff": "image/tiff",
    ".bmp": "image/bmp",
}


@pytest.fixture(scope="module")
def server_with_report(serve_commands, tmp_path_factory):
    """A server whose bundle has a report, and a sample of each format."""
    store = tmp_path_factory.mktemp("reported")
    files = [tiny_bundle.make_image("red", kind=kind) for kind in SAMPLE_KINDS]
    path = tiny_bundle.publish(store, files=files, samples=len(files))
    (path / "report.html").write_text("Accuracy of the model")
    write_checksums(path)
    log = tmp_path_factory.mktemp("log") / "log"
    with Server(store, log, forker=serve_commands) as running:
        yield running.wait_ready()


@pytest.mark.parametrize("path", ["/", "/docs", "/report", "/samples/0", "/page/page.js"])
def test_security_headers_forbid_other_scripts_and_hosts(server_with_report, path):
    answer = server_with_report.http.get(path)
    assert answer.status_code == 200
    policy: dict[str, str] = {}
    for part in answer.headers["content-security-policy"].split(";"):
        directive, _, value = part.strip().partition(" ")
        policy[directive] = value
    for directive in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy[directive] == "'none'"
    assert policy.get("script-src", "'none'") in ("'none'", "'self'")
    assert ("sandbox" in policy) is (path == "/report")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("changed", ["report.html", "samples/01.png", "SHA256SUMS"])
def test_files_that_changed_since_they_were_verified_are_not_sent(start, tmp_path, changed):
    path = tiny_bundle.publish(tmp_path)
    (path / "report.html").write_text("Accuracy of the model")
    write_checksums(path)
    server = start("--reload-seconds", "0", store=tmp_path)
    with (path / changed).open("ab") as file:
        file.write(b"\n")

    files = {
        "report.html": "/report",
        "samples/00.png": "/samples/0",
        "samples/01.png": "/samples/1",
    }
    for name, url in files.items():
        response = server.http.get(url)
        if changed in (name, "SHA256SUMS"):
            assert response.status_code == 500
            assert "has changed" in response.json()["detail"]
        else:
            assert response.content == (path / name).read_bytes()


@pytest.mark.parametrize(("kind", "content_type"), SAMPLE_KINDS.items())
def test_samples_have_their_content_type(server_with_report, kind, content_type):
    answer = server_with_report.http.get(f"/samples/{[*SAMPLE_KINDS].index(kind)}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == content_type
    assert answer.content == tiny_bundle.make_image("red", kind=kind)
