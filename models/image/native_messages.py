"""Keep libpng and libjpeg from writing to stderr, where each broken image would leave a line.

OpenCV has no setting for it: both write to the C variable `stderr`. While an image is decoded, the
variable names a stream to /dev/null. The file descriptor stays as it is, so that Python's own
output and logs are not affected.
"""

import ctypes
import os
import threading


class _NativeMessages:
    """Drops what C code writes to `stderr` while any thread is in a `with` block of this object."""

    def __init__(self) -> None:
        self.stderr = _find_stderr()
        self.original = self.stderr.value
        self.null = _open_null() or self.original
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Forget the threads in blocks, of which a forked process has none."""
        self.lock = threading.Lock()
        self.users = 0
        self.stderr.value = self.original

    def __enter__(self) -> None:
        with self.lock:
            self.users += 1
            self.stderr.value = self.null

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.stderr.value = self.original


def _find_stderr() -> ctypes.c_void_p:
    """Return the C variable `stderr`, or one without effect where it can't be changed."""
    if not _is_glibc():  # a constant in musl; it has another name on macOS
        return ctypes.c_void_p()
    return ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stderr")


def _is_glibc() -> bool:
    try:
        return "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (ValueError, OSError):
        return False


def _open_null() -> int | None:
    """Return a C stream that discards what is written."""
    fopen = ctypes.CDLL(None).fopen
    fopen.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
    fopen.restype = ctypes.c_void_p
    stream: int | None = fopen(os.devnull.encode(), b"w")
    return stream


dropped_native_messages = _NativeMessages()
