"""Bundles to and from other places: any URL that fsspec knows (s3://, gs://, az://, file://, …).

A remote store is laid out as a local one, `<url>/<name>/<version>/…`. Object stores can't rename, so there SHA256SUMS
is written last, after every other file was read back and its digest compared: a version without it is not there. Nor
have they links: `<name>/latest` is an object that holds the number. A local store, file:// too, keeps its own ways.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from models.bundle import Bundle, BundleError
from models.bundle.checksums import (
    CHECKSUMS_FILE,
    MAX_CHECKSUMS_BYTES,
    SIGNATURE,
    file_sha256,
    parse_checksums,
)
from models.store import LATEST, Store

MAX_BUNDLE_BYTES = 32 << 30
CHUNK = 4 << 20


def push(
    store: Store, name: str, version: str | int, url: str, promote: bool = True
) -> tuple[str, bool]:
    """Copy a version to the store at `url`; returns where it lies and whether it had to be copied.

    `promote` moves latest there forward, never back. Raises BundleError where the bundle is not whole, or the same
    version lies there with other contents.
    """
    remote = Remote(url)
    bundle = store.open(name, version)
    number, where = bundle.manifest.version, f"{url.rstrip('/')}/{name}/{bundle.manifest.version}"
    if remote.store:
        return where, pull(remote.store, name, number, str(store.root), promote)[1]
    sums = (bundle.path / CHECKSUMS_FILE).read_bytes()
    with remote.errors():
        copied = not remote.has(name, number)
        if not copied and remote.read(name, number, CHECKSUMS_FILE, MAX_CHECKSUMS_BYTES) != sums:
            raise BundleError(f"{where}: there already, with other contents")
        if copied:
            for file, digest in {
                **parse_checksums(sums.decode(), CHECKSUMS_FILE),
                **_signature(bundle.path),
            }.items():
                remote.write(bundle.path / file, name, number, file, digest)
            remote.fs.pipe_file(remote.path(name, number, CHECKSUMS_FILE), sums)
        if promote and (remote.latest(name) or 0) <= number:
            remote.fs.pipe_file(remote.path(name, LATEST), f"{number}\n".encode())
    return where, copied


def pull(
    store: Store, name: str, version: str | int, url: str, promote: bool = True
) -> tuple[Bundle, bool]:
    """Copy a version from the store at `url` into `store`; returns it and whether it had to be copied.

    Files go to a hidden directory that is renamed once every digest fits, so an interrupted copy leaves nothing
    visible. Raises BundleError where there is no such version, it is not whole, or another one is here already.
    """
    remote = Remote(url)
    with remote.errors():
        number = remote.latest(name) if str(version) == LATEST else int(version)
        where = f"{url.rstrip('/')}/{name}/{number or version}"
        if not number or not remote.has(name, number):
            raise BundleError(
                f"{where}: no such version, or not whole ({CHECKSUMS_FILE} is missing)"
            )
        text = remote.read(name, number, CHECKSUMS_FILE, MAX_CHECKSUMS_BYTES)
        if number in store.versions(name):
            bundle = store.open(name, number)
            if (bundle.path / CHECKSUMS_FILE).read_bytes() != text:
                raise BundleError(
                    f"{bundle.path}: another bundle than {where}; pull it into another store"
                )
            if promote:
                store.advance(name, number)
            return bundle, False
        with store.stage(name, number) as staged:
            files = [
                *parse_checksums(text.decode(), f"{where}/{CHECKSUMS_FILE}"),
                *remote.signature(name, number),
            ]
            if (total := sum(remote.size(name, number, file) for file in files)) > MAX_BUNDLE_BYTES:
                raise BundleError(f"{where}: {total} bytes, and {MAX_BUNDLE_BYTES} are allowed")
            for file in files:
                target = staged.path / file
                target.parent.mkdir(parents=True, exist_ok=True)
                remote.fs.get_file(remote.path(name, number, file), str(target))
            (staged.path / CHECKSUMS_FILE).write_bytes(text)
            return staged.publish(promote), True


class Remote:
    """A store behind a URL. `store` is set where it is a local directory."""

    def __init__(self, url: str):
        try:
            from fsspec.core import url_to_fs
            from fsspec.implementations.local import LocalFileSystem
        except ImportError as error:
            raise BundleError(
                "push and pull need the package fsspec: pip install 'imago[remote]'"
            ) from error
        self.url = url
        with self.errors():
            self.fs, self.root = url_to_fs(url)
        self.store = Store(self.root) if isinstance(self.fs, LocalFileSystem) else None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """File systems raise what they like; all of it becomes one line that names the URL."""
        try:
            yield
        except BundleError:
            raise
        except Exception as error:
            cause = (str(error).splitlines() or [""])[0]
            raise BundleError(f"{self.url}: {type(error).__name__}: {cause}") from error

    def path(self, *parts: str | int) -> str:
        return str(PurePosixPath(self.root, *map(str, parts)))

    def has(self, name: str, version: int) -> bool:
        return self.fs.exists(self.path(name, version, CHECKSUMS_FILE))

    def latest(self, name: str) -> int | None:
        if self.store:
            return self.store.latest(name)
        path = self.path(name, LATEST)
        text = (
            self.fs.cat_file(path, start=0, end=32).decode().strip() if self.fs.exists(path) else ""
        )
        return int(text) if text.isdecimal() else None

    def size(self, name: str, version: int, file: str) -> int:
        return self.fs.size(self.path(name, version, file)) or 0

    def read(self, name: str, version: int, file: str, limit: int) -> bytes:
        if (size := self.size(name, version, file)) > limit:
            raise BundleError(
                f"{self.url}/{name}/{version}/{file}: {size} bytes, and {limit} are allowed"
            )
        return self.fs.cat_file(self.path(name, version, file))

    def signature(self, name: str, version: int) -> list[str]:
        return [SIGNATURE] if self.fs.exists(self.path(name, version, SIGNATURE)) else []

    def write(self, source: Path, name: str, version: int, file: str, digest: str) -> None:
        """Upload one file, read it back and compare; raises BundleError where what arrived is something else."""
        target = self.path(name, version, file)
        self.fs.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
        self.fs.put_file(str(source), target)
        found = hashlib.sha256()
        with self.fs.open(target, "rb") as stored:
            while chunk := stored.read(CHUNK):
                found.update(chunk)
        if found.hexdigest() != digest:
            raise BundleError(
                f"{self.url}/{name}/{version}/{file}: arrived damaged (sha256 differs)"
            )


def _signature(path: Path) -> dict[str, str]:
    return {SIGNATURE: file_sha256(path / SIGNATURE)} if (path / SIGNATURE).exists() else {}
