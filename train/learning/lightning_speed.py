"""Remove from a training step what is not training. Written for lightning 2.6.

Hooks: in each step Lightning calls a dozen hooks on every callback and on the module, each within a
profiler's context and under a name that it formats, whether or not anything overrides them. Small
networks spend a fifth of their time on that. Lightning skips a hook that is not callable, so hooks
that are not overridden are set to None.
"""

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
