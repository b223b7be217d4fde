"""Provenance of a bundle: the code, packages, device, data and settings that made it."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from models.bundle import DataInfo, Provenance
from models.cpu_quota import available_cores

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "opencv-python-headless",
    "imago",
)
GIT_TIMEOUT_SECONDS = 30


def build_provenance(
    device: torch.device,
    data: DataInfo,
    recipe: dict[str, Any],
    seconds: dict[str, float],
) -> Provenance:
    """Return the provenance for the manifest.

    `recipe` holds all settings as plain values, among them `seed_everything`; `seconds` the time of
    each step.
    """
    commit, is_dirty = read_revision()
    packages = {"python": platform.python_version()}
    for package in PACKAGES:
        package_version = _read_version(package)
        if package_version is not None:
            packages[package] = package_version

    return Provenance(
        git_commit=commit,
        git_dirty=is_dirty,
        data=data,
        packages=packages,
        device=device_name(device),
        seed=recipe["seed_everything"],
        recipe=recipe,
        seconds=seconds,
    )


def read_revision() -> tuple[str | None, bool | None]:
    """Return the git commit of this code and whether files differ from it; None where unknown.

    A container image has no repository. Its build writes the commit into IMAGO_REVISION, with
    "-dirty" at the end for changed files.
    """
    commit = _run_git("rev-parse", "HEAD")
    if commit:
        changes = _run_git("status", "--porcelain")
        return commit, None if changes is None else bool(changes)

    revision = os.environ.get("IMAGO_REVISION", "unknown")
    commit = revision.removesuffix("-dirty")
    if commit == "unknown":
        return None, None
    return commit, revision.endswith("-dirty")


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """Return the CPU's name, whether it has int8 instructions, and the cores of this process."""
    name = platform.machine()
    vnni = ""
    cpuinfo = _read_cpuinfo()
    if cpuinfo:
        name = cpuinfo.get("model name", name)
        flags = set(cpuinfo.get("flags", "").split())
        if flags & {"avx512_vnni", "avx_vnni"}:
            vnni = ", VNNI"
    return f"{name}{vnni}, {available_cores()} cores"


def _read_cpuinfo() -> dict[str, str]:
    """Return the fields of /proc/cpuinfo; empty if the file is missing (not Linux)."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                fields[key.strip()] = value.strip()
    except OSError:
        return {}
    return fields


def _read_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _run_git(*arguments: str) -> str | None:
    """Return what git prints about this code; None where it is not in a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
