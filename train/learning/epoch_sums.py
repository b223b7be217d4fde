"""Sums of an epoch: loss, correct predictions and images, kept on the device."""

import torch
from torch import Tensor

STEPS_PER_SUM = 64  # steps that are kept before they are added up at once


class EpochSums:
    """The sums of one part of the data over the steps of an epoch.

    A step only stores its values; those of up to 64 steps are added up at once, in their order. To
    add each step separately takes fifteen small operations, which slows down a small network.
    """

    def __init__(self, totals: Tensor):
        """`totals`, float64 [4]: the sums to start from, as `totals()` returns them."""
        self._totals = totals
        self._class_counts: Tensor | None = None  # see `count_classes`
        self._batch_size = 0
        self._steps: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def zeros(cls, device: torch.device) -> "EpochSums":
        """Return the sums of an epoch that has no steps yet."""
        return cls(torch.zeros(4, dtype=torch.float64, device=device))

    def add(self, loss: Tensor, correct: Tensor, batch_size: int) -> None:
        """Add a step: its mean loss [] and its number of correct predictions []."""
        if batch_size != self._batch_size or len(self._steps) == STEPS_PER_SUM:
            self.totals()
        self._batch_size = batch_size
        self._steps.append((loss, correct))

    def count_classes(self, labels: Tensor, is_correct: Tensor, classes: int) -> None:
        """Count the images of each class and those that are classified correctly, both [B]."""
        if self._class_counts is None:
            self._class_counts = torch.zeros(2, classes, dtype=torch.float64, device=labels.device)
        is_counted = torch.stack([torch.ones_like(is_correct), is_correct])
        self._class_counts.index_add_(1, labels, is_counted.double())

    def class_counts(self, classes: int) -> Tensor:
        """Return float64 [2,K]: images of each class, and those that are classified correctly."""
        if self._class_counts is None:
            return self._totals.new_zeros(2, classes)
        return self._class_counts

    def totals(self) -> Tensor:
        """Return float64 [4]: loss, correct predictions, images, and steps with a finite loss.

        The last one counts the steps before the first loss that is not finite.
        """
        if not self._steps:
            return self._totals

        losses = torch.stack([loss for loss, _ in self._steps]).double()
        correct = torch.stack([correct for _, correct in self._steps]).double()
        steps = len(self._steps)
        terms = torch.cat([self._totals[:1], losses * self._batch_size])

        # On the CPU one by one, so that the sum does not depend on when it is computed; a resumed
        # run needs that. A GPU has no cumulative sum that is deterministic.
        if terms.device.type == "cpu":
            loss_sum = terms.cumsum(0)[-1:]
        else:
            loss_sum = terms.sum(0, keepdim=True)

        not_finite = terms.isfinite().logical_not().int()
        first_bad_step = not_finite.argmax().sub(1).clamp_min(0)
        finite_steps = torch.where(not_finite.any(), first_bad_step, steps).double()

        images = torch.full_like(finite_steps, self._batch_size * steps)
        added = torch.stack([correct.sum(), images, finite_steps])
        self._totals = torch.cat([loss_sum, self._totals[1:] + added])
        self._steps.clear()
        return self._totals
