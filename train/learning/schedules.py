"""Learning-rate schedules over the steps of a run: constant, linear, cosine, step; with a warm-up.

The system builds its scheduler from `ScheduleConfig`; Lightning calls it after each step.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class ScheduleConfig:
    """The learning rate over the steps of the run, as a share of its peak.

    Args:
        name: constant, linear, cosine, or step (times `gamma` after each of `milestones`).
        warmup: share of all steps in which the rate rises linearly from `start`, 0..1.
        start: where the warm-up begins, as a share of the peak.
        final: where linear and cosine end, as a share of the peak.
        milestones: for step: shares of all steps.
        gamma: for step: the factor.
    """

    name: Literal["constant", "linear", "cosine", "step"] = "constant"
    warmup: float = 0.0
    start: float = 0.0
    final: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"model.schedule.warmup: {self.warmup} is not in 0..1; it is a share of all steps"
            )

        for name in ("start", "final"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(
                    f"model.schedule.{name}: {value} is not in 0..1; it is a share of the peak"
                )

        if not all(0 < milestone < 1 for milestone in self.milestones):
            raise ValueError(
                f"model.schedule.milestones: {list(self.milestones)} are not in 0..1; they are "
                "shares of all steps"
            )

        if not 0 < self.gamma < math.inf:
            raise ValueError(f"model.schedule.gamma: {self.gamma} is not above 0")

    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor for the peak learning rate at `step` of `total_steps`."""
        warmup_steps = self.warmup * total_steps
        if step < warmup_steps:
            return self.start + (1 - self.start) * (step + 1) / (warmup_steps + 1)

        # Share of the steps after the warm-up that are done.
        progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))

        if self.name == "linear":
            return 1 + (self.final - 1) * progress
        if self.name == "cosine":
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        if self.name == "step":
            passed = sum(step >= milestone * total_steps for milestone in self.milestones)
            return self.gamma**passed
        return 1.0

    def build_scheduler(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
        """Return a scheduler that scales the rate of every parameter group alike."""
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps))
