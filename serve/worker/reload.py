"""Hot reload: a worker that follows `latest` swaps models between two batches, and keeps the old one if the new is bad.

A new version is first checked by a process of its own with low priority: it reads every digest, loads the graph and
answers the bundle's samples. What crashes or hangs there harms nobody. Only then the worker loads it beside the old,
warms it and takes it. Rollback is the same move, since all that counts is where `latest` points. A store that can't be
read for a moment says nothing about a version, so that is looked at again.
"""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

from models.bundle import CHECKSUMS_FILE, Bundle, BundleError, file_sha256
from models.store import LATEST, Store
from serve import logs
from serve.metrics.shared_counters import SharedCounters
from serve.model import Model
from serve.settings import PREFIX, Settings

SERVING, LOCK = "serving", "reload.lock"
CHECK_SECONDS = 300  # a check that takes longer has failed, and one that is older is made again
NICE = 10
AWAY = 75  # exit status of a check that could not read the store (EX_TEMPFAIL of sysexits.h)
LASTING = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
# `python -m serve`, killed with the thread that started it (PR_SET_PDEATHSIG): a check that hangs must not outlive us,
# nor one whose worker died before it came to say so.
MORTAL = """import ctypes, os, runpy
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == %d:
    runpy.run_module('serve', run_name='__main__')"""


class Reload:
    """Watches `latest` from a thread of the worker; `loop` is its PredictLoop."""

    def __init__(self, loop, counters: SharedCounters):
        self.loop, self.api, self.counters = loop, loop.api, counters
        self.settings: Settings = loop.api.settings
        self.store = Store(self.settings.store)
        self.refused: int | None = None  # until `latest` points elsewhere
        for outcome in ("ok", "refused"):
            counters.slot("reloads", outcome)

    def start(self) -> None:
        threading.Thread(target=self.watch, name="reload", daemon=True).start()

    def watch(self) -> None:
        while True:
            time.sleep(self.settings.reload_seconds)
            try:
                self.look()
            except Exception:  # a store that does not answer for a while, say
                logs.logger.exception("could not look for a new version")

    def look(self) -> None:
        version = self.store.latest(self.settings.model)
        if version in (None, self.api.model.version):
            self.refused = None
        elif version != self.refused:
            self.swap(version)

    def swap(self, version: int) -> None:
        """Load a version beside the one that is served and take its place, or refuse it and say why."""
        started, old = time.monotonic(), self.api.model.version
        fields = {"from": old, "to": version}
        try:
            with turn(self.api.run):  # workers reload one after the other
                variant, digest = check(self.settings, self.api.run, version, self.api.threads)
                bundle = Bundle(self.store.path(self.settings.model, version))
                if bundle.digest != digest:
                    raise BundleError(f"version {version}: changed since it was checked")
                fresh = Model(
                    bundle, self.settings.model_copy(update={"variant": variant}), self.api.threads
                )
        except Exception as error:  # whatever is wrong with it, the old one serves on
            if is_transient(error):
                logs.logger.warning(
                    "new version not read, so it is tried again: %s",
                    error,
                    extra={"fields": fields},
                )
                return
            self.refused = version
            self.counters.add("reloads", "refused")
            logs.logger.error("new version refused: %s", error, extra={"fields": fields})
            return
        if self.store.latest(self.settings.model) != version:
            return  # it was withdrawn meanwhile
        self.loop.swap(fresh)
        note(self.api.run, version)
        self.counters.add("reloads", "ok")
        logs.logger.info(
            "model swapped",
            extra={"fields": {**fields, "seconds": round(time.monotonic() - started, 2)}},
        )


@contextmanager
def turn(run: str):
    with open(os.path.join(run, LOCK), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_transient(error: BaseException | None) -> bool:
    """Whether the system failed, not the bundle: an OSError that may be gone at the next look is the cause of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None and error.errno is not None and error.errno not in LASTING


def check(settings: Settings, run: str, version: int, threads: int) -> tuple[str, str]:
    """Check a version in a process of its own, once for all workers; returns the variant to serve, and the digest of
    the bundle that was checked.

    It gets what matters as flags and no IMAGO_ variable: one that a flag of ours overrides might not fit the rest.
    Raises BundleError with what it said.
    """
    done = os.path.join(run, f"checked-{version}")
    if os.path.exists(done) and time.time() - os.path.getmtime(done) < CHECK_SECONDS:
        with open(done) as file:
            variant, digest = json.load(file)
        if digest == file_sha256(
            Store(settings.store).path(settings.model, version) / CHECKSUMS_FILE
        ):
            return variant, digest
    command = [
        sys.executable,
        "-c",
        MORTAL % os.getpid(),
        "check",
        "--store",
        str(settings.store),
        "--model",
        settings.model,
        "--version",
        str(version),
        "--variant",
        settings.variant,
        "--engine",
        settings.engine,
        "--threads",
        str(threads),
        "--max-batch-size",
        str(settings.max_batch_size),
        "--json",
        *(["--public-key", str(settings.public_key)] if settings.public_key else []),
    ]
    clean = {
        name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)
    }
    with subprocess.Popen(
        command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        os.setpriority(os.PRIO_PROCESS, child.pid, NICE)
        try:
            found, said = child.communicate(timeout=CHECK_SECONDS)
        except subprocess.TimeoutExpired as error:
            child.kill()
            raise BundleError(
                f"version {version}: the check took longer than {CHECK_SECONDS} s"
            ) from error
    if child.returncode:
        last = (said.strip().splitlines() or [f"the check ended with status {child.returncode}"])[
            -1
        ]
        cause = OSError(errno.EIO, last) if child.returncode == AWAY else None
        raise BundleError(f"version {version}: {last.removeprefix('error: ')}") from cause
    answer = json.loads(found)
    with open(done, "w") as file:
        json.dump([answer["variant"], answer["digest"]], file)
    return answer["variant"], answer["digest"]


def note(run: str, version: int) -> None:
    """Remember what serves, for a worker that has to be replaced while `latest` points to a bad version."""
    path = os.path.join(run, SERVING)
    with open(f"{path}.{os.getpid()}", "w") as file:
        file.write(str(version))
    os.replace(file.name, path)


def load(settings: Settings, run: str, threads: int) -> Model:
    """The model of a starting worker: the settings' version, or what served before where that can't be had.

    Where `latest` is followed it is the other way round: only Reload's check may lead on to another version, since a
    bad one could crash or hang each worker that took it.
    """
    store, path, versions = Store(settings.store), os.path.join(run, SERVING), [settings.version]
    if settings.version == LATEST and os.path.exists(path):
        with open(path) as file:
            before = file.read()
        versions = [before, LATEST] if settings.reload_seconds else [LATEST, before]
    for version in versions:
        try:
            model = Model(store.open(settings.model, version), settings, threads)
            break
        except (
            ValueError,
            OSError,
        ) as error:  # BundleError is the first, a store that can't be read the second
            if version == versions[-1]:
                raise
            logs.logger.error("version %s refused, %s is taken: %s", version, versions[-1], error)
    note(run, model.version)
    return model
