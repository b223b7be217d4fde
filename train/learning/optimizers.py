"""Optimizers: their settings, the parameter groups that fast recipes need, and how they are built.

The system builds one optimizer over all parameters in `configure_optimizers`.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.networks.base import Network
from train.learning.muon import Muon


@dataclass
class OptimizerConfig:
    """Which optimizer, and how it treats kernels, biases and the head.

    Args:
        name: sgd, adam, adamw, or muon (for kernels; the other parameters follow `others`).
        lr: peak learning rate of kernels.
        momentum: of sgd and muon.
        nesterov: whether sgd and muon use Nesterov momentum.
        weight_decay: pull of the weights to zero, the same for all groups whatever their learning
            rate. adamw subtracts this times the learning rate in a step; sgd adds this times the
            weight to the gradient, before momentum; adam does so too, and then scales the sum. With
            muon not for kernels, whose norm is held; for the others as in sgd or adamw.
        decay_biases: whether biases and norms decay as well.
        bias_lr: learning rate of biases and norms, as a multiple of lr (of others_lr for muon).
        head_lr: learning rate of the last layer's weights, likewise.
        layer_decay: learning rate of each group of layers, as a multiple of that of the group
            after it; 0.75 is usual where pretrained weights are fine-tuned, so that the first
            layers change least (Clark et al., "ELECTRA", 2020; Bao et al., "BEiT", 2022).
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
    layer_decay: float = 1.0
    others: Literal["sgd", "adamw"] = "sgd"
    others_lr: float = 0.1
    others_momentum: float = 0.9

    def __post_init__(self) -> None:
        for name in ("lr", "bias_lr", "head_lr", "others_lr"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"model.optimizer.{name}: {value} is not above 0")
            if not math.isfinite(value):
                raise ValueError(f"model.optimizer.{name}: {value} is not a finite number")

        for name in ("momentum", "others_momentum"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"model.optimizer.{name}: {value} is not in 0..1")

        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"model.optimizer.layer_decay: {self.layer_decay} is not in 0..1")

        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"model.optimizer.weight_decay: {self.weight_decay} is not 0 or more")


def build_parameter_groups(network: Network, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group the trainable parameters: kernels; biases, norms and the like; the head's weights.

    Kernels map features to features: the weights of convolutions, linear layers and attention.
    Their shape does not identify them: layer scales, position embeddings and class tokens have
    several axes as well. Their weight decay is divided by their multiple of the learning rate, so
    that a step takes off the same share of all kinds. With `layer_decay`, each group of layers has
    groups of its own. Empty groups are left out.
    """
    if config.layer_decay == 1:
        return _build_kind_groups(network, list(network.parameters()), config, 1.0)

    layers = network.layer_groups()
    groups: list[dict[str, Any]] = []
    for i, parameters in enumerate(layers):
        multiple = config.layer_decay ** (len(layers) - 1 - i)
        groups += _build_kind_groups(network, parameters, config, multiple)
    return groups


def _build_kind_groups(
    network: Network, parameters: list[nn.Parameter], config: OptimizerConfig, multiple: float
) -> list[dict[str, Any]]:
    """Group these parameters by their kind; `multiple` is that of all their learning rates."""
    head_weight = network.head.weight
    kernel_ids = {id(weight) for weight in _kernel_weights(network)}
    kernels: list[Tensor] = []
    vectors: list[Tensor] = []
    heads: list[Tensor] = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter is head_weight:
            heads.append(parameter)
        elif id(parameter) in kernel_ids:
            kernels.append(parameter)
        else:
            vectors.append(parameter)

    is_muon = config.name == "muon"
    decay = config.weight_decay  # in proportion to `multiple`: pretrained layers hardly shrink
    lr = config.lr * multiple
    other_lr = config.others_lr * multiple if is_muon else lr

    kernel_group: dict[str, Any] = {
        "params": kernels,
        "lr": lr,
        "weight_decay": 0.0 if is_muon else decay,
    }
    if is_muon:
        kernel_group["muon"] = True
    vector_group = {
        "params": vectors,
        "lr": other_lr * config.bias_lr,
        "weight_decay": decay / config.bias_lr if config.decay_biases else 0.0,
    }
    head_group = {
        "params": heads,
        "lr": other_lr * config.head_lr,
        "weight_decay": decay / config.head_lr,
    }
    groups = [kernel_group, vector_group, head_group]
    return [group for group in groups if group["params"]]


def _kernel_weights(network: Network) -> list[Tensor]:
    """Return the weights of all convolutions, linear layers and attention projections."""
    weights: list[Tensor] = []
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            # Its output projection is an nn.Linear among the modules.
            weights.append(module.in_proj_weight)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            weights.append(module.weight)
    return weights


def build_optimizer(
    network: Network, config: OptimizerConfig, fused: bool = True
) -> torch.optim.Optimizer:
    """Build the optimizer over the parameter groups of a network.

    `fused` allows torch's fused kernels, where the device and the optimizer have them.
    """
    groups = build_parameter_groups(network, config)
    if config.name == "muon":
        return Muon(
            groups,
            config.lr,
            config.momentum,
            config.others,
            config.others_momentum,
            config.nesterov,
        )

    fused = fused and all(p.device.type in ("cpu", "cuda") for p in network.parameters())
    if config.name == "sgd":
        return torch.optim.SGD(
            groups,
            config.lr,
            config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            fused=fused,
        )
    if config.name == "adam":
        return torch.optim.Adam(groups, config.lr, fused=fused)
    return torch.optim.AdamW(groups, config.lr, fused=fused)
