"""What a browser is given: the page, the documentation, and the bundle's own samples and report."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from support import tiny_bundle
from support.blocked_path import BlockedPath
from support.server import Server, wait_until

from models.bundle import write_checksums


def test_a_store_that_hangs_holds_up_only_who_asks_for_its_files(start, tmp_path):
    path = tiny_bundle.publish(tmp_path / "store")
    (path / "report.html").write_text("How good it is")
    write_checksums(path)
    hang = BlockedPath(tmp_path / "hang", tmp_path / "store")
    service = start("--reload-seconds", "0", store=tmp_path / "store", env=hang.env)
    sample = (path / "samples" / "00.png").read_bytes()
    with ThreadPoolExecutor(2) as others:
        with hang.blocked():
            asked = [others.submit(service.http.get, place) for place in ("/samples/0", "/report")]
            wait_until(hang.is_reached)
            assert service.predict(tiny_bundle.make_image("red")).status_code == 200
            assert not any(one.done() for one in asked)
        assert [one.result().content for one in asked] == [sample, b"How good it is"]


def test_a_store_that_hangs_on_is_told_of_at_the_deadline(start, tmp_path):
    hang = BlockedPath(tmp_path / "hang", tiny_bundle.publish(tmp_path / "store"))
    service = start(
        "--reload-seconds", "0", "--deadline-ms", "300", store=tmp_path / "store", env=hang.env
    )
    with hang.blocked():
        for place in ("/samples/0", "/report"):
            answer = service.http.get(place, timeout=10)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "the store does not answer" in answer.json()["detail"]
    assert service.http.get("/samples/0").status_code == 200


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    store = tmp_path_factory.mktemp("reported")
    path = tiny_bundle.publish(store)
    (path / "report.html").write_text("How good it is")
    write_checksums(path)
    with Server(store, tmp_path_factory.mktemp("log") / "log") as running:
        yield running.wait_ready()


@pytest.mark.parametrize("place", ["/", "/docs", "/report", "/samples/0", "/page/page.js"])
def test_a_browser_is_told_to_run_and_fetch_nothing_else(reported, place):
    answer = reported.http.get(place)
    assert answer.status_code == 200
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in answer.headers["content-security-policy"].split(";")
    )
    assert (
        policy["default-src"]
        == policy["base-uri"]
        == policy["form-action"]
        == policy["frame-ancestors"]
        == "'none'"
    )
    assert policy.get("script-src", "'none'") in ("'none'", "'self'")
    assert ("sandbox" in policy) is (place == "/report")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
