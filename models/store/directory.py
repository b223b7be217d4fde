"""`DirectoryBackend`: bundles in a local directory, `<store>/<name>/<version>/`.

`<store>/<name>/latest` is a link to one version. A version becomes visible in one rename, and
`latest` moves in another. mkdir decides who writes a version.

A copy of a store may have lost its links: `latest` is then a copy of the version (cp -rL, zip,
`aws s3 sync`), or a file with its number (a file system without links). Both are read.
"""

import fcntl
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from models.bundle import BundleError, Manifest, read_manifest
from models.bundle.checksums import read_checksums
from models.bundle.files import read_file
from models.durable_files import sync_path
from models.store.layout import ABANDONED_SECONDS, LATEST, MAX_LATEST_BYTES, STAGING_PREFIX

LOCK_FILE = ".lock"


class DirectoryBackend:
    """The versions in a directory, which need not exist yet.

    Methods that list a directory raise BundleError where they may not read it.
    """

    def __init__(self, root: Path):
        self.root = root

    def location_of(self, name: str, version: str | int) -> str:
        """Return the path of a version."""
        return str(self.root / name / str(version))

    # Reading

    def list_names(self) -> list[str]:
        """Return the names of the directories in the store."""
        return _list_directories(self.root)

    def list_versions(self, name: str) -> list[int]:
        """Return the versions of a name, ascending."""
        directories = _list_directories(self.root / name)
        return sorted(int(number) for number in directories if number.isdecimal())

    def list_taken(self, name: str) -> list[int]:
        """Return the versions of a name: the claim of one that is being written can't be taken."""
        return self.list_versions(name)

    def read_latest(self, name: str) -> int | None:
        """Return the version that `latest` points to, or None."""
        latest = self.root / name / LATEST
        try:
            target = os.path.normpath(os.readlink(latest))
        except OSError:
            target = _read_latest_without_link(latest)
        return int(target) if target.isdecimal() else None

    def read_manifest(self, name: str, version: int) -> Manifest | None:
        """Return the manifest of a version; None if the version does not exist."""
        path = self.fetch(name, version)
        return None if path is None else read_manifest(path)

    def read_checksums(self, name: str, version: int) -> bytes | None:
        """Return SHA256SUMS of a version; None if the version does not exist."""
        path = self.fetch(name, version)
        return None if path is None else read_checksums(path)

    def local_path(self, name: str, version: int) -> Path | None:
        """Return the directory of a version; None where there is none."""
        return self.fetch(name, version)

    def fetch(self, name: str, version: int) -> Path | None:
        """Return the directory of a version; None where there is none."""
        path = self.root / name / str(version)
        return path if os.path.isdir(path) else None

    # Writing

    def check_writable(self, name: str) -> None:
        """Raise BundleError where a version of this name could not be published.

        Nothing is created: a job that fails before it publishes leaves no trace in the store.
        """
        directory = self.root / name
        self._check_latest_is_replaceable(name)
        while not directory.exists() and directory != directory.parent:
            directory = directory.parent
        if not directory.is_dir():
            raise BundleError(f"{self.root / name}: can't be created: {directory} is a file")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise BundleError(f"{directory}: not writable")

    def claim(self, name: str, version: int) -> Path | None:
        """Create the staging directory of a version, or return None where it is taken.

        mkdir decides who gets a version: it is atomic on network file systems too, where locks
        often are not.
        """
        directory = self.root / name / f"{STAGING_PREFIX}{version}"
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleError(f"{directory.parent}: can't be created: {error.strerror}") from error
        try:
            directory.mkdir(mode=0o755)
        except FileExistsError:
            return None

        if (self.root / name / str(version)).exists():  # published just before this mkdir
            with suppress(FileNotFoundError):  # its writer may be removing the directory, too
                directory.rmdir()
            return None
        return directory

    def release(self, name: str, version: int, staged: Path) -> None:
        """Delete the staging directory; publishing has renamed it."""
        shutil.rmtree(staged, ignore_errors=True)

    def publish(self, name: str, version: int, staged: Path) -> Path:
        """Make a staged version visible in one rename; return its directory."""
        _sync_to_disk(staged)
        target = self.root / name / str(version)
        try:
            os.rename(staged, target)
        except OSError as error:  # the target exists and is not empty
            raise BundleError(f"{target}: can't be published: {error.strerror}") from error
        return target

    def upload_signature(self, name: str, version: int) -> None:
        """Do nothing: the signature is in the store already."""

    def move_latest(self, name: str, version: int, forward_only: bool) -> None:
        """Point `latest` at a version; with `forward_only` unless it points at a newer one."""
        if not forward_only:
            self._point_latest_at(name, version)
            return
        with (self.root / name / LOCK_FILE).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (self.read_latest(name) or 0) < version:
                self._point_latest_at(name, version)

    def _point_latest_at(self, name: str, version: int) -> None:
        """Point `latest` at a version in one atomic rename."""
        self._check_latest_is_replaceable(name)
        latest = self.root / name / LATEST
        token = secrets.token_hex(8)
        link = self.root / name / f".latest-{token}"
        copy = self.root / name / f"{STAGING_PREFIX}{LATEST}-{token}"
        try:
            _write_link(link, version)
            if latest.is_dir() and not latest.is_symlink():
                os.rename(latest, copy)
            os.replace(link, latest)
        except OSError as error:
            with suppress(OSError):
                link.unlink()
            raise BundleError(f"{latest}: can't be moved: {error.strerror}") from error
        shutil.rmtree(copy, ignore_errors=True)

    def _check_latest_is_replaceable(self, name: str) -> None:
        """Raise BundleError where `latest` is a directory that is not a copy of a version."""
        latest = self.root / name / LATEST
        if latest.is_symlink() or not latest.is_dir():
            return
        version = self.read_latest(name)
        if version is None or not (self.root / name / str(version)).is_dir():
            raise BundleError(
                f"{latest}: a directory that is not a copy of a version of {name}; move it away"
            )

    def delete_version(self, name: str, version: int) -> None:
        """Delete a version, which is never visible in part."""
        trash = self.root / name / f"{STAGING_PREFIX}{version}.deleted"
        os.rename(self.root / name / str(version), trash)
        shutil.rmtree(trash)

    def delete_abandoned(self, name: str) -> None:
        """Delete staging directories older than a day, which jobs that died left."""
        for directory in (self.root / name).glob(f"{STAGING_PREFIX}*"):
            if directory.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(directory)


def _read_latest_without_link(latest: Path) -> str:
    """Return the version that `latest` stands for where it is not a link, or an empty text."""
    try:
        if latest.is_dir():
            return str(read_manifest(latest).version)
        return read_file(latest, MAX_LATEST_BYTES).decode().strip()
    except (OSError, ValueError):  # includes BundleError and UnicodeDecodeError
        return ""


def _write_link(path: Path, version: int) -> None:
    """Create a link to a version, or a file with its number on a file system without links."""
    try:
        path.symlink_to(str(version))
    except OSError:
        path.write_text(f"{version}\n")


def _list_directories(path: Path) -> list[str]:
    """Return the names of the directories in `path`, none where it does not exist.

    Raises BundleError where it can't be listed.
    """
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BundleError(f"{path}: can't be listed: {error.strerror}") from error


def _sync_to_disk(directory: Path) -> None:
    """Flush the files, so that after a power cut no renamed directory has empty files."""
    for path in [*directory.rglob("*"), directory]:
        sync_path(path)
