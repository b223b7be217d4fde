"""Download of one file, resumed after a break: also by another process, a day later.

    remote file -> <name>.part and <name>.part.json -> the complete file

The .json names the version of the file: its entity tag, modification time and size. A download
continues only where the version is still the same; otherwise it starts over.
"""

import base64
import contextlib
import errno
import http.client
import json
import os
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from io import RawIOBase
from pathlib import Path
from typing import Protocol

from train.data.cache import replace_text
from train.data.source import DataError
from train.data.sources.archive import DISK_FULL_ERRORS, HEAD_BYTES
from train.data.sources.byte_progress import byte_progress
from train.failures import DownloadFailed

TIMEOUT_SECONDS = 30.0  # without a byte from the server
ATTEMPTS = 5  # in a row that bring no byte
FIRST_RETRY_SECONDS = 0.2  # doubled for each attempt in a row
CHUNK_BYTES = 1 << 20
TEMPORARY_STATUSES = (408, 425, 429, 500, 502, 503, 504)


class ConnectionLost(Exception):
    """The server can't be reached, or the connection broke. Another attempt may succeed."""


class Unreachable(DataError):
    """A server that no attempt has reached."""


@dataclass(frozen=True)
class Version:
    """What tells one version of a remote file from another."""

    etag: str | None = None
    last_modified: str | None = None
    size: int | None = None

    @property
    def condition(self) -> str | None:
        """The value of If-Range; None where the server names nothing that is exact enough."""
        if self.etag is not None and not self.etag.startswith("W/"):
            return self.etag
        return self.last_modified


@dataclass(frozen=True)
class Response:
    """The bytes of a file from a position on."""

    version: Version
    start: int  # position of the first chunk; 0 where the file can't be continued
    chunks: Iterator[bytes]  # raises ConnectionLost


class RemoteFile(Protocol):
    """A file on a server."""

    def open(self, offset: int, version: Version | None) -> AbstractContextManager[Response]:
        """Read from `offset` on where the file still has this version, else from its start.

        Raises ConnectionLost where another attempt may succeed, else DataError.
        """
        ...


class PartialFile:
    """A file that is being downloaded, and the version that its bytes are of."""

    def __init__(self, path: Path):
        self.path = path
        self.version: Version | None = None
        self._version_path = path.with_name(path.name + ".json")
        with contextlib.suppress(OSError, ValueError, TypeError):
            self.version = Version(**json.loads(self._version_path.read_text()))

    @property
    def size(self) -> int:
        """Bytes that can be continued."""
        if self.version is None:
            return 0
        with contextlib.suppress(OSError):
            return self.path.stat().st_size
        return 0

    def restart(self, version: Version) -> None:
        """Begin the download of a version, without any bytes."""
        self.discard()
        self.path.touch()
        replace_text(self._version_path, json.dumps(asdict(version)))
        self.version = version

    def discard(self) -> None:
        """Delete the bytes."""
        self._version_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.version = None

    def read_head(self) -> bytes:
        """Return the first `HEAD_BYTES` bytes."""
        with self.path.open("rb") as file:
            return file.read(HEAD_BYTES)


def download(
    remote: RemoteFile,
    part: PartialFile,
    known: Version | None,
    check_head: Callable[[bytes], None],
    source: str,
) -> bool:
    """Download a file into `part`, unless it still has the version `known`.

    Returns whether it was downloaded. `check_head` gets its first bytes and raises DataError where
    the file is not what was expected; nothing is kept then. A connection that breaks is opened
    again, and the download continues. Raises DataError where the file can't be had, DownloadFailed
    where the connection keeps breaking, OSError where the disk is full.
    """
    failures = 0
    largest_size = part.size
    while True:
        try:
            with remote.open(part.size, part.version) as response:
                if response.version == known:
                    part.discard()
                    return False
                _receive(response, part, check_head, source)
                return True
        except ConnectionLost as error:
            failures = 1 if part.size > largest_size else failures + 1
            largest_size = max(largest_size, part.size)
            if failures == ATTEMPTS:
                raise _describe_lost_connection(part, source, error) from error
        except OSError as error:
            if error.errno in DISK_FULL_ERRORS:
                part.discard()
            raise
        time.sleep(FIRST_RETRY_SECONDS * 2 ** (failures - 1))


def _describe_lost_connection(
    part: PartialFile, source: str, error: ConnectionLost
) -> Unreachable | DownloadFailed:
    if part.size == 0:
        return Unreachable(
            f"{source}: can't be reached: {error}; check the address and the network"
        )
    total = part.version.size if part.version else None
    of_total = f" of {total:,}" if total else ""
    return DownloadFailed(
        f"{source}: the download broke off after {part.size:,}{of_total} bytes: {error}; run the "
        "same command again to continue it"
    )


def _receive(
    response: Response, part: PartialFile, check_head: Callable[[bytes], None], source: str
) -> None:
    """Write what a response holds. Raises ConnectionLost where it ends too early."""
    if response.start == 0:
        part.restart(response.version)
    elif response.start != part.size:
        part.discard()
        raise ConnectionLost(f"the server continues at byte {response.start}")
    total = response.version.size
    if total is not None:
        check_free_space(part.path.parent, total - part.size, source)

    is_checked = False
    with (
        part.path.open("ab", buffering=0) as file,
        byte_progress(f"Fetching {source}", total, part.size) as report,
    ):
        for chunk in response.chunks:
            _write_all(file, chunk)
            done = file.tell()
            report(done)
            if not is_checked and done >= HEAD_BYTES:
                _check_head(part, check_head)
                is_checked = True
    if total is not None and part.size < total:
        raise ConnectionLost("the connection closed early")
    if not is_checked:
        _check_head(part, check_head)


def _write_all(file: RawIOBase, chunk: bytes) -> None:
    """Write a chunk; a disk that is nearly full takes a part of it before it reports an error."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]


def _check_head(part: PartialFile, check_head: Callable[[bytes], None]) -> None:
    try:
        check_head(part.read_head())
    except DataError:
        part.discard()
        raise


def check_free_space(directory: Path, size: int, source: str) -> None:
    """Raise OSError where a disk has no room for `size` more bytes."""
    if size > shutil.disk_usage(directory).free:
        reason = f"{os.strerror(errno.ENOSPC)} for the {size:,} bytes of {source}"
        raise OSError(errno.ENOSPC, reason, str(directory))


class HttpFile:
    """A file at an http:// or https:// URL, which may hold a user name and a password."""

    def __init__(self, url: str, source: str):
        """`source`: the URL for messages."""
        self.source = source
        parts = urllib.parse.urlsplit(url)
        self._authorization = _build_authorization(parts)
        address = parts.netloc.rpartition("@")[2]
        path = urllib.parse.quote(parts.path, safe="/%:=&?~#+!$,;'@()*[]")
        query = urllib.parse.quote(parts.query, safe="/%:=&?~#+!$,;'@()*[]")
        self._url = urllib.parse.urlunsplit((parts.scheme, address, path, query, ""))

    @contextmanager
    def open(self, offset: int, version: Version | None) -> Iterator[Response]:
        """Send a GET request, for the rest of the file where the server can tell its version."""
        request = urllib.request.Request(self._url, headers={"User-Agent": "imago"})
        if self._authorization:
            # Not sent to another server that this one redirects to.
            request.add_unredirected_header("Authorization", self._authorization)
        condition = version.condition if version else None
        if offset > 0 and condition is not None:
            request.add_header("Range", f"bytes={offset}-")
            request.add_header("If-Range", condition)

        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416 and version is not None and version.size == offset:
                    yield Response(version, offset, iter(()))  # nothing is missing
                    return
                raise self._explain_status(error.code, error.reason) from error
        except ssl.SSLError as error:
            raise self._explain_certificate(error) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):
                raise self._explain_certificate(error.reason) from error
            raise ConnectionLost(str(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLost(_describe(error)) from error

        with response:
            start = _parse_start(response)
            yield Response(_parse_version(response, start), start, _read_chunks(response))

    def _explain_status(self, status: int, reason: str) -> DataError | ConnectionLost:
        answer = f"the server answers {status} {reason}"
        if status in TEMPORARY_STATUSES:
            return ConnectionLost(answer)
        if status in (401, 403):
            return DataError(
                f"{self.source}: access denied: {answer}; a signed link may have expired, and a "
                "user name and password are written https://user:password@host/…"
            )
        return DataError(f"{self.source}: {answer}; check the address")

    def _explain_certificate(self, error: ssl.SSLError) -> DataError:
        return DataError(
            f"{self.source}: no secure connection: {error.reason or error}; set SSL_CERT_FILE "
            "to the certificates that this network uses"
        )


def _build_authorization(parts: urllib.parse.SplitResult) -> str | None:
    if parts.username is None:
        return None
    user = urllib.parse.unquote(parts.username)
    password = urllib.parse.unquote(parts.password or "")
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _parse_start(response: http.client.HTTPResponse) -> int:
    """Return the position of a response in its file."""
    if response.status != 206:
        return 0
    content_range = response.headers.get("Content-Range", "")
    start = content_range.removeprefix("bytes ").partition("-")[0]
    if not start.isdecimal():
        raise ConnectionLost(f"the server answers with the range {content_range!r}")
    return int(start)


def _parse_version(response: http.client.HTTPResponse, start: int) -> Version:
    length = response.headers.get("Content-Length", "")
    return Version(
        response.headers.get("ETag"),
        response.headers.get("Last-Modified"),
        start + int(length) if length.isdecimal() else None,
    )


def _read_chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read1(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLost(_describe(error)) from error
        if not chunk:
            return
        yield chunk


def _describe(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
