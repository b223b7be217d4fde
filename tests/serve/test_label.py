"""/label of a service, and `imago serve label`: the requests of the labelling page."""

import json
import os
import re
import resource
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.kept import KeptFolder, Reason, open_kept
from support import ROOT, tiny_bundle
from support.forked_commands import ForkedCommand, ForkedCommands
from support.kept_images import add_answered_image
from support.s3_server import failing_s3_server
from support.server import Server, assert_refused, wait_until

KEY = {"X-API-Key": "secret"}
OPENED: list[httpx.Client] = []


@pytest.fixture(autouse=True)
def close_clients() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


class Labeller:
    """A person at the page: the requests that its script sends."""

    def __init__(self, url: str, who: str, headers: dict[str, str] | None = None):
        self.http = httpx.Client(base_url=url, headers=headers, timeout=60)
        self.who = who
        self.command: ForkedCommand | None = None  # whose page it is
        OPENED.append(self.http)

    def items(self, **query: str) -> dict[str, Any]:
        response = self.http.get("/label/items", params={"client": self.who, **query})
        assert response.status_code == 200, response.text
        return response.json()

    def send(self, item_id: str, label: str, verdict: str = "class", **changes: object):
        entry = {"id": item_id, "verdict": verdict, "label": label, "who": self.who, **changes}
        body = {"page": self.items()["page"], "labels": [entry]}
        return self.http.post("/label/labels", json=body)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> KeptFolder:
    """Six images of three colours; the tests share the directory and its server."""
    folder = open_kept(tmp_path_factory.mktemp("kept"))
    for seed in range(6):
        colour = tiny_bundle.CLASSES[seed % 3]
        embedding = [1.0 if i == seed % 3 else 0.01 * seed for i in range(3)]
        add_answered_image(folder, seed, colour, f"request-{seed}", embedding=embedding)
    return folder


@pytest.fixture(scope="module")
def service(bundle_store, kept, serve_commands, tmp_path_factory) -> Iterator[Server]:
    flags = (
        "--keep",
        kept.location,
        "--api-key",
        "secret",
        "--keep-share",
        "0",
        "--keep-days",
        "0",
    )
    log = tmp_path_factory.mktemp("label") / "log"
    with Server(bundle_store, log, *flags, forker=serve_commands) as server:
        yield server.wait_ready()


@pytest.fixture
def ann(service) -> Labeller:
    return Labeller(service.url, "ann", KEY)


@contextmanager
def label_command(
    commands: ForkedCommands, kept: KeptFolder, env: dict[str, str | None] | None = None
) -> Iterator[Labeller]:
    """Run `imago serve label`; yields a person at its page."""
    process = commands.start("label", kept.location, "--port", "0", cwd=ROOT, env=env)
    process.wait_for("stop it with Ctrl-C")
    (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", process.text)
    labeller = Labeller(url, "ann")
    labeller.command = process
    yield labeller
    process.kill()
    process.wait()


def read_label(kept: KeptFolder, item_id: str):
    return open_kept(kept.location).read_labels().get(item_id, (None, ()))


def test_the_page_needs_the_key_and_its_files_do_not(service):
    page = service.http.get("/label")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    for path in set(re.findall(r'(?:src|href)="(label/[^"]+)"', page.text)):
        assert service.http.get(f"/{path}").status_code == 200
    for path in ("items", "images/x", "similar/x"):
        assert service.http.get(f"/label/{path}").status_code == 401
    assert service.http.post("/label/labels", json={}).status_code == 401


def test_a_service_without_a_key_has_no_labels(server):
    response = server.http.get("/label/items")
    assert response.status_code == 403
    assert "--api-key" in response.json()["detail"]


def test_images_classes_and_progress_are_listed(service, ann, kept):
    state = ann.items()
    assert state["total"] == 6
    assert state["classes"][:3] == tiny_bundle.CLASSES
    assert set(state["orders"]) == {"teach", "newest", "random"}
    item = state["items"][0]
    assert item["guesses"][0]["confidence"] == 0.5
    assert item["reasons"] == ["random"]
    image = ann.http.get(f"/label/images/{item['id']}")
    assert image.headers["content-type"] == "image/png"
    assert image.content == kept.read_file(kept.read_images()[item["id"]])
    assert ann.http.get("/label/items", params={"order": "no"}).status_code == 400
    assert ann.http.get(f"/label/images/{'0' * 64}").status_code == 404


def test_a_label_says_who_and_counts_as_feedback(service, ann, kept):
    image = next(i for i in kept.read_images().values() if i.request_id == "request-0")
    before = service.metric("imago_feedback_total", outcome="wrong")
    response = ann.send(image.digest, "green")
    saved = response.json()
    assert (saved["saved"], saved["gone"], saved["total"]) == (1, [], 6)
    assert saved["labelled"] >= 1
    label, _ = read_label(kept, image.digest)
    assert (label.label, label.who) == ("green", "ann")
    wait_until(lambda: service.metric("imago_feedback_total", outcome="wrong") == before + 1)
    assert "imago_feedback_accuracy 0.0" in service.metrics()

    ann.send(image.digest, "red")  # a changed mind is not counted again
    assert read_label(kept, image.digest)[0].label == "red"
    assert service.metric("imago_feedback_total", outcome="correct") == 0


def test_two_people_do_not_overwrite_one_another(service, ann, kept):
    bob = Labeller(service.url, "bob", KEY)
    digest = next(i.digest for i in kept.read_images().values() if i.request_id == "request-1")
    ann.send(digest, "green")
    bob.send(digest, "blue")
    label, others = read_label(kept, digest)
    assert label.label == "blue"
    assert [other.label for other in others] == ["green"]
    (shown,) = [item for item in ann.items(show="conflicts")["items"] if item["id"] == digest]
    assert shown["others"] == [{"verdict": "class", "label": "green", "who": "ann"}]

    bob.send(digest, "", "withdrawn")
    assert read_label(kept, digest)[0].label == "green"

    # Several at once: no line is torn or lost.
    people = [Labeller(service.url, f"person {i}", KEY) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda person: person.send(digest, "green"), people))
    files = Path(kept.location, "labels").iterdir()
    lines = "".join(file.read_text() for file in files).splitlines()
    assert {json.loads(line)["who"] for line in lines} >= {person.who for person in people}


def test_people_get_different_images(tmp_path, serve_commands):
    kept = open_kept(tmp_path / "kept")
    for seed in range(5):
        add_answered_image(kept, seed)
    with label_command(serve_commands, kept) as ann:
        bob = Labeller(str(ann.http.base_url), "bob")
        first = {item["id"] for item in ann.items(limit="2")["items"]}
        second = {item["id"] for item in bob.items(limit="2")["items"]}
        assert len(first | second) == 4
        # With too few images for both, the last one is better than none.
        assert len(ann.items()["items"]) == 3
        assert len(bob.items()["items"]) == 2
        assert len(Labeller(str(ann.http.base_url), "eve").items()["items"]) == 5


def test_a_class_that_the_model_lacks_is_a_new_class(ann, kept):
    digest = next(i.digest for i in kept.read_images().values() if i.request_id == "request-2")
    assert ann.send(digest, "  purple ").json()["saved"] == 1
    assert read_label(kept, digest)[0].label == "purple"
    assert "purple" in ann.items()["classes"]


def test_a_label_of_an_image_that_is_gone_is_reported(ann):
    answer = ann.send("0" * 64, "red").json()
    assert (answer["saved"], answer["gone"]) == (0, ["0" * 64])


def test_a_page_of_another_version_is_told_to_reload(ann):
    response = ann.http.post("/label/labels", json={"page": "old", "labels": []})
    assert response.status_code == 409
    assert "reload" in response.json()["detail"]


@pytest.mark.parametrize(
    "changes",
    [
        {"who": ""},
        {"who": "x" * 81},
        {"who": "line\nbreak"},
        {"label": ""},
        {"label": "x" * 201},
        {"label": "\ud800"},
        {"label": 7},
        {"verdict": "perhaps"},
        {"id": None},
    ],
)
def test_labels_that_cannot_be_used_are_refused(ann, kept, changes):
    digest = next(iter(kept.read_images()))
    entry = {"id": digest, "verdict": "class", "label": "red", "who": "ann", **changes}
    content = json.dumps({"page": ann.items()["page"], "labels": [entry]})
    headers = {"Content-Type": "application/json"}
    response = ann.http.post("/label/labels", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"labels": 1}', b"[" * 9000])
def test_malformed_bodies_are_refused(ann, body):
    headers = {"Content-Type": "application/json"}
    response = ann.http.post("/label/labels", content=body, headers=headers)
    assert response.status_code in (400, 409)


def test_forms_of_other_pages_cannot_label(ann):
    body = {"content": b"{}", "headers": {"Content-Type": "text/plain"}}
    assert ann.http.post("/label/labels", **body).status_code == 415
    other = {"Content-Type": "application/json", "Origin": "https://other.example"}
    assert ann.http.post("/label/labels", content=b"{}", headers=other).status_code == 403


def test_a_full_disk_is_reported_and_labels_are_kept_whole(service, ann, kept):
    digest = next(i.digest for i in kept.read_images().values() if i.request_id == "request-3")
    ann.send(digest, "red")
    (process,) = service.http_processes()
    limits = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        response = ann.send(digest, "blue")
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, limits)
    assert response.status_code == 503
    assert "nothing was saved" in response.json()["detail"]
    assert read_label(kept, digest)[0].label == "red"
    assert ann.send(digest, "blue").status_code == 200


def test_a_bucket_that_refuses_a_label_is_told_and_the_label_can_be_sent_again(serve_commands):
    with failing_s3_server("kept") as bucket:
        folder = open_kept("s3://kept/colours")
        add_answered_image(folder, 0, "red", "request-0", embedding=[1.0])
        env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        with label_command(serve_commands, folder, {**env}) as ann:
            (item,) = ann.items()["items"]
            entry = {"id": item["id"], "verdict": "class", "label": "green", "who": "ann"}
            body = {"page": ann.items()["page"], "labels": [entry]}

            bucket.choose_failure = lambda method, path: "denied"
            response = ann.http.post("/label/labels", json=body)
            assert response.status_code == 503
            assert "nothing was saved" in response.json()["detail"]

            bucket.choose_failure = lambda method, path: None
            assert ann.http.post("/label/labels", json=body).json()["saved"] == 1
        assert read_label(folder, item["id"])[0].label == "green"


def test_look_alikes_are_the_nearest_by_embedding(tmp_path, serve_commands):
    kept = open_kept(tmp_path / "kept")
    embeddings = {0: (1, 0), 1: (1, 0.1), 2: (1, 0.3), 3: (0, 1)}
    ids = {
        seed: add_answered_image(kept, seed, embedding=embedding).digest
        for seed, embedding in embeddings.items()
    }
    with label_command(serve_commands, kept) as ann:
        found = ann.http.get(f"/label/similar/{ids[0]}").json()["items"]
        assert [item["id"] for item in found] == [ids[1], ids[2]]
        ann.send(ids[1], "red")
        found = ann.http.get(f"/label/similar/{ids[0]}").json()["items"]
        assert [item["id"] for item in found] == [ids[2]]


def test_what_teaches_most_comes_first(tmp_path, serve_commands):
    """The most uncertain image, then an unlike one before its copies; sure ones are last."""
    kept = open_kept(tmp_path / "kept")
    uncertain = add_answered_image(kept, 0, confidence=0.45, embedding=(1, 0)).digest
    copy = add_answered_image(kept, 1, confidence=0.46, embedding=(1, 0)).digest
    unlike = add_answered_image(kept, 2, confidence=0.6, embedding=(0, 1)).digest
    newest = add_answered_image(kept, 3, confidence=1.0, embedding=(0, 1), day=1).digest
    with label_command(serve_commands, kept) as ann:
        order = [item["id"] for item in ann.items()["items"]]
        assert order[:2] == [uncertain, unlike]
        assert set(order[2:]) == {copy, newest}
        assert ann.items(order="newest")["items"][0]["id"] == newest
        assert ann.items(order="random") == ann.items(order="random")


@pytest.mark.parametrize("directory", ["empty", "missing"])
def test_the_command_refuses_a_directory_without_images(run_serve, tmp_path, directory):
    (tmp_path / "empty").mkdir()
    assert_refused(run_serve("label", str(tmp_path / directory)), "no kept images", "--keep")


def test_the_command_refuses_other_sites(tmp_path, serve_commands):
    kept = open_kept(tmp_path / "kept")
    add_answered_image(kept, reason=Reason.ABSTAIN)
    with label_command(serve_commands, kept) as ann:
        assert ann.http.get("/", follow_redirects=True).text.startswith("<!doctype html>")
        other = {"Host": "rebound.example"}
        assert ann.http.get("/label/items", headers=other).status_code == 403
        site = {"Origin": "https://other.example"}
        assert ann.http.post("/label/labels", json={}, headers=site).status_code == 403
        assert ann.http.get("/label/none").status_code == 404


HOSTILE_HEADS = {
    b"GET http://[ HTTP/1.1\r\n": 400,
    b"GET /label/items?limit=x HTTP/1.1\r\n": 400,
    b"GET /label/page/../app.py HTTP/1.1\r\n": 404,
    b"GET /label/images/%2e%2e%2f%2e%2e%2fetc%2fpasswd HTTP/1.1\r\n": 404,
    b"POST /label/labels HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n": 413,
    b"POST /label/labels HTTP/1.1\r\nContent-Length: -1\r\n": 411,
    b"POST /label/labels HTTP/1.1\r\nContent-Length: 1\r\n": 400,
}


def test_the_command_answers_hostile_requests_without_a_traceback(tmp_path, serve_commands):
    kept = open_kept(tmp_path / "kept")
    add_answered_image(kept, reason=Reason.ABSTAIN)
    with label_command(serve_commands, kept) as ann:
        address = (ann.http.base_url.host, ann.http.base_url.port)
        for head, status in HOSTILE_HEADS.items():
            headers = b"Host: localhost\r\nContent-Type: application/json\r\n\r\n"
            with socket.create_connection(address, timeout=60) as connection:
                connection.sendall(head + headers + b"{")
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(12) == b"HTTP/1.1 %d" % status, head[:80]
        assert len(ann.items()["items"]) == 1
        assert ann.command is not None
        assert "Traceback" not in ann.command.text
