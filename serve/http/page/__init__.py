"""The page at `/`, its files, and the sample images and report of the served bundle.

The page needs no build step and loads nothing from other hosts. Runs in HTTP processes.
"""

import asyncio
import os
import re
from pathlib import Path
from typing import Any

from models.bundle import SAMPLES_DIRECTORY, BundleError, open_verified
from serve.bundle_source import BundleSource
from serve.http.dispatcher import Dispatcher
from serve.http.responses import Header, OpenFile, Problem, Request, Response
from serve.settings import Settings

DIRECTORY = Path(__file__).parent
CONTENT_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
# The styles of a report are allowed because the page shows it, with this policy, if there is a key.
PAGE_HEADERS: list[Header] = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        b"connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
        b"frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"same-origin"),
]
# A report comes from a bundle and contains its styles and plots. It may not run scripts.
REPORT_HEADERS: list[Header] = [
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox allow-popups; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
]


# The content types of images by their first bytes.
SIGNATURE_BYTES = 12
IMAGE_TYPES = {
    re.compile(rb"\xff\xd8\xff"): b"image/jpeg",
    re.compile(rb"\x89PNG\r\n\x1a\n"): b"image/png",
    re.compile(rb"GIF8[79]a"): b"image/gif",
    re.compile(rb"RIFF....WEBP", re.DOTALL): b"image/webp",
    re.compile(rb"....ftypavif", re.DOTALL): b"image/avif",
    re.compile(rb"II\*\0|MM\0\*"): b"image/tiff",
    re.compile(rb"BM"): b"image/bmp",
}

# The content of the page's files, by name.
FILES = {
    path.name: path.read_bytes() for path in DIRECTORY.iterdir() if path.suffix in CONTENT_TYPES
}


class Page:
    """The handlers of the page, of one HTTP process."""

    def __init__(self, settings: Settings, dispatcher: Dispatcher):
        self.source = BundleSource(settings)
        self.dispatcher = dispatcher
        self.read_timeout_seconds = settings.deadline_ms / 1000

    async def index(self, request: Request) -> Response:
        """Handle /."""
        return _build_file_response("index.html")

    async def file(self, request: Request) -> Response:
        """Handle /page/<file>. Raises Problem 404."""
        _check_method(request)
        name = request.scope["path"].removeprefix("/page/")
        if name not in FILES:
            raise Problem(404, "this path does not exist; see /docs")
        return _build_file_response(name)

    async def sample(self, request: Request) -> Response:
        """Handle /samples/<index>: the file of one sample image, in the order of GET /model.

        Raises Problem 404, 500 or 503.
        """
        _check_method(request)
        samples = self.dispatcher.model.get("samples", [])
        text = request.scope["path"].removeprefix("/samples/").rstrip("/")
        index = int(text[:9]) if text.isascii() and text.isdecimal() else len(samples)
        if index >= len(samples):
            raise Problem(404, f"there are {len(samples)} samples, from 0")

        start, file = await self._open(f"{SAMPLES_DIRECTORY}/{samples[index]['file']}")
        for signature, content_type in IMAGE_TYPES.items():
            if signature.match(start):
                return Response(200, b"", content_type, PAGE_HEADERS, file=file)
        file.stream.close()
        raise Problem(404, "this sample is not an image")

    async def report(self, request: Request) -> Response:
        """Handle /report. Raises Problem 404, 500 or 503."""
        _, file = await self._open("report.html")
        return Response(200, b"", CONTENT_TYPES[".html"], REPORT_HEADERS, file=file)

    async def _open(self, name: str) -> tuple[bytes, OpenFile]:
        """Return the first bytes of a file of the served bundle, and the open file.

        Raises Problem 404 if it does not exist, 500 if it is not the file that was verified when
        the model was loaded, 503 if the store does not respond in time.
        """
        model = self.dispatcher.model
        if not model:
            raise Problem(503, "no model is ready yet; try again in a second")

        # In a thread: a store on a network disk may block, and the event loop must not.
        file = asyncio.to_thread(self._open_in_store, model, name)
        try:
            return await asyncio.wait_for(file, self.read_timeout_seconds)
        except TimeoutError as error:
            raise Problem(503, "the store does not answer; try again in a second") from error
        except (OSError, BundleError) as error:
            raise Problem(500, "this file has changed since the model was loaded") from error

    def _open_in_store(self, model: dict[str, Any], name: str) -> tuple[bytes, OpenFile]:
        bundle_path = self.source.local_path(int(model["version"]))
        stream = open_verified(bundle_path, name, model["digest"])
        if stream is None:
            raise Problem(404, "the bundle has no such file")
        start = stream.peek(SIGNATURE_BYTES)[:SIGNATURE_BYTES]
        return start, OpenFile(stream, os.fstat(stream.fileno()).st_size)


def _build_file_response(name: str) -> Response:
    content_type = CONTENT_TYPES[Path(name).suffix]
    return Response(200, FILES[name], content_type, PAGE_HEADERS)


def _check_method(request: Request) -> None:
    if request.scope["method"] not in ("GET", "HEAD"):
        raise Problem(405, f"{request.scope['path']} allows GET and HEAD", allow="GET, HEAD")
