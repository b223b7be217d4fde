"""Copy bundles to and from a store at a URL that fsspec knows: s3://, gs://, az://, file://, …

A remote store has the layout of a local one, `<url>/<name>/<version>/…`, with two differences,
because object stores have no rename and no links:

- SHA256SUMS is written last, after every other file was read back and compared. A version without
  it does not exist.
- `<name>/latest` is an object that holds the number. In a bucket that a local store was copied to,
  it can be a copy of the version.

A local directory, also as file://, is treated as a `Store`.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from models.bundle import (
    CHECKSUMS_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    Bundle,
    BundleError,
    file_sha256,
)
from models.bundle.checksums import MAX_CHECKSUMS_BYTES, parse_checksums
from models.bundle.manifest import MAX_MANIFEST_BYTES, parse_manifest
from models.store.local import LATEST, MAX_LATEST_BYTES, Store

MAX_BUNDLE_BYTES = 32 << 30
CHUNK_BYTES = 4 << 20


def push(
    store: Store, name: str, version: str | int, url: str, promote: bool = True
) -> tuple[str, bool]:
    """Copy a version to the store at `url`.

    Returns the URL of the version, and whether it was copied: false where it exists already.
    `promote` moves `latest` of that store forward, never back. Raises BundleError where the bundle
    is incomplete, or the same version exists with other contents.
    """
    remote = RemoteStore(url)
    bundle = store.open(name, version)
    number = bundle.manifest.version
    target_url = f"{url.rstrip('/')}/{name}/{number}"
    if remote.local_store:
        _, is_copied = pull(remote.local_store, name, number, str(store.root), promote)
        return target_url, is_copied

    checksums_text = (bundle.path / CHECKSUMS_FILE).read_bytes()
    with remote.translate_errors():
        is_present = remote.has_version(name, number)
        if is_present:
            remote_text = remote.read(name, number, CHECKSUMS_FILE, MAX_CHECKSUMS_BYTES)
            if remote_text != checksums_text:
                raise BundleError(f"{target_url}: exists already with other contents")
        else:
            remote.upload_bundle(bundle, checksums_text)
        if promote:
            remote.advance(name, number)
    return target_url, not is_present


def pull(
    store: Store, name: str, version: str | int, url: str, promote: bool = True
) -> tuple[Bundle, bool]:
    """Copy a version from the store at `url` into `store`.

    Returns the bundle and whether it was copied: false where it exists already. An interrupted copy
    stays invisible. Raises BundleError if the version does not exist, if it is incomplete, or if
    `store` has the version with other contents.
    """
    if str(version) != LATEST and not str(version).isdecimal():
        raise BundleError(f"can't pull version {version!r} of {name}; give a number or latest")
    remote = RemoteStore(url)
    with remote.translate_errors():
        number = remote.latest(name) if str(version) == LATEST else int(version)
        source_url = f"{url.rstrip('/')}/{name}/{number or version}"
        if not number or not remote.has_version(name, number):
            raise BundleError(
                f"{source_url}: no such version, or it is incomplete ({CHECKSUMS_FILE} is missing)"
            )

        checksums_text = remote.read(name, number, CHECKSUMS_FILE, MAX_CHECKSUMS_BYTES)
        if number in store.versions(name):
            bundle = store.open(name, number)
            if (bundle.path / CHECKSUMS_FILE).read_bytes() != checksums_text:
                raise BundleError(
                    f"{bundle.path}: has other contents than {source_url}; pull into another store"
                )
            if promote:
                store.advance(name, number)
            return bundle, False

        files = list(parse_checksums(checksums_text, f"{source_url}/{CHECKSUMS_FILE}"))
        if remote.has_signature(name, number):
            files.append(SIGNATURE_FILE)
        total_bytes = sum(remote.size(name, number, file) for file in files)
        if total_bytes > MAX_BUNDLE_BYTES:
            raise BundleError(
                f"{source_url}: {total_bytes} bytes are more than the {MAX_BUNDLE_BYTES} allowed"
            )

        with store.stage(name, number) as staged:
            for file in files:
                remote.download(name, number, file, staged.path / file)
            (staged.path / CHECKSUMS_FILE).write_bytes(checksums_text)
            return staged.publish(promote), True


class RemoteStore:
    """A store at a URL. `local_store` is set where the URL is a local directory."""

    def __init__(self, url: str):
        try:
            from fsspec.core import url_to_fs
            from fsspec.implementations.local import LocalFileSystem
        except ImportError as error:
            raise BundleError(
                "push and pull need the package fsspec: pip install 'imago[remote]'"
            ) from error

        self.url = url
        with self.translate_errors():
            self.filesystem, self.root = url_to_fs(url)
        self.local_store: Store | None = None
        if isinstance(self.filesystem, LocalFileSystem):
            self.local_store = Store(self.root)

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turn any error of a file system into a BundleError of one line that names the URL."""
        try:
            yield
        except BundleError:
            raise
        except Exception as error:
            lines = str(error).splitlines()
            cause = lines[0] if lines else ""
            raise BundleError(f"{self.url}: {type(error).__name__}: {cause}") from error

    def path(self, *parts: str | int) -> str:
        """Return a path inside the store, as the file system takes it."""
        return str(PurePosixPath(self.root, *map(str, parts)))

    def has_version(self, name: str, version: int) -> bool:
        """Whether a version exists and is complete."""
        return self.filesystem.exists(self.path(name, version, CHECKSUMS_FILE))

    def has_signature(self, name: str, version: int) -> bool:
        """Whether a version is signed."""
        return self.filesystem.exists(self.path(name, version, SIGNATURE_FILE))

    def latest(self, name: str) -> int | None:
        """Return the version that `latest` names, or None."""
        if self.local_store:
            return self.local_store.latest(name)
        path = self.path(name, LATEST)
        if not self.filesystem.isfile(path):
            return self._read_copied_latest(self.path(name, LATEST, MANIFEST_FILE))
        text = self.filesystem.cat_file(path, start=0, end=MAX_LATEST_BYTES).decode().strip()
        return int(text) if text.isdecimal() else None

    def _read_copied_latest(self, manifest_path: str) -> int | None:
        """Return the version of a manifest, or None where there is none."""
        if not self.filesystem.isfile(manifest_path):
            return None
        content = self.filesystem.cat_file(manifest_path, start=0, end=MAX_MANIFEST_BYTES)
        return parse_manifest(content, manifest_path).version

    def advance(self, name: str, version: int) -> None:
        """Make `latest` name a version, unless it names a newer one."""
        if (self.latest(name) or 0) <= version:
            self.filesystem.pipe_file(self.path(name, LATEST), f"{version}\n".encode())

    def size(self, name: str, version: int, file: str) -> int:
        """Return the bytes of a file."""
        return self.filesystem.size(self.path(name, version, file)) or 0

    def read(self, name: str, version: int, file: str, max_bytes: int) -> bytes:
        """Return the contents of a file. Raises BundleError for more than `max_bytes`."""
        size = self.size(name, version, file)
        if size > max_bytes:
            raise BundleError(
                f"{self.url}/{name}/{version}/{file}: {size} bytes are more than "
                f"the {max_bytes} allowed"
            )
        return self.filesystem.cat_file(self.path(name, version, file))

    def download(self, name: str, version: int, file: str, target: Path) -> None:
        """Copy one file to a local path."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.filesystem.get_file(self.path(name, version, file), str(target))

    def upload_bundle(self, bundle: Bundle, checksums_text: bytes) -> None:
        """Upload all files of a bundle, SHA256SUMS last: with it the version exists."""
        name = bundle.manifest.name
        version = bundle.manifest.version
        checksums = parse_checksums(checksums_text, CHECKSUMS_FILE)
        signature = bundle.path / SIGNATURE_FILE
        if signature.exists():
            checksums[SIGNATURE_FILE] = file_sha256(signature)

        for file, sha256 in checksums.items():
            self._upload(bundle.path / file, name, version, file, sha256)
        self.filesystem.pipe_file(self.path(name, version, CHECKSUMS_FILE), checksums_text)

    def _upload(self, source: Path, name: str, version: int, file: str, sha256: str) -> None:
        """Upload one file, read it back and compare. Raises BundleError where it differs."""
        target = self.path(name, version, file)
        self.filesystem.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
        self.filesystem.put_file(str(source), target)

        stored_sha256 = hashlib.sha256()
        with self.filesystem.open(target, "rb") as stored:
            while chunk := stored.read(CHUNK_BYTES):
                stored_sha256.update(chunk)
        if stored_sha256.hexdigest() != sha256:
            raise BundleError(
                f"{self.url}/{name}/{version}/{file}: arrived damaged (sha256 differs)"
            )
