"""/openapi.json and /docs: what the service answers, told from here, since LitServe's routes are not what is served."""

import json
from html import escape

from serve.http.responses import Request, Response

ERRORS = {
    400: "The request is malformed.",
    401: "The API key is missing or wrong.",
    413: "Too many bytes, pixels or images.",
    415: "Not a media type or image format that is taken.",
    422: "The image can't be decoded.",
    429: "Too many images are waiting; try again after Retry-After seconds.",
    503: "Not ready, or shutting down.",
    504: "No answer before the deadline.",
    404: "There is no such thing.",
    405: "The path does not take this method.",
    408: "The request did not arrive in time.",
    431: "The head of the request is too large.",
    500: "The service failed on this request.",
}
REQUEST_ERRORS = (401, 408, 429, 431)
IMAGE_ERRORS = (
    400,
    413,
    415,
    422,
    500,
    503,
    504,
)  # of a request, or of all its images, each then told in its place


def _schema(properties: dict, required: list[str] | None = None) -> dict:
    return {"type": "object", "properties": properties, "required": required or list(properties)}


_TEXT, _NUMBER, _INTEGER, _FLAG = ({"type": t} for t in ("string", "number", "integer", "boolean"))
_CHOICE = {
    "label": _TEXT,
    "index": _INTEGER,
    "confidence": {"type": "number", "minimum": 0, "maximum": 1},
}
SCHEMAS = {
    "Problem": _schema(
        {"type": _TEXT, "title": _TEXT, "status": _INTEGER, "detail": _TEXT, "request_id": _TEXT}
    ),
    "Choice": _schema(_CHOICE),
    "Prediction": _schema(
        {
            **_CHOICE,
            "top": {"type": "array", "items": {"$ref": "#/components/schemas/Choice"}},
            "prediction_set": {
                "type": "array",
                "items": _TEXT,
                "description": "holds the true class as often as the bundle's conformal_level says",
            },
            "abstain": {**_FLAG, "description": "the confidence is below the bundle's threshold"},
            "out_of_distribution": {
                **_FLAG,
                "description": "the energy is above the bundle's threshold",
            },
            "energy": {
                **_NUMBER,
                "description": "-logsumexp of the logits: high for images unlike the training data",
            },
            "cam": {
                "type": "string",
                "format": "byte",
                "contentMediaType": "image/png",
                "contentEncoding": "base64",
                "description": "with explain=cam: class activation map of the label, a gray PNG over what the network "
                "saw; 255 where most spoke for it",
            },
        },
        [*_CHOICE, "top", "prediction_set", "abstain", "out_of_distribution", "energy"],
    ),
    "ImageError": _schema(
        {"error": _schema({"title": _TEXT, "status": _INTEGER, "detail": _TEXT})}
    ),
    "Answer": _schema(
        {
            "id": _TEXT,
            "model": _schema({"name": _TEXT, "version": _TEXT}),
            "predictions": {
                "type": "array",
                "items": {
                    "anyOf": [
                        {"$ref": "#/components/schemas/Prediction"},
                        {"$ref": "#/components/schemas/ImageError"},
                    ]
                },
            },
        }
    ),
    "Status": _schema({"status": _TEXT}),
    "Model": {
        "type": "object",
        "properties": {
            "name": _TEXT,
            "version": _TEXT,
            "classes": {"type": "array", "items": _TEXT},
        },
        "required": ["name", "version", "classes"],
    },
    "Feedback": {
        **_schema(
            {
                "id": {**_TEXT, "description": "the answer's id"},
                "label": {**_TEXT, "description": "the true class"},
                "image": {
                    "type": "integer",
                    "minimum": 0,
                    "maximum": 65535,
                    "default": 0,
                    "description": "its place in the request",
                },
            },
            ["id", "label"],
        )
    },
    "FeedbackResult": _schema({"id": _TEXT, "image": _INTEGER, "correct": _FLAG}),
    "Tensor": _schema(
        {
            "name": _TEXT,
            "datatype": {"enum": ["UINT8", "FP32", "BYTES"]},
            "shape": {"type": "array", "items": _INTEGER},
            "data": {"type": "array"},
            "parameters": {"type": "object"},
        },
        ["name", "datatype", "shape"],
    ),
    "InferRequest": _schema(
        {
            "id": _TEXT,
            "inputs": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1,
                "items": {"$ref": "#/components/schemas/Tensor"},
            },
            "outputs": {"type": "array", "items": _schema({"name": _TEXT})},
            "parameters": {"type": "object"},
        },
        ["inputs"],
    ),
    "InferAnswer": _schema(
        {
            "id": _TEXT,
            "model_name": _TEXT,
            "model_version": _TEXT,
            "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}},
        },
        ["model_name", "model_version", "outputs"],
    ),
    "InferError": _schema({"error": _TEXT}),
    "Object": {"type": "object"},
    "Images": {
        "oneOf": [
            _schema({"image": {"type": "string", "format": "byte"}}),
            _schema({"images": {"type": "array", "items": {"type": "string", "format": "byte"}}}),
        ]
    },
}


def _answer(description: str, schema: str, kind: str = "application/json") -> dict:
    return {
        "description": description,
        "content": {kind: {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }


def _problems(*statuses: int) -> dict:
    return {str(s): _answer(ERRORS[s], "Problem", "application/problem+json") for s in statuses}


def _failures(*statuses: int) -> dict:
    found = _problems(*statuses)
    for answer in found.values():
        answer["content"]["application/json"] = {"schema": {"$ref": "#/components/schemas/Answer"}}
    return found


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_MULTIPART = {
    "schema": _schema({"file": {"type": "array", "items": {"type": "string", "format": "binary"}}})
}
_HTML = {"description": "HTML.", "content": {"text/html": {"schema": _TEXT}}}
_NAME = {
    "name": "name",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "minLength": 1},
}
_V2 = {
    "security": [{}, {"key": []}],
    "responses": {
        "200": _answer("It is so.", "Object"),
        "401": _answer(ERRORS[401], "Problem", "application/problem+json"),
        "404": _answer(ERRORS[404], "InferError"),
        "503": _answer(ERRORS[503], "Object"),
    },
}
PATHS = {
    "/predict": {
        "post": {
            "summary": "Classify one image or many",
            "operationId": "predict",
            "security": [{}, {"key": []}],
            "parameters": [
                {
                    "name": "top_k",
                    "in": "query",
                    "description": "how many classes to list",
                    "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5},
                },
                {
                    "name": "explain",
                    "in": "query",
                    "description": "cam: also where the network looked",
                    "schema": {"type": "string", "enum": ["cam"]},
                },
                {
                    "name": "X-Request-ID",
                    "in": "header",
                    "schema": {"type": "string", "maxLength": 128},
                },
            ],
            "requestBody": {
                "required": True,
                "content": {
                    "image/jpeg": _BINARY,
                    "image/png": _BINARY,
                    "image/*": _BINARY,
                    "multipart/form-data": _MULTIPART,
                    "application/json": {"schema": {"$ref": "#/components/schemas/Images"}},
                },
            },
            "responses": {
                "200": _answer("One prediction an image, in their order.", "Answer"),
                **_problems(*REQUEST_ERRORS),
                **_failures(*IMAGE_ERRORS),
            },
        }
    },
    "/model": {
        "get": {
            "summary": "What is served",
            "operationId": "model",
            "responses": {
                "200": _answer("Name, version, classes, input, calibration.", "Model"),
                **_problems(503),
            },
        }
    },
    "/health/live": {
        "get": {
            "summary": "Is the process alive",
            "operationId": "live",
            "responses": {"200": _answer("It is.", "Status")},
        }
    },
    "/health/ready": {
        "get": {
            "summary": "Can it answer",
            "operationId": "ready",
            "responses": {"200": _answer("It can.", "Status"), **_problems(503)},
        }
    },
    "/feedback": {
        "post": {
            "summary": "Tell the true class of an image answered before",
            "operationId": "feedback",
            "security": [{}, {"key": []}],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/Feedback"}}
                },
            },
            "responses": {
                "200": _answer("It is counted, once.", "FeedbackResult"),
                **_problems(400, 401, 404, 413),
            },
        }
    },
    "/": {"get": {"summary": "The page", "operationId": "page", "responses": {"200": _HTML}}},
    "/report": {
        "get": {
            "summary": "The model's report",
            "operationId": "report",
            "responses": {"200": _HTML, **_problems(404, 503)},
        }
    },
    "/samples/{index}": {
        "get": {
            "summary": "A sample image of the model",
            "operationId": "sample",
            "parameters": [
                {
                    "name": "index",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "integer", "minimum": 0},
                }
            ],
            "responses": {
                "200": {"description": "The file.", "content": {"image/*": _BINARY}},
                **_problems(404, 503),
            },
        }
    },
    "/v2": {"get": {"summary": "Open Inference Protocol: the server", "operationId": "v2", **_V2}},
    "/v2/health/live": {
        "get": {
            "summary": "Open Inference Protocol: alive",
            "operationId": "v2_live",
            "responses": {"200": _answer("It is.", "Object")},
        }
    },
    "/v2/health/ready": {
        "get": {
            "summary": "Open Inference Protocol: ready",
            "operationId": "v2_ready",
            "responses": {
                "200": _answer("It is.", "Object"),
                "503": _answer("It is not.", "Object"),
            },
        }
    },
    "/v2/models/{name}": {
        "get": {
            "summary": "Open Inference Protocol: inputs and outputs",
            "operationId": "v2_model",
            "parameters": [_NAME],
            **_V2,
        }
    },
    "/v2/models/{name}/ready": {
        "get": {
            "summary": "Open Inference Protocol: is the model ready",
            "operationId": "v2_model_ready",
            "parameters": [_NAME],
            **_V2,
        }
    },
    "/v2/models/{name}/infer": {
        "post": {
            "summary": "Open Inference Protocol: UINT8 tensors or BYTES of image files to probabilities, energy and label",
            "operationId": "v2_infer",
            "security": [{}, {"key": []}],
            "parameters": [_NAME],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
                    "application/octet-stream": _BINARY,
                },
            },
            "responses": {
                "200": {
                    "description": "One row an image.",
                    "content": {
                        "application/json": {
                            "schema": {"$ref": "#/components/schemas/InferAnswer"}
                        },
                        "application/octet-stream": _BINARY,
                    },
                },
                "401": _answer(ERRORS[401], "Problem", "application/problem+json"),
                **{
                    str(s): _answer(ERRORS[s], "InferError")
                    for s in (400, 404, 413, 415, 422, 429, 500, 503, 504)
                },
                **_problems(408, 431),
            },
        }
    },
}
OPENAPI = {
    "openapi": "3.1.0",
    "info": {"title": "Imago", "version": "1", "description": "Image classification."},
    "paths": PATHS,
    "components": {
        "schemas": SCHEMAS,
        "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}},
    },
}


async def openapi(request: Request) -> Response:
    return Response(200, json.dumps(OPENAPI).encode())


async def page(request: Request) -> Response:
    """The same for people: rendered here, without a script or a foreign host, in the style of the page at `/`."""
    operations = "".join(
        _operation(path, method, operation)
        for path, methods in PATHS.items()
        for method, operation in methods.items()
    )
    schemas = "".join(
        f"<details class=card><summary><code>{name}</code></summary>"
        f"<pre tabindex=0>{escape(json.dumps(schema, indent=1))}</pre></details>"
        for name, schema in SCHEMAS.items()
    )
    html = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Imago API</title><link rel="icon" href="page/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="page/page.css"></head>
<body><header class="top"><h1>Imago <span class="model">API</span></h1>
<nav aria-label="More"><a href=".">Try it</a><a href="openapi.json">openapi.json</a></nav></header>
<main class="docs">{operations}<h2>Schemas</h2>{schemas}</main></body></html>"""
    return Response(
        200,
        html.encode(),
        b"text/html; charset=utf-8",
        [
            (
                b"content-security-policy",
                b"default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; "
                b"form-action 'none'; frame-ancestors 'none'",
            )
        ],
    )


def _operation(path: str, method: str, operation: dict) -> str:
    takes = ", ".join(
        f"<code>{kind}</code>" for kind in operation.get("requestBody", {}).get("content", {})
    )
    rows = [
        (
            f"<code>{p['name']}</code>",
            f"{p['in']}: {escape(p.get('description', p['schema']['type']))}",
        )
        for p in operation.get("parameters", [])
    ]
    answers = sorted(operation["responses"].items())
    rows += [(f"<b>{code}</b>", escape(answer["description"])) for code, answer in answers]
    table = "".join(f"<tr><th scope=row>{name}</th><td>{text}</td></tr>" for name, text in rows)
    return (
        f"<section class=card><h2><code>{method.upper()} {path}</code></h2><p>{escape(operation['summary'])}."
        f"{f' Takes {takes}.' if takes else ''}</p><table>{table}</table></section>"
    )
