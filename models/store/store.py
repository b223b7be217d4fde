"""`Store`: bundles by name and version, in a directory or in a bucket.

Versions are 1, 2, 3, …; `latest` names one of them. A version becomes visible as a whole or not at
all, two jobs that finish at the same time get two versions, and `latest` moves atomically. Training
publishes here; the server and `imago models` read it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol
from urllib.parse import unquote, urlsplit

from models.bundle import MANIFEST_FILE, NAME_PATTERN, Bundle, BundleError, Manifest
from models.store.bucket import BucketBackend
from models.store.cache import BundleCache
from models.store.directory import DirectoryBackend
from models.store.errors import IncompleteVersion
from models.store.layout import LATEST
from models.store.object_storage import BUCKET_SCHEMES


class Backend(Protocol):
    """What differs between a directory and a bucket. Names are valid, versions are numbers."""

    def location_of(self, name: str, version: str | int) -> str:
        """Return the path or URL of a version, for messages."""

    def list_names(self) -> list[str]:
        """Return what may be the names of models."""

    def list_versions(self, name: str) -> list[int]:
        """Return the complete versions, ascending."""

    def list_taken(self, name: str) -> list[int]:
        """Return the versions that a new writer can't have."""

    def read_latest(self, name: str) -> int | None:
        """Return the version that `latest` names."""

    def read_manifest(self, name: str, version: int) -> Manifest | None:
        """Return the manifest of a version; None if the version does not exist."""

    def read_checksums(self, name: str, version: int) -> bytes | None:
        """Return SHA256SUMS of a version; None if the version does not exist."""

    def local_path(self, name: str, version: int) -> Path | None:
        """Return the directory of a version where it is on this machine already."""

    def fetch(self, name: str, version: int) -> Path | None:
        """Return the directory of a version; None if the version does not exist."""

    def check_writable(self, name: str) -> None:
        """Raise BundleError where nothing can be published under this name."""

    def claim(self, name: str, version: int) -> Path | None:
        """Claim a version; return a directory for its files, or None where it is taken."""

    def release(self, name: str, version: int, staged: Path) -> None:
        """Give up a claim, and delete what is not published."""

    def publish(self, name: str, version: int, staged: Path) -> Path:
        """Make a claimed version visible; return its directory on this machine."""

    def upload_signature(self, name: str, version: int) -> None:
        """Store the signature that was written to the directory of a version."""

    def move_latest(self, name: str, version: int, forward_only: bool) -> None:
        """Make `latest` name a version; with `forward_only` unless it names a newer one."""

    def delete_version(self, name: str, version: int) -> None:
        """Delete a version, which is never visible in part."""

    def delete_abandoned(self, name: str) -> None:
        """Delete what jobs that died more than a day ago have left."""


class Store:
    """Bundles by name and version. `location` is a directory, which need not exist yet, or a URL.

    A bucket, s3://bucket/prefix, gs://… or az://…, is read through `cache`, by default the cache
    directory of the user. file:///… is a directory. Methods raise BundleError where a directory
    can't be read, and StoreError, a kind of BundleError, where a bucket can't be used.
    """

    def __init__(self, location: str | Path, cache: BundleCache | None = None):
        self.location = str(location)
        self._backend: Backend = _open_backend(self.location, cache)

    @property
    def is_bucket(self) -> bool:
        """Whether it is in a bucket, so that versions are copied to a cache."""
        return isinstance(self._backend, BucketBackend)

    def names(self) -> list[str]:
        """Return the names that have at least one version, sorted."""
        names: list[str] = []
        for name in self._backend.list_names():
            if re.fullmatch(NAME_PATTERN, name) and self.versions(name):
                names.append(name)
        return sorted(names)

    def versions(self, name: str) -> list[int]:
        """Return the versions of a name, ascending; empty for an unknown name."""
        return self._backend.list_versions(name)

    def latest(self, name: str) -> int | None:
        """Return the version that `latest` names, or None."""
        return self._backend.read_latest(name)

    def location_of(self, name: str, version: str | int) -> str:
        """Return the path or URL of a version, for messages."""
        return self._backend.location_of(name, version)

    def path(self, name: str, version: str | int = LATEST) -> Path:
        """Return the directory of a version, "latest" or a number; one of a bucket is a copy.

        Raises BundleError that lists what the store has instead.
        """
        number = self._find_version(name, version)
        path = None if number is None else self._backend.fetch(name, number)
        if path is None:
            self._raise_missing(name, version)
        return path

    def local_path(self, name: str, version: int) -> Path:
        """Return the directory of a version that `path` has returned before, without a request.

        Raises BundleError where it is gone.
        """
        path = self._backend.local_path(name, version)
        if path is None:
            raise BundleError(f"{self.location_of(name, version)}: not on this machine any more")
        return path

    def open(
        self,
        name: str,
        version: str | int = LATEST,
        verify: bool = True,
        public_key: Path | None = None,
    ) -> Bundle:
        """Open a version. Raises BundleError as `path` and `Bundle` do."""
        return Bundle(self.path(name, version), verify, public_key)

    def read_manifest(self, name: str, version: str | int = LATEST) -> Manifest:
        """Return the manifest of a version, without its other files. Raises BundleError."""
        number = self._find_version(name, version)
        manifest = None if number is None else self._backend.read_manifest(name, number)
        if manifest is None:
            self._raise_missing(name, version)
        if (manifest.name, manifest.version) != (name, number):
            raise BundleError(
                f"{self.location_of(name, str(number))}/{MANIFEST_FILE}: belongs to "
                f"{manifest.name}/{manifest.version}, so the directory was renamed, or is a link"
            )
        return manifest

    def read_checksums(self, name: str, version: int) -> bytes | None:
        """Return SHA256SUMS of a version, which identifies all its files; None without it."""
        return self._backend.read_checksums(name, version)

    def _find_version(self, name: str, version: str | int) -> int | None:
        """Return the number of "latest" or of a version; None where it can't exist."""
        if not re.fullmatch(NAME_PATTERN, name):
            return None
        if str(version) == LATEST:
            return self.latest(name)
        return int(version) if str(version).isdecimal() else None

    def _raise_missing(self, name: str, version: str | int) -> NoReturn:
        # Only now list the store, which may be large and on a network disk.
        self._check_name_exists(name)
        versions = ", ".join(map(str, self.versions(name)))
        latest = self.latest(name) if self.is_bucket else None
        if latest is not None and str(version) in (LATEST, str(latest)):
            raise IncompleteVersion(
                f"{self.location}: {LATEST} of {name} names version {latest}, which is "
                f"half-written or deleted; it has {versions}"
            )
        raise BundleError(f"{self.location}: {name} has no version {version}; it has {versions}")

    def check_writable(self, name: str) -> None:
        """Raise BundleError where a version of this name could not be published.

        Nothing is left: a job that fails before it publishes leaves no trace in the store.
        """
        _check_name(name)
        self._backend.check_writable(name)

    @contextmanager
    def stage(self, name: str, version: int | None = None) -> Iterator["StagedVersion"]:
        """Give a hidden directory to write a new version in.

            with store.stage("digits") as staged:
                ...  # write the bundle of digits/<staged.version> to staged.path
                staged.publish()

        The directory is deleted when the block ends without `publish`. `version` defaults to the
        next free one; no two writers get the same. Raises BundleError where `version` exists or
        is being written.
        """
        _check_name(name)
        if version is None:
            number, directory = self._claim_next(name)
        else:
            number, directory = self._claim_one(name, version)
        try:
            yield StagedVersion(self, name, number, directory)
        finally:
            self._backend.release(name, number, directory)

    def _claim_next(self, name: str) -> tuple[int, Path]:
        """Claim the next free version. Return it and its staging directory."""
        version = max(self._backend.list_taken(name), default=0) + 1
        while True:
            directory = self._backend.claim(name, version)
            if directory is not None:
                return version, directory
            version += 1

    def _claim_one(self, name: str, version: int) -> tuple[int, Path]:
        """Claim one version, or raise BundleError where it is taken."""
        directory = self._backend.claim(name, version)
        if directory is None:
            raise BundleError(
                f"{self.location_of(name, version)}: exists already, or another job is writing it"
            )
        return version, directory

    def promote(self, name: str, version: int) -> None:
        """Make `latest` name a version, atomically.

        Raises BundleError without that version, or where nothing can be written.
        """
        self.path(name, version)
        self._backend.move_latest(name, version, forward_only=False)

    def advance(self, name: str, version: int) -> None:
        """Make `latest` name a version, unless it names a newer one.

        Of two jobs that finish at the same time, the newer version stays.
        """
        self._backend.move_latest(name, version, forward_only=True)

    def rollback(self, name: str) -> int:
        """Make `latest` name the version before it and return that.

        Raises BundleError where there is no older version.
        """
        self._check_name_exists(name)
        latest = self.latest(name)
        previous = _find_previous(self.versions(name), latest)
        if previous is None:
            location = self.location_of(name, LATEST)
            raise BundleError(
                f"{location}: no version older than {latest or LATEST} to roll back to"
            )
        self.promote(name, previous)
        return previous

    def prune(self, name: str, keep: int) -> list[int]:
        """Delete all versions but the newest `keep`, `latest` and the one before it.

        Also deletes what jobs that died more than a day ago have left. Returns the versions that
        were deleted.
        """
        self._check_name_exists(name)
        versions = self.versions(name)
        latest = self.latest(name)
        kept = {*versions[-keep:], latest, _find_previous(versions, latest)}

        deleted = [version for version in versions if version not in kept]
        for version in deleted:
            self._backend.delete_version(name, version)
        self._backend.delete_abandoned(name)
        return deleted

    def save_signature(self, name: str, version: int) -> None:
        """Store the signature that was written to the directory of a version."""
        self._backend.upload_signature(name, version)

    def _check_name_exists(self, name: str) -> None:
        names = self.names()
        if name not in names:
            raise BundleError(
                f"{self.location}: no model {name!r} in this store; it has "
                f"{', '.join(names) or 'nothing'}"
            )


@dataclass(frozen=True)
class StagedVersion:
    """A version that is being written: a claimed number and the hidden directory for its files."""

    store: Store
    name: str
    version: int
    path: Path

    @property
    def location(self) -> str:
        """The path or URL that the version will have."""
        return self.store.location_of(self.name, self.version)

    def publish(self, promote: bool = True) -> Bundle:
        """Check the bundle, make it visible as a whole, and move `latest` forward to it.

        `latest` stays where another writer already published a newer version. Raises BundleError
        for an incomplete bundle, which then stays invisible.
        """
        manifest = Bundle(self.path).manifest
        if (manifest.name, manifest.version) != (self.name, self.version):
            raise BundleError(
                f"{self.path / MANIFEST_FILE}: is of {manifest.name}/{manifest.version}, "
                f"not of {self.name}/{self.version}"
            )
        _make_readable(self.path)
        target = self.store._backend.publish(self.name, self.version, self.path)
        if promote:
            self.store.advance(self.name, self.version)
        return Bundle(target, verify=False)


def _open_backend(location: str, cache: BundleCache | None) -> Backend:
    """Return the backend of a path or URL. Raises BundleError for a URL that is of no store."""
    scheme, separator, _ = location.partition("://")
    if not separator:
        return DirectoryBackend(Path(location))
    if scheme == "file":
        return DirectoryBackend(_parse_file_url(location))
    if scheme in BUCKET_SCHEMES:
        return BucketBackend(location, cache or BundleCache(location, None))
    known = ", ".join(f"{name}://" for name in BUCKET_SCHEMES)
    raise BundleError(f"{location}: no store; give a directory, or a URL that begins with {known}")


def _parse_file_url(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise BundleError(f"{url}: names another machine; write file:///path of this one")
    return Path(unquote(parts.path))


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        raise BundleError(
            f"{name!r} can't name a model; use up to 63 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit"
        )


def _find_previous(versions: list[int], version: int | None) -> int | None:
    older = [number for number in versions if number < (version or 0)]
    return max(older, default=None)


def _make_readable(directory: Path) -> None:
    """Let every user read the files: the server often runs as another one than training."""
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
