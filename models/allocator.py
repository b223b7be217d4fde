"""Whether glibc keeps freed memory for the next use or returns it to the system.

By default it returns large blocks until one was freed; from then on each thread keeps up to 64 MiB.
The kernel hands returned memory out again page by page and zeroed. On a CPU that takes a quarter to
a third of a training step of speednet, so training keeps its memory. Workers of the server return
it, because what all their threads keep would add up.

Nothing is changed with another C library, or where the environment configures the allocator.
"""

import ctypes
import os

# Parameters of mallopt, as malloc.h numbers them, and a threshold that no block reaches.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
UNREACHABLE_BYTES = 2**31 - 1

LARGE_BLOCK_BYTES = 8 << 20


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step. Peak memory may rise by half."""
    _set_thresholds(UNREACHABLE_BYTES)


def return_large_blocks() -> None:
    """Return freed blocks of LARGE_BLOCK_BYTES and more, such as decoded images, at once.

    What a process holds is then what it uses, however many threads take turns at large images.
    """
    _set_thresholds(LARGE_BLOCK_BYTES)


def _set_thresholds(size: int) -> None:
    is_configured = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or is_configured:
        return
    mallopt(M_TRIM_THRESHOLD, size)
    mallopt(M_MMAP_THRESHOLD, size)
