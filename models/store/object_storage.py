"""Access to buckets by obstore: credentials, time limits, and errors in words.

Credentials are those of the cloud's own tools: the variables AWS_…, GOOGLE_… and AZURE_…, the files
that the commands aws and gcloud write, and what a machine or a pod in the cloud is given.
AWS_ENDPOINT_URL names another store with the interface of S3.

obstore is imported when a bucket is used. Its threads do not survive a fork: a process that forks
must not use a bucket in its children.
"""

import configparser
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

BUCKET_SCHEMES = ("s3", "gs", "az")
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

NO_CREDENTIALS = "no credentials; {advice}"
ACCESS_DENIED = "access denied; {advice}"
NO_BUCKET = "no such bucket; check the name"
OTHER_REGION = "the bucket is in another region; set AWS_REGION"
CLOCK_IS_OFF = "the clock of this machine is off, so the store refuses its requests; set the clock"
# Words of obstore's messages -> what is wrong; the first that occurs counts. The paths are those at
# which a machine of a cloud gives credentials; they can't be reached elsewhere.
PROBLEMS = {
    "RequestTimeTooSkewed": CLOCK_IS_OFF,
    "reasonable timeframe": CLOCK_IS_OFF,  # Google, of a token from another time
    "/latest/api/token": NO_CREDENTIALS,
    "/latest/meta-data": NO_CREDENTIALS,
    "/computeMetadata/": NO_CREDENTIALS,
    "/metadata/identity/": NO_CREDENTIALS,
    "403 Forbidden": ACCESS_DENIED,
    "401 Unauthorized": ACCESS_DENIED,
    "404 Not Found": NO_BUCKET,
    "PermanentRedirect": OTHER_REGION,
    "301 Moved": OTHER_REGION,
}
# Of the answer to a request for an object, whose other 404 is that of a missing object.
MISSING_BUCKET_CODES = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
MAX_REASON_LENGTH = 300

Result = TypeVar("Result")


class ObjectStorageError(ValueError):
    """A URL or credentials that can't be used. The message is one line."""


def split_url(url: str) -> tuple[str, str, str]:
    """Return scheme, bucket and path of a URL. Raises ObjectStorageError without a bucket."""
    scheme, _, location = url.partition("://")
    bucket, _, path = location.partition("/")
    if not bucket:
        raise ObjectStorageError(f"{url}: no bucket; write {scheme}://bucket/path")
    return scheme, bucket, path.strip("/")


def open_client(url: str) -> Any:
    """Return obstore's client of the bucket of a URL; no request is sent.

    Raises ObjectStorageError for settings that obstore refuses.
    """
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    scheme, bucket, _ = split_url(url)
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
        raise ObjectStorageError(
            f"{url}: {describe_error(error)}; {CREDENTIALS_ADVICE[scheme]}"
        ) from error


def explain_error(error: Exception, url: str) -> str | None:
    """Return what is wrong and what to do about it; None for what may pass by itself.

    `error` is one of obstore, also the FileNotFoundError that it raises for a missing object.
    """
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    scheme, _, _ = url.partition("://")
    advice = CREDENTIALS_ADVICE[scheme]
    reason = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        is_bucket_missing = any(code in reason for code in MISSING_BUCKET_CODES)
        return NO_BUCKET if is_bucket_missing else None

    for words, problem in PROBLEMS.items():
        if words in reason:
            return problem.format(advice=advice)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return ACCESS_DENIED.format(advice=advice)
    return None


def describe_error(error: Exception) -> str:
    """Return one line of what obstore says, without its description for developers."""
    reason = " ".join(str(error).partition("Debug source")[0].split())
    return os.fsencode(reason).decode(errors="backslashreplace")[:MAX_REASON_LENGTH]


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


def _is_any_set(variables: tuple[str, ...]) -> bool:
    return any(os.environ.get(variable) for variable in variables)


def _read_aws_profile(url: str) -> dict[str, Any]:
    """Return the settings of the user's profile in ~/.aws, as `aws configure` writes them.

    Without such files there are none, and obstore asks the machine. Raises ObjectStorageError for a
    profile that is missing, or that names another way to get keys.
    """
    name = os.environ.get("AWS_PROFILE") or "default"
    config_file = os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"
    credentials_file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    sections = ((config_file, f"profile {name}"), (config_file, name), (credentials_file, name))

    profile: dict[str, str] = {}
    for file, section in sections:
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(Path(file).expanduser())
        except RuntimeError:  # this user has no home directory, so no files in it
            continue
        except (configparser.Error, UnicodeError) as error:
            raise ObjectStorageError(
                f"{file}: not readable: {str(error).splitlines()[0]}"
            ) from error
        if parser.has_section(section):
            profile.update(parser.items(section))

    if os.environ.get("AWS_PROFILE") and not profile:
        raise ObjectStorageError(f"{url}: no profile {name!r} in {config_file}; check AWS_PROFILE")
    settings = {
        setting: profile[key] for key, setting in AWS_PROFILE_SETTINGS.items() if profile.get(key)
    }
    if profile and "access_key_id" not in settings:
        others = ("sso_session", "sso_start_url", "role_arn", "credential_process")
        if any(key in profile for key in others):
            raise ObjectStorageError(
                f"{url}: the profile {name!r} in {config_file} holds no keys; run: eval "
                f'"$(aws configure export-credentials --profile {name} --format env)"'
            )
    return settings
