"""Take what does nothing out of Lightning's step: small networks spend a fifth of their time on it.

For each step Lightning calls a dozen hooks on every callback and on the module, each within a profiler's context and
each under a name that is made for it, whether or not anybody overrides the hook. It skips a hook that is not callable.
"""
from contextlib import AbstractContextManager, nullcontext

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler

from train.trainer import ours

STEP_HOOKS = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
              "on_before_optimizer_step", "on_train_batch_end")
NOTHING = nullcontext()


class NoProfiler(PassThroughProfiler):
    """Measures nothing, at the least cost."""

    def profile(self, action_name: str) -> AbstractContextManager:  # type: ignore[override]  # any will do
        return NOTHING


def trim(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Make the step hooks that nobody overrides be skipped."""
    us = ours(trainer)
    if type(us.profiler) is PassThroughProfiler:
        us.profiler = NoProfiler()
    for owner, base in [*((callback, Callback) for callback in us.callbacks), (module, L.LightningModule)]:
        for hook in STEP_HOOKS:
            if getattr(type(owner), hook) is getattr(base, hook):
                setattr(owner, hook, None)
