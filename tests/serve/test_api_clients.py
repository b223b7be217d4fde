"""What a developer copies from /docs runs, and a typed client can be generated from the OpenAPI."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serve.http.openapi import PATHS
from support import tiny_bundle
from support.server import Server

OPERATIONS = [f"{method} {path}" for path, methods in PATHS.items() for method in methods]
# /kept needs a service with a key that keeps images, /report a bundle with a report.
NOT_RUNNABLE = ("delete /kept/{id}", "get /report")
RUNNABLE = [operation for operation in OPERATIONS if operation not in NOT_RUNNABLE]


@pytest.fixture(scope="module")
def examples(server) -> dict[str, dict[str, str]]:
    """The code of each operation by its language, as /docs shows it."""
    text = server.http.get("/docs").text
    found: dict[str, dict[str, str]] = {}
    for operation, content in re.findall(r'data-code="([^"]+)">(.*?)</details>', text, re.DOTALL):
        blocks = re.findall(r'data-language="(\w+)">(.*?)</pre>', content, re.DOTALL)
        found[operation] = {language: html.unescape(code) for language, code in blocks}
    return found


def test_every_operation_has_code_in_three_languages(examples):
    assert list(examples) == OPERATIONS
    for code in examples.values():
        assert list(code) == ["curl", "Python", "JavaScript"]


def prepare(code: str, server: Server, directory: Path) -> str:
    """Put in the address of the server, its model, and the id of an answer, as the page does."""
    (directory / "photo.jpg").write_bytes(tiny_bundle.make_image("red", kind=".jpg"))
    request_id = server.predict(tiny_bundle.make_image("red")).json()["id"]
    code = code.replace("http://localhost:8000", server.url).replace("digits", "colours")
    return code.replace("3f6b1c09a2d40000001f", request_id).replace(
        '"label": "7"', '"label": "red"'
    )


@pytest.mark.parametrize("operation", RUNNABLE)
def test_the_commands_for_curl_run(examples, server, tmp_path, operation):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = prepare(examples[operation]["curl"], server, tmp_path)
    result = subprocess.run(
        ["sh", "-c", command.replace("curl -sS", "curl -sS --fail-with-body")],
        cwd=tmp_path,
        capture_output=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout
    if operation == "post /predict":
        assert json.loads(result.stdout)["predictions"][0]["label"] == "red"


@pytest.mark.parametrize("operation", ["post /predict", "post /feedback", "get /model"])
def test_the_programs_for_httpx_run(examples, server, tmp_path, operation):
    code = prepare(examples[operation]["Python"], server, tmp_path)
    code = code.replace("'label': '7'", "'label': 'red'")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("{")


# The generator knows no images; their bytes are sent as they are.
GENERATOR_CONFIG = """content_type_overrides:
  image/jpeg: application/octet-stream
  image/png: application/octet-stream
  image/*: application/octet-stream
"""
PROGRAM = """
import sys

from imago_client import Client
from imago_client.api.default import feedback, model, predict
from imago_client.models import Answer, Feedback, FeedbackResult, ImagesType0, Model, Prediction

with Client(base_url=sys.argv[1]) as client:
    described = model.sync(client=client)
    assert isinstance(described, Model), described
    answer = predict.sync(client=client, body=ImagesType0(image=sys.argv[2]), top_k=2)
    assert isinstance(answer, Answer), answer
    prediction = answer.predictions[0]
    assert isinstance(prediction, Prediction), prediction
    sent = Feedback(id=answer.id, label=prediction.label)
    result = feedback.sync(client=client, body=sent)
    assert isinstance(result, FeedbackResult), result
    print(described.name, prediction.label, len(prediction.top), result.correct)
"""


def test_a_typed_client_is_generated_and_works(server, tmp_path):
    pytest.importorskip("openapi_python_client")
    (tmp_path / "openapi.json").write_text(server.http.get("/openapi.json").text)
    (tmp_path / "config.yaml").write_text(GENERATOR_CONFIG)
    generated = subprocess.run(
        [
            *(sys.executable, "-m", "openapi_python_client", "generate"),
            *("--path", "openapi.json", "--config", "config.yaml"),
            *("--output-path", "imago_client", "--meta", "none"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert generated.returncode == 0, generated.stdout + generated.stderr
    assert "warning" not in generated.stdout.lower(), generated.stdout

    image = base64.b64encode(tiny_bundle.make_image("red")).decode()
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, server.url, image],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["colours", "red", "2", "True"]
