"""What the reports of the scripts in this folder have in common."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("litserve", "uvicorn", "onnxruntime", "opencv-python-headless", "numpy")
TRAINING_PACKAGES = ("torch", "lightning", "onnxscript")


def describe_run(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Return the machine, the versions and the date."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _read_cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def _read_cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def print_report(report: dict[str, Any], out: Path | None) -> int:
    """Print the report as JSON, write it to `out`, and return 1 if it names violations."""
    text = json.dumps(report, indent=1)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    return 1 if report["violations"] else 0
