"""The networks, by name. Import this before lightning, timm and torchvision: see ops.py.

    network = build("resnet18", classes=10, channels=3, size=32)
    logits = network(x)           # x: normalised images [N,C,H,W]
    outputs = network.outputs(x)  # logits, embedding, and cam where the network is spatial

To add a network, write a subclass of `Network` whose constructor takes (classes, channels, size,
**options), and list it in `SMALL_NETWORKS`.
"""

from models.networks.ops import declare_torchvision_ops

_torchvision_ops = declare_torchvision_ops()  # before any import of torchvision

import inspect  # noqa: E402
from difflib import get_close_matches  # noqa: E402
from typing import Any  # noqa: E402

from models.networks.base import Network  # noqa: E402
from models.networks.convnet import ConvNet, ConvNet4  # noqa: E402
from models.networks.lenet import LeNet  # noqa: E402
from models.networks.speednet import SpeedNet  # noqa: E402

__all__ = [
    "SMALL_NETWORKS",
    "Network",
    "build",
    "check_name",
    "list_networks",
]

# Networks of this package: they train from scratch in minutes.
SMALL_NETWORKS: dict[str, type[Network]] = {
    "lenet": LeNet,
    "convnet": ConvNet,
    "convnet4": ConvNet4,
    "speednet": SpeedNet,
}
_POSITIONAL_PARAMETERS = 3  # classes, channels, size


def list_networks() -> list[str]:
    """Return the names that `build` takes: small networks first, then timm's models.

    Those of timm have no tags here, as in `resnet18.a1_in1k`, which name one of their weights.
    """
    from models.networks.timm_network import list_timm_models

    return [*SMALL_NETWORKS, *list_timm_models()]


def build(name: str, classes: int, channels: int, size: int, **options: Any) -> Network:
    """Build a network with new weights, for square images of `size` pixels and 1 or 3 channels.

    Raises ValueError for an unknown name or option, and for a size that the network can't take.
    """
    if name in SMALL_NETWORKS:
        network_class = SMALL_NETWORKS[name]
        _check_options(name, network_class, options)
        return network_class(classes, channels, size, **options)

    check_name(name)
    from models.networks.timm_network import TimmNetwork

    return TimmNetwork(name, classes, channels, size, **options)


def check_name(name: str) -> None:
    """Raise ValueError, with similar names, for a name that `build` does not know."""
    if name in SMALL_NETWORKS:
        return
    from models.networks.timm_network import list_tags, list_timm_models

    architecture, _, tag = name.partition(".")
    models = list_timm_models()
    if architecture not in models:
        similar = get_close_matches(architecture, [*SMALL_NETWORKS, *models], 3)
        suggestion = f"did you mean {' or '.join(similar)}? " if similar else ""
        raise ValueError(
            f"unknown network {name!r}; {suggestion}There are {', '.join(SMALL_NETWORKS)} and "
            "timm's classification models, such as resnet18 (https://huggingface.co/timm)"
        )

    tags = list_tags(architecture)
    if tag and tag not in tags:
        raise ValueError(
            f"unknown network {name!r}: timm has no such weights of {architecture}; it has "
            f"{', '.join(tags) or 'none'}"
        )


def _check_options(name: str, network_class: type[Network], options: dict[str, Any]) -> None:
    known = list(inspect.signature(network_class).parameters)[_POSITIONAL_PARAMETERS:]
    for option in options:
        if option not in known:
            raise ValueError(
                f"network {name}: unknown option {option!r}; it has {', '.join(known) or 'none'}"
            )
