"""speednet: the kind of network that holds the CIFAR-10 speed records, for images of 9 to 96 pixels."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.networks.base import Network


class SpeedNet(Network):
    """A whitened first convolution, then few wide blocks of 3x3 convolutions, a global max-pool and scaled logits.

    What is taken from where:
    - a first convolution whose kernels are the whitened principal components of training patches, and their negatives,
      fixed; GELU; label smoothing and scaled logits: Page, "How to train your ResNet", 2019, and tysam-code's
      hlb-CIFAR10, 2023;
    - BatchNorm without a trained scale, its bias at a much higher learning rate (the recipe's `bias_lr`): the same;
    - identity ("dirac") initialisation, three blocks of 64-256-256: Jordan, "94% on CIFAR-10 in 3.29 seconds on a
      single GPU", arXiv 2404.00498; 128-384-512 with three convolutions and a shortcut a block: its 96 % sibling.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        size: int,
        widths: Sequence[int] = (64, 256, 256),
        depth: int = 2,
        scale: float = 1 / 9,
        norm_momentum: float = 0.4,
        kernel: int = 2,
    ):
        """`depth` convolutions a block (the third and later ones lie in a shortcut); `scale` multiplies the logits."""
        super().__init__()
        if not (
            isinstance(widths, Sequence)
            and widths
            and all(isinstance(w, int) and w > 0 for w in widths)
        ):
            raise ValueError(
                f"network speednet: widths: {widths!r} is no list of filters, such as [64, 256, 256]"
            )
        for name, count, least in (("depth", depth, 2), ("kernel", kernel, 1)):
            if not (isinstance(count, int) and count >= least):
                raise ValueError(
                    f"network speednet: {name}: {count!r} is no whole number of {least} or more"
                )
        for name, factor in (("scale", scale), ("norm_momentum", norm_momentum)):
            if not isinstance(factor, int | float):
                raise ValueError(f"network speednet: {name}: {factor!r} is no number")
        if size - kernel + 1 < 1 << len(widths):
            raise ValueError(
                f"network speednet: {size} pixels are too few for {len(widths)} blocks, each of which "
                f"halves them; give {(1 << len(widths)) + kernel - 1} or more, or fewer widths"
            )
        self.scale = scale
        filters = 2 * channels * kernel**2
        self.whiten = nn.Conv2d(channels, filters, kernel)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.get_parameter("bias"))
        self.blocks = nn.Sequential(
            nn.GELU(),
            *(
                Block(inside, outside, depth, norm_momentum)
                for inside, outside in pairwise([filters, *widths])
            ),
        )
        self.head = nn.Linear(widths[-1], classes, bias=False)
        nn.init.zeros_(
            self.head.weight
        )  # all classes alike at first, whatever the scale of the features

    def trunk(self, x: Tensor) -> Tensor:
        return self.blocks(self.whiten(x))

    def pool(self, maps: Tensor) -> Tensor:
        # Not amax: its gradient compares values with the maximum. In bfloat16 torch.compile computes them anew and
        # rounds otherwise: none is equal, and the gradient is 0/0. This one remembers where the maximum lay.
        return maps.flatten(2).max(2).values

    @torch.no_grad()
    def prepare(self, images: Tensor) -> None:
        """Fix the first convolution from normalised training images [n,C,H,W]: patches come out uncorrelated, with
        variance one. A few thousand images are enough."""
        channels, kernel = images.shape[1], self.whiten.kernel_size[0]
        patches = images.unfold(2, kernel, 1).unfold(3, kernel, 1)  # [n,C,H',W',k,k]
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * kernel**2).double()
        patches = patches - patches.mean(0)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        kernels = (vectors / (values.clamp_min(0) + 5e-4).sqrt()).T.flip(
            0
        )  # largest variance first
        kernels = kernels.reshape(-1, channels, kernel, kernel)
        self.whiten.weight.copy_(torch.cat([kernels, -kernels]))


class Block(nn.Module):
    """Convolution, max-pool, norm, GELU, and `depth - 1` more convolutions at the smaller size."""

    def __init__(self, inside: int, outside: int, depth: int, momentum: float):
        super().__init__()
        self.first, self.pool, self.norm = (
            convolution(inside, outside),
            nn.MaxPool2d(2),
            norm(outside, momentum),
        )
        self.second = nn.Sequential(
            convolution(outside, outside), norm(outside, momentum), nn.GELU()
        )
        self.rest = nn.ModuleList(
            nn.Sequential(convolution(outside, outside), norm(outside, momentum))
            for _ in range(depth - 2)
        )
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.pool(self.first(x))))
        shortcut = x
        x = self.second(x)
        for layer in self.rest:
            x = self.act(layer(x) + shortcut)
        return x


def convolution(inside: int, outside: int) -> nn.Conv2d:
    """3x3, no bias; the first `inside` filters start as the identity."""
    layer = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight[:inside].data)
    return layer


def norm(width: int, momentum: float) -> nn.BatchNorm2d:
    """BatchNorm whose scale stays one: the next layer can scale as well, and one parameter less is tuned."""
    layer = nn.BatchNorm2d(width, momentum=momentum)
    layer.weight.requires_grad_(False)
    return layer
