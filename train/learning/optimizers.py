"""Optimizers with the parameter groups that fast recipes need, and learning-rate schedules over steps."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from models.networks.base import Network
from train.learning.precision import gpu_has_bfloat16

Tensors = list[Tensor] | tuple[Tensor, ...]


@dataclass
class Optimizer:
    """Which optimizer, and how it treats kernels, biases and the head.

    Args:
        name: sgd, adam, adamw, or muon (for kernels; the other parameters follow `others`).
        lr: peak learning rate of kernels.
        momentum: of sgd and muon.
        nesterov: whether sgd looks ahead.
        weight_decay: pull of the weights to zero, the same for all whatever their own learning rate. In adamw a step
            takes off this times the learning rate; sgd adds this times the weight to the gradient, before momentum;
            adam does so too, and then scales the sum. In muon not for kernels, whose norm is held; for the others as
            in sgd or adamw.
        decay_biases: whether biases and norms decay as well.
        bias_lr: learning rate of biases and norms, as a multiple of lr (of others_lr for muon).
        head_lr: learning rate of the last layer's weights, likewise.
        others: for muon: what trains the parameters that are not kernels.
        others_lr: for muon: their learning rate.
        others_momentum: for muon with sgd for the others.
    """

    name: Literal["sgd", "adam", "adamw", "muon"] = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    decay_biases: bool = False
    bias_lr: float = 1.0
    head_lr: float = 1.0
    others: Literal["sgd", "adamw"] = "sgd"
    others_lr: float = 0.1
    others_momentum: float = 0.9

    def __post_init__(self):
        for name in ("lr", "bias_lr", "head_lr", "others_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.optimizer.{name}: {getattr(self, name)} is not above 0")
            if not math.isfinite(getattr(self, name)):
                raise ValueError(
                    f"model.optimizer.{name}: {getattr(self, name)} is no learning rate"
                )
        for name in ("momentum", "others_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.optimizer.{name}: {getattr(self, name)} is not in 0..1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"model.optimizer.weight_decay: {self.weight_decay} is not 0 or more")


@dataclass
class Schedule:
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

    def __post_init__(self):
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"model.schedule.warmup: {self.warmup} is not in 0..1; it is a share of all steps"
            )
        for name in ("start", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"model.schedule.{name}: {getattr(self, name)} is not in 0..1; it is a share of the "
                    "peak"
                )
        if not all(0 < m < 1 for m in self.milestones):
            raise ValueError(
                f"model.schedule.milestones: {list(self.milestones)} are not in 0..1; they are shares of "
                "all steps"
            )
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"model.schedule.gamma: {self.gamma} is not above 0")

    def share(self, step: int, steps: int) -> float:
        """The factor for the peak learning rate at `step` of `steps`."""
        rising = self.warmup * steps
        if step < rising:
            return self.start + (1 - self.start) * (step + 1) / (rising + 1)
        done = min(1.0, (step - rising) / max(1.0, steps - rising))
        if self.name == "linear":
            return 1 + (self.final - 1) * done
        if self.name == "cosine":
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2
        if self.name == "step":
            return self.gamma ** sum(step >= m * steps for m in self.milestones)
        return 1.0

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: self.share(step, steps))


def parameter_groups(network: Network, config: Optimizer) -> list[dict[str, Any]]:
    """Kernels; biases, norms and the like, which don't decay; the head. Frozen parameters are left out.

    Kernels are what maps features to features: the weights of convolutions, linear layers and attention. Shape does not
    tell them: scales of layers, embeddings of positions and class tokens have several axes as well.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    maps = {id(p) for module in network.modules() for p in _maps(module)}
    heads = [p for p in trained if p is network.head.weight]
    kernels = [p for p in trained if id(p) in maps and p is not network.head.weight]
    vectors = [p for p in trained if id(p) not in maps]
    muon, decay = config.name == "muon", config.weight_decay
    rest = config.others_lr if muon else config.lr
    groups: list[dict[str, Any]] = [
        {"params": kernels, "lr": config.lr, "weight_decay": 0.0 if muon else decay},
        {
            "params": vectors,
            "lr": rest * config.bias_lr,
            "weight_decay": decay / config.bias_lr if config.decay_biases else 0.0,
        },
        {"params": heads, "lr": rest * config.head_lr, "weight_decay": decay / config.head_lr},
    ]
    if muon:
        groups[0]["muon"] = True
    return [group for group in groups if group["params"]]


def _maps(module: nn.Module) -> list[Tensor]:
    """The kernels that a module holds itself."""
    if isinstance(module, nn.MultiheadAttention):  # its output's is that of a linear layer inside
        return [module.in_proj_weight]
    return [module.weight] if isinstance(module, nn.Conv2d | nn.Linear) else []


def build(network: Network, config: Optimizer, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer over the parameter groups of a network; torch's fused kernels where it has them and `fused`."""
    groups = parameter_groups(network, config)
    if config.name == "muon":
        return Muon(
            groups,
            config.lr,
            config.momentum,
            config.others,
            config.others_momentum,
            config.nesterov,
        )
    fused = fused and all(
        p.device.type in ("cpu", "cuda") for group in groups for p in group["params"]
    )
    if config.name == "sgd":
        return torch.optim.SGD(
            groups,
            config.lr,
            config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            fused=fused,
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, config.lr, fused=fused)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for kernels (groups with `muon`); SGD with Nesterov or AdamW for the others.

    The update of a kernel [F,C,k,k], seen as a matrix [F, C*k*k], is the nearest semi-orthogonal matrix to its
    momentum: every direction is learnt at the same speed (Jordan et al., "Muon: an optimizer for hidden layers in
    neural networks", 2024). Kernels are held at the norm sqrt(F), so the learning rate means the same for every layer
    and at any time. torch.optim.Muon takes matrices only.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
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
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # both at once
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            update = (
                self._muon
                if group["muon"]
                else self._sgd
                if group["others"] == "sgd"
                else self._adamw
            )
            update(group, parameters, [p.grad for p in parameters])
        return loss

    def _moments(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in parameters]

    def _muon(self, group: dict[str, Any], parameters: list[Tensor], gradients: Tensors) -> None:
        momentum, velocities = group["momentum"], self._moments(parameters, "velocity")
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, gradients)
        updates = (
            torch._foreach_add(gradients, velocities, alpha=momentum)
            if group["nesterov"]
            else velocities
        )
        for p, update in zip(parameters, updates, strict=True):
            p.mul_(len(p) ** 0.5 / p.norm().clamp_min(1e-12))
            p.add_(orthogonal(update.reshape(len(p), -1)).view_as(p), alpha=-group["lr"])

    def _sgd(self, group: dict[str, Any], parameters: list[Tensor], gradients: Tensors) -> None:
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        momentum, velocities = group["others_momentum"], self._moments(parameters, "velocity")
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, gradients)
        updates = (
            torch._foreach_add(gradients, velocities, alpha=momentum)
            if group["nesterov"]
            else velocities
        )
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor], gradients: Tensors) -> None:
        b1, b2 = group["betas"]
        group["count"] = count = group.get("count", 0) + 1
        means, squares = self._moments(parameters, "mean"), self._moments(parameters, "square")
        torch._foreach_lerp_(means, gradients, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, (1 - b2**count) ** 0.5)
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, means, scales, -group["lr"] / (1 - b1**count))


def orthogonal(matrix: Tensor, steps: int = 3) -> Tensor:
    """The nearest semi-orthogonal matrix, about, for directions that count.

    With 3 steps a singular value of at least 1/50 of the matrix's Frobenius norm ends within 0.68 to 1.21; a smaller
    one, of which a square or low-rank matrix has many, only grows about 41 times against that norm. It is a quintic
    Newton-Schulz iteration whose coefficients give the steepest rise from zero; it needs products only and stands
    bfloat16, which is used where the hardware is fast at it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if matrix.is_cuda and gpu_has_bfloat16() else matrix
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)
