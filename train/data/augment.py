"""Augmentation of whole batches on their device. Every choice comes from the generator that is handed in."""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Augmentation:
    """What is done to training images. Everything is off by default."""

    flip: Literal["none", "random", "alternating"] = "none"
    crop_padding: int = 0
    crop_mode: Literal["reflect", "zero"] = "reflect"

    def __call__(self, images: Tensor, labels: Tensor, index: Tensor, epoch: int,
                 draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """`images` uint8 [B, C, H, W], `labels` int64 [B], `index` int64 [B]: each image's number in the data set."""
        if self.crop_padding:
            images = padded_crop(images, self.crop_padding, self.crop_mode, draw)
        if self.flip == "random":
            images = flip(images, torch.rand(len(images), generator=draw) < 0.5)
        return images, labels


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left and right the images that `chosen` bool [B] marks."""
    return torch.where(chosen.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)


def padded_crop(images: Tensor, padding: int, mode: str, draw: torch.Generator) -> Tensor:
    """Move each image by up to `padding` pixels either way; what comes in is mirrored or black."""
    b, _, h, w = images.shape
    padded = F.pad(images.float(), (padding,) * 4, "reflect" if mode == "reflect" else "constant").to(images.dtype)
    y, x = torch.randint(0, 2 * padding + 1, (2, b), generator=draw).to(images.device)
    rows = y.view(-1, 1, 1) + torch.arange(h, device=images.device).view(1, -1, 1)
    columns = x.view(-1, 1, 1) + torch.arange(w, device=images.device).view(1, 1, -1)
    batch = torch.arange(b, device=images.device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[batch, rows, columns].permute(0, 3, 1, 2)
