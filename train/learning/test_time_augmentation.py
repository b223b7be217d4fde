"""Test-time augmentation: views of an image whose logits are averaged.

As in airbench (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024).
"""

from typing import Literal

import torch
from torch import Tensor

TestTimeAugmentation = Literal["none", "flip", "shift"]


def augmented_views(images: Tensor, augmentation: str) -> list[Tensor]:
    """Return the views of images [B,C,H,W] that are evaluated; the first one is the images.

    none: the images alone; flip: also their mirror images; shift: also four crops that are moved by
    one pixel towards each corner, and the mirror images of all five.
    """
    if augmentation == "none":
        return [images]

    views = [images]
    if augmentation == "shift":
        padded = torch.nn.functional.pad(images.float(), (1, 1, 1, 1), mode="reflect")
        padded = padded.to(images.dtype)
        height, width = images.shape[2:]
        for y in (0, 2):
            for x in (0, 2):
                views.append(padded[:, :, y : y + height, x : x + width])

    mirrored = [view.flip(3) for view in views]
    return views + mirrored
