"""The cores and the memory a process may use, from cgroup files and the machine."""

import os

import pytest

from models import cpu_quota, memory_limit

V2 = "0::/kubepods/pod1/box\n"
V1 = "12:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n"


def write_cgroup(root, path: str, **files: str) -> None:
    directory = root / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text + "\n")


def test_version_2(tmp_path):
    write_cgroup(tmp_path, "kubepods/pod1/box", cpu__max="150000 100000")
    assert cpu_quota.read_quota(V2, tmp_path) == 1.5


def test_version_2_inside_a_container_uses_the_root_directory(tmp_path):
    write_cgroup(tmp_path, ".", cpu__max="50000 100000")
    assert cpu_quota.read_quota("0::/\n", tmp_path) == 0.5
    assert cpu_quota.read_quota("0::/../../elsewhere\n", tmp_path) == 0.5


def test_the_smallest_quota_of_all_parents_counts(tmp_path):
    write_cgroup(tmp_path, "kubepods/pod1/box", cpu__max="max 100000")
    write_cgroup(tmp_path, "kubepods/pod1", cpu__max="200000 100000")
    write_cgroup(tmp_path, "kubepods", cpu__max="800000 100000")
    assert cpu_quota.read_quota(V2, tmp_path) == 2


def test_version_1(tmp_path):
    write_cgroup(
        tmp_path, "cpu,cpuacct/docker/x", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000"
    )
    assert cpu_quota.read_quota(V1, tmp_path) == 3
    write_cgroup(tmp_path, "cpu,cpuacct/docker/x", cpu__cfs_quota_us="-1")
    assert cpu_quota.read_quota(V1, tmp_path) is None


def test_version_1_mounted_under_its_short_name(tmp_path):
    write_cgroup(tmp_path, "cpu", cpu__cfs_quota_us="100000", cpu__cfs_period_us="100000")
    assert cpu_quota.read_quota("4:cpu:/docker/x\n", tmp_path) == 1


@pytest.mark.parametrize("text", ["", "nonsense", "max", "0 0", "x 100000"])
def test_without_a_readable_quota_there_is_none(tmp_path, text):
    write_cgroup(tmp_path, ".", cpu__max=text)
    assert cpu_quota.read_quota("0::/\n", tmp_path) is None
    assert cpu_quota.read_quota("", tmp_path) is None


@pytest.mark.parametrize(
    ("limit", "cores"), [("50000 100000", 1), ("150000 100000", 2), ("6400000 100000", None)]
)
def test_cores_are_whole_and_at_most_those_of_the_affinity(tmp_path, limit, cores):
    write_cgroup(tmp_path, ".", cpu__max=limit)
    (tmp_path / "process").write_text("0::/\n")
    usable = len(os.sched_getaffinity(0))
    available = cpu_quota.available_cores(tmp_path, tmp_path / "process")
    assert available == min(cores or usable, usable)


MIB = 1 << 20
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000  # what the kernel reports without a limit


def write_memory(root, version: int, path: str, limit: int | str, used: int) -> None:
    """Write the memory files of a cgroup, of which 10 MiB are file cache."""
    files = {2: ("memory__max", "memory__current", "inactive_file")}
    files[1] = ("memory__limit_in_bytes", "memory__usage_in_bytes", "total_inactive_file")
    limit_file, usage_file, field = files[version]
    statistics = f"cache 1\n{field} {10 * MIB}\nmapped_file 5"
    contents = {limit_file: str(limit), usage_file: str(used), "memory__stat": statistics}
    write_cgroup(root, path if version == 2 else f"memory/{path}", **contents)


MACHINE_BYTES = 21 << 30


def available_memory(root, membership: str) -> int:
    (root / "process").write_text(membership)
    (root / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {MACHINE_BYTES >> 10} kB\n")
    return memory_limit.available_memory(root, root / "process", root / "meminfo")


@pytest.mark.parametrize(
    ("version", "membership", "path"),
    [
        (2, "0::/\n", "."),
        (2, V2, "kubepods/pod1/box"),
        (1, "9:memory:/kubepods/pod1/box\n4:cpu,cpuacct:/x\n0::/\n", "."),
        (1, V1, "docker/x"),
    ],
    ids=["v2 in a container", "v2", "v1 in a container", "v1"],
)
def test_a_pod_plans_with_its_own_memory_limit(version, membership, path, tmp_path):
    write_memory(tmp_path, version, path, limit=512 * MIB, used=112 * MIB)
    assert available_memory(tmp_path, membership) == (512 - 112 + 10) * MIB


def test_the_smallest_free_memory_of_all_parents_counts(tmp_path):
    write_memory(tmp_path, 2, "kubepods/pod1/box", limit="max", used=0)
    write_memory(tmp_path, 2, "kubepods/pod1", limit=300 * MIB, used=310 * MIB)
    write_memory(tmp_path, 2, "kubepods", limit=900 * MIB, used=310 * MIB)
    assert available_memory(tmp_path, V2) == 0, "above the limit there is nothing"


@pytest.mark.parametrize(("version", "limit"), [(1, UNLIMITED_V1), (2, "max"), (2, "nonsense")])
def test_without_a_limit_the_memory_is_that_of_the_machine(version, limit, tmp_path):
    write_memory(tmp_path, version, ".", limit, used=MIB)
    membership = "0::/\n" if version == 2 else "9:memory:/\n"
    assert available_memory(tmp_path, membership) == MACHINE_BYTES
