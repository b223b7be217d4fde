"""Schemathesis: valid and invalid requests generated from the OpenAPI, against a real server."""

import base64
from typing import Any
from urllib.parse import urljoin

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.http.openapi import OPENAPI
from support import tiny_bundle

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SCHEMA = schemathesis.openapi.from_dict(OPENAPI)
WITH_INPUT = (
    "POST /predict",
    "POST /feedback",
    "POST /v2/models/{name}/infer",
    "GET /samples/{index}",
)
OPERATIONS = {result.ok().label: result.ok() for result in SCHEMA.get_all_operations()}


def test_the_server_returns_the_openapi_description(server):
    assert server.http.get("/openapi.json").json() == OPENAPI
    assert len(OPERATIONS) >= 14


def test_generated_clients_keep_the_prefix_of_a_proxy():
    (server,) = OPENAPI["servers"]
    base = urljoin("https://example.com/imago/openapi.json", server["url"])
    assert base == "https://example.com/imago/"


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        *((label, GenerationMode.POSITIVE) for label in OPERATIONS),
        *((label, GenerationMode.NEGATIVE) for label in WITH_INPUT),
    ],
)
def test_responses_conform_to_the_openapi(server, label, mode):
    @QUICK
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    def send(case):
        case.call_and_validate(base_url=server.url, checks=CHECKS)

    send()


@pytest.mark.parametrize(
    ("path", "name"),
    [("/predict", "Images"), ("/v2/models/colours/infer", "InferRequest")],
)
def test_the_examples_are_answered(server, path, name):
    (example,) = OPENAPI["components"]["schemas"][name]["examples"]
    response = server.http.post(path, json=example)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", OPENAPI["components"]["schemas"])
def test_examples_fit_their_schemas(name):
    schemas = OPENAPI["components"]["schemas"]
    validator = Draft202012Validator({**schemas[name], "components": {"schemas": schemas}})
    for example in schemas[name].get("examples", []):
        validator.validate(example)


@pytest.mark.parametrize(
    "query", ["", "?explain=cam&top_k=2&embedding=true", "?explain=cam&embedding=base64"]
)
@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data", "application/json"])
def test_responses_to_images_conform_to_the_openapi(server, query, kind):
    """Generated bodies are almost never images."""
    image = tiny_bundle.make_image("red")
    bodies: dict[str, dict[str, Any]] = {
        "image/png": {"content": image, "headers": {"Content-Type": kind}},
        "multipart/form-data": {"files": [("file", ("a", image)), ("file", ("b", b"no image"))]},
        "application/json": {"json": {"image": base64.b64encode(image).decode()}},
    }
    request = server.http.build_request("POST", f"/predict{query}", **bodies[kind])
    request.read()
    response = server.http.send(request)
    assert response.status_code == 200
    SCHEMA["/predict"]["POST"].validate_response(response)
    for name in ("cam", "embedding"):
        assert (name in response.json()["predictions"][0]) == bool(query)
