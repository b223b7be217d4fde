"""Read the body of a request and find the images in it.

A body is the bytes of one image, multipart with one or many files, or JSON with base64 images. Used
by the endpoints for predictions and feedback, in HTTP processes. All input is untrusted: time and
memory stay proportional to the size of the body.
"""

import binascii
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from models.image import ImageError, read_header
from serve.http.responses import Problem, Receive

MAX_PART_HEAD_BYTES = 8192
MAX_EXTRA_ELEMENTS = 64  # objects, lists or form fields that a request may have besides its images

MULTIPART_TYPES = (b"multipart/form-data", b"multipart/mixed", b"multipart/related")

_HEADER = re.IGNORECASE | re.MULTILINE
_BOUNDARY = re.compile(rb'boundary\s*=\s*(?:"([^"\r\n]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
_LINE_END = re.compile(rb"[ \t]*(\r?\n)")
_FOLD = re.compile(rb"\r?\n[ \t]+")  # a header that continues on the next line
_FILE_NAME = re.compile(rb'^content-disposition[ \t]*:.*;\s*filename\*?\s*=\s*(?:(""))?', _HEADER)
_MEDIA_TYPE = re.compile(rb"^content-type[ \t]*:[ \t]*([^\s;]+)", _HEADER)
_TRANSFER_ENCODING = re.compile(rb"^content-transfer-encoding[ \t]*:[ \t]*([^\s;]+)", _HEADER)
_PLAIN_ENCODINGS = (b"7bit", b"8bit", b"binary")

# Base64 with the URL-safe alphabet (RFC 4648) and with line breaks, as in MIME.
_TO_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_BLANKS = b" \t\r\n"

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
    elif media_type in MULTIPART_TYPES:
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


def parse_multipart(body: bytes, content_type: bytes, max_files: int) -> list[ImageOrProblem]:
    """Return the images of a multipart body (RFC 2046, RFC 7578), in order; ignore other fields.

    Lines may end with LF alone, which is then the case in the whole body. Raises Problem 400 for a
    malformed body, 413 for too many files or fields.
    """
    match = _BOUNDARY.search(content_type)
    if not match:
        raise Problem(400, "the Content-Type has no boundary; let the HTTP library set it")
    boundary = b"--" + (match[1] or match[2])
    position = _find_first_boundary(body, boundary) + len(boundary)
    line_end = _LINE_END.match(body, position)
    newline = line_end[1] if line_end else b"\r\n"
    delimiter = newline + boundary

    images: list[ImageOrProblem] = []
    for _ in range(max_files + MAX_EXTRA_ELEMENTS + 1):
        if body.startswith(b"--", position):
            return images
        line_end = _LINE_END.match(body, position)
        if line_end is None or line_end[1] != newline:
            raise Problem(400, "the multipart body is malformed after a boundary")

        # A part without headers begins with an empty line.
        position = line_end.start(1)
        head_end = body.find(2 * newline, position, position + MAX_PART_HEAD_BYTES)
        part_end = body.find(delimiter, head_end + len(newline)) if head_end >= 0 else -1
        if part_end < 0:
            raise Problem(400, "the multipart body ends before its closing boundary")

        head = _FOLD.sub(b" ", body[position:head_end])
        content = body[head_end + 2 * len(newline) : part_end]
        if is_image_part(head, content):
            if len(images) == max_files:
                raise _too_many_images(max_files)
            images.append(decode_part(head, content, f"image {len(images) + 1}"))
        position = part_end + len(delimiter)

    raise Problem(
        413,
        f"the multipart body has more than {MAX_EXTRA_ELEMENTS} fields besides its images",
        "images",
    )


def _find_first_boundary(body: bytes, boundary: bytes) -> int:
    """Return the position of the first boundary, which text for old mailers may precede."""
    if body.startswith(boundary):
        return 0
    position = body.find(b"\n" + boundary)
    if position < 0:
        raise Problem(400, "the boundary in the Content-Type does not occur in the multipart body")
    return position + 1


def is_image_part(head: bytes, content: bytes) -> bool:
    """Whether a part is an image: by its file name, its media type or its first bytes.

    Browsers send an empty file name without content for a form in which no file was chosen.
    """
    file_name = _FILE_NAME.search(head)
    if file_name is not None:
        return bool(content) or file_name[1] is None

    match = _MEDIA_TYPE.search(head)
    media_type = match[1].lower() if match else b""
    if media_type.startswith(b"image/") or media_type == b"application/octet-stream":
        return True
    if content.startswith(b"data:image/"):
        return True
    try:
        read_header(content)
    except ImageError:
        return False
    return True


def decode_part(head: bytes, content: bytes, name: str) -> ImageOrProblem:
    """Undo the Content-Transfer-Encoding of a part; `name` is that of the part in messages."""
    match = _TRANSFER_ENCODING.search(head)
    encoding = match[1].lower() if match else b""
    if encoding == b"base64" or content.startswith(b"data:image/"):
        return decode_base64_image(content.decode("latin-1"), name)
    if encoding == b"quoted-printable":
        return binascii.a2b_qp(content)
    if encoding and encoding not in _PLAIN_ENCODINGS:
        return Problem(400, f"{name} has an unknown Content-Transfer-Encoding; send it as binary")
    return content


def parse_json(body: bytes, max_images: int) -> list[ImageOrProblem]:
    """Return the images of `{"image": "<base64>"}` or `{"images": ["<base64>", …]}`.

    Raises Problem 400 for other content, 413 for too many images.
    """
    # A data: URL contains a comma as well.
    max_commas = 2 * max_images + MAX_EXTRA_ELEMENTS
    members = load_bounded_json(body, MAX_EXTRA_ELEMENTS, max_commas)
    if not isinstance(members, dict) or ("image" in members) == ("images" in members):
        raise Problem(400, 'send {"image": "<base64>"} or {"images": ["<base64>", ...]}')
    if "image" in members:
        return [decode_base64_image(members["image"], "image")]

    texts = members["images"]
    if not isinstance(texts, list):
        raise Problem(400, "images is not a list of strings of base64")
    if len(texts) > max_images:
        raise _too_many_images(max_images)
    return [decode_base64_image(text, f"images[{i}]") for i, text in enumerate(texts)]


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


def decode_base64_image(text: Any, name: str) -> ImageOrProblem:
    """Decode the base64 of one image, or return a Problem that says that `name` is not base64."""
    if not isinstance(text, str):
        return Problem(400, f"{name} is not a string of base64")
    try:
        return decode_base64(text)
    except ValueError:
        return Problem(400, f"{name} is not valid base64")


def decode_base64(text: str) -> bytes:
    """Decode base64 of the standard or the URL-safe alphabet, or a data: URL.

    Blanks, line breaks and padding are optional. Raises ValueError.
    """
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError("the data: URL is not base64")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        pass  # other characters than those of padded, standard base64

    content = text.encode("ascii").translate(_TO_STANDARD_ALPHABET, _BLANKS).rstrip(b"=")
    padding = b"=" * (-len(content) % 4)
    return binascii.a2b_base64(content + padding, strict_mode=True)


def _too_many_images(max_images: int) -> Problem:
    return Problem(413, f"more than the {max_images} images allowed in one request", "images")
