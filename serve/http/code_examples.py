"""Examples of requests for /docs, that can be run: curl, Python with httpx, JavaScript with fetch.

They are built from the OpenAPI description. The address is that of a local service; page/docs.js
puts in the address that the page came from, and the name of the served model.
"""

import json
from typing import Any

Json = dict[str, Any]

BASE_URL = "http://localhost:8000"
MODEL_NAME = "digits"
REQUEST_ID = "3f6b1c09a2d40000001f"
PATH_VALUES = {"name": MODEL_NAME, "index": "0", "id": REQUEST_ID}
JSON_TYPE = "application/json"


def build_code_examples(
    path: str, method: str, operation: Json, body: Json | None
) -> dict[str, str]:
    """Return the code of a request by its language. `body` is the example of a JSON body."""
    for name, value in PATH_VALUES.items():
        path = path.replace(f"{{{name}}}", value)
    url = f"{BASE_URL}{path}"
    sends_image = "image/jpeg" in operation.get("requestBody", {}).get("content", {})
    has_key = any("key" in requirement for requirement in operation.get("security", []))
    has_json = JSON_TYPE in operation["responses"]["200"]["content"]

    headers: dict[str, str] = {}
    if sends_image:
        headers["Content-Type"] = "image/jpeg"
        body = None
    elif body is not None:
        headers["Content-Type"] = JSON_TYPE
    return {
        "curl": _build_curl(url, method, headers, body, sends_image, has_key),
        "Python": _build_httpx(url, method, headers, body, sends_image, has_key, has_json),
        "JavaScript": _build_fetch(url, method, headers, body, sends_image, has_key, has_json),
    }


def _build_curl(
    url: str,
    method: str,
    headers: dict[str, str],
    body: Json | None,
    sends_image: bool,
    has_key: bool,
) -> str:
    """Return a command of a shell; the key is in the variable KEY."""
    words = ["curl -sS"]
    if method not in ("get", "post"):
        words.append(f"-X {method.upper()}")
    if has_key:
        words.append('-H "X-API-Key: $KEY"')
    words += [f'-H "{name}: {value}"' for name, value in headers.items()]
    if sends_image:
        words.append("--data-binary @photo.jpg")
    elif body is not None:
        words.append(f"-d '{json.dumps(body)}'")
    return " \\\n  ".join([" ".join(words[:2]), *words[2:], url])


def _build_httpx(
    url: str,
    method: str,
    headers: dict[str, str],
    body: Json | None,
    sends_image: bool,
    has_key: bool,
    has_json: bool,
) -> str:
    """Return a program in Python that prints the answer."""
    lines = ["import os" if has_key else "", "import httpx"]
    entries = [f'"{name}": "{value}"' for name, value in headers.items() if sends_image]
    if has_key:
        entries.insert(0, '"X-API-Key": os.environ.get("KEY", "")')
    arguments = [f'"{url}"']
    if sends_image:
        arguments.append('content=open("photo.jpg", "rb").read()')
    elif body is not None:
        arguments.append(f"json={body!r}")
    if entries:
        arguments.append(f"headers={{{', '.join(entries)}}}")
    lines += [
        "",
        f"response = httpx.{method}(",
        *(f"    {argument}," for argument in arguments),
        ")",
        "response.raise_for_status()",
        "print(response.json())" if has_json else "print(len(response.content), 'bytes')",
    ]
    return "\n".join(lines).lstrip("\n")


def _build_fetch(
    url: str,
    method: str,
    headers: dict[str, str],
    body: Json | None,
    sends_image: bool,
    has_key: bool,
    has_json: bool,
) -> str:
    """Return a program for a browser; an image is the one that its file input has."""
    entries = [f'"{name}": "{value}"' for name, value in headers.items()]
    if has_key:
        entries.insert(0, '"X-API-Key": ""')
    options = [f'method: "{method.upper()}"']
    if entries:
        options.append(f"headers: {{ {', '.join(entries)} }}")
    lines: list[str] = []
    if sends_image:
        lines.append('const [file] = document.querySelector("input[type=file]").files;')
        options.append("body: file")
    elif body is not None:
        options.append(f"body: JSON.stringify({json.dumps(body)})")
    lines += [
        f'const response = await fetch("{url}", {{',
        *(f"  {option}," for option in options),
        "});",
        "if (!response.ok) throw new Error(await response.text());",
        f"console.log(await response.{'json' if has_json else 'blob'}());",
    ]
    return "\n".join(lines)
