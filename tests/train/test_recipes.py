"""The recipes of the tutorials say what the tutorials do."""

from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from models import networks
from train.cli import main
from train.data.source import Arrays, Source
from train.data.split import split
from train.learning.optimizers import OptimizerConfig, build_optimizer


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((main.RECIPES / "seeds" / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("name", "source", "channels", "size", "convolutions", "linear", "optimizer", "settings"),
    [
        ("convnet4-cifar10", "cifar10", 3, 32, 4, 3, torch.optim.Adam, {"lr": 2e-4}),
        ("lenet-cifar10", "cifar10", 3, 32, 2, 3, torch.optim.Adam, {"lr": 1e-3}),
        ("resnet18-cifar10", "cifar10", 3, 32, 20, 1, torch.optim.Adam, {"lr": 1e-3}),
        (
            "resnet18-fashion-mnist",
            "fashion-mnist",
            1,
            28,
            20,
            1,
            torch.optim.SGD,
            {"lr": 1e-3, "momentum": 0.1, "nesterov": False},
        ),
        (
            "convnet-fashion-mnist",
            "fashion-mnist",
            1,
            28,
            2,
            1,
            torch.optim.SGD,
            {"lr": 0.01, "momentum": 0.9, "nesterov": False},
        ),
    ],
)
def test_network_and_optimizer(
    name, source, channels, size, convolutions, linear, optimizer, settings
):
    said = recipe(name)
    assert said["data"]["source"] == source
    model = said["model"]
    assert "weights" not in model  # from scratch
    network = networks.build(model["network"], 10, channels, size, **model.get("options", {}))
    kinds = [type(module) for module in network.modules()]
    assert (kinds.count(nn.Conv2d), kinds.count(nn.Linear)) == (convolutions, linear)
    assert next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels == channels
    built = build_optimizer(network, OptimizerConfig(**model["optimizer"]))
    assert type(built) is optimizer
    for group in built.param_groups:
        assert {key: group[key] for key in settings} == settings
        assert not group["weight_decay"]


def test_four_convolutions_train_on_45_000_in_batches_of_32_and_stop_early_with_pictures_in_the_log():
    said = recipe("convnet4-cifar10")
    labels = np.arange(60_000) % 10
    parts = np.repeat(["train", "test"], [50_000, 10_000])
    cifar = Source(
        "cifar10", list("abcdefghij"), Arrays(np.zeros((60_000, 1, 1, 1), np.uint8)), labels, parts
    )
    index = split(
        cifar, np.ones(60_000, bool), said["data"]["val_fraction"], 0.2, said["seed_everything"]
    )
    assert [len(index[part]) for part in ("train", "val", "test")] == [45_000, 5_000, 10_000]
    assert said["data"]["batch_size"] == 32
    assert said["early_stopping"]["patience"] > 0
    assert said["samples"]["images"] > 0


def test_clothes_are_turned_by_up_to_20_degrees():
    assert recipe("resnet18-fashion-mnist")["data"]["augment"]["rotation"] == 20
