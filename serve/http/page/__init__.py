"""The page at `/`, its own files, the bundle's sample images and its report. No build step, no foreign host."""

import asyncio
from pathlib import Path

from models.bundle import SAMPLES_DIRECTORY, BundleError, resolve_inside
from models.image import ImageError, read_header
from models.store import Store
from serve.http.dispatcher import Dispatcher
from serve.http.responses import Header, Problem, Request, Response
from serve.settings import Settings

HERE = Path(__file__).parent
TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
FILES = {
    path.name: (path.read_bytes(), TYPES[path.suffix])
    for path in HERE.iterdir()
    if path.suffix in TYPES
}
GUARD: list[Header] = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
]
REPORT_GUARD: list[
    Header
] = [  # a report brings its own styles and plots, and came with a bundle: no script runs in it
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox allow-popups; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
]


class Page:
    """Handlers of one HTTP process."""

    def __init__(self, settings: Settings, dispatcher: Dispatcher):
        self.store, self.dispatcher, self.seconds = (
            Store(settings.store),
            dispatcher,
            settings.deadline_ms / 1000,
        )

    async def index(self, request: Request) -> Response:
        return await self.file("index.html")

    async def own(self, request: Request) -> Response:
        """/page/<file>"""
        _only_get(request)
        return await self.file(request.scope["path"].removeprefix("/page/"))

    async def file(self, name: str) -> Response:
        if name not in FILES:
            raise Problem(404, "there is nothing here; see /docs")
        content, kind = FILES[name]
        return Response(200, content, kind, GUARD)

    async def sample(self, request: Request) -> Response:
        """/samples/<i>: the file of one sample image, by its place in /model's `samples`."""
        _only_get(request)
        number, samples = (
            request.scope["path"].removeprefix("/samples/"),
            self.dispatcher.model.get("samples", []),
        )
        if not (number.isascii() and number.isdecimal()) or int(number[:9]) >= len(samples):
            raise Problem(404, f"there are {len(samples)} samples, from 0")
        content = await self.read(f"{SAMPLES_DIRECTORY}/{samples[int(number[:9])]['file']}")
        try:
            kind = read_header(content).format
        except ImageError as error:
            raise Problem(404, "this sample is no image") from error
        return Response(200, content, b"image/" + kind.encode(), GUARD)

    async def report(self, request: Request) -> Response:
        return Response(200, await self.read("report.html"), TYPES[".html"], REPORT_GUARD)

    async def read(self, name: str) -> bytes:
        """A file of the bundle that is served.

        Raises Problem 404 where it is gone or was never there, 503 where the store does not answer in time.
        """
        model = self.dispatcher.model
        if not model:
            raise Problem(503, "no model is ready yet; try again in a second")
        try:
            asked = asyncio.to_thread(
                self.content, model, name
            )  # the store may hang, and the loop may not
            return await asyncio.wait_for(asked, self.seconds)
        except TimeoutError as error:
            raise Problem(503, "the store does not answer; try again in a second") from error
        except (OSError, BundleError) as error:
            raise Problem(404, "the bundle has no such file") from error

    def content(self, model: dict, name: str) -> bytes:
        return resolve_inside(self.store.path(model["name"], model["version"]), name).read_bytes()


def _only_get(request: Request) -> None:
    if request.scope["method"] not in ("GET", "HEAD"):
        raise Problem(405, f"{request.scope['path']} is only to be read", allow="GET, HEAD")
