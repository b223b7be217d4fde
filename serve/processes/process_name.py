"""The names of the processes, as `ps` and `top` show them."""

import contextlib
from pathlib import Path


def set_process_name(name: str) -> None:
    """Name this process `imago-<name>`. Linux keeps 15 characters; other systems ignore it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"imago-{name}")
