"""Check a version of a model in a separate process, before a worker loads it.

That process runs `python -m serve check`: it verifies the digests, loads the graph and runs the
bundle's samples. Its priority is low. If the graph crashes or hangs it, no worker is affected.
"""

import errno
import json
import os
import subprocess
import sys
import time
from typing import NamedTuple

from models.bundle import CHECKSUMS_FILE, BundleError, file_sha256
from models.store import IncompleteVersion, StoreError
from serve.bundle_source import BundleSource
from serve.settings import PREFIX, Settings
from serve.worker.exit_status import STORE_UNREADABLE

CHECK_TIMEOUT_SECONDS = 300
RESULT_MAX_AGE_SECONDS = 300  # an older result is not reused, as the bundle may have changed
NICENESS = 10

# Runs `python -m serve` such that the kernel kills it (PR_SET_PDEATHSIG, 1) with SIGKILL (9) when
# the worker's thread that started it ends: a check that hangs must not outlive its worker. It exits
# at once if the worker, whose process id is %d, ended before that call.
CHECK_PROGRAM = """import ctypes, os, runpy
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == %d:
    runpy.run_module('serve', run_name='__main__')"""

# An OSError with another number is transient: the store failed, not the bundle.
PERMANENT_ERRORS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


class CheckResult(NamedTuple):
    """The result of a check that passed."""

    variant: str  # the variant to serve
    digest: str  # of the bundle that was checked


def check_version(
    settings: Settings, source: BundleSource, run_directory: str, version: int, threads: int
) -> CheckResult:
    """Check a version once for all workers.

    A result that another worker has left in the run directory is reused while the bundle is the
    same. Raises BundleError with the reason that the check gave; its cause is an OSError if the
    store could not be read.
    """
    result_path = os.path.join(run_directory, f"checked-{version}")
    result = _read_recent_result(result_path)
    if result and result.digest == file_sha256(source.path(version) / CHECKSUMS_FILE):
        return result

    output = _run_check(_check_command(settings, version, threads), version)
    report = json.loads(output)
    result = CheckResult(report["variant"], report["digest"])
    with open(result_path, "w") as file:
        json.dump(result, file)
    return result


def is_transient(error: BaseException | None) -> bool:
    """Whether the store failed, not the bundle: the error or one of its causes may go away."""
    if isinstance(error, StoreError | IncompleteVersion):
        return True
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None and error.errno is not None and error.errno not in PERMANENT_ERRORS


def _read_recent_result(path: str) -> CheckResult | None:
    if not os.path.exists(path):
        return None
    if time.time() - os.path.getmtime(path) >= RESULT_MAX_AGE_SECONDS:
        return None
    with open(path) as file:
        return CheckResult(*json.load(file))


def _check_command(settings: Settings, version: int, threads: int) -> list[str]:
    """Return the command that checks this version. All settings that matter are flags of it."""
    command = [sys.executable, "-c", CHECK_PROGRAM % os.getpid(), "check", "--json"]
    command += ["--store", str(settings.store)]
    if settings.store_cache is not None:
        command += ["--store-cache", str(settings.store_cache)]
    command += ["--store-cache-bytes", str(settings.store_cache_bytes)]
    command += ["--model", settings.model]
    command += ["--version", str(version)]
    command += ["--variant", settings.variant]
    command += ["--engine", settings.engine]
    command += ["--threads", str(threads)]
    command += ["--max-batch-size", str(settings.max_batch_size)]
    if settings.public_key:
        command += ["--public-key", str(settings.public_key)]
    return command


def _run_check(command: list[str], version: int) -> str:
    """Return what the check prints. Raises BundleError if it fails or takes too long."""
    # Without IMAGO_ variables: one that a flag of the service overrides may contradict the others.
    environment = {
        name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)
    }
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        try:
            output, errors = process.communicate(timeout=CHECK_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise BundleError(
                f"version {version}: the check took longer than {CHECK_TIMEOUT_SECONDS} s"
            ) from error

    if process.returncode == 0:
        return output
    lines = errors.strip().splitlines()
    reason = lines[-1] if lines else f"the check ended with status {process.returncode}"
    cause = OSError(errno.EIO, reason) if process.returncode == STORE_UNREADABLE else None
    raise BundleError(f"version {version}: {reason.removeprefix('error: ')}") from cause
