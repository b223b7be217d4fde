"""Buckets: s3://, gs:// and az://, read by obstore.

Credentials are those of the cloud's own tools: the variables AWS_…, GOOGLE_… and AZURE_…, the files
that the commands aws and gcloud write, and what a machine in the cloud is given. AWS_ENDPOINT_URL
names another store with the interface of S3.
"""

import configparser
import hashlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from train.data.source import DataError, expand_home, printable_name
from train.data.sources.download import ConnectionLost, Response, Unreachable, Version

if TYPE_CHECKING:
    from obstore import ObjectMeta

BUCKET_SCHEMES = ("s3", "gs", "az")
PARALLEL_BLOCKS = 8  # of one object
BLOCK_BYTES = 8 << 20
CHUNK_BYTES = 1 << 20
LIST_CHUNK = 1000  # objects
TIMEOUTS = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "10m"}
RETRIES: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=30)}

ENDPOINT_VARIABLES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
# Each of these says where credentials come from, so that the user's files are not read.
AWS_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
AZURE_CREDENTIALS = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_CLIENT_ID",
    "AZURE_CLIENT_ID",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_SKIP_SIGNATURE",
)
# Settings of a profile in ~/.aws/config and ~/.aws/credentials -> settings of obstore
AWS_PROFILE_SETTINGS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}
CREDENTIALS_ADVICE = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run aws configure; a public bucket "
    "needs AWS_SKIP_SIGNATURE=true",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login; a "
    "public bucket needs GOOGLE_SKIP_SIGNATURE=true",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or run az login; a public "
    "container needs AZURE_SKIP_SIGNATURE=true",
}

# Words of obstore's messages -> what is wrong. The paths are those at which a machine of a cloud
# gives credentials; they can't be reached elsewhere.
PROBLEMS = {
    "/latest/api/token": "no credentials; {advice}",
    "/latest/meta-data": "no credentials; {advice}",
    "/computeMetadata/": "no credentials; {advice}",
    "/metadata/identity/": "no credentials; {advice}",
    "403 Forbidden": "access denied; {advice}",
    "404 Not Found": "no such bucket; check the name",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "301 Moved": "the bucket is in another region; set AWS_REGION",
}
MAX_REASON_LENGTH = 300

Item = TypeVar("Item")
Result = TypeVar("Result")


class FetchedObject(NamedTuple):
    """What is known of an object that was written to a file."""

    version: str
    size: int
    sha256: str  # in hex


class Bucket:
    """A bucket, and a path in it. Its methods raise DataError, or ConnectionLost."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.scheme, _, location = url.partition("://")
        name, _, path = location.partition("/")
        self.path = path.rstrip("/")
        if not name:
            raise DataError(f"{url}: no bucket; write {self.scheme}://bucket/path")
        self._store = _open_store(self.scheme, name, self.url)

    def describe_object(self) -> "ObjectMeta | None":
        """Return the description of the object at the path; None where there is none."""
        from obstore import head

        if not self.path:
            return None
        try:
            with self._translate_errors():
                return run_interruptibly(lambda: head(self._store, self.path))
        except FileNotFoundError:
            return None
        except ConnectionLost as error:
            raise Unreachable(f"{self.url}: can't be reached: {error}") from error

    def list_objects(self) -> "list[ObjectMeta]":
        """List all objects below the path."""
        with self._translate_errors():
            return run_interruptibly(self._list_objects)

    def _list_objects(self) -> "list[ObjectMeta]":
        from obstore import list as list_chunks

        objects: list[ObjectMeta] = []
        for chunk in list_chunks(self._store, self.path or None, chunk_size=LIST_CHUNK):
            objects += chunk
        return objects

    def read_block(self, start: int, end: int, etag: str | None) -> bytes:
        """Read a part of the object at the path, while it has this entity tag."""
        from obstore import get

        options: Any = {"range": (start, end)}
        if etag is not None:
            options["if_match"] = etag
        with self._translate_errors():
            return bytes(get(self._store, self.path, options=options).bytes())

    def fetch_object(self, path: str, target: Path) -> FetchedObject | None:
        """Write an object to a file; None where it is gone. Raises OSError for a full disk."""
        from obstore import get

        digest = hashlib.sha256()
        size = 0
        with target.open("wb") as file:
            try:
                with self._translate_errors():
                    result = get(self._store, path)
                    for chunk in result.stream(CHUNK_BYTES):
                        content = bytes(chunk)
                        digest.update(content)
                        size += file.write(content)
            except FileNotFoundError:
                return None
        return FetchedObject(describe_version(result.meta), size, digest.hexdigest())

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn obstore's errors into DataError for what the user can correct, or ConnectionLost.

        FileNotFoundError, which obstore raises for an object that is not there, stays.
        """
        from obstore import exceptions

        try:
            yield
        except (exceptions.UnauthenticatedError, exceptions.PermissionDeniedError) as error:
            raise DataError(
                f"{self.url}: access denied; {CREDENTIALS_ADVICE[self.scheme]}"
            ) from error
        except exceptions.BaseError as error:
            reason = _describe(error)
            for words, problem in PROBLEMS.items():
                if words in reason:
                    advice = CREDENTIALS_ADVICE[self.scheme]
                    raise DataError(f"{self.url}: {problem.format(advice=advice)}") from error
            raise ConnectionLost(reason) from error


def describe_version(description: "ObjectMeta") -> str:
    """Return what tells one version of an object from another: its entity tag, or its time."""
    return description["e_tag"] or description["last_modified"].isoformat()


def _open_store(scheme: str, bucket: str, url: str) -> Any:
    """Return obstore's client of a bucket. Raises DataError for settings that it refuses."""
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    config: Any = {}  # of a type for each store
    if scheme == "s3" and not _is_any_set(AWS_CREDENTIALS):
        config = _read_aws_profile(url)
    if scheme == "az" and not _is_any_set(AZURE_CREDENTIALS) and shutil.which("az"):
        config["use_azure_cli"] = True

    for variable in ENDPOINT_VARIABLES[scheme]:
        if scheme == "s3" and os.environ.get(variable):
            config["endpoint"] = os.environ[variable]
            break
    endpoints = [os.environ.get(variable, "") for variable in ENDPOINT_VARIABLES[scheme]]
    endpoints.append(config.get("endpoint", ""))
    options: Any = dict(TIMEOUTS)
    if any(endpoint.startswith("http:") for endpoint in endpoints):
        options["allow_http"] = True  # stores inside a cluster often have no certificate

    try:
        return from_url(
            f"{scheme}://{bucket}", config=config, client_options=options, retry_config=RETRIES
        )
    except (BaseError, ValueError) as error:
        raise DataError(f"{url}: {_describe(error)}; {CREDENTIALS_ADVICE[scheme]}") from error


def _describe(error: Exception) -> str:
    """Return one line of what obstore says, without its description for developers."""
    reason = " ".join(str(error).partition("Debug source")[0].split())
    return printable_name(reason)[:MAX_REASON_LENGTH]


def _is_any_set(variables: tuple[str, ...]) -> bool:
    return any(os.environ.get(variable) for variable in variables)


def _read_aws_profile(url: str) -> dict[str, Any]:
    """Return the settings of the user's profile in ~/.aws, as `aws configure` writes them.

    Without such files there are none, and obstore asks the machine. Raises DataError for a profile
    that is missing, or that names another way to get keys.
    """
    name = os.environ.get("AWS_PROFILE") or "default"
    config_file = os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"
    credentials_file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    sections = ((config_file, f"profile {name}"), (config_file, name), (credentials_file, name))

    profile: dict[str, str] = {}
    for file, section in sections:
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(expand_home(file))
        except (configparser.Error, UnicodeError) as error:
            raise DataError(f"{file}: not readable: {str(error).splitlines()[0]}") from error
        if parser.has_section(section):
            profile.update(parser.items(section))

    if os.environ.get("AWS_PROFILE") and not profile:
        raise DataError(f"{url}: no profile {name!r} in {config_file}; check AWS_PROFILE")
    settings = {
        setting: profile[key] for key, setting in AWS_PROFILE_SETTINGS.items() if profile.get(key)
    }
    if profile and "access_key_id" not in settings:
        others = ("sso_session", "sso_start_url", "role_arn", "credential_process")
        if any(key in profile for key in others):
            raise DataError(
                f"{url}: the profile {name!r} in {config_file} holds no keys; run: eval "
                f'"$(aws configure export-credentials --profile {name} --format env)"'
            )
    return settings


class BucketFile:
    """An object that is downloaded as one file, in parallel blocks."""

    def __init__(self, bucket: Bucket, description: "ObjectMeta"):
        self._bucket = bucket
        self._description = description

    @contextmanager
    def open(self, offset: int, version: Version | None) -> Iterator[Response]:
        """Read the blocks from `offset` on, in order; see `RemoteFile`."""
        current = Version(
            self._description["e_tag"],
            self._description["last_modified"].isoformat(),
            self._description["size"],
        )
        start = offset if version == current else 0
        with closing(self._read_blocks(start)) as chunks:
            yield Response(current, start, chunks)

    def _read_blocks(self, start: int) -> Generator[bytes]:
        size = self._description["size"]
        etag = self._description["e_tag"]

        def read(position: int) -> bytes:
            return self._bucket.read_block(position, min(position + BLOCK_BYTES, size), etag)

        return map_in_threads(read, range(start, size, BLOCK_BYTES), PARALLEL_BLOCKS)


def map_in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result]:
    """Yield `work(item)` in the order of the items, some of which are worked on at once."""
    executor = ThreadPoolExecutor(threads)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(work, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def run_interruptibly(work: Callable[[], Result]) -> Result:
    """Return the result of `work`, which runs in a thread: Python handles signals meanwhile.

    Python can't do so while code that is not Python waits for a network.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()
