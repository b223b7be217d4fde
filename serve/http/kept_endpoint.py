"""DELETE /kept/<request id>: delete what was kept of a request. Only with an API key."""

import asyncio
from urllib.parse import unquote

from models.kept import open_kept
from serve.http.dispatcher import Dispatcher
from serve.http.responses import Problem, Request, Response, json_response
from serve.settings import Settings
from serve.wire import FORGET

NEEDS_KEY = (
    "this path is only served with an API key, since it changes what the service keeps: start it "
    "with --api-key; without a server use python -m serve kept or python -m serve label"
)
NOTHING_KEPT = "the service keeps no images; start it with --keep"


def check_available(settings: Settings) -> None:
    """Raise Problem 403 without an API key, 404 if the service keeps no images."""
    if not settings.api_key and not settings.api_key_file:
        raise Problem(403, NEEDS_KEY)
    if not settings.keep:
        raise Problem(404, NOTHING_KEPT)


class KeptEndpoint:
    """Handles the paths below /kept/."""

    def __init__(self, settings: Settings, dispatcher: Dispatcher) -> None:
        self.settings = settings
        self.dispatcher = dispatcher

    async def __call__(self, request: Request) -> Response:
        """Delete the images of a request, on the disk and in the memory of workers.

        Raises Problem 403, 404, 405 or 503.
        """
        if request.scope["method"] != "DELETE":
            raise Problem(405, "/kept/<request id> allows DELETE", allow="DELETE")
        check_available(self.settings)
        request_id = unquote(request.scope["path"].removeprefix("/kept/").rstrip("/"))

        self.dispatcher.send_notice(request_id.encode(), FORGET)
        folder = open_kept(self.settings.keep)
        try:
            count = await asyncio.to_thread(folder.delete_request, request_id)
        except OSError as error:
            raise Problem(503, f"kept images can't be deleted now: {error}") from error
        if not count:
            raise Problem(404, "no image of this request is kept")
        return json_response({"deleted": count})
