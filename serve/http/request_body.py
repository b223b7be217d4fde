"""A request's body to images: raw bytes, multipart without a form parser, or JSON with base64."""

import binascii
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from serve.http.responses import Problem

BOUNDARY = re.compile(rb'boundary=(?:"([^"\r\n]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
FILE = re.compile(rb"^content-disposition:.*;\s*filename\*?=", re.IGNORECASE | re.MULTILINE)
MAX_PART_HEAD = 8192  # bytes of the headers of one part
FEW = 64  # objects, lists or fields, more than any request has besides its images


async def read(
    receive: Callable[[], Awaitable[dict]], limit: int, grew: Callable[[int], None] | None = None
) -> bytes:
    """The whole body, counted as it comes: `grew` hears the bytes so far. Raises Problem 413 beyond the limit, what
    `grew` raises, and ConnectionError when the client left."""
    message = await receive()
    body = message.get("body", b"")
    if not message.get("more_body") and message["type"] == "http.request" and len(body) <= limit:
        return body
    parts, size = [], 0
    while True:
        if message["type"] != "http.request":
            raise ConnectionError("the client left")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise Problem(
                413, f"the body is larger than the {limit} bytes allowed", "body", close=True
            )
        if grew is not None:
            grew(size)
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


def images(body: bytes, content_type: bytes, limit: int) -> Sequence[bytes | Problem]:
    """The images of a body, or what is wrong with one of many.

    Raises Problem 400 where the body is malformed or has no image, 413 for too many images, 415 for other types.
    """
    found: Sequence[bytes | Problem]
    kind = content_type.split(b";", 1)[0].strip().lower()
    if kind.startswith(b"image/") or kind == b"application/octet-stream":
        found = [body]
    elif kind == b"multipart/form-data":
        found = parts(body, content_type, limit)
    elif kind == b"application/json":
        found = from_json(body, limit)
    else:
        raise Problem(
            415,
            "send one image as image/*, many as multipart/form-data, or JSON with base64 images",
        )
    if any(image and not isinstance(image, Problem) for image in found):
        return found
    raise next(
        (image for image in found if isinstance(image, Problem)),
        Problem(400, "there is no image in the body"),
    )


def parts(body: bytes, content_type: bytes, limit: int) -> list[bytes]:
    """The files of a multipart/form-data body (RFC 7578), in order; fields that are no files are passed over."""
    match = BOUNDARY.search(content_type)
    if not match:
        raise Problem(400, "multipart/form-data without a boundary")
    dash = b"--" + (match[1] or match[2])
    if not body.startswith(dash):
        raise Problem(400, "the multipart body does not begin with its boundary")
    found, at, delimiter = list[bytes](), len(dash), b"\r\n" + dash
    for _ in range(limit + FEW + 1):
        if body.startswith(b"--", at):
            return found
        if not body.startswith(b"\r\n", at):
            raise Problem(400, "the multipart body is malformed after a boundary")
        head_end = body.find(b"\r\n\r\n", at, at + MAX_PART_HEAD)
        end = body.find(delimiter, head_end + 2) if head_end >= 0 else -1
        if end < 0:
            raise Problem(400, "the multipart body ends before its closing boundary")
        if FILE.search(body, at, head_end):
            if len(found) == limit:
                raise Problem(413, f"more than the {limit} images allowed in one request", "images")
            found.append(body[head_end + 4 : end])
        at = end + len(delimiter)
    raise Problem(
        413, f"the multipart body has more than {FEW} fields besides its images", "images"
    )


def load(text: bytes, lists: int, commas: int) -> Any:
    """JSON that is no larger in memory than its images need. Raises Problem 400, 413.

    Counted before it is parsed: `{},` a million times would be 70 MB, and hold up all other requests meanwhile.
    """
    if text.count(b"{") > FEW or text.count(b"[") > lists:
        raise Problem(400, "the JSON has more objects or lists than images need")
    if text.count(b",") > commas:
        raise Problem(
            413, "the JSON has more values than the images allowed in one request need", "images"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "the body is not JSON") from error


def from_base64(text: str) -> bytes:
    """Strict but for line breaks, which MIME asks for (RFC 2045). Raises ValueError."""
    return binascii.a2b_base64(text.replace("\n", "").replace("\r", ""), strict_mode=True)


def from_json(body: bytes, limit: int) -> list[bytes | Problem]:
    """`{"image": "<base64>"}` or `{"images": ["<base64>", ...]}`; a data: URL is as good as its base64."""
    value = load(body, lists=FEW, commas=2 * limit + FEW)  # a data: URL has a comma of its own
    if not isinstance(value, dict) or ("image" in value) == ("images" in value):
        raise Problem(400, 'send {"image": "<base64>"} or {"images": ["<base64>", ...]}')
    texts = value["images"] if "images" in value else [value["image"]]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Problem(400, "images must be strings of base64")
    if len(texts) > limit:
        raise Problem(413, f"more than the {limit} images allowed in one request", "images")
    found = list[bytes | Problem]()
    for text in texts:
        try:
            found.append(from_base64(text.rpartition("base64,")[2]))
        except ValueError:
            found.append(Problem(400, "the image is not valid base64"))
    return found
