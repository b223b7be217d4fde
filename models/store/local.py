"""The store: `<store>/<name>/<version>/`, versions 1, 2, 3, …, and `latest`, a link that moves in one rename.

A version appears whole or not at all, and two writers that finish together get two versions.
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

from models.bundle import MANIFEST_FILE, NAME_PATTERN, Bundle, BundleError

LATEST = "latest"
STAGING = ".staging-"
ABANDONED_SECONDS = 24 * 3600


class Store:
    """Bundles by name and version under one directory, which need not exist yet.

    Whatever has to list a directory raises BundleError where it may not.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def names(self) -> list[str]:
        """Names with at least one version, sorted."""
        return sorted(
            name
            for name in _directories(self.root)
            if re.fullmatch(NAME_PATTERN, name) and self.versions(name)
        )

    def versions(self, name: str) -> list[int]:
        """Versions of a name, rising; empty where there is none."""
        return sorted(
            int(number) for number in _directories(self.root / name) if number.isdecimal()
        )

    def latest(self, name: str) -> int | None:
        """The version that `latest` points to, or None."""
        try:
            target = os.readlink(self.root / name / LATEST)
        except OSError:
            return None
        return int(target) if target.isdecimal() else None

    def path(self, name: str, version: str | int = LATEST) -> Path:
        """Directory of one version ("latest" or a number). Raises BundleError, saying what there is instead."""
        number = self.latest(name) if str(version) == LATEST else version
        path = self.root / name / str(number)
        if not (
            re.fullmatch(NAME_PATTERN, name) and str(number).isdecimal() and os.path.isdir(path)
        ):
            self._known(name)  # looks at the whole store, which may be large and far away
            there = ", ".join(map(str, self.versions(name)))
            raise BundleError(f"{self.root}: {name} has no version {version}; it has {there}")
        return path

    def _known(self, name: str) -> None:
        if name not in self.names():
            there = ", ".join(self.names()) or "nothing"
            raise BundleError(f"{self.root}: no model {name!r} in this store; it has {there}")

    def open(self, name: str, version: str | int = LATEST, verify: bool = True) -> Bundle:
        return Bundle(self.path(name, version), verify)

    def ensure_writable(self, name: str) -> Path:
        """The directory for the versions of a name, made where it is missing.

        Raises BundleError where this can't name a model, or nothing can be written there.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise BundleError(
                f"{name!r} can't name a model: lower-case letters, digits, . _ - and at most 63 of them"
            )
        parent = self.root / name
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleError(f"{parent}: can't be made: {error.strerror}") from error
        if not os.access(parent, os.W_OK):
            raise BundleError(f"{parent}: can't be written to")
        return parent

    @contextmanager
    def stage(self, name: str, version: int | None = None) -> Iterator["StagedVersion"]:
        """A hidden directory to write one new version in; gone when the block ends without `publish`.

            with store.stage("digits") as staged:
                ...                       # write the bundle of digits/<staged.version> to staged.path
                staged.publish()

        Making the directory claims the version, the next free one where none is asked for, so two writers never get
        the same. Raises BundleError where `version` is there already or is being written.
        """
        parent = self.ensure_writable(name)
        number = version or max([0, *self.versions(name)]) + 1
        while not (claimed := self._claim(name, number)):
            if version:
                raise BundleError(
                    f"{parent / str(version)}: there already, or being written by another job"
                )
            number += 1
        try:
            yield StagedVersion(self, name, number, claimed)
        finally:
            shutil.rmtree(claimed, ignore_errors=True)

    def _claim(self, name: str, version: int) -> Path | None:
        """mkdir decides who gets a number: it is atomic on network file systems too, where locks often are not."""
        directory = self.root / name / f"{STAGING}{version}"
        try:
            directory.mkdir(mode=0o755)
        except FileExistsError:
            return None
        if (self.root / name / str(version)).exists():  # published between our look and our mkdir
            with suppress(
                FileNotFoundError
            ):  # its writer, whose directory had this name, may just be tidying up
                directory.rmdir()
            return None
        return directory

    def promote(self, name: str, version: int) -> None:
        """Point `latest` at a version, in one atomic rename. Raises BundleError where there is no such version."""
        self.path(name, version)
        link = self.root / name / f".latest-{secrets.token_hex(8)}"
        link.symlink_to(str(version))
        os.replace(link, self.root / name / LATEST)

    def advance(self, name: str, version: int) -> None:
        """Promote, but never from a newer version to an older one; of two jobs that end together the newer stays."""
        with (self.root / name / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (self.latest(name) or 0) < version:
                self.promote(name, version)

    def rollback(self, name: str) -> int:
        """Point `latest` at the version before it and return that. Raises BundleError where there is none."""
        self._known(name)
        now = self.latest(name) or 0
        older = [v for v in self.versions(name) if v < now]
        if not older:
            raise BundleError(
                f"{self.root / name}: no version older than {now or 'latest'} to roll back to"
            )
        self.promote(name, older[-1])
        return older[-1]

    def prune(self, name: str, keep: int) -> list[int]:
        """Delete all but the newest `keep` versions, `latest` and the one before it; returns what was deleted.

        What a job that died more than a day ago left half-written goes too.
        """
        self._known(name)
        versions, latest = self.versions(name), self.latest(name)
        kept = {*versions[-keep:], latest, *[v for v in versions if v < (latest or 0)][-1:]}
        doomed = [v for v in versions if v not in kept]
        for version in doomed:
            trash = self.root / name / f"{STAGING}{version}.deleted"
            os.rename(
                self.root / name / str(version), trash
            )  # at once, so that nobody reads half of it
            shutil.rmtree(trash)
        for left in (self.root / name).glob(f"{STAGING}*"):
            if left.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(left)
        return doomed


@dataclass(frozen=True)
class StagedVersion:
    """A version being written: a claimed number and the hidden directory that will become it."""

    store: Store
    name: str
    version: int
    path: Path

    def publish(self, promote: bool = True) -> Bundle:
        """Check the bundle, make it visible in one rename and move `latest` forward to it.

        `latest` is left where it is when another writer already published a newer version. Raises BundleError for a
        bundle that is not whole; nothing is visible then.
        """
        bundle = Bundle(self.path)
        if (bundle.manifest.name, bundle.manifest.version) != (self.name, self.version):
            raise BundleError(f"{self.path / MANIFEST_FILE}: is not of {self.name}/{self.version}")
        target = self.store.root / self.name / str(self.version)
        for path in self.path.rglob("*"):  # a server is often another user
            path.chmod(0o755 if path.is_dir() else 0o644)
        sync(self.path)
        try:
            os.rename(self.path, target)
        except OSError as error:  # a directory that is not empty, and a bundle never is
            raise BundleError(f"{target}: can't be published: {error.strerror}") from error
        if promote:
            self.store.advance(self.name, self.version)
        return Bundle(target, verify=False)


def _directories(path: Path) -> list[str]:
    """Names of the directories in there; none where nothing is there. Raises BundleError where it can't be listed."""
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BundleError(f"{path}: can't be listed: {error.strerror}") from error


def sync(directory: Path) -> None:
    """Flush the files of a directory to disk: a rename must not outlive a power cut that its contents don't."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
