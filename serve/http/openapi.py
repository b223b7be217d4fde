"""The OpenAPI description of the service, and /docs, the same as a page.

It is written by hand: the service answers requests without the routes from which a framework would
generate it. `tests/serve/test_openapi.py` checks it against a running server. Runs in HTTP
processes.
"""

import json
from html import escape
from typing import Any

from serve.http.code_examples import build_code_examples
from serve.http.responses import Header, Request, Response

Json = dict[str, Any]

STATUS_DESCRIPTIONS = {
    400: "The request is malformed.",
    401: "The API key is missing or wrong.",
    403: "A web page of another origin sent the request, or the path needs a service with a key.",
    404: "The path, model, sample or answer does not exist.",
    405: "The path does not support this method.",
    408: "The request did not arrive in time.",
    413: "The request has too many bytes, pixels or images.",
    415: "The media type or image format is not supported.",
    422: "The image can't be decoded, takes too long, or crashes a worker.",
    429: "Too many images are waiting. Try again after the seconds in Retry-After.",
    431: "The head of the request is too large.",
    500: "The service failed on this request.",
    503: "The service is not ready, or it is shutting down.",
    504: "No answer was available before the deadline.",
}
# Errors of a request as a whole.
REQUEST_ERRORS = (401, 403, 408, 429, 431)
# Errors of a request, or of all of its images. In the second case each image has its own error.
IMAGE_ERRORS = (400, 413, 415, 422, 500, 503, 504)

JSON_TYPE = "application/json"
PROBLEM_TYPE = "application/problem+json"
BINARY_TYPE = "application/octet-stream"

STRING: Json = {"type": "string"}
NUMBER: Json = {"type": "number"}
INTEGER: Json = {"type": "integer"}
BOOLEAN: Json = {"type": "boolean"}
OBJECT: Json = {"type": "object"}
BASE64: Json = {"type": "string", "format": "byte"}
BINARY: Json = {"type": "string", "format": "binary"}


def _object(properties: Json, required: list[str] | None = None) -> Json:
    """Return the schema of an object. All properties are required unless `required` names some."""
    if required is None:
        required = list(properties)
    return {"type": "object", "properties": properties, "required": required}


def _array(items: Json, **bounds: int) -> Json:
    return {"type": "array", **bounds, "items": items}


def _reference(schema: str) -> Json:
    return {"$ref": f"#/components/schemas/{schema}"}


def _content(schema: Json, media_type: str = JSON_TYPE) -> Json:
    return {media_type: {"schema": schema}}


def _response(description: str, schema: str, media_type: str = JSON_TYPE) -> Json:
    return {"description": description, "content": _content(_reference(schema), media_type)}


def _problems(*statuses: int) -> Json:
    """Return the responses of errors as problem+json."""
    return {
        str(status): _response(STATUS_DESCRIPTIONS[status], "Problem", PROBLEM_TYPE)
        for status in statuses
    }


def _image_problems(*statuses: int) -> Json:
    """Return the responses of errors as problem+json, or as an answer with one error per image."""
    responses = _problems(*statuses)
    for response in responses.values():
        response["content"] |= _content(_reference("Answer"))
    return responses


def _inference_errors(*statuses: int) -> Json:
    """Return the responses of errors as the Open Inference Protocol has them."""
    return {
        str(status): _response(STATUS_DESCRIPTIONS[status], "InferError") for status in statuses
    }


CHOICE_PROPERTIES: Json = {
    "label": STRING,
    "index": INTEGER,
    "confidence": {"type": "number", "minimum": 0, "maximum": 1},
}
PREDICTION_PROPERTIES: Json = {
    **CHOICE_PROPERTIES,
    "top": _array(_reference("Choice")),
    "prediction_set": {
        **_array(STRING),
        "description": "classes that together contain the true one with the probability "
        "conformal_level of the bundle",
    },
    "abstain": {**BOOLEAN, "description": "the confidence is below the bundle's threshold"},
    "out_of_distribution": {
        **BOOLEAN,
        "description": "the energy is above the bundle's threshold",
    },
    "energy": {
        **NUMBER,
        "description": "-logsumexp of the logits; high for images unlike the training data",
    },
}
CAM_PROPERTY: Json = {
    **BASE64,
    "contentMediaType": "image/png",
    "contentEncoding": "base64",
    "description": "with explain=cam: class-activation map of the label as a gray PNG that covers "
    "the input of the network; 255 marks the strongest activation",
}
EMBEDDING_PROPERTY: Json = {
    "anyOf": [_array(NUMBER), BASE64],
    "description": "with embedding=true: the features before the last layer, as numbers; with "
    "embedding=base64: the same as little-endian float16 in base64",
}
OUTPUT_PARAMETERS: Json = {
    "type": "object",
    "properties": {
        "binary_data": {**BOOLEAN, "description": "send the output after the JSON, in binary"},
        "classification": {
            "type": "integer",
            "minimum": 0,
            "description": "of probabilities: send this many of the most likely classes instead, "
            "each as the text <probability>:<index>:<label>",
        },
    },
}
SCHEMAS: Json = {
    "Problem": _object(
        {
            "type": STRING,
            "title": STRING,
            "status": INTEGER,
            "detail": STRING,
            "request_id": STRING,
        }
    ),
    "Choice": _object(CHOICE_PROPERTIES),
    "Prediction": _object(
        {
            **PREDICTION_PROPERTIES,
            "cam": CAM_PROPERTY,
            "embedding": EMBEDDING_PROPERTY,
        },
        required=list(PREDICTION_PROPERTIES),
    ),
    "ImageError": _object(
        {"error": _object({"title": STRING, "status": INTEGER, "detail": STRING})}
    ),
    "Answer": _object(
        {
            "id": STRING,
            "model": _object({"name": STRING, "version": STRING}),
            "predictions": _array({"anyOf": [_reference("Prediction"), _reference("ImageError")]}),
        }
    ),
    "Status": _object({"status": STRING}),
    "Model": _object(
        {
            "name": STRING,
            "version": STRING,
            "classes": _array(STRING),
            "keeps_images": {**BOOLEAN, "description": "a sample of the images is stored"},
        }
    ),
    "Feedback": _object(
        {
            "id": {**STRING, "description": "id of the answer"},
            "label": {**STRING, "description": "the true class"},
            "image": {
                "type": "integer",
                "minimum": 0,
                "maximum": 65535,
                "default": 0,
                "description": "position of the image in the request",
            },
        },
        required=["id", "label"],
    ),
    "Deleted": _object({"deleted": INTEGER}),
    "FeedbackResult": _object({"id": STRING, "image": INTEGER, "correct": BOOLEAN}),
    "Tensor": _object(
        {
            "name": STRING,
            "datatype": {"enum": ["UINT8", "FP32", "BYTES"]},
            "shape": _array(INTEGER),
            "data": _array({}),
            "parameters": OBJECT,
        },
        required=["name", "datatype", "shape"],
    ),
    "InferRequest": _object(
        {
            "id": STRING,
            "inputs": _array(_reference("Tensor"), minItems=1, maxItems=1),
            "outputs": _array(
                _object({"name": STRING, "parameters": OUTPUT_PARAMETERS}, required=["name"])
            ),
            "parameters": OBJECT,
        },
        required=["inputs"],
    ),
    "InferAnswer": _object(
        {
            "id": STRING,
            "model_name": STRING,
            "model_version": STRING,
            "outputs": _array(_reference("Tensor")),
        },
        required=["model_name", "model_version", "outputs"],
    ),
    "InferError": _object({"error": STRING}),
    "Object": OBJECT,
    "Images": {"oneOf": [_object({"image": BASE64}), _object({"images": _array(BASE64)})]},
}

# A PNG file of one red pixel.
TINY_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
)
CHOICE_EXAMPLES: list[Json] = [
    {"label": "7", "index": 7, "confidence": 0.98},
    {"label": "1", "index": 1, "confidence": 0.02},
]
# Schemas get their examples here, so that the description and /docs show the same ones.
EXAMPLES: Json = {
    "Images": {"image": TINY_IMAGE},
    "Answer": {
        "id": "3f6b1c09a2d40000001f",
        "model": {"name": "digits", "version": "3"},
        "predictions": [
            {
                **CHOICE_EXAMPLES[0],
                "top": CHOICE_EXAMPLES,
                "prediction_set": ["7"],
                "abstain": False,
                "out_of_distribution": False,
                "energy": -9.1,
            }
        ],
    },
    "Problem": {
        "type": "about:blank",
        "title": "Unprocessable Content",
        "status": 422,
        "detail": "the image is cut short or damaged",
        "request_id": "3f6b1c09a2d40000001f",
    },
    "Status": {"status": "ready"},
    "Model": {"name": "digits", "version": "3", "classes": ["1", "7"], "keeps_images": False},
    "Feedback": {"id": "3f6b1c09a2d40000001f", "label": "7", "image": 0},
    "FeedbackResult": {"id": "3f6b1c09a2d40000001f", "image": 0, "correct": True},
    "InferRequest": {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [TINY_IMAGE]}],
        "outputs": [{"name": "probabilities", "parameters": {"classification": 2}}],
    },
    "InferAnswer": {
        "model_name": "digits",
        "model_version": "3",
        "outputs": [
            {
                "name": "probabilities",
                "datatype": "BYTES",
                "shape": [1, 2],
                "data": ["0.980000:7:7", "0.020000:1:1"],
            }
        ],
    },
    "InferError": {"error": "there must be one input, named image"},
}
for _name, _example in EXAMPLES.items():
    SCHEMAS[_name]["examples"] = [_example]

API_KEY: list[Json] = [{}, {"key": []}]  # optional: the service may run without a key

PREDICT: Json = {
    "summary": "Classify one image or many",
    "operationId": "predict",
    "security": API_KEY,
    "parameters": [
        {
            "name": "top_k",
            "in": "query",
            "description": "number of classes to list",
            "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5},
        },
        {
            "name": "explain",
            "in": "query",
            "description": "cam adds a class-activation map",
            "schema": {"type": "string", "enum": ["cam"]},
        },
        {
            "name": "embedding",
            "in": "query",
            "description": "true adds the features before the last layer as numbers; base64 as "
            "little-endian float16 in base64, a quarter of the bytes",
            "schema": {"type": "string", "enum": ["true", "base64", "false"], "default": "false"},
        },
        {
            "name": "X-Request-ID",
            "in": "header",
            "description": "id of the request, returned in the answer; generated if absent",
            "schema": {"type": "string", "maxLength": 128},
        },
    ],
    "requestBody": {
        "required": True,
        "content": {
            **_content(BINARY, "image/jpeg"),
            **_content(BINARY, "image/png"),
            **_content(BINARY, "image/*"),
            **_content(_object({"file": _array(BINARY)}), "multipart/form-data"),
            **_content(_reference("Images")),
        },
    },
    "responses": {
        "200": _response("One prediction per image, in the order of the images.", "Answer"),
        **_problems(*REQUEST_ERRORS),
        **_image_problems(*IMAGE_ERRORS),
    },
}
MODEL: Json = {
    "summary": "Describe the served model",
    "operationId": "model",
    "security": API_KEY,
    "responses": {
        "200": _response("Name, version, classes, input and calibration of the model.", "Model"),
        **_problems(401, 403, 503),
    },
}
LIVE: Json = {
    "summary": "Liveness probe",
    "operationId": "live",
    "responses": {"200": _response("The process is alive.", "Status")},
}
READY: Json = {
    "summary": "Readiness probe",
    "operationId": "ready",
    "responses": {
        "200": _response("All workers are ready to answer.", "Status"),
        **_problems(503),
    },
}
FEEDBACK: Json = {
    "summary": "Report the true class of an image that was answered before",
    "operationId": "feedback",
    "security": API_KEY,
    "requestBody": {"required": True, "content": _content(_reference("Feedback"))},
    "responses": {
        "200": _response("The label was counted. A second one is not.", "FeedbackResult"),
        **_problems(400, 401, 403, 404, 413, 415),
    },
}
DELETE_KEPT: Json = {
    "summary": "Delete what was kept of a request: images, lines and labels",
    "operationId": "delete_kept",
    "security": [{"key": []}],
    "parameters": [
        {
            "name": "id",
            "in": "path",
            "required": True,
            "description": "id of the answer",
            "schema": {"type": "string", "minLength": 1},
        }
    ],
    "responses": {
        "200": _response("The number of images that were deleted.", "Deleted"),
        **_problems(401, 403, 404, 503),
    },
}
PAGE: Json = {
    "summary": "A page to try the model",
    "operationId": "page",
    "responses": {
        "200": {"description": "The page as HTML.", "content": _content(STRING, "text/html")}
    },
}
LABEL_PAGE: Json = {
    "summary": "A page to label kept images",
    "operationId": "label_page",
    "responses": {
        "200": {"description": "The page as HTML.", "content": _content(STRING, "text/html")}
    },
}
REPORT: Json = {
    "summary": "The report of the served model",
    "operationId": "report",
    "security": API_KEY,
    "responses": {
        "200": {"description": "The report as HTML.", "content": _content(STRING, "text/html")},
        **_problems(401, 403, 404, 500, 503),
    },
}
SAMPLE: Json = {
    "summary": "A sample image of the served model",
    "operationId": "sample",
    "security": API_KEY,
    "parameters": [
        {
            "name": "index",
            "in": "path",
            "required": True,
            "description": "position of the sample in the answer of /model",
            "schema": {"type": "integer", "minimum": 0},
        }
    ],
    "responses": {
        "200": {"description": "The image file.", "content": _content(BINARY, "image/*")},
        **_problems(401, 403, 404, 500, 503),
    },
}

MODEL_NAME: Json = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "name of the served model",
    "schema": {"type": "string", "minLength": 1},
}


def _inference_get(
    summary: str, operation_id: str, description: str, parameters: list[Json] | None = None
) -> Json:
    """Return a GET operation of the Open Inference Protocol."""
    operation: Json = {
        "summary": f"Open Inference Protocol: {summary}",
        "operationId": operation_id,
        "security": API_KEY,
        "responses": {
            "200": _response(description, "Object"),
            **_problems(401, 403),
            **_inference_errors(404),
            "503": _response(STATUS_DESCRIPTIONS[503], "Object"),
        },
    }
    if parameters:
        operation["parameters"] = parameters
    return operation


INFERENCE_LIVE: Json = {
    "summary": "Open Inference Protocol: liveness of the server",
    "operationId": "v2_live",
    "responses": {"200": _response("The server is alive.", "Object")},
}
INFERENCE_READY: Json = {
    "summary": "Open Inference Protocol: readiness of the server",
    "operationId": "v2_ready",
    "responses": {
        "200": _response("The server is ready.", "Object"),
        "503": _response("The server is not ready.", "Object"),
    },
}
INFERENCE: Json = {
    "summary": "Open Inference Protocol: probabilities, energy and label of UINT8 tensors, or of "
    "image files as BYTES; embedding and cam where outputs names them",
    "operationId": "v2_infer",
    "security": API_KEY,
    "parameters": [MODEL_NAME],
    "requestBody": {
        "required": True,
        "content": {**_content(_reference("InferRequest")), **_content(BINARY, BINARY_TYPE)},
    },
    "responses": {
        "200": {
            "description": "The requested outputs, with one row per image.",
            "content": {**_content(_reference("InferAnswer")), **_content(BINARY, BINARY_TYPE)},
        },
        **_problems(401, 403),
        **_inference_errors(400, 404, 413, 415, 422, 429, 500, 503, 504),
        **_problems(408, 431),
    },
}

PATHS: Json = {
    "/predict": {"post": PREDICT},
    "/model": {"get": MODEL},
    "/health/live": {"get": LIVE},
    "/health/ready": {"get": READY},
    "/feedback": {"post": FEEDBACK},
    "/label": {"get": LABEL_PAGE},
    "/kept/{id}": {"delete": DELETE_KEPT},
    "/": {"get": PAGE},
    "/report": {"get": REPORT},
    "/samples/{index}": {"get": SAMPLE},
    "/v2": {
        "get": _inference_get("metadata of the server", "v2", "Name and extensions of the server.")
    },
    "/v2/health/live": {"get": INFERENCE_LIVE},
    "/v2/health/ready": {"get": INFERENCE_READY},
    "/v2/models/{name}": {
        "get": _inference_get(
            "metadata of the model",
            "v2_model",
            "Versions, inputs and outputs of the model.",
            [MODEL_NAME],
        )
    },
    "/v2/models/{name}/ready": {
        "get": _inference_get(
            "readiness of the model", "v2_model_ready", "The model is ready.", [MODEL_NAME]
        )
    },
    "/v2/models/{name}/infer": {"post": INFERENCE},
}
OPENAPI: Json = {
    "openapi": "3.1.0",
    "info": {"title": "Imago", "version": "1", "description": "Image classification."},
    # Relative to this document, so that clients keep the prefix of a proxy.
    "servers": [{"url": "."}],
    "paths": PATHS,
    "components": {
        "schemas": SCHEMAS,
        "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}},
    },
}

DOCS_HEADERS: list[Header] = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    )
]
DOCS_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Imago API</title>
<link rel="icon" href="page/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="page/page.css">
<script src="page/docs.js" type="module"></script>
</head>
<body>
<header class="top">
  <h1>Imago <span class="model">API</span></h1>
  <nav aria-label="More"><a href=".">Try it</a><a href="openapi.json">openapi.json</a></nav>
</header>
<main class="docs">
<p class="options"><label>API key <input id="key" type="password" autocomplete="off"></label></p>
{operations}<h2>Schemas</h2>{schemas}</main>
</body>
</html>
"""


async def openapi(request: Request) -> Response:
    """Handle /openapi.json."""
    return Response(200, json.dumps(OPENAPI).encode())


async def docs(request: Request) -> Response:
    """Handle /docs: the OpenAPI description as HTML, with forms that send requests."""
    if request.scope["path"].endswith("/"):  # the links of the page are relative to /docs
        return Response(308, b"", headers=[(b"location", b"../docs")])
    operations: list[str] = []
    for path, methods in PATHS.items():
        for method, operation in methods.items():
            operations.append(_render_operation(path, method, operation))

    schemas: list[str] = []
    for name, schema in SCHEMAS.items():
        text = escape(json.dumps(schema, indent=1))
        schemas.append(
            f"<details class=card><summary><code>{name}</code></summary>"
            f"<pre tabindex=0>{text}</pre></details>"
        )

    html = DOCS_TEMPLATE.format(operations="".join(operations), schemas="".join(schemas))
    return Response(200, html.encode(), b"text/html; charset=utf-8", DOCS_HEADERS)


def _render_operation(path: str, method: str, operation: Json) -> str:
    """Return one operation as an HTML card: summary, body types, parameters, responses."""
    rows: list[str] = []
    for parameter in operation.get("parameters", []):
        description = parameter.get("description", parameter["schema"]["type"])
        name = f"<code>{parameter['name']}</code>"
        rows.append(_render_row(name, f"{parameter['in']}: {description}"))
    for status, response in sorted(operation["responses"].items()):
        rows.append(_render_row(f"<b>{status}</b>", response["description"]))

    body_types = ", ".join(
        f"<code>{media_type}</code>"
        for media_type in operation.get("requestBody", {}).get("content", {})
    )
    accepts = f" Accepts {body_types}." if body_types else ""
    return (
        f"<section class=card><h2><code>{method.upper()} {path}</code></h2>"
        f"<p>{escape(operation['summary'])}.{accepts}</p>"
        f"<table>{''.join(rows)}</table>"
        f"{_render_examples(operation)}{_render_code(path, method, operation)}"
        f"{_render_form(path, method, operation)}</section>"
    )


def _render_examples(operation: Json) -> str:
    """Return the examples of the body and of the answer, where their schemas have some."""
    parts: list[str] = []
    contents = {
        "body": operation.get("requestBody", {}),
        "answer": operation["responses"]["200"],
    }
    for name, described in contents.items():
        example = _find_example(described)
        if example is not None:
            text = escape(json.dumps(example, indent=1))
            parts.append(
                f"<details><summary>Example of the {name}</summary>"
                f"<pre tabindex=0>{text}</pre></details>"
            )
    return "".join(parts)


def _render_code(path: str, method: str, operation: Json) -> str:
    """Return the request in several languages."""
    body = _find_example(operation.get("requestBody", {}))
    examples = build_code_examples(path, method, operation, body)
    parts = [
        f'<h3>{language}</h3><pre class="code" tabindex="0" data-language="{language}">'
        f"{escape(code)}</pre>"
        for language, code in examples.items()
    ]
    return (
        f'<details data-code="{method} {path}"><summary>Code: {", ".join(examples)}</summary>'
        f"{''.join(parts)}</details>"
    )


def _find_example(described: Json) -> Json | None:
    """Return the first example of the JSON content of a body or response."""
    schema = described.get("content", {}).get(JSON_TYPE, {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    return EXAMPLES.get(name)


def _render_form(path: str, method: str, operation: Json) -> str:
    """Return the form to try an operation. page/docs.js sends it and shows the response."""
    fields: list[str] = []
    for parameter in operation.get("parameters", []):
        name = parameter["name"]
        fields.append(
            f'<label>{name} <input name="{name}" data-in="{parameter["in"]}" type="text"></label>'
        )

    body = operation.get("requestBody", {})
    if "image/*" in body.get("content", {}):
        fields.append('<label>Images <input type="file" multiple></label>')
    example = _find_example(body)
    if example is not None:
        text = escape(json.dumps(example, indent=1))
        fields.append(
            f'<label>JSON <textarea rows="6" spellcheck="false">{text}</textarea></label>'
        )
    return (
        f'<form data-method="{method.upper()}" data-path="{path}">{"".join(fields)}'
        f'<button type="submit">Send {method.upper()} {path}</button><output></output></form>'
    )


def _render_row(name_html: str, text: str) -> str:
    return f"<tr><th scope=row>{name_html}</th><td>{escape(text)}</td></tr>"
