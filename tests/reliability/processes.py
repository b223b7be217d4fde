"""Read what the processes of a running service hold."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from support.server import Server


@dataclass(frozen=True)
class Usage:
    """Of all processes of a service together."""

    memory_mb: float
    """Anonymous and shared memory; pages that processes share count once."""

    descriptors: int

    threads: int


def read_usage(server: Server) -> Usage:
    memory_kb = 0
    descriptors = 0
    threads = 0
    for pid in [server.process.pid, *server.children()]:
        with contextlib.suppress(OSError):  # it has ended
            memory_kb += _read_memory_kb(pid)
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            threads += len(os.listdir(f"/proc/{pid}/task"))
    return Usage(memory_kb / 1024, descriptors, threads)


def _read_memory_kb(pid: int) -> int:
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
            total += int(line.split()[1])
    return total
