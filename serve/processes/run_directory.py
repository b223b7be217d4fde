"""The run directory: private to one service, in memory, with its sockets, counters and state."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

SHARED_MEMORY = "/dev/shm"
PREFIX = "imago-"
LOCK_NAME = "supervisor.lock"


def create_run_directory() -> str:
    """Make a run directory and return its path. Remove those that killed services have left.

    It lies in shared memory if possible, else in the temporary directory. This process holds a lock
    on a file in it until it ends, in whatever way. So a directory whose lock is free belongs to no
    running service. Such leftovers are removed because /dev/shm is small, and in a pod
    it outlives the containers.
    """
    _set_temporary_directory()
    parent = SHARED_MEMORY
    if not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        parent = tempfile.gettempdir()
    for lock in Path(parent).glob(f"{PREFIX}*/{LOCK_NAME}"):
        _remove_if_unlocked(lock)

    directory = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
    _lock(directory)
    return directory


def _set_temporary_directory() -> None:
    """Use shared memory for temporary files if the root file system is read-only."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = SHARED_MEMORY
        os.environ["TMPDIR"] = SHARED_MEMORY  # for the processes that this one starts


def _lock(directory: str) -> None:
    """Create the lock file and hold its lock; the descriptor stays open until this process ends."""
    new_path = os.path.join(directory, "new")
    descriptor = os.open(new_path, os.O_WRONLY | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    # It gets its name only now, so that no other service sees it unlocked.
    os.rename(new_path, os.path.join(directory, LOCK_NAME))


def _remove_if_unlocked(lock: Path) -> None:
    """Remove the directory of a lock file if this user owns it and no process holds the lock."""
    try:
        with lock.open("rb") as file:
            if lock.parent.lstat().st_uid == os.getuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
    except OSError:
        pass  # it is in use, or another service removes it at this moment
