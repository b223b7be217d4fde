"""SpeedNet: a network like those of the CIFAR-10 speed records, for images of 9 to 96 pixels."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.networks.base import Network

WHITENING_EPSILON = 5e-4
"""Added to the variances of patches, which are divided by."""


class SpeedNet(Network):
    """A whitening convolution, wide blocks of 3x3 convolutions, a global max-pool, scaled logits.

    - Whitening convolution: its kernels are the whitened principal components of training patches,
      and their negatives, and are not trained. GELU and scaled logits. From Page, "How to train
      your ResNet", 2019, and tysam-code's hlb-CIFAR10, 2023.
    - BatchNorm without a trained scale, and its bias at a much higher learning rate (`bias_lr` of
      the recipe): the same sources.
    - Convolutions that start as the identity ("dirac"), and three blocks of 64-256-256: Jordan,
      "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498. Three blocks of
      128-384-512, with three convolutions and a shortcut each: its 96 % variant.

    Options: `widths` are the filters of the blocks; `depth` the convolutions of a block, of which
    the third and later ones have a shortcut; `scale` multiplies the logits; `kernel` is the side of
    the whitening convolution.
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
        super().__init__()
        _check_widths(widths)
        _check_count("depth", depth, minimum=2)
        _check_count("kernel", kernel, minimum=1)
        _check_number("scale", scale)
        _check_number("norm_momentum", norm_momentum)
        _check_size(size, len(widths), kernel)

        self.logit_scale = scale
        filters = 2 * channels * kernel**2
        self.whiten = nn.Conv2d(channels, filters, kernel)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.get_parameter("bias"))

        blocks: list[nn.Module] = [nn.GELU()]
        for in_channels, out_channels in pairwise([filters, *widths]):
            blocks.append(Block(in_channels, out_channels, depth, norm_momentum))
        self.blocks = nn.Sequential(*blocks)

        self.head = nn.Linear(widths[-1], classes, bias=False)
        nn.init.zeros_(self.head.weight)  # equal logits at first, whatever the features' scale

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [N,C,H,W] to features [N,D,h,w]."""
        return self.blocks(self.whiten(x))

    def pool(self, features: Tensor) -> Tensor:
        """Reduce features to their maxima [N,D].

        Not by `amax`: its gradient compares all values with the maximum. In bfloat16, torch.compile
        computes them again and rounds differently, so that none is equal and the gradient is 0/0.
        `max` remembers where the maximum is.
        """
        return features.flatten(2).max(2).values

    @torch.no_grad()
    def prepare(self, images: Tensor) -> None:
        """Set the whitening convolution from normalised training images [n,C,H,W].

        Its outputs for patches of them are uncorrelated, with variance one. A few thousand images
        are enough.
        """
        channels = images.shape[1]
        kernel = self.whiten.kernel_size[0]
        patches = images.unfold(2, kernel, 1).unfold(3, kernel, 1)  # [n,C,H',W',k,k]
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * kernel**2).double()
        patches = patches - patches.mean(0)

        covariance = patches.T @ patches / len(patches)
        variances, components = torch.linalg.eigh(covariance)
        deviations = (variances.clamp_min(0) + WHITENING_EPSILON).sqrt()
        kernels = (components / deviations).T.flip(0)  # largest variance first
        kernels = kernels.reshape(-1, channels, kernel, kernel)
        self.whiten.weight.copy_(torch.cat([kernels, -kernels]))


class Block(nn.Module):
    """Convolution, max-pool, norm, GELU, and `depth - 1` more convolutions at the smaller size."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, momentum: float):
        super().__init__()
        self.first = _convolution(in_channels, out_channels)
        self.pool = nn.MaxPool2d(2)
        self.norm = _norm(out_channels, momentum)
        self.second = nn.Sequential(
            _convolution(out_channels, out_channels),
            _norm(out_channels, momentum),
            nn.GELU(),
        )
        self.rest = nn.ModuleList()
        for _ in range(depth - 2):
            convolution = _convolution(out_channels, out_channels)
            self.rest.append(nn.Sequential(convolution, _norm(out_channels, momentum)))
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [N,C,h,w] to [N,D,h/2,w/2]."""
        x = self.act(self.norm(self.pool(self.first(x))))
        shortcut = x
        x = self.second(x)
        for layer in self.rest:
            x = self.act(layer(x) + shortcut)
        return x


def _convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    """3x3 without bias; the first `in_channels` filters start as the identity."""
    layer = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight[:in_channels].data)
    return layer


def _norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    """BatchNorm whose scale stays one: the next convolution can scale as well."""
    layer = nn.BatchNorm2d(channels, momentum=momentum)
    layer.weight.requires_grad_(False)
    return layer


def _check_widths(widths: object) -> None:
    is_valid = (
        isinstance(widths, Sequence)
        and len(widths) > 0
        and all(isinstance(width, int) and width > 0 for width in widths)
    )
    if not is_valid:
        raise ValueError(
            f"network speednet: widths: {widths!r} is not a list of filters, such as [64, 256, 256]"
        )


def _check_count(option: str, value: object, minimum: int) -> None:
    if not (isinstance(value, int) and value >= minimum):
        raise ValueError(
            f"network speednet: {option}: {value!r} is not a whole number of {minimum} or more"
        )


def _check_number(option: str, value: object) -> None:
    if not isinstance(value, int | float):
        raise ValueError(f"network speednet: {option}: {value!r} is not a number")


def _check_size(size: int, blocks: int, kernel: int) -> None:
    """Each block halves the image, and one pixel must be left."""
    minimum = 2**blocks + kernel - 1
    if size < minimum:
        raise ValueError(
            f"network speednet: {size} pixels are too few for {blocks} blocks, each of which "
            f"halves them; give {minimum} or more, or fewer widths"
        )
