"""Where the pixels are kept while training: on the device, in the host's memory, or on disk and streamed."""

from pathlib import Path
from typing import Literal

import torch

Memory = Literal["auto", "memory", "stream"]
Place = Literal["device", "host", "stream"]


def choose(
    memory: Memory, size: int, share: float, device: torch.device, holders: int = 1
) -> tuple[Place, str]:
    """Where `size` bytes of pixels go, and why, in words.

    They go to the device if they fit into `share` of its free memory, else to the host's if they fit into that share of
    it, for each of so many `holders`, else they are streamed. "memory" and "stream" decide without asking; only the
    device may still be too small.
    """
    if memory == "stream":
        return "stream", "as asked"
    fits_device = device.type != "cpu" and size <= share * _free(device)
    if device.type != "cpu" and fits_device:
        return (
            "device",
            f"{_gb(size)} within {share:.0%} of the {_gb(_free(device))} free on {device}",
        )
    free = available()
    if memory == "memory":
        return "host", f"{_gb(size)}, as asked"
    each = f"{holders} times {_gb(size)}" if holders > 1 else _gb(size)
    if holders * size <= share * free:
        return "host", f"{each} within {share:.0%} of {_gb(free)} of free memory"
    return "stream", f"{each} is more than {share:.0%} of {_gb(free)} of free memory"


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available()


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def available() -> int:
    """Bytes of memory that this process may still take: the machine's, or less where a container sets a limit."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30  # not Linux: assume a modest machine
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (
            (group / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        inactive = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())[
            "inactive_file"
        ]
        return free if limit == "max" else min(free, int(limit) - int(used) + int(inactive))
    except (OSError, KeyError, ValueError):
        return free
