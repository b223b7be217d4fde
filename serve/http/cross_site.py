"""Requests that a web page of another origin makes a browser send.

A page may send requests to every service that its reader can reach, also to one in a private
network. They are refused, unless `--cors-origins` lists the origin of the page. Then preflight
requests are answered, and responses carry the headers that let the page read them (CORS, as the
Fetch standard describes it).

Browsers state the origin in two headers that no page can change: Sec-Fetch-Site, over HTTPS and to
localhost only, and Origin, with each POST and each request by CORS. Other clients send neither.
"""

from serve.http.responses import Header, Problem, Response
from serve.settings import ANY_ORIGIN

SAME_ORIGIN_SITES = (b"same-origin", b"none")  # none: by the user, such as from the address bar
PREFLIGHT_HEADERS: list[Header] = [
    (b"access-control-allow-methods", b"GET, POST"),
    (
        b"access-control-allow-headers",
        b"Authorization, Content-Type, Inference-Header-Content-Length, Traceparent, X-API-Key, "
        b"X-Request-ID",
    ),
    (b"access-control-max-age", b"600"),
]
EXPOSED_HEADERS = (
    b"Inference-Header-Content-Length, Retry-After, Server-Timing, X-Model-Version, X-Request-ID"
)


class CrossSitePolicy:
    """Decides which pages of other origins may send requests and read the responses."""

    def __init__(self, origins: list[str]) -> None:
        """Allow the pages of these origins, or all with ANY_ORIGIN."""
        self.origins = frozenset(origin.encode() for origin in origins)
        self.allows_any = ANY_ORIGIN in origins
        self.has_origins = bool(origins)

    def check(self, method: str, headers: dict[bytes, bytes]) -> None:
        """Raise Problem 403 for a request by a page of an origin that is not allowed.

        Following a link to this service is allowed, because the page with the link can't read the
        answer.
        """
        origin = headers.get(b"origin")
        site = headers.get(b"sec-fetch-site")
        if origin is None and site is None:
            return
        if self.allows_any or origin in self.origins:
            return

        if site is not None:
            is_same_origin = site in SAME_ORIGIN_SITES
        else:
            assert origin is not None
            is_same_origin = origin.partition(b"://")[2] == headers.get(b"host", b"").lower()
        is_link = method in ("GET", "HEAD") and headers.get(b"sec-fetch-mode") == b"navigate"
        if is_same_origin or is_link:
            return
        raise Problem(
            403,
            "requests by web pages of other origins are refused; the service allows the origins "
            "in its setting --cors-origins",
            "cross_site",
        )

    def answer_preflight(self, method: str, headers: dict[bytes, bytes]) -> Response | None:
        """Return the answer to a preflight request, None for any other request."""
        is_preflight = b"origin" in headers and b"access-control-request-method" in headers
        if method != "OPTIONS" or not is_preflight:
            return None
        return Response(200, b"", headers=PREFLIGHT_HEADERS)

    def add_headers(self, headers: dict[bytes, bytes], response: Response) -> None:
        """Let the page that sent the request with these headers read the response."""
        origin = headers.get(b"origin")
        added: list[Header] = [(b"vary", b"Origin")]
        if origin is not None and (self.allows_any or origin in self.origins):
            added.append((b"access-control-allow-origin", origin))
            added.append((b"access-control-expose-headers", EXPOSED_HEADERS))
        response.headers = [*response.headers, *added]
