"""/label: the labelling page of the images that the service keeps. Only with an API key."""

import asyncio
from urllib.parse import parse_qsl

from models.kept import KeptError, KeptImage, Label, Verdict, open_kept
from models.labelling import KeptSource, LabelApp, LabelProblem, LabelReply
from models.labelling.app import MAX_BODY_BYTES, read_page_file
from serve.http import request_body
from serve.http.dispatcher import Dispatcher
from serve.http.feedback import FeedbackEndpoint
from serve.http.kept_endpoint import check_available
from serve.http.responses import JSON, Problem, Request, Response
from serve.settings import Settings


class LabelEndpoint:
    """Handles /label and the paths below it, in one HTTP process."""

    def __init__(
        self, settings: Settings, dispatcher: Dispatcher, feedback: FeedbackEndpoint
    ) -> None:
        self.settings = settings
        self.dispatcher = dispatcher
        self.feedback = feedback
        self.app: LabelApp | None = None  # from the first request on

    async def __call__(self, request: Request) -> Response:
        """Answer a request of the page. Raises Problem."""
        method = request.scope["method"]
        path = request.scope["path"]
        if method not in ("GET", "HEAD", "POST"):
            raise Problem(405, f"{path} allows GET and POST", allow="GET, POST")
        name = path.strip("/").removeprefix("label").strip("/")
        try:
            if not name or name.startswith("page/"):
                return _respond(read_page_file(name.removeprefix("page/") or "label.html"))
            check_available(self.settings)
            body = b""
            if method == "POST":
                _check_media_type(request)
                body = await request_body.read_body(request.receive, MAX_BODY_BYTES)
            query = dict(parse_qsl(request.scope["query_string"].decode("latin-1")))
            app = self._get_app()
            # In a thread: a disk or a bucket may block, and the event loop must not.
            handle = asyncio.to_thread(app.handle, method.replace("HEAD", "GET"), path, query, body)
            return _respond(await handle)
        except LabelProblem as problem:
            raise Problem(problem.status, str(problem)) from problem

    def _get_app(self) -> LabelApp:
        if self.app is None:
            try:
                folder = open_kept(self.settings.keep)
            except KeptError as error:
                raise Problem(503, str(error)) from error
            self.app = LabelApp(KeptSource(folder, self._list_classes, self._on_first_label))
        return self.app

    def _list_classes(self) -> list[str]:
        return self.dispatcher.model.get("classes", [])

    def _on_first_label(self, image: KeptImage, label: Label) -> None:
        """Count the first label of an image as feedback; called in a thread."""
        if label.verdict is Verdict.CLASS:
            self.dispatcher.loop.call_soon_threadsafe(self.feedback.count_label, image, label.label)


def _respond(reply: LabelReply) -> Response:
    headers = [(name.lower().encode(), value.encode()) for name, value in reply.headers.items()]
    return Response(200, reply.body, reply.content_type.encode(), headers)


def _check_media_type(request: Request) -> None:
    """Raise Problem 415 for another type than JSON, such as those that forms can send."""
    media_type = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media_type != JSON:
        raise Problem(415, "send JSON, with Content-Type: application/json")
