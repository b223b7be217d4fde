"""Where a bundle comes from."""

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


def provenance(
    device: torch.device,
    data: DataInfo,
    seed: int,
    recipe: dict[str, Any],
    seconds: dict[str, float],
) -> Provenance:
    commit, dirty = revision()
    packages = {"python": platform.python_version()} | {
        p: v for p in PACKAGES if (v := _version(p))
    }
    return Provenance(
        git_commit=commit,
        git_dirty=dirty,
        data=data,
        packages=packages,
        device=device_name(device),
        seed=seed,
        recipe=recipe,
        seconds=seconds,
    )


def revision() -> tuple[str | None, bool | None]:
    """The commit of this code, and whether it was changed since; None where nobody knows."""
    if commit := _git("rev-parse", "HEAD"):
        status = _git("status", "--porcelain")
        return commit, None if status is None else bool(status)
    told = os.environ.get(
        "IMAGO_REVISION", "unknown"
    )  # an image has no repository: docker/build told it
    commit = told.removesuffix("-dirty")
    return (None, None) if commit == "unknown" else (commit, commit != told)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The CPU's name, what of int8 it has in hardware, and the cores this process may use."""
    name, flags = platform.machine(), ""
    try:
        with open("/proc/cpuinfo") as file:
            facts = {key.strip(): value for key, _, value in (line.partition(":") for line in file)}
        name = facts.get("model name", name).strip()
        flags = (
            ", VNNI" if {"avx512_vnni", "avx_vnni"} & set(facts.get("flags", "").split()) else ""
        )
    except OSError:
        pass  # not Linux
    return f"{name}{flags}, {available_cores()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """What git says of this code; None where it is no git repository."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(
            git, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
