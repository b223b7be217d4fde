"""Small convolutional networks that train from scratch in minutes on a CPU."""

from torch import Tensor, nn

from models.networks.base import Network


class ConvNet(Network):
    """Two convolutions of 3x3 (16 and 32 filters), each with ReLU and max-pooling, and the head."""

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

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [N,C,H,W] to features [N,D]."""
        return self.layers(x)


class ConvNet4(Network):
    """Four convolutions of 3x3 (32, 32, 64, 64 filters), then linear layers of 512, 128 and K.

    Max-pooling follows every second convolution.
    """

    spatial = False

    def __init__(self, classes: int, channels: int, size: int):
        super().__init__()
        side = ((size - 4) // 2 - 4) // 2  # after four convolutions and two poolings
        if side < 1:
            raise ValueError(
                f"network convnet4: images of {size} pixels are too small; give 14 or more"
            )
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * side * side, 512),
            nn.ReLU(),
            nn.Linear(512, 128),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [N,C,H,W] to features [N,128]."""
        return self.layers(x)
