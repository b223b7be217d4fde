"""/openapi.json and /docs: what the service answers, told from here, since LitServe's routes are not what is served."""
import json

from serve.responses import Request, Response

ERRORS = {
    400: "The request is malformed.", 401: "The API key is missing or wrong.", 413: "Too many bytes, pixels or images.",
    415: "Not a media type or image format that is taken.", 422: "The image can't be decoded.",
    429: "Too many images are waiting; try again after Retry-After seconds.",
    503: "Not ready, or shutting down.", 504: "No answer before the deadline.",
}


def _schema(properties: dict, required: list[str] | None = None) -> dict:
    return {"type": "object", "properties": properties, "required": required or list(properties)}


_TEXT, _NUMBER, _INTEGER, _FLAG = ({"type": t} for t in ("string", "number", "integer", "boolean"))
_CHOICE = {"label": _TEXT, "index": _INTEGER, "confidence": {"type": "number", "minimum": 0, "maximum": 1}}
SCHEMAS = {
    "Problem": _schema({"type": _TEXT, "title": _TEXT, "status": _INTEGER, "detail": _TEXT, "request_id": _TEXT}),
    "Choice": _schema(_CHOICE),
    "Prediction": _schema({
        **_CHOICE, "top": {"type": "array", "items": {"$ref": "#/components/schemas/Choice"}},
        "prediction_set": {"type": "array", "items": _TEXT}, "abstain": _FLAG, "out_of_distribution": _FLAG,
        "energy": _NUMBER}),
    "ImageError": _schema({"error": _schema({"title": _TEXT, "status": _INTEGER, "detail": _TEXT})}),
    "Answer": _schema({
        "id": _TEXT, "model": _schema({"name": _TEXT, "version": _TEXT}),
        "predictions": {"type": "array", "items": {"anyOf": [
            {"$ref": "#/components/schemas/Prediction"}, {"$ref": "#/components/schemas/ImageError"}]}}}),
    "Status": _schema({"status": _TEXT}),
    "Model": {"type": "object", "properties": {"name": _TEXT, "version": _TEXT, "classes": {
        "type": "array", "items": _TEXT}}, "required": ["name", "version", "classes"]},
    "Images": {"oneOf": [_schema({"image": {"type": "string", "format": "byte"}}),
                         _schema({"images": {"type": "array", "items": {"type": "string", "format": "byte"}}})]},
}


def _answer(description: str, schema: str, kind: str = "application/json") -> dict:
    return {"description": description, "content": {kind: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


def _problems(*statuses: int) -> dict:
    return {str(s): _answer(ERRORS[s], "Problem", "application/problem+json") for s in statuses}


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_MULTIPART = {"schema": _schema({"file": {"type": "array", "items": {"type": "string", "format": "binary"}}})}
PATHS = {
    "/predict": {"post": {
        "summary": "Classify one image or many", "operationId": "predict", "security": [{}, {"key": []}],
        "parameters": [
            {"name": "top_k", "in": "query", "description": "how many classes to list",
             "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5}},
            {"name": "explain", "in": "query", "description": "cam: also where the network looked",
             "schema": {"type": "string", "enum": ["cam"]}},
            {"name": "X-Request-ID", "in": "header", "schema": {"type": "string", "maxLength": 128}}],
        "requestBody": {"required": True, "content": {
            "image/jpeg": _BINARY, "image/png": _BINARY, "image/*": _BINARY,
            "multipart/form-data": _MULTIPART,
            "application/json": {"schema": {"$ref": "#/components/schemas/Images"}}}},
        "responses": {"200": _answer("One prediction an image, in their order.", "Answer"), **_problems(*ERRORS)}}},
    "/model": {"get": {"summary": "What is served", "operationId": "model", "responses": {
        "200": _answer("Name, version, classes, input, calibration.", "Model"), **_problems(503)}}},
    "/health/live": {"get": {"summary": "Is the process alive", "operationId": "live", "responses": {
        "200": _answer("It is.", "Status")}}},
    "/health/ready": {"get": {"summary": "Can it answer", "operationId": "ready", "responses": {
        "200": _answer("It can.", "Status"), **_problems(503)}}},
}
OPENAPI = {
    "openapi": "3.1.0",
    "info": {"title": "Imago", "version": "1", "description": "Image classification."},
    "paths": PATHS,
    "components": {"schemas": SCHEMAS,
                   "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}},
}


async def openapi(request: Request) -> Response:
    return Response(200, json.dumps(OPENAPI).encode())


async def page(request: Request) -> Response:
    """The same for people: rendered here, without a script or a foreign host."""
    sections = []
    for path, methods in PATHS.items():
        for method, operation in methods.items():
            takes = ", ".join(operation.get("requestBody", {}).get("content", {}))
            parameters = "".join(f"<li><code>{p['name']}</code> ({p['in']}) {p.get('description', '')}</li>"
                                 for p in operation.get("parameters", []))
            answers = "".join(f"<li><b>{code}</b> {answer['description']}</li>"
                              for code, answer in operation["responses"].items())
            sections.append(f"<h2><code>{method.upper()} {path}</code></h2><p>{operation['summary']}."
                            f"{f' Takes {takes}.' if takes else ''}</p><ul>{parameters}</ul><ul>{answers}</ul>")
    schemas = f"<pre>{json.dumps(SCHEMAS, indent=1)}</pre>"
    html = ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            "<title>Imago API</title><style>body{font:16px/1.5 system-ui;max-width:50rem;margin:2rem auto;"
            "padding:0 1rem;color-scheme:light dark}pre{overflow:auto}</style><h1>Imago API</h1>"
            f'<p><a href="/openapi.json">openapi.json</a></p>{"".join(sections)}<h2>Schemas</h2>{schemas}</html>')
    return Response(200, html.encode(), b"text/html; charset=utf-8")
