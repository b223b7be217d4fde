"""The networks by name. Import this before lightning or torchvision: see ops.py.

    network = build("resnet18", classes=10, channels=3, size=32)
    logits = network(x)             # x: normalised [N,C,H,W]
    outputs = network.outputs(x)    # logits, embedding, and cam where the head allows it

A new network is a subclass of `Network` whose constructor takes (classes, channels, size, **options), named in `SMALL_NETWORKS`.
"""

from models.networks.ops import declare_missing

_ops = declare_missing()

import inspect  # noqa: E402
from difflib import get_close_matches  # noqa: E402
from typing import Any  # noqa: E402

from models.networks.base import Network  # noqa: E402
from models.networks.small import ConvNet, ConvNet4, LeNet  # noqa: E402
from models.networks.speednet import SpeedNet  # noqa: E402

SMALL_NETWORKS: dict[str, type[Network]] = {
    "lenet": LeNet,
    "convnet": ConvNet,
    "convnet4": ConvNet4,
    "speednet": SpeedNet,
}


def list_networks() -> list[str]:
    """Every name that `build` knows: our own first, then torchvision's classification models."""
    from models.networks import zoo

    return [*SMALL_NETWORKS, *zoo.names()]


def build(name: str, classes: int, channels: int, size: int, **options: Any) -> Network:
    """A network with fresh weights for square images of `size` pixels and 1 or 3 channels.

    Raises ValueError, naming what is there instead, for an unknown name or option and for a size that can't work.
    """
    if name in SMALL_NETWORKS:
        known = list(inspect.signature(SMALL_NETWORKS[name]).parameters)[3:]
        for option in options:
            if option not in known:
                raise ValueError(
                    f"network {name}: unknown option {option!r}; it has {', '.join(known) or 'none'}"
                )
        return SMALL_NETWORKS[name](classes, channels, size, **options)
    check_name(name)
    from models.networks import zoo

    return zoo.Zoo(name, classes, channels, size, **options)


def check_name(name: str) -> None:
    """Raise ValueError for a name that `build` does not know, with the nearest that it does."""
    if name not in SMALL_NETWORKS and name not in (known := list_networks()):
        near = get_close_matches(name, known, 3)
        raise ValueError(
            f"unknown network {name!r}; "
            + (f"did you mean {' or '.join(near)}? " if near else "")
            + f"There are {', '.join(SMALL_NETWORKS)} and torchvision's classification models, such as resnet18"
        )
