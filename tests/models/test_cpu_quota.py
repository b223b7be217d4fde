"""The cores a process may use, from cgroup files and CPU affinity."""

import os

import pytest

from models import cpu_quota

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
