"""Small networks that train from scratch in minutes on a CPU."""

from torch import Tensor, nn

from models.networks.base import Network


class LeNet(Network):
    """Two convolutions of 5x5 (6 and 16 filters), then 120-84-K (LeCun et al., 1998, with ReLU and max-pooling)."""

    spatial = False

    def __init__(self, classes: int, channels: int, size: int):
        super().__init__()
        side = ((size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(
                f"network lenet: images of {size} pixels are too small; give 16 or more, or use convnet"
            )
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * side * side, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
        )
        self.head = nn.Linear(84, classes)

    def trunk(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvNet(Network):
    """Two convolutions of 3x3 (16 and 32 filters), each with ReLU and max-pooling, and one linear layer."""

    spatial = False

    def __init__(self, classes: int, channels: int, size: int):
        super().__init__()
        if size < 4:
            raise ValueError(
                f"network convnet: images of {size} pixels are too small; give 4 or more"
            )
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(32 * (size // 4) ** 2, classes)

    def trunk(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvNet4(Network):
    """Four convolutions of 3x3 (32, 32, 64, 64 filters, max-pooling after every second), then 512-128-K."""

    spatial = False

    def __init__(self, classes: int, channels: int, size: int):
        super().__init__()
        side = ((size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(
                f"network convnet4: images of {size} pixels are too small; give 14 or more"
            )
        layers: list[nn.Module] = []
        for inside, outside in ((channels, 32), (32, 64)):
            layers += [
                nn.Conv2d(inside, outside, 3),
                nn.ReLU(),
                nn.Conv2d(outside, outside, 3),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.layers = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(64 * side * side, 512),
            nn.ReLU(),
            nn.Linear(512, 128),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, classes)

    def trunk(self, x: Tensor) -> Tensor:
        return self.layers(x)
