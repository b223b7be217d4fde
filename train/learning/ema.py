"""Exponential moving average of the weights, which is validated, checkpointed and exported.

The average replaces the trained weights where they are evaluated or saved.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class WeightAverage(Callback):
    """Average of the weights over about the last 1 / (1 - decay) steps.

    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992. The decay at
    update t is at most (1 + t) / (10 + t), so that the random start does not slow down a short run.
    Floating-point buffers, such as the statistics of norms, are averaged too. The average is held
    in float32 at least: bfloat16 loses relative changes below 1/256 by rounding.

    Lightning's own callback swaps before its first update (Lightning-AI/pytorch-lightning#21724);
    this one swaps nothing until there is an average.

    Args:
        decay: share of the old average that stays at each update, e.g. 0.999; 0 for no average.
        every_steps: steps between updates.
    """

    def __init__(self, decay: float = 0.0, every_steps: int = 1):
        if not 0 <= decay < 1 or every_steps < 1:
            raise ValueError(
                f"ema: decay must be in 0..1, not {decay}, and every_steps 1 or more, not "
                f"{every_steps}"
            )
        self.decay = decay
        self.every_steps = every_steps
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._current: dict[str, Tensor] = {}  # tensors of the module, not copies
        self._trained: dict[str, Tensor] = {}  # copies, while the average replaces them
        self._is_swapped = False
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep references to the weights, and put a restored average on their device."""
        self._current = _averaged_tensors(pl_module)
        for name, value in self.average.items():
            self.average[name] = value.to(self._current[name].device)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Update the average after every `every_steps` optimizer steps."""
        step = trainer.global_step
        if not self.decay or step == self._last_step or step % self.every_steps:
            return
        self._last_step = step
        self._update(self._current)

    @torch.no_grad()
    def _update(self, current: dict[str, Tensor]) -> None:
        if not self.average:
            self.average = {name: _copy_in_float32(value) for name, value in current.items()}

        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))

        averages = list(self.average.values())
        values: list[Tensor] = []
        for value, average in zip(current.values(), averages, strict=True):
            values.append(value.to(average.dtype))
        torch._foreach_lerp_(averages, values, 1 - decay)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate with the average."""
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train on with the trained weights."""
        self._swap(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore the trained weights where a validation was interrupted."""
        if self._is_swapped:
            self._swap(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in place of the trained weights."""
        self._swap(pl_module)
        self.average = {}
        self._trained = {}
        self._is_swapped = False

    @torch.no_grad()
    def _swap(self, pl_module: L.LightningModule) -> None:
        """Replace the trained weights by their average, or the average by the trained weights."""
        current = _averaged_tensors(pl_module)
        if self._is_swapped:
            replacement = self._trained
            self._trained = {}
        else:
            replacement = self.average
            self._trained = {name: current[name].clone() for name in self.average}

        for name, value in replacement.items():
            current[name].copy_(value)
        self._is_swapped = not self._is_swapped

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average, which was validated, as the weights; add the trained ones as `ema`."""
        if not self.average:
            return
        trained = checkpoint["state_dict"]
        checkpoint["ema"] = {
            "updates": self.updates,
            "last_step": self._last_step,
            "current": {name: trained[name] for name in self.average},
        }
        checkpoint["state_dict"] = trained | self.average

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore average and trained weights, to continue training.

        Lightning calls this after it has loaded the checkpoint's weights into the module.
        """
        if not self.decay or "ema" not in checkpoint or trainer.state.fn != "fit":
            return
        state = checkpoint["ema"]
        weights = checkpoint["state_dict"]
        self.updates = state["updates"]
        self._last_step = state["last_step"]
        self.average = {name: _copy_in_float32(weights[name]) for name in state["current"]}
        pl_module.load_state_dict(state["current"], strict=False)


def _copy_in_float32(value: Tensor) -> Tensor:
    """Copy a tensor; the copy has float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _averaged_tensors(pl_module: L.LightningModule) -> dict[str, Tensor]:
    """Return the tensors that are averaged: floating-point weights and buffers, by name."""
    state = pl_module.state_dict()
    return {name: value for name, value in state.items() if value.is_floating_point()}
