"""SaliencyMix: the box is cut where the foreground is most salient (Uddin et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otmix.devices import move
from otmix.mixing.cutmix import half_sides
from otmix.mixing.pasting import paste
from otmix.mixing.saliency import salient_peaks
from otmix.mixing.share import Per, check_drawn, check_settings, draw_shares
from otmix.types import Batch, Mixed


def boxes_around(peak: Tensor, sides: Tensor, height: int, width: int) -> Tensor:
    """Boxes of `sides [n,2]` (height, width) centred on `peak [n]`, a pixel's number in reading order, cut off where
    they leave the image. Returns int64 `[n,4]`: top, left, height, width.
    """
    half_height, half_width = (sides // 2).unbind(1)
    y, x = peak // width, peak % width
    top, left = (y - half_height).clamp_min_(0), (x - half_width).clamp_min_(0)
    bottom, right = (y + half_height).clamp_max_(height), (x + half_width).clamp_max_(width)
    return torch.stack((top, left, bottom - top, right - left), dim=1)


@dataclass(frozen=True)
class SaliencyMix:
    """Paste the rectangle of each foreground around its most salient pixel at the same place of its background.

    λ ~ Beta(α, α) gives the sides H√(1−λ) and W√(1−λ), rounded as in `clipped_boxes`; what leaves the image is cut off,
    and the shares are those of the pixels really pasted. The peak is that of `fine_grained_saliency` on plain pixels,
    the first in reading order of several. The released code hands OpenCV normalised float images, of which it reads the
    bytes as if they were pixels, and cuts one box for the whole batch, from the first foreground.

    Args:
        alpha: the background's share before clipping is Beta(alpha, alpha) (SaliencyMix's code: 1).
        per: one box for each image, around its own peak, or one for the whole batch (SaliencyMix's code: batch).
    """

    alpha: float = 1.0
    per: Per = "image"

    def __post_init__(self) -> None:
        check_settings(self.alpha, self.per)

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Sides of the boxes of `n` images, int64 on the CPU, `[1,2]` per batch, `[n,2]` per image: height, width."""
        share = draw_shares(self.alpha, 1 if self.per == "batch" else n, generator)
        return torch.from_numpy(2 * half_sides(share, height, width).astype("int64"))

    def apply(self, background: Batch, foreground: Batch, drawn: Tensor) -> Mixed:
        """Paste boxes of the sides `drawn` from the peaks of `foreground` onto the `background` it is paired with.

        The inputs stay as they are. Raises ValueError where the batches are not paired, or `drawn` does not fit them.
        """
        check_drawn(background, foreground, len(drawn))
        images = foreground.images
        peak = salient_peaks(images[: len(drawn)])
        sides = move(drawn, images.device)
        return paste(background, foreground, boxes_around(peak, sides, *images.shape[-2:]))
