"""How much memory this process may still take, by its cgroups (version 1 or 2) and the machine.

A container sees the memory of its host, and is killed when it takes more than its own limit.
"""

from pathlib import Path

from models.cpu_quota import CGROUP_ROOT, PROCESS_CGROUPS, list_cgroups

MEMINFO = Path("/proc/meminfo")
ASSUMED_FREE_BYTES = 4 << 30  # where the system does not report its memory

LIMIT_FILES = {1: "memory.limit_in_bytes", 2: "memory.max"}
USAGE_FILES = {1: "memory.usage_in_bytes", 2: "memory.current"}
# Memory of the file cache that the kernel frees first; of a cgroup and those below it.
CACHE_FIELDS = {1: "total_inactive_file", 2: "inactive_file"}


def available_memory(
    root: Path = CGROUP_ROOT, process_cgroups: Path = PROCESS_CGROUPS, meminfo: Path = MEMINFO
) -> int:
    """Return the free bytes of the machine, or of the container where it has fewer.

    `root` is the mount of the cgroup file system, `process_cgroups` the file that names the cgroups
    of this process, `meminfo` that of the machine's memory.
    """
    try:
        fields = _read_fields(meminfo, ":")
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return ASSUMED_FREE_BYTES  # not Linux

    membership = process_cgroups.read_text() if process_cgroups.exists() else ""
    limited = read_free_bytes(membership, root)
    return free if limited is None else max(0, min(free, limited))


def read_free_bytes(membership: str, root: Path) -> int | None:
    """Return the bytes below the memory limit of all cgroups, or None without a limit.

    `membership` is the text of /proc/self/cgroup, as for the CPU quota. A parent's limit holds for
    its children together, so all directories from that of the process up to `root` count.
    """
    free: list[int | None] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for directory in list_cgroups(root, path):
                free.append(_read_free_bytes(directory, 2))
        elif "memory" in controllers.split(","):
            for directory in list_cgroups(root / "memory", path):
                free.append(_read_free_bytes(directory, 1))

    return min((count for count in free if count is not None), default=None)


def _read_free_bytes(directory: Path, version: int) -> int | None:
    """Return the limit of one cgroup less what it uses, without the file cache."""
    try:
        limit = int((directory / LIMIT_FILES[version]).read_text())  # version 2: maybe `max`
        used = int((directory / USAGE_FILES[version]).read_text())
        cached = int(_read_fields(directory / "memory.stat", None)[CACHE_FIELDS[version]])
        return limit - used + cached
    except (OSError, KeyError, ValueError):
        return None


def _read_fields(path: Path, separator: str | None) -> dict[str, str]:
    """Parse lines of a name, a separator (None: white space) and a value."""
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, value = line.split(separator, 1)
        fields[name] = value
    return fields
