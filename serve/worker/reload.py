"""Hot reload: follow the store's latest version, and replace the model between two batches.

A thread of each worker watches where `latest` points. A new version is first checked in a
separate process (`version_check`). Then the worker loads it while the old model still serves, and
replaces the old one. A version that fails is refused until its files are replaced or `latest`
points to another. A rollback works in the same way: only the target of `latest` counts. After an
error of the store itself, the version is not refused but tried again.
"""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from models.bundle import BundleError
from models.store import StoreError
from serve import logs
from serve.bundle_source import BundleSource
from serve.metrics.shared_counters import SharedCounters
from serve.model import Model
from serve.settings import Settings
from serve.worker.served_version import record_served_version
from serve.worker.version_check import check_version, is_transient

LOCK_NAME = "reload.lock"


class Reloader:
    """Watches `latest` in a thread of a worker."""

    def __init__(
        self,
        settings: Settings,
        source: BundleSource,
        run_directory: str,
        threads: int,
        counters: SharedCounters,
        current_model: Callable[[], Model],
        replace_model: Callable[[Model], None],
    ):
        self.settings = settings
        self.run_directory = run_directory
        self.threads = threads
        self.counters = counters
        self.current_model = current_model
        self.replace_model = replace_model
        self.source = source
        self.refused_version: int | None = None
        self.refused_files: object = None  # as BundleSource describes them
        for outcome in ("ok", "refused"):
            counters.slot("reloads", outcome)  # so that the series exist with value 0

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._watch, name="reload", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(self.settings.reload_seconds)
            was_reachable = self.source.is_reachable
            try:
                self._follow_latest()
            except StoreError as error:
                if was_reachable:
                    logs.logger.warning("store out of reach, the model stays: %s", error)
            except Exception:  # for example, a disk does not answer
                logs.logger.exception("could not check for a new version; trying again later")

    def _follow_latest(self) -> None:
        """Reload if `latest` points to a version that is neither served nor refused."""
        latest = self._read_latest()
        if latest is None or latest == self.current_model().version:
            self._allow_refused_version()
        elif latest != self.refused_version or self._has_new_files(latest):
            self._reload(latest)

    def _has_new_files(self, refused_version: int) -> bool:
        return self._describe_files(refused_version) != self.refused_files

    def _describe_files(self, version: int) -> object:
        try:
            return self.source.describe_files(version)
        except (BundleError, OSError):  # deleted, or being replaced
            return None

    def _read_latest(self) -> int | None:
        """Return the target of `latest`, and show in the metrics whether the store answers."""
        was_reachable = self.source.is_reachable
        try:
            latest = self.source.latest()
        finally:
            self.counters.set("store_reachable", to=int(self.source.is_reachable))
        if not was_reachable:
            logs.logger.info("store within reach again")
        return latest

    def _allow_refused_version(self) -> None:
        """Try the refused version again when `latest` points to it the next time."""
        if self.refused_version is not None:
            logs.logger.info("refused version rolled back: version %d", self.refused_version)
            self.refused_version = None

    def _reload(self, version: int) -> None:
        """Replace the model by this version, or refuse it."""
        start = time.monotonic()
        files = self._describe_files(version)  # before the check, during which they may be replaced
        fields: dict[str, object] = {"from": self.current_model().version, "to": version}
        try:
            model = self._load(version)
        except Exception as error:  # whatever is wrong with it, the old model serves on
            if is_transient(error):
                logs.logger.warning(
                    "new version could not be read, will be tried again: %s",
                    error,
                    extra={"fields": fields},
                )
                return
            self.refused_version = version
            self.refused_files = files
            logs.logger.error("new version refused: %s", error, extra={"fields": fields})
            self.counters.add("reloads", "refused")
            return

        if self._read_latest() != version:
            return  # it was withdrawn while it was checked and loaded
        self.replace_model(model)
        record_served_version(self.run_directory, version)
        self.source.record_served(version)
        self.counters.add("reloads", "ok")
        fields["seconds"] = round(time.monotonic() - start, 2)
        logs.logger.info("model replaced", extra={"fields": fields})

    def _load(self, version: int) -> Model:
        """Check a version and load it. Raises an exception of any kind if that fails."""
        with self._lock():
            result = check_version(
                self.settings, self.source, self.run_directory, version, self.threads
            )
            bundle = self.source.open(version)
            if bundle.digest != result.digest:
                raise BundleError(f"version {version}: changed since it was checked")
            settings = self.settings.model_copy(update={"variant": result.variant})
            return Model(bundle, settings, self.threads)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Let the workers of a service reload one by one."""
        with open(os.path.join(self.run_directory, LOCK_NAME), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
