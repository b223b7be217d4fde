"""Muon: momentum, orthogonalized, for kernels; torch's SGD or AdamW for the other parameters.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024
(https://kellerjordan.github.io/posts/muon/). `torch.optim.Muon` takes matrices only.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from train.learning.precision import gpu_has_bfloat16

ParameterGroup = dict[str, Any]


class Muon(torch.optim.Optimizer):
    """Muon for groups with `muon` set; SGD or AdamW for the other groups, in one state dict.

    The update of a kernel [F,C,k,k], seen as a matrix [F, C*k*k], is the semi-orthogonal matrix
    nearest to its momentum: every direction is learned at the same speed. Kernels are held at the
    norm sqrt(F), so that the learning rate means the same for every layer at any time.

    The other groups call the functions behind `torch.optim.SGD` and `torch.optim.AdamW` on this
    optimizer's own groups and state. Lightning's schedules, checkpoints and gradient clipping then
    see one optimizer.

    Args:
        groups: parameter groups; those with `muon: True` hold kernels.
        lr: learning rate of groups that have none of their own.
        momentum: of kernels.
        others: the optimizer of the groups without `muon`.
        others_momentum: the momentum of these groups, for sgd.
        nesterov: whether kernels and sgd use Nesterov momentum.
        betas: for adamw: decay of the running means of gradients and of their squares.
        eps: for adamw: added to the denominator.
    """

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        lr: float,
        momentum: float = 0.6,
        others: Literal["sgd", "adamw"] = "sgd",
        others_momentum: float = 0.9,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "others_momentum": others_momentum,
            "nesterov": nesterov,
            "others": others,
            "betas": betas,
            "eps": eps,
            "weight_decay": 0.0,
            "muon": False,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch declares two overloads
        """Update all parameters that have a gradient; return the closure's loss, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]

            if group["muon"]:
                self._step_kernels(group, parameters, gradients)
            elif group["others"] == "sgd":
                self._step_sgd(group, parameters, gradients)
            else:
                self._step_adamw(group, parameters, gradients)

        return loss

    def _step_kernels(
        self, group: ParameterGroup, parameters: list[Tensor], gradients: list[Tensor]
    ) -> None:
        momentum = group["momentum"]
        velocities = self._state_tensors(parameters, "velocity")
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, gradients)

        updates: Iterable[Tensor] = velocities
        if group["nesterov"]:
            updates = torch._foreach_add(gradients, velocities, alpha=momentum)

        for p, update in zip(parameters, updates, strict=True):
            filters = len(p)
            direction = orthogonalize(update.reshape(filters, -1))
            p.mul_(filters**0.5 / p.norm().clamp_min(1e-12))
            p.add_(direction.view_as(p), alpha=-group["lr"])

    def _step_sgd(
        self, group: ParameterGroup, parameters: list[Tensor], gradients: list[Tensor]
    ) -> None:
        momentum = group["others_momentum"]
        sgd(
            parameters,
            gradients,
            [*self._state_tensors(parameters, "velocity")],  # for mypy: torch's list may hold None
            foreach=True,
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"] and momentum > 0,
            maximize=False,
        )

    def _step_adamw(
        self, group: ParameterGroup, parameters: list[Tensor], gradients: list[Tensor]
    ) -> None:
        for p in parameters:
            self.state[p].setdefault("step", torch.zeros(()))
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            exp_avgs=self._state_tensors(parameters, "mean"),
            exp_avg_sqs=self._state_tensors(parameters, "square"),
            max_exp_avg_sqs=[],
            state_steps=[self.state[p]["step"] for p in parameters],
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state_tensors(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """Return one state tensor of each parameter; it starts at zero."""
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in parameters]


def orthogonalize(matrix: Tensor, steps: int = 3) -> Tensor:
    """Return about the nearest semi-orthogonal matrix, for the directions that matter.

    With 3 steps a singular value of at least 1/50 of the matrix's Frobenius norm ends within 0.68
    to 1.21. A smaller one, of which a square or low-rank matrix has many, only grows about 41 times
    relative to that norm.

    It is a quintic Newton-Schulz iteration whose coefficients give the steepest rise from zero
    (Jordan et al., 2024). It needs products only and tolerates bfloat16, which is used on GPUs that
    multiply it in hardware.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if matrix.is_cuda and gpu_has_bfloat16() else matrix

    is_wide = x.shape[0] <= x.shape[1]
    if not is_wide:
        x = x.T

    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x

    if not is_wide:
        x = x.T
    return x.to(matrix.dtype)
