"""How every benchmark keeps its results: a list in a JSON file next to the script.

An entry holds what the script measured (medians, and under `spread` the least and the largest
value of the rounds), the machine, the versions of what was measured, and the date.
"""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent))
"""Where the files are; the variable is for tests and for a checkout that can't be written."""
PACKAGES = ("onnxruntime", "openvino", "litserve", "numpy", "torch", "lightning", "timm")


def describe_machine() -> dict[str, Any]:
    """CPU, cores of this process, memory, system, and the load of others a minute ago."""
    return {
        "cpu": _read_field("/proc/cpuinfo", "model name") or platform.machine(),
        "has_vnni": "vnni" in _read_field("/proc/cpuinfo", "flags"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(terse=True),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _read_field(file: str, name: str) -> str:
    """The first value of a field in /proc; empty where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def describe_versions() -> dict[str, str]:
    """Versions of Python, of the packages that matter for speed, and the commit of Imago."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    command = ["git", "describe", "--always", "--dirty"]
    described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    versions["imago"] = described.stdout.strip() or version("imago")
    return versions


MACHINE = describe_machine()
"""Read at the import, before the benchmark itself makes load."""


def write_result(script: str, result: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Write a result into the JSON file of a script.

    It replaces an earlier result with the same CPU, cores and values for all `keys`.
    """
    entry = {
        **result,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": MACHINE,
        "versions": describe_versions(),
    }
    kept: list[dict[str, Any]] = []
    for old in read_results(script):
        if _identify(old, keys) != _identify(entry, keys):
            kept.append(old)
    text = json.dumps([*kept, entry], indent=1)
    find_file(script).write_text(text + "\n")


def find_file(script: str) -> Path:
    """The file with the results of a script."""
    return DIRECTORY / f"{Path(script).stem}.json"


def read_results(script: str) -> list[dict[str, Any]]:
    """The results of a script, oldest first; empty where none was kept."""
    file = find_file(script)
    return json.loads(file.read_text()) if file.exists() else []


def _identify(entry: dict[str, Any], keys: tuple[str, ...]) -> tuple[Any, ...]:
    machine = entry.get("machine", {})
    return (machine.get("cpu"), machine.get("cores"), *(entry.get(key) for key in keys))


def spread(values: list[float]) -> list[float]:
    """The least and the largest value of the rounds."""
    return [round(min(values), 3), round(max(values), 3)]
