"""How many cores this process may use, by CPU affinity and cgroup quota.

A container sees all cores of its host, and more threads than its quota slow it down. Training and
serving size their thread pools by `available_cores`.
"""

import math
import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROCESS_CGROUPS = Path("/proc/self/cgroup")


def available_cores(root: Path = CGROUP_ROOT, process_cgroups: Path = PROCESS_CGROUPS) -> int:
    """Return the smaller of affinity and CPU quota, rounded up to whole cores, at least one.

    `root` is the mount of the cgroup file system, `process_cgroups` the file that names the cgroups
    of this process.
    """
    affinity = len(os.sched_getaffinity(0))
    membership = process_cgroups.read_text() if process_cgroups.exists() else ""
    quota = read_quota(membership, root)
    if not quota:
        return affinity
    return max(1, min(affinity, math.ceil(quota)))


def read_quota(membership: str, root: Path) -> float | None:
    """Return the cores that the CPU quota grants, or None without a quota.

    `membership` is the text of /proc/self/cgroup: lines `hierarchy:controllers:path`, where an
    empty list of controllers marks version 2. A parent's quota limits its children, so all
    directories from that of the process up to `root` count.
    """
    quotas: list[float | None] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for directory in list_cgroups(root, path):
                quotas.append(_read_quota_v2(directory))
        elif "cpu" in controllers.split(","):
            for mount in (root / controllers, root / "cpu", root / "cpu,cpuacct"):
                for directory in list_cgroups(mount, path):
                    quotas.append(_read_quota_v1(directory))

    return min((quota for quota in quotas if quota), default=None)


def list_cgroups(mount: Path, path: str) -> list[Path]:
    """Return a cgroup's directory and its parents; in a container often only the mount exists."""
    directory = mount / path.lstrip("/")
    is_outside = ".." in directory.parts
    candidates = [mount] if is_outside else [directory, *directory.parents]
    return [
        candidate
        for candidate in candidates
        if candidate.is_relative_to(mount) and candidate.is_dir()
    ]


def _read_quota_v2(directory: Path) -> float | None:
    """Read cpu.max, which holds `quota period` in microseconds, or `max period`."""
    try:
        quota, period = (directory / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _read_quota_v1(directory: Path) -> float | None:
    """Read cpu.cfs_quota_us, which is -1 without a limit, and cpu.cfs_period_us."""
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        period = int((directory / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
