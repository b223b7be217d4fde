"""`Store`: bundles in a local directory, `<store>/<name>/<version>/`, versions 1, 2, 3, …

`<store>/<name>/latest` is a link to one version. A version becomes visible as a whole or not at
all, two jobs that finish at the same time get two versions, and `latest` moves in one atomic
rename. Training publishes here; the server and `imago models` read it.

A copy of a store may have lost its links: `latest` is then a copy of the version (cp -rL, zip,
`aws s3 sync`), or a file with its number (a file system without links). Both are read.
"""

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from models.bundle import MANIFEST_FILE, NAME_PATTERN, Bundle, BundleError, read_manifest
from models.bundle.files import read_file

LATEST = "latest"
LOCK_FILE = ".lock"
STAGING_PREFIX = ".staging-"
MAX_LATEST_BYTES = 32
ABANDONED_SECONDS = 24 * 3600
"""Age from which a staging directory counts as one of a job that died."""


class Store:
    """Bundles by name and version under one directory, which need not exist yet.

    Methods that list a directory raise BundleError where they may not read it.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def names(self) -> list[str]:
        """Return the names that have at least one version, sorted."""
        names: list[str] = []
        for name in _list_directories(self.root):
            if re.fullmatch(NAME_PATTERN, name) and self.versions(name):
                names.append(name)
        return sorted(names)

    def versions(self, name: str) -> list[int]:
        """Return the versions of a name, ascending; empty for an unknown name."""
        directories = _list_directories(self.root / name)
        return sorted(int(number) for number in directories if number.isdecimal())

    def latest(self, name: str) -> int | None:
        """Return the version that `latest` points to, or None."""
        latest = self.root / name / LATEST
        try:
            target = os.path.normpath(os.readlink(latest))
        except OSError:
            target = _read_latest_without_link(latest)
        return int(target) if target.isdecimal() else None

    def path(self, name: str, version: str | int = LATEST) -> Path:
        """Return the directory of a version, "latest" or a number.

        Raises BundleError that lists what the store has instead.
        """
        number = self.latest(name) if str(version) == LATEST else version
        path = self.root / name / str(number)
        is_valid = re.fullmatch(NAME_PATTERN, name) and str(number).isdecimal()
        if is_valid and os.path.isdir(path):
            return path

        # Only now list the store, which may be large and on a network disk.
        self._check_name_exists(name)
        versions = ", ".join(map(str, self.versions(name)))
        raise BundleError(f"{self.root}: {name} has no version {version}; it has {versions}")

    def open(
        self,
        name: str,
        version: str | int = LATEST,
        verify: bool = True,
        public_key: Path | None = None,
    ) -> Bundle:
        """Open a version. Raises BundleError as `path` and `Bundle` do."""
        return Bundle(self.path(name, version), verify, public_key)

    def check_writable(self, name: str) -> None:
        """Raise BundleError where a version of this name could not be published.

        Nothing is created: a job that fails before it publishes leaves no trace in the store.
        """
        self._check_name(name)
        directory = self.root / name
        self._check_latest_is_replaceable(name)
        while not directory.exists() and directory != directory.parent:
            directory = directory.parent
        if not directory.is_dir():
            raise BundleError(f"{self.root / name}: can't be created: {directory} is a file")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise BundleError(f"{directory}: not writable")

    def _check_name(self, name: str) -> None:
        if not re.fullmatch(NAME_PATTERN, name):
            raise BundleError(
                f"{name!r} can't name a model; use up to 63 of a-z, 0-9, '.', '_' and '-', "
                "beginning with a letter or digit"
            )

    def _check_latest_is_replaceable(self, name: str) -> None:
        """Raise BundleError where `latest` is a directory that is not a copy of a version."""
        latest = self.root / name / LATEST
        if latest.is_symlink() or not latest.is_dir():
            return
        version = self.latest(name)
        if version is None or not (self.root / name / str(version)).is_dir():
            raise BundleError(
                f"{latest}: a directory that is not a copy of a version of {name}; move it away"
            )

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
        self._check_name(name)
        directory = self.root / name
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleError(f"{directory}: can't be created: {error.strerror}") from error
        if version is None:
            number, directory = self._claim_next(name)
        else:
            number, directory = self._claim_one(name, version)
        try:
            yield StagedVersion(self, name, number, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _claim_next(self, name: str) -> tuple[int, Path]:
        """Claim the next free version. Return it and its staging directory."""
        version = max(self.versions(name), default=0) + 1
        while True:
            directory = self._claim(name, version)
            if directory is not None:
                return version, directory
            version += 1

    def _claim_one(self, name: str, version: int) -> tuple[int, Path]:
        """Claim one version, or raise BundleError where it is taken."""
        directory = self._claim(name, version)
        if directory is None:
            raise BundleError(
                f"{self.root / name / str(version)}: exists already, or another job is writing it"
            )
        return version, directory

    def _claim(self, name: str, version: int) -> Path | None:
        """Create the staging directory of a version, or return None where it is taken.

        mkdir decides who gets a version: it is atomic on network file systems too, where locks
        often are not.
        """
        directory = self.root / name / f"{STAGING_PREFIX}{version}"
        try:
            directory.mkdir(mode=0o755)
        except FileExistsError:
            return None

        if (self.root / name / str(version)).exists():  # published just before this mkdir
            with suppress(FileNotFoundError):  # its writer may be removing the directory, too
                directory.rmdir()
            return None
        return directory

    def promote(self, name: str, version: int) -> None:
        """Point `latest` at a version in one atomic rename.

        Raises BundleError without that version, or where nothing can be written.
        """
        self.path(name, version)
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

    def advance(self, name: str, version: int) -> None:
        """Point `latest` at a version, unless it points at a newer one.

        Of two jobs that finish at the same time, the newer version stays.
        """
        with (self.root / name / LOCK_FILE).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (self.latest(name) or 0) < version:
                self.promote(name, version)

    def rollback(self, name: str) -> int:
        """Point `latest` at the version before it and return that.

        Raises BundleError where there is no older version.
        """
        self._check_name_exists(name)
        latest = self.latest(name)
        previous = self._version_before(name, latest)
        if previous is None:
            raise BundleError(
                f"{self.root / name}: no version older than {latest or LATEST} to roll back to"
            )
        self.promote(name, previous)
        return previous

    def prune(self, name: str, keep: int) -> list[int]:
        """Delete all versions but the newest `keep`, `latest` and the one before it.

        Also deletes staging directories older than a day, which jobs that died left. Returns the
        versions that were deleted.
        """
        self._check_name_exists(name)
        versions = self.versions(name)
        latest = self.latest(name)
        kept = {*versions[-keep:], latest, self._version_before(name, latest)}

        deleted = [version for version in versions if version not in kept]
        for version in deleted:
            trash = self.root / name / f"{STAGING_PREFIX}{version}.deleted"
            os.rename(self.root / name / str(version), trash)  # never visible in part
            shutil.rmtree(trash)
        for directory in (self.root / name).glob(f"{STAGING_PREFIX}*"):
            if directory.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(directory)
        return deleted

    def _version_before(self, name: str, version: int | None) -> int | None:
        older = [number for number in self.versions(name) if number < (version or 0)]
        return max(older, default=None)

    def _check_name_exists(self, name: str) -> None:
        names = self.names()
        if name not in names:
            raise BundleError(
                f"{self.root}: no model {name!r} in this store; it has "
                f"{', '.join(names) or 'nothing'}"
            )


@dataclass(frozen=True)
class StagedVersion:
    """A version that is being written: a claimed number and the hidden directory for its files."""

    store: Store
    name: str
    version: int
    path: Path

    def publish(self, promote: bool = True) -> Bundle:
        """Check the bundle, make it visible in one rename, and move `latest` forward to it.

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
        _sync_to_disk(self.path)

        target = self.store.root / self.name / str(self.version)
        try:
            os.rename(self.path, target)
        except OSError as error:  # the target exists and is not empty
            raise BundleError(f"{target}: can't be published: {error.strerror}") from error
        if promote:
            self.store.advance(self.name, self.version)
        return Bundle(target, verify=False)


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


def _make_readable(directory: Path) -> None:
    """Let every user read the files: the server often runs as another one than training."""
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _sync_to_disk(directory: Path) -> None:
    """Flush the files, so that after a power cut no renamed directory has empty files."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
