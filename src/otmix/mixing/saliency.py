"""How salient each pixel is: fine-grained saliency (Montabone & Soto 2010), as OpenCV computes it.

A pixel is salient when it is brighter (on) or darker (off) than the mean of the square around it, summed over six sizes
of the square. The arithmetic is that of `cv2.saliency.StaticSaliencyFineGrained` on 8-bit RGB, roundings included, and
up to 32,896 pixels (181²) so is the map, to the last bit; above, OpenCV's sums in float32 are no longer exact.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

REACHES = (12, 24, 28, 48, 56, 112)
"""A square of reach r goes from r − 1 pixels before its pixel to r pixels after it, as far as the image goes."""


@torch.no_grad()
def fine_grained_saliency(images: Tensor) -> Tensor:
    """Saliency of each pixel of `images [B,C,H,W]` in [0, 1]: float32 `[B,H,W]`, whole numbers of 1/255.

    Grey, smoothed twice; contrast with the mean of the other pixels of six squares, in whole levels; the sums of the
    positive and of the negative contrasts each scaled to 255 by their largest in the image, and added. As in OpenCV, a
    sum above 255 starts again at 0: so it can be where a pixel is both. An image without contrast is 0 everywhere.
    """
    n, _, height, width = images.shape
    levels = _levels(images).view(height * width, n).t().contiguous()
    return levels.view(n, height, width).float() * (1.0 / 255.0)


@torch.no_grad()
def salient_peaks(images: Tensor) -> Tensor:
    """The most salient pixel of each of `images [B,C,H,W]`, the first in reading order of several: row · W + column,
    int64 `[B]`.
    """
    n, _, height, width = images.shape
    pixels = height * width
    # one number that orders pixels by saliency, then place: its maximum takes a quarter of the time of an argmax
    dtype = torch.int32 if pixels < 2**23 else torch.int64
    behind = torch.arange(pixels - 1, -1, -1, dtype=dtype, device=images.device)
    rank = _levels(images).view(pixels, n).to(dtype).mul_(pixels).add_(behind[:, None])
    return (pixels - 1 - rank.amax(0) % pixels).long()


def _levels(images: Tensor) -> Tensor:
    """Saliency in levels 0 … 255, int16 `[H,W,B]`."""
    n, _, height, width = images.shape
    # the batch goes last, so that windows select and add whole rows of numbers
    grey = _grey(images).flatten(1).t().contiguous().view(height, width, n)
    for dim in (0, 1):
        grey = grey.index_select(dim, _mirrored(grey.shape[dim], 2, grey.device))
    grey = _smooth(_smooth(grey))
    # integers: any order of summation gives the same, and what overflows comes back in the difference
    integral = pad(grey, (0, 0, 1, 0, 1, 0)).cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    level = grey.float()
    off, balance = torch.zeros_like(grey), torch.zeros_like(grey)
    for reach, times in Counter(min(reach, max(height, width)) for reach in REACHES).items():
        area, others = _areas(height, width, reach, grey.device)
        total = _sums(_sums(integral, reach, 0), reach, 1).float()
        # mean of the others − level, of exact numbers below 2^24; it rounds once, never past a whole number
        contrast = torch.addcmul(total, level, area, value=-1.0).div_(others).to(torch.int16)
        balance.add_(contrast, alpha=times)
        off.add_(contrast.clamp_min_(0), alpha=times)
    return _scale(off).add_(_scale(off - balance)).bitwise_and_(255)


def _grey(images: Tensor) -> Tensor:
    """Brightness of `images [B,C,H,W]` in levels 0 … 255, int16 `[B,H,W]`: of RGB OpenCV's luma, in fixed point of 15
    bits (float32 holds its parts and sums exactly), of other channels the mean.
    """
    levels = (images.float() * 255.0).round_()
    if images.shape[1] != 3:
        return levels.mean(1).round_().to(torch.int16)
    red, green, blue = levels.unbind(1)
    luma = (red * (9798 / 2**15)).add_(green, alpha=19235 / 2**15).add_(blue, alpha=3735 / 2**15)
    return luma.add_(0.5).to(torch.int16)


@lru_cache(maxsize=256)
def _mirrored(n: int, beyond: int, device: torch.device) -> Tensor:
    """The pixels of a row of `n` between mirrors that stand on its outermost pixels, and `beyond` more on each side."""
    place = torch.arange(-beyond, n + beyond, device=device) % max(2 * n - 2, 1)
    return torch.minimum(place, 2 * n - 2 - place)


def _smooth(levels: Tensor) -> Tensor:
    """The 3×3 binomial filter, rounded half up, where it lies inside: `[H,W,B]` -> `[H−2,W−2,B]`."""
    for dim in (0, 1):
        for _ in range(2):
            n = levels.shape[dim] - 1
            levels = levels.narrow(dim, 0, n) + levels.narrow(dim, 1, n)
    return levels.add_(8).bitwise_right_shift_(4)


@lru_cache(maxsize=256)
def _windows(n: int, reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the window of each of `n` pixels in a row: the pixel after its last, int64 `[n]`, and its length."""
    place = torch.arange(n, device=device)
    end = (place + reach + 1).clamp_max_(n)
    return end, end - (place - reach + 1).clamp_min_(0)


def _sums(integral: Tensor, reach: int, dim: int) -> Tensor:
    """Sums over windows along `dim` from sums over all that is before; one for all where each window is the image."""
    n = integral.shape[dim] - 1
    if reach >= n:
        return integral.narrow(dim, n, 1)
    sums = integral.index_select(dim, _windows(n, reach, integral.device)[0])
    sums.narrow(dim, reach, n - reach).sub_(integral.narrow(dim, 1, n - reach))
    return sums


@lru_cache(maxsize=256)
def _areas(height: int, width: int, reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels in each pixel's window, float32 `[H,W,1]`, and those besides it (1 where there are none)."""
    rows, columns = _windows(height, reach, device)[1], _windows(width, reach, device)[1]
    area = (rows[:, None, None] * columns[:, None]).float()
    return area, (area - 1.0).clamp_min_(1.0)


def _scale(contrast: Tensor) -> Tensor:
    """⌊255 · contrast / largest in the image⌋, int16 `[H,W,B]`.

    OpenCV rounds the quotient to float32 first, which changes nothing: a whole result k comes from k/255, and all these
    are rounded up.
    """
    largest = contrast.amax((0, 1)).clamp_min_(1)
    return contrast.float().mul_(255.0).div_(largest.float()).to(torch.int16)
