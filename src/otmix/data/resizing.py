"""From a picture of any size to the square that the model sees, without chance: what evaluation uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 64
"""Squares up to this side are small images: area-averaged, held on the device, augmented by shifted crops."""


def to_square(images: Tensor, size: int) -> Tensor:
    """uint8 `[C,h,w]` or `[N,C,h,w]` to uint8 `[…,C,size,size]`; images of that size are returned as they are.

    Small squares (<= 64): the largest central square, averaged over areas (bilinear where it has to grow). Larger ones:
    the shorter side to size · 256/224, antialiased, then the centre, as in the usual ImageNet evaluation.
    """
    if images.shape[-2:] == (size, size):
        return images
    return _small_square(images, size) if size <= SMALL else _large_square(images, size)


def side_needed(size: int) -> int:
    """How long the shorter side should be when it is read for `to_square`: so long that its averages, or its
    antialiasing, still do most of the shrinking (twice the target, as Pillow's `thumbnail`; more for small ones)."""
    return 8 * SMALL if size <= SMALL else 2 * round(size * 256 / 224)


def _small_square(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = images[..., top : top + side, left : left + side].float()
    pixels = pixels if pixels.ndim == 4 else pixels[None]
    if side >= size:
        pixels = F.interpolate(pixels, (size, size), mode="area")
    else:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
    return pixels.round_().to(torch.uint8).reshape(*images.shape[:-2], size, size)


def _large_square(images: Tensor, size: int) -> Tensor:
    from torchvision.transforms.v2 import functional as tv

    resized: Tensor = tv.center_crop(tv.resize(images, [round(size * 256 / 224)], antialias=True), [size, size])
    return resized
