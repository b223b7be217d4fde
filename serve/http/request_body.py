"""Read the body of a request and find the images in it.

A body is the bytes of one image, multipart/form-data with one or many files, or JSON with base64
images. Used by the endpoints for predictions and feedback, in HTTP processes. All input is
untrusted: time and memory stay proportional to the size of the body.
"""

import binascii
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from serve.http.responses import Problem, Receive

MAX_PART_HEAD_BYTES = 8192
MAX_EXTRA_ELEMENTS = 64  # objects, lists or form fields that a request may have besides its images

_BOUNDARY = re.compile(rb'boundary=(?:"([^"\r\n]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
_FILE_HEADER = re.compile(rb"^content-disposition:.*;\s*filename\*?=", re.IGNORECASE | re.MULTILINE)

# The bytes of an image, or the error that replaces its prediction in the answer.
ImageOrProblem = bytes | Problem


async def read_body(
    receive: Receive,
    max_bytes: int,
    on_progress: Callable[[int], None] | None = None,
) -> bytes:
    """Return the whole body.

    `on_progress` is called with the bytes received so far and may raise to end the request. Raises
    Problem 413 for a body of more than `max_bytes`, ConnectionError if the client disconnects.
    """
    message = await receive()
    body = message.get("body", b"")
    is_complete = message["type"] == "http.request" and not message.get("more_body")
    if is_complete and len(body) <= max_bytes:
        return body

    chunks: list[bytes] = []
    size = 0
    while True:
        if message["type"] != "http.request":
            raise ConnectionError("the client disconnected")
        chunk = message.get("body", b"")
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise Problem(
                413, f"the body is larger than the {max_bytes} bytes allowed", "body", close=True
            )
        if on_progress is not None:
            on_progress(size)
        if not message.get("more_body"):
            return b"".join(chunks)
        message = await receive()


def parse_images(body: bytes, content_type: bytes, max_images: int) -> Sequence[ImageOrProblem]:
    """Return the images of a body, in order. An image that can't be read is a Problem.

    Raises Problem 400 for a malformed body or one without an image, 413 for too many images, 415
    for other content types. If no image can be read, the Problem of the first is raised.
    """
    media_type = content_type.split(b";", 1)[0].strip().lower()
    images: Sequence[ImageOrProblem]
    if media_type.startswith(b"image/") or media_type == b"application/octet-stream":
        images = [body]
    elif media_type == b"multipart/form-data":
        images = parse_multipart(body, content_type, max_images)
    elif media_type == b"application/json":
        images = parse_json(body, max_images)
    else:
        raise Problem(
            415,
            "send one image as image/*, many as multipart/form-data, or JSON with base64 images",
        )

    problems: list[Problem] = []
    for image in images:
        if isinstance(image, Problem):
            problems.append(image)
        elif image:
            return images
    if problems:
        raise problems[0]
    raise Problem(400, "there is no image in the body")


def parse_multipart(body: bytes, content_type: bytes, max_files: int) -> list[bytes]:
    """Return the files of a multipart/form-data body (RFC 7578), in order; ignore other fields.

    Raises Problem 400 for a malformed body, 413 for too many files or fields.
    """
    match = _BOUNDARY.search(content_type)
    if not match:
        raise Problem(400, "multipart/form-data without a boundary")
    boundary = b"--" + (match[1] or match[2])
    if not body.startswith(boundary):
        raise Problem(400, "the multipart body does not begin with its boundary")

    files: list[bytes] = []
    delimiter = b"\r\n" + boundary
    position = len(boundary)
    for _ in range(max_files + MAX_EXTRA_ELEMENTS + 1):
        if body.startswith(b"--", position):
            return files
        if not body.startswith(b"\r\n", position):
            raise Problem(400, "the multipart body is malformed after a boundary")

        head_end = body.find(b"\r\n\r\n", position, position + MAX_PART_HEAD_BYTES)
        part_end = body.find(delimiter, head_end + 2) if head_end >= 0 else -1
        if part_end < 0:
            raise Problem(400, "the multipart body ends before its closing boundary")

        if _FILE_HEADER.search(body, position, head_end):
            if len(files) == max_files:
                raise _too_many_images(max_files)
            files.append(body[head_end + 4 : part_end])
        position = part_end + len(delimiter)

    raise Problem(
        413,
        f"the multipart body has more than {MAX_EXTRA_ELEMENTS} fields besides its images",
        "images",
    )


def parse_json(body: bytes, max_images: int) -> list[ImageOrProblem]:
    """Return the images of `{"image": "<base64>"}` or `{"images": ["<base64>", …]}`.

    A string may also be a data: URL. Raises Problem 400 for other content, 413 for too many images.
    """
    # A data: URL contains a comma as well.
    max_commas = 2 * max_images + MAX_EXTRA_ELEMENTS
    members = load_bounded_json(body, MAX_EXTRA_ELEMENTS, max_commas)
    if not isinstance(members, dict) or ("image" in members) == ("images" in members):
        raise Problem(400, 'send {"image": "<base64>"} or {"images": ["<base64>", ...]}')

    texts = members["images"] if "images" in members else [members["image"]]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Problem(400, "images must be strings of base64")
    if len(texts) > max_images:
        raise _too_many_images(max_images)

    images: list[ImageOrProblem] = []
    for text in texts:
        try:
            images.append(decode_base64(text.rpartition("base64,")[2]))
        except ValueError:
            images.append(Problem(400, "the image is not valid base64"))
    return images


def load_bounded_json(text: bytes, max_lists: int, max_commas: int) -> Any:
    """Parse JSON whose values take no more memory than the images of a request need.

    Brackets and commas are counted before parsing: a million objects `{}` would take 70 MB and
    block all other requests. Raises Problem 400 or 413.
    """
    if text.count(b"{") > MAX_EXTRA_ELEMENTS or text.count(b"[") > max_lists:
        raise Problem(400, "the JSON has more objects or lists than images need")
    if text.count(b",") > max_commas:
        raise Problem(
            413, "the JSON has more values than the images allowed in one request need", "images"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "the body is not JSON") from error


def decode_base64(text: str) -> bytes:
    """Decode strict base64, in which line breaks are allowed as in MIME (RFC 2045).

    Raises ValueError.
    """
    return binascii.a2b_base64(text.replace("\n", "").replace("\r", ""), strict_mode=True)


def _too_many_images(max_images: int) -> Problem:
    return Problem(413, f"more than the {max_images} images allowed in one request", "images")
