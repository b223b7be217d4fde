"""An S3 server in the process of the test, by moto, whose answers a test can make fail."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Literal

import pytest

ERROR_BODY = (
    "<?xml version='1.0'?><Error><Code>{code}</Code><Message>made by the test</Message></Error>"
)
# unavailable  status 503, which S3 sends where too many requests come in
# reset        the connection is reset before anything is done
# lost         the request is done, but its answer is lost with the connection
# cut          half of the body arrives, then the connection is reset
# stalled      half of the body arrives, then nothing more until `release_stalled` is set
# damaged      a byte of what is uploaded changes
# skewed       the clock of the client is off
# denied       the key is not the right one
Failure = Literal["unavailable", "reset", "lost", "cut", "stalled", "damaged", "skewed", "denied"]
ERROR_CODES = {
    "unavailable": (503, "SlowDown"),
    "skewed": (403, "RequestTimeTooSkewed"),
    "denied": (403, "SignatureDoesNotMatch"),
}


@dataclass
class S3Server:
    """A running server. `client` is boto3's; `choose_failure` decides how a request fails."""

    client: Any
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path with query
    choose_failure: Callable[[str, str], Failure | None] = lambda method, path: None
    release_stalled: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the keys of all objects below a prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def read(self, bucket: str, key: str) -> bytes:
        """Return the contents of an object."""
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def write(self, bucket: str, key: str, content: bytes) -> None:
        """Write an object."""
        self.client.put_object(Bucket=bucket, Key=key, Body=content)


class _FailingApplication:
    """moto's WSGI application, between requests and answers that fail where the test says so.

    Writes take turns: moto checks a condition and writes in two steps.
    """

    def __init__(self, application: Any, server: S3Server):
        self.application = application
        self.server = server

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        path = environ["PATH_INFO"] + query
        with self.server.lock:
            self.server.requests.append((method, path))
            failure = self.server.choose_failure(method, path)

        if failure in ERROR_CODES:
            status, code = ERROR_CODES[failure]
            start_response(f"{status} Failed", [("Content-Type", "application/xml")])
            return [ERROR_BODY.format(code=code).encode()]
        if failure == "reset":
            return _reset_connection(environ)
        if failure == "damaged":
            length = int(environ["CONTENT_LENGTH"])
            content = environ["wsgi.input"].read(length)
            environ["wsgi.input"] = BytesIO(content[:-1] + bytes([content[-1] ^ 1]))
        if failure is None:
            return self._answer(environ, start_response)

        # The length of the whole body is promised.
        body = b"".join(self._answer(environ, start_response))
        if failure == "lost":
            return _reset_connection(environ)
        if failure in ("cut", "stalled"):
            return self._send_half(environ, body, failure)
        return [body]

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "GET":
            return self.application(environ, start_response)
        with self.server.lock:
            return list(self.application(environ, start_response))

    def _send_half(self, environ: dict[str, Any], body: bytes, failure: Failure) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        if failure == "stalled":
            self.server.release_stalled.wait(60)
        _reset_connection(environ)


def _reset_connection(environ: dict[str, Any]) -> list[bytes]:
    """Close the connection; what is sent on it later is lost."""
    connection: socket.socket = environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    return []


@contextlib.contextmanager
def failing_s3_server(bucket: str) -> Iterator[S3Server]:
    """Run an S3 server with one empty bucket, whose requests a test can make fail.

    Within the block the AWS variables of the environment point to the server.
    """
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    serving = pytest.importorskip("werkzeug.serving")

    class Handler(serving.WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *arguments: object) -> None:
            """Print nothing."""

    server = S3Server(client=None)
    application = _FailingApplication(
        moto.DomainDispatcherApplication(moto.create_backend_app), server
    )
    wsgi_server = serving.make_server(
        "127.0.0.1", 0, application, threaded=True, request_handler=Handler
    )
    thread = threading.Thread(target=wsgi_server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{wsgi_server.port}")
        server.client = boto3.client("s3")
        server.client.create_bucket(Bucket=bucket)
        yield server
    wsgi_server.shutdown()
    thread.join()


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[Any]:
    """Run an S3 server with one empty bucket; yield a boto3 client of it."""
    with failing_s3_server(bucket) as server:
        yield server.client
