"""What this process may use of the machine: ports, open files, and a place for run files."""

import fcntl
import os
import resource
import shutil
import socket
import tempfile
from pathlib import Path

RUN, LOCK = "imago-", "supervisor.lock"


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
