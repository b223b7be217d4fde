"""What this process may use of the machine: ports, open files, and a place for run files."""
import os
import resource
import socket
import tempfile


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

    A container with a read-only root still has /dev/shm; LitServe's manager needs a temporary directory as well, so
    TMPDIR is pointed there when no other place can be written.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = os.environ["TMPDIR"] = "/dev/shm"
    shm = "/dev/shm"
    return tempfile.mkdtemp(prefix="imago-", dir=shm if os.access(shm, os.W_OK | os.X_OK) else None)
