"""How many cores this process may use, by affinity and CPU quota: a container sees all that its host has."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Whole cores to plan with: the least of affinity and CPU quota, rounded up, at least one."""
    usable = len(os.sched_getaffinity(0))
    limit = read_quota(OWN_CGROUPS.read_text() if OWN_CGROUPS.exists() else "", CGROUPS)
    return max(1, min(usable, math.ceil(limit))) if limit else usable


def read_quota(membership: str, root: Path) -> float | None:
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
