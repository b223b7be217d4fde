"""Test-time augmentation: the augmented_views of an image whose logits are averaged."""

import torch
from torch import Tensor


def augmented_views(images: Tensor, tta: str) -> list[Tensor]:
    """What test-time augmentation looks at, of images [B,C,H,W]: nothing else for none; for flip the mirror images as
    well; for shift both also moved by one pixel towards each corner."""
    found = [images]
    if tta == "shift":
        padded = torch.nn.functional.pad(images.float(), (1, 1, 1, 1), mode="reflect").to(
            images.dtype
        )
        height, width = images.shape[2:]
        found += [padded[:, :, y : y + height, x : x + width] for y in (0, 2) for x in (0, 2)]
    return found if tta == "none" else found + [view.flip(3) for view in found]
