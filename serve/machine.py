"""What this process may use of the machine: cores by affinity and CPU quota, and a place for run files."""
import fcntl
import math
import os
import resource
import shutil
import socket
import tempfile
from pathlib import Path

RUN, LOCK = "imago-", "supervisor.lock"
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def cores() -> int:
    """Whole cores to plan with: the least of affinity and CPU quota, rounded up, at least one."""
    usable = len(os.sched_getaffinity(0))
    limit = quota(OWN_CGROUPS.read_text() if OWN_CGROUPS.exists() else "", CGROUPS)
    return max(1, min(usable, math.ceil(limit))) if limit else usable


def quota(membership: str, root: Path) -> float | None:
    """Cores that the CPU quota grants, or None where there is none.

    `membership` is the text of /proc/self/cgroup, lines `hierarchy:controllers:path`; an empty list of controllers
    marks version 2. A quota on any parent counts as well, so the path is walked up to `root`.
    """
    limits = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += [_v2(directory) for directory in _upwards(root, path)]
        elif "cpu" in controllers.split(","):
            for mount in (root / controllers, root / "cpu", root / "cpu,cpuacct"):
                limits += [_v1(directory) for directory in _upwards(mount, path)]
    known = [limit for limit in limits if limit]
    return min(known) if known else None


def _upwards(mount: Path, path: str) -> list[Path]:
    """The cgroup's directory and its parents; inside a container only the mount itself may exist."""
    own = mount / path.lstrip("/")
    parents = [own, *own.parents] if ".." not in own.parts else [mount]
    return [p for p in parents if p.is_relative_to(mount) and p.is_dir()]


def _v2(directory: Path) -> float | None:
    """cpu.max holds `quota period` in microseconds, or `max period`."""
    try:
        limit, period = (directory / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _v1(directory: Path) -> float | None:
    """cpu.cfs_quota_us is -1 where there is no limit."""
    try:
        limit = int((directory / "cpu.cfs_quota_us").read_text())
        period = int((directory / "cpu.cfs_period_us").read_text())
        return limit / period if limit > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def free(host: str, port: int = 0) -> bool:
    """Whether the port can be listened on; with 0, any: `::` needs IPv6, which may be turned off."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError:
        return False
    return True


def open_files(wanted: int) -> int:
    """Let this process and those it starts have so many files and connections open; returns how many they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else soft


def run_directory() -> str:
    """A new private directory for sockets and counters, in memory where the machine has such a place.

    Its lock is held until this process ends, however it ends. A directory whose lock is free was left by one that was
    killed, and goes: /dev/shm is small, and that of a pod outlives its containers.

    A container with a read-only root still has /dev/shm; LitServe's manager needs a temporary directory as well, so
    TMPDIR is pointed there when no other place can be written.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = os.environ["TMPDIR"] = "/dev/shm"
    shm = "/dev/shm"
    parent = shm if os.access(shm, os.W_OK | os.X_OK) else tempfile.gettempdir()
    for left in Path(parent).glob(f"{RUN}*/{LOCK}"):
        _remove_if_free(left)
    run = tempfile.mkdtemp(prefix=RUN, dir=parent)
    lock = os.open(f"{run}/new", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(f"{run}/new", f"{run}/{LOCK}")  # so that no one ever finds it free
    return run


def _remove_if_free(lock: Path) -> None:
    try:
        with lock.open("rb") as file:
            if lock.parent.lstat().st_uid == os.getuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
    except OSError:
        pass  # in use, or another is removing it
