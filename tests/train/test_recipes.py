"""The recipes from tutorials have the network, optimizer and data of the tutorials."""

from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from models import networks
from train.cli.recipes import RECIPES
from train.data.source import ArrayItems, LabelledImages
from train.data.split import split
from train.learning.optimizers import OptimizerConfig, build_optimizer


def load_recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / "seeds" / f"{name}.yaml").read_text())


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
    recipe = load_recipe(name)
    assert recipe["data"]["source"] == source
    model = recipe["model"]
    assert "weights" not in model  # it trains from random weights

    network = networks.build(model["network"], 10, channels, size, **model.get("options", {}))
    layers = [type(module) for module in network.modules()]
    assert layers.count(nn.Conv2d) == convolutions
    assert layers.count(nn.Linear) == linear
    first_convolution = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    assert first_convolution.in_channels == channels

    built = build_optimizer(network, OptimizerConfig(**model["optimizer"]))
    assert type(built) is optimizer
    for group in built.param_groups:
        assert {key: group[key] for key in settings} == settings
        assert not group["weight_decay"]


def test_convnet4_trains_on_45_000_images_with_early_stopping_and_sample_predictions():
    recipe = load_recipe("convnet4-cifar10")
    labels = np.arange(60_000) % 10
    parts = np.repeat(["train", "test"], [50_000, 10_000])
    items = ArrayItems(np.zeros((60_000, 1, 1, 1), np.uint8))
    cifar10 = LabelledImages("cifar10", list("abcdefghij"), items, labels, parts)
    digests = np.random.default_rng(0).integers(256, size=(60_000, 32), dtype=np.uint8)
    usable = np.ones(60_000, bool)

    val_fraction = recipe["data"]["val_fraction"]
    index = split(cifar10, digests, usable, val_fraction, 0.2, recipe["seed_everything"])

    assert [len(index[part]) for part in ("train", "val", "test")] == [45_000, 5_000, 10_000]
    assert recipe["data"]["batch_size"] == 32
    assert recipe["early_stopping"]["patience"] > 0
    assert recipe["samples"]["images"] > 0


def test_resnet18_for_fashion_mnist_rotates_images_by_up_to_20_degrees():
    assert load_recipe("resnet18-fashion-mnist")["data"]["augment"]["rotation"] == 20
