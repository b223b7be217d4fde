"""Take out of a training step what is not training.

Hooks: for each step Lightning calls a dozen on every callback and on the module, each within a profiler's context and
each under a name that is made for it, whether or not anybody overrides it. Small networks spend a fifth of their time
on that. It skips a hook that is not callable.

Memory: glibc hands every large block back to the kernel when it is freed, and gets it back page by page and zeroed when
the next step asks for the same. On a CPU that took a quarter to a third of a step of speednet.
"""

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler

from train.learning.trainer import ours

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
NOTHING = nullcontext()
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


class NoProfiler(PassThroughProfiler):
    """Measures nothing, at the least cost."""

    def profile(self, action_name: str) -> AbstractContextManager:  # type: ignore[override]  # any will do
        return NOTHING


def trim(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Make the step hooks that nobody overrides be skipped."""
    us = ours(trainer)
    if type(us.profiler) is PassThroughProfiler:
        us.profiler = NoProfiler()
    for owner, base in [
        *((callback, Callback) for callback in us.callbacks),
        (module, L.LightningModule),
    ]:
        for hook in STEP_HOOKS:
            if getattr(type(owner), hook) is getattr(base, hook):
                setattr(owner, hook, None)


def keep_memory() -> None:
    """Let the C library keep what a step frees for the next one. The peak may be half as high again.

    Nothing happens where the C library has no such setting, or where the environment names its own.
    """
    named = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not named:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
