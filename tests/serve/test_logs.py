"""The log of a running service on stderr."""

import base64
import json

from support import tiny_bundle


def test_json_lines_have_requests_but_no_images(start):
    server = start("--access-log", "true")
    image = tiny_bundle.make_image("red")
    encoded = base64.b64encode(image).decode()
    ids = [
        server.predict(image).json()["id"],
        server.http.post("/predict", json={"image": encoded}).json()["id"],
        server.predict(b"no image").json()["request_id"],
    ]
    server.http.get("/a%0ab")
    assert server.stop() == 0
    text = server.log.read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    requests = [entry for entry in entries if entry.get("path") == "/predict"]
    for entry, request_id, status in zip(requests, ids, (200, 200, 415), strict=True):
        assert entry["message"] == "request"
        assert entry["request_id"] == request_id
        assert entry["method"] == "POST"
        assert entry["status"] == status
        assert entry["ms"] > 0
    assert "/a\nb" in [entry.get("path") for entry in entries]
    assert encoded[:40] not in text
    assert "PNG" not in text


def test_a_path_cannot_forge_lines_or_fields_of_a_text_log(start):
    server = start("--access-log", "true", "--log-format", "text")
    paths = ("/a%0a16:00:00%20INFO%20all%20is%20well", "/a%20status=200", "/a%e2%80%a8b")
    for path in paths:
        assert server.http.get(path).status_code == 404
    assert server.stop() == 0
    lines = [line for line in server.log.read_text().splitlines() if "/a" in line]
    assert len(lines) == len(paths)
    for line in lines:
        assert 'path="/a' in line
        assert " status=404 ms=" in line
