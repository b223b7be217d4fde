"""`BucketBackend`: bundles below the prefix of a bucket, `<url>/<name>/<version>/`.

    <name>/<version>/…          the files of a bundle; manifest.json is written last and deleted
                                first, and a version without it does not exist
    <name>/latest               an object that holds the number of a version
    <name>/.staging-<version>   the claim of the job that writes this version

A claim is created by a write that fails where the object exists, so each version has one writer.
`latest` moves by a write that fails where the object has changed since it was read. In a bucket
that a directory was copied to, `latest` may be a copy of the version. What is read is copied to a
`BundleCache` first.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from models.bundle import (
    CHECKSUMS_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    BundleError,
    Manifest,
    file_sha256,
)
from models.bundle.checksums import MAX_CHECKSUMS_BYTES, parse_checksums
from models.bundle.files import MAX_SIGNATURE_BYTES
from models.bundle.manifest import MAX_MANIFEST_BYTES, parse_manifest
from models.store.bucket_client import BucketClient, StoredObject
from models.store.cache import BundleCache, measure_bytes
from models.store.errors import IncompleteVersion, StoreError
from models.store.layout import ABANDONED_SECONDS, LATEST, MAX_LATEST_BYTES, STAGING_PREFIX

if TYPE_CHECKING:
    from obstore import ObjectMeta

MAX_BUNDLE_BYTES = 32 << 30
MAX_CLAIM_BYTES = 4096
PARALLEL_OBJECTS = 8
MOVE_ATTEMPTS = 20

Item = TypeVar("Item")


class _Claim(NamedTuple):
    """A version that this process writes."""

    content: bytes  # of the object that claims it
    staging: AbstractContextManager[Path]  # the directory of its files


class BucketBackend:
    """The versions in a bucket. Methods raise StoreError where the bucket can't be used."""

    def __init__(self, url: str, cache: BundleCache):
        self.url = url.rstrip("/")
        self.cache = cache
        self._client = BucketClient(url)
        self._latest: dict[str, StoredObject] = {}  # as last read, by name
        self._claims: dict[Path, _Claim] = {}  # by the directory of the files

    def location_of(self, name: str, version: str | int) -> str:
        """Return the URL of a version."""
        return f"{self.url}/{name}/{version}"

    # Reading

    def list_names(self) -> list[str]:
        """Return the names of the directories at the top of the store."""
        return self._client.list_directories()

    def list_versions(self, name: str) -> list[int]:
        """Return the complete versions of a name, ascending."""
        return _find_versions(self._client.list_objects(name), name)

    def has_version(self, name: str, version: int) -> bool:
        """Whether a version exists, which is complete then."""
        path = f"{name}/{version}/{MANIFEST_FILE}"
        return self._client.read(path, MAX_MANIFEST_BYTES) is not None

    def read_latest(self, name: str) -> int | None:
        """Return the version that `latest` names; None where there is no `latest`.

        One request, which returns nothing while `latest` stays the same.
        """
        current = self._read_latest(name)
        if current is not None:
            return _parse_latest(current)
        manifest = self._client.read(f"{name}/{LATEST}/{MANIFEST_FILE}", MAX_MANIFEST_BYTES)
        if manifest is None:
            return None
        return self._parse_manifest(manifest, name, LATEST).version

    def _read_latest(self, name: str) -> StoredObject | None:
        known = self._latest.get(name)
        current = self._client.read_changed(f"{name}/{LATEST}", MAX_LATEST_BYTES, known)
        if current is None:
            self._latest.pop(name, None)
        else:
            self._latest[name] = current
        return current

    def read_manifest(self, name: str, version: int) -> Manifest | None:
        """Return the manifest of a version without its other files; None without the version."""
        path = f"{name}/{version}/{MANIFEST_FILE}"
        stored = self._client.read(path, MAX_MANIFEST_BYTES)
        return None if stored is None else self._parse_manifest(stored, name, version)

    def _parse_manifest(self, stored: StoredObject, name: str, version: str | int) -> Manifest:
        source = f"{self.location_of(name, version)}/{MANIFEST_FILE}"
        return parse_manifest(stored.content, source)

    def read_checksums(self, name: str, version: int) -> bytes | None:
        """Return SHA256SUMS of a version; None if the version does not exist."""
        stored = self._client.read(f"{name}/{version}/{CHECKSUMS_FILE}", MAX_CHECKSUMS_BYTES)
        if stored is None or not self.has_version(name, version):
            return None
        return stored.content

    def local_path(self, name: str, version: int) -> Path | None:
        """Return the copy of a version in the cache, without a request; None where none is."""
        return self.cache.find(name, version)

    def fetch(self, name: str, version: int) -> Path | None:
        """Return the copy of a version in the cache, which is made now where it is needed.

        Returns None where the version does not exist. Raises BundleError for one that is
        incomplete or damaged.
        """
        path = f"{name}/{version}/{CHECKSUMS_FILE}"
        with self.cache.lock(name):
            checksums = self._client.read(path, MAX_CHECKSUMS_BYTES)
            copy = self.cache.find(name, version)
            if copy is not None and checksums is not None and _is_copy(copy, checksums.content):
                self._copy_signature(name, version, copy)
                self.cache.mark_used(copy)
                return copy

            if not self.has_version(name, version):
                return None
            if checksums is None:
                raise IncompleteVersion(
                    f"{self._client.url_of(path)}: no such object, so the version is half-written; "
                    "push it again"
                )
            return self._copy_to_cache(name, version, checksums.content)

    def _copy_signature(self, name: str, version: int, copy: Path) -> None:
        """Copy the signature again: a version may be signed after it was published."""
        path = f"{name}/{version}/{SIGNATURE_FILE}"
        signature = self._client.read(path, MAX_SIGNATURE_BYTES)
        if signature is not None:
            (copy / SIGNATURE_FILE).write_bytes(signature.content)

    def _copy_to_cache(self, name: str, version: int, checksums_text: bytes) -> Path:
        location = self.location_of(name, version)
        checksums = parse_checksums(checksums_text, f"{location}/{CHECKSUMS_FILE}")
        directory = f"{name}/{version}/"
        sizes: dict[str, int] = {}
        for path, description in self._client.list_objects(directory).items():
            sizes[path.removeprefix(directory)] = description["size"]
        for file in checksums:
            if file not in sizes:
                raise IncompleteVersion(
                    f"{location}/{file}: listed in {CHECKSUMS_FILE}, but missing, so the version "
                    "is half-written; push it again"
                )

        wanted = [file for file in (*checksums, SIGNATURE_FILE) if file in sizes]
        total = sum(sizes[file] for file in wanted)
        if total > MAX_BUNDLE_BYTES:
            raise BundleError(
                f"{location}: {total} bytes are more than the {MAX_BUNDLE_BYTES} allowed"
            )

        self.cache.make_room(total)
        with self.cache.stage() as staged:

            def download(file: str) -> None:
                target = staged / file
                target.parent.mkdir(parents=True, exist_ok=True)
                sha256 = self._client.download(directory + file, target)
                if sha256 is None:
                    raise BundleError(f"{location}/{file}: no such object; it was deleted just now")
                if file in checksums and sha256 != checksums[file]:
                    raise BundleError(
                        f"{location}/{file}: changed since it was written (sha256 differs from "
                        f"{CHECKSUMS_FILE})"
                    )

            _run_for_each(download, wanted)
            (staged / CHECKSUMS_FILE).write_bytes(checksums_text)
            return self.cache.add(name, version, staged)

    # Writing

    def check_writable(self, name: str) -> None:
        """Raise StoreError where no object of this name can be written: one is, and is deleted."""
        path = f"{name}/{STAGING_PREFIX}check-{secrets.token_hex(8)}"
        self._client.create(path, b"")
        self._client.delete([path])

    def list_taken(self, name: str) -> list[int]:
        """Return all versions that no new writer can have: also those that are being written."""
        taken: set[int] = set()
        for path in self._client.list_objects(name):
            directory, _, rest = path.removeprefix(f"{name}/").partition("/")
            number = directory.removeprefix(STAGING_PREFIX)
            if number.isdecimal() and (rest or number != directory):
                taken.add(int(number))
        return sorted(taken)

    def claim(self, name: str, version: int) -> Path | None:
        """Claim a version; return a directory for its files, or None where it is taken."""
        path = self._claim_path(name, version)
        writer = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        claim = json.dumps(writer).encode()
        if not self._client.create(path, claim):
            return None
        if self.has_version(name, version):  # published just before the claim
            self._client.delete([path])
            return None

        staging = self.cache.stage()
        staged = staging.__enter__()
        self._claims[staged] = _Claim(claim, staging)
        return staged

    def release(self, name: str, version: int, staged: Path) -> None:
        """Delete the claim, and what was uploaded of a version that is not published."""
        claim = self._claims.pop(staged)
        claim.staging.__exit__(None, None, None)
        with suppress(StoreError):  # prune deletes what stays
            objects = self._client.list_objects(f"{name}/{version}/")
            if f"{name}/{version}/{MANIFEST_FILE}" not in objects:
                self._client.delete(list(objects))
            self._client.delete([self._claim_path(name, version)])

    def _claim_path(self, name: str, version: int) -> str:
        return f"{name}/{STAGING_PREFIX}{version}"

    def publish(self, name: str, version: int, staged: Path) -> Path:
        """Upload a bundle, its manifest last; return its copy in the cache."""
        claim = self._client.read(self._claim_path(name, version), MAX_CLAIM_BYTES)
        if claim is None or claim.content != self._claims[staged].content:
            raise BundleError(
                f"{self.location_of(name, version)}: another job writes this version, or its claim "
                "was removed; publish again to get the next one"
            )
        checksums_text = (staged / CHECKSUMS_FILE).read_bytes()
        checksums = parse_checksums(checksums_text, staged / CHECKSUMS_FILE)
        del checksums[MANIFEST_FILE]
        for file in (CHECKSUMS_FILE, SIGNATURE_FILE):
            if (staged / file).exists():
                checksums[file] = file_sha256(staged / file)

        def upload(file: str) -> None:
            path = f"{name}/{version}/{file}"
            self._client.upload(staged / file, path)
            if self._client.sha256(path) != checksums[file]:
                raise BundleError(
                    f"{self._client.url_of(path)}: arrived damaged (sha256 differs); publish again"
                )

        _run_for_each(upload, checksums)
        manifest_path = f"{name}/{version}/{MANIFEST_FILE}"
        if not self._client.create(manifest_path, (staged / MANIFEST_FILE).read_bytes()):
            raise BundleError(
                f"{self.location_of(name, version)}: exists already with other contents"
            )
        with self.cache.lock(name):
            self.cache.make_room(measure_bytes(staged))
            return self.cache.add(name, version, staged)

    def upload_signature(self, name: str, version: int) -> None:
        """Upload the signature that was written to the copy of a version."""
        copy = self.cache.find(name, version)
        assert copy is not None  # the caller signed it
        self._client.upload(copy / SIGNATURE_FILE, f"{name}/{version}/{SIGNATURE_FILE}")

    def move_latest(self, name: str, version: int, forward_only: bool) -> None:
        """Make `latest` name a version; with `forward_only` unless it names a newer one."""
        content = f"{version}\n".encode()
        path = f"{name}/{LATEST}"
        for _ in range(MOVE_ATTEMPTS):
            current = self._read_latest(name)
            if current is None:
                older = self.read_latest(name) or 0  # of a copy of the version
                if forward_only and older > version:
                    return
                if self._client.create(path, content):
                    return
                continue

            number = _parse_latest(current) or 0
            if number == version or (forward_only and number > version):
                return
            if self._client.replace(path, content, current):
                return
        raise StoreError(
            f"{self._client.url_of(path)}: other writers keep moving it; try again", may_pass=True
        )

    def delete_version(self, name: str, version: int) -> None:
        """Delete a version, its manifest first: it is never visible in part."""
        self._client.delete([f"{name}/{version}/{MANIFEST_FILE}"])
        self._client.delete(list(self._client.list_objects(f"{name}/{version}/")))

    def delete_abandoned(self, name: str) -> None:
        """Delete the objects of uploads that were interrupted more than a day ago."""
        objects = self._client.list_objects(name)
        complete = _find_versions(objects, name)
        ages: dict[str, float] = {}  # of a version: seconds since its newest object was written
        files: dict[str, list[str]] = {}
        claims: dict[str, list[str]] = {}
        for path, description in objects.items():
            directory = path.removeprefix(f"{name}/").partition("/")[0]
            version = directory.removeprefix(STAGING_PREFIX)
            if version != directory:
                claims.setdefault(version, []).append(path)
            elif version.isdecimal() and int(version) not in complete:
                files.setdefault(version, []).append(path)
            else:
                continue
            age = time.time() - description["last_modified"].timestamp()
            ages[version] = min(age, ages.get(version, age))

        for version, age in ages.items():
            if age > ABANDONED_SECONDS:
                self._client.delete(files.get(version, []))
                self._client.delete(claims.get(version, []))  # last: it keeps other writers away


def _find_versions(objects: "dict[str, ObjectMeta]", name: str) -> list[int]:
    """Return the versions that have a manifest, ascending."""
    versions: list[int] = []
    for path in objects:
        number, _, file = path.removeprefix(f"{name}/").partition("/")
        if number.isdecimal() and file == MANIFEST_FILE:
            versions.append(int(number))
    return sorted(versions)


def _parse_latest(stored: StoredObject) -> int | None:
    text = stored.content.decode(errors="replace").strip()
    return int(text) if text.isdecimal() else None


def _is_copy(directory: Path, checksums_text: bytes) -> bool:
    """Whether a directory of the cache holds the files of these checksums, undamaged."""
    try:
        if (directory / CHECKSUMS_FILE).read_bytes() != checksums_text:
            return False
        checksums = parse_checksums(checksums_text, directory / CHECKSUMS_FILE)
        return all(file_sha256(directory / file) == sha256 for file, sha256 in checksums.items())
    except (OSError, BundleError):
        return False


def _run_for_each(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Call `work` for all items, some of them at once. Raises the first error."""
    executor = ThreadPoolExecutor(PARALLEL_OBJECTS)
    try:
        for _ in executor.map(work, items):
            pass
    finally:
        executor.shutdown(cancel_futures=True)
