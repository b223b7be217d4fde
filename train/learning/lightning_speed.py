"""Remove from a training step what is not training. Written for lightning 2.6.

Hooks: in each step Lightning calls a dozen hooks on every callback and on the module, each within a
profiler's context and under a name that it formats, whether or not anything overrides them. Small
networks spend a fifth of their time on that. Lightning skips a hook that is not callable, so hooks
that are not overridden are set to None.

Memory: glibc returns every large block to the kernel when it is freed. When the next step allocates
the same size, the kernel hands it out page by page and zeroed. On a CPU that takes a quarter to a
third of a step of speednet.
"""

import ctypes
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
NO_CONTEXT = nullcontext()

# Parameters of mallopt, as malloc.h numbers them, and a threshold that no block reaches.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
UNREACHABLE_BYTES = 2**31 - 1


class NoProfiler(PassThroughProfiler):
    """Measures nothing, at the least cost: one shared context instead of one a call."""

    def profile(self, action_name: str) -> AbstractContextManager:  # type: ignore[override]  # Lightning's are generators
        """Return a context that does nothing."""
        return NO_CONTEXT


def skip_unused_hooks(module: L.LightningModule, callbacks: Iterable[Callback]) -> None:
    """Let Lightning skip the hooks of a step that the module and the callbacks do not override."""
    _skip_hooks(module, L.LightningModule)
    for callback in callbacks:
        _skip_hooks(callback, Callback)


def _skip_hooks(owner: object, base: type) -> None:
    for hook in STEP_HOOKS:
        if getattr(type(owner), hook) is getattr(base, hook):
            setattr(owner, hook, None)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step. Peak memory may rise by half.

    Does nothing where the C library has no such setting, or where the environment configures it.
    """
    is_configured = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or is_configured:
        return
    mallopt(M_TRIM_THRESHOLD, UNREACHABLE_BYTES)
    mallopt(M_MMAP_THRESHOLD, UNREACHABLE_BYTES)
