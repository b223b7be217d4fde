"""Exponential moving average of the weights: validated, checkpointed and kept in place of the last ones."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class WeightAverage(Callback):
    """Average of the weights over about the last 1 / (1 - decay) steps (Polyak and Juditsky, 1992).

    The first steps weigh more (decay at step t is at most (1 + t) / (10 + t)), so a short run is not held back by its
    random start. Buffers, the norms' statistics, are averaged alike. Lightning's own callback swaps before its
    first update (Lightning-AI/pytorch-lightning#21724); here nothing is swapped until there is an average. It is held
    in float32 at least: in bfloat16 a step of less than 1/256 would be rounded away.
    """

    def __init__(self, decay: float = 0.0, every_steps: int = 1):
        """
        Args:
            decay: share of the old average that stays at each update, e.g. 0.999; 0 for no average.
            every_steps: steps between updates.
        """
        if not 0 <= decay < 1 or every_steps < 1:
            raise ValueError(
                f"ema: decay must be in 0..1, not {decay}, and every_steps 1 or more, not {every_steps}"
            )
        self.decay, self.every_steps = decay, every_steps
        self.average: dict[str, Tensor] = {}
        self._current: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}  # what was trained, while the average is in its place
        self.updates, self._last_step = 0, 0
        self._swapped = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._current = _tensors(pl_module)
        self.average = {
            name: value.to(self._current[name].device) for name, value in self.average.items()
        }

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if not self.decay or step == self._last_step or step % self.every_steps:
            return
        self._last_step = step
        self._update(self._current)

    @torch.no_grad()
    def _update(self, current: dict[str, Tensor]) -> None:
        if not self.average:
            self.average = {name: _precise(value) for name, value in current.items()}
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = list(self.average.values())
        values = [
            value.to(average.dtype)
            for value, average in zip(current.values(), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, values, 1 - decay)

    @torch.no_grad()
    def _swap(self, pl_module: L.LightningModule) -> None:
        current = _tensors(pl_module)
        found = self._kept if self._swapped else self.average
        self._kept = {} if self._swapped else {name: current[name].clone() for name in found}
        for name, value in found.items():
            current[name].copy_(value)
        self._swapped = not self._swapped

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._swapped:  # in a validation that was cut short
            self._swap(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module)
        self.average, self._kept, self._swapped = {}, {}, False

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The average becomes the checkpoint's weights, as it is what was validated; the others lie beside it."""
        if self.average:
            checkpoint["ema"] = {
                "updates": self.updates,
                "last_step": self._last_step,
                "current": {name: checkpoint["state_dict"][name] for name in self.average},
            }
            checkpoint["state_dict"] = checkpoint["state_dict"] | self.average

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called after the weights were loaded: to go on training, take back those that were trained."""
        if self.decay and "ema" in checkpoint and trainer.state.fn == "fit":
            found = checkpoint["ema"]
            self.updates, self._last_step = found["updates"], found["last_step"]
            self.average = {
                name: _precise(checkpoint["state_dict"][name]) for name in found["current"]
            }
            pl_module.load_state_dict(found["current"], strict=False)


def _precise(value: Tensor) -> Tensor:
    """A copy in float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _tensors(pl_module: L.LightningModule) -> dict[str, Tensor]:
    """What is averaged, by its name in the state dict: floating-point weights and buffers."""
    return {
        name: value for name, value in pl_module.state_dict().items() if value.is_floating_point()
    }
