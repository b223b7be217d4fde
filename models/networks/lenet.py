"""LeNet-5: LeCun et al., "Gradient-based learning applied to document recognition", 1998."""

from torch import Tensor, nn

from models.networks.base import Network


class LeNet(Network):
    """Two convolutions of 5x5 (6 and 16 filters), then linear layers of 120, 84 and K.

    As in the paper, but with ReLU and max-pooling.
    """

    spatial = False

    def __init__(self, classes: int, channels: int, size: int):
        super().__init__()
        side = ((size - 4) // 2 - 4) // 2  # after two convolutions and two poolings
        if side < 1:
            raise ValueError(
                f"network lenet: images of {size} pixels are too small; "
                "give 16 or more, or use convnet"
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

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [N,C,H,W] to features [N,84]."""
        return self.layers(x)
