"""CutMix: a rectangle of the foreground is pasted onto the background.

Yun et al. 2019; eq. 1, 9 and 11 of Gao et al. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otmix.errors import UserError
from otmix.mixing.pasting import paste
from otmix.mixing.share import Per, check_settings, draw_shares
from otmix.types import Batch, Mixed

BoxRule = Literal["exact", "clipped"]


# The boxes are worked out in NumPy: on a handful of numbers its operations take a fifth of the time of torch's.


def exact_boxes(share: Tensor, position: Tensor, height: int, width: int) -> Tensor:
    """Boxes of H√(1−λ) by W√(1−λ) pixels (eq. 11), uniformly among the places where they lie inside the image.

    `share [n]` is λ, `position [n,2]` uniforms in [0, 1), both float64. Returns int64 `[n,4]`: top, left, height,
    width. Sides are rounded to the nearest pixel, so the area is 1 − λ of the image but for that rounding.
    """
    size = np.array((height, width))
    extent = np.rint(np.sqrt(1.0 - share.numpy())[:, None] * size)
    # the minimum keeps inside what rounds up
    corner = np.minimum(np.floor(position.numpy() * (size - extent + 1.0)), size - extent)
    return torch.from_numpy(np.concatenate((corner, extent), axis=1).astype(np.int64))


def half_sides(share: Tensor, height: int, width: int) -> NDArray[np.float64]:
    """Half the sides of the released code's boxes, `[n,2]`: H√(1−λ) and W√(1−λ) are rounded down, and so are halves."""
    sides: NDArray[np.float64] = np.sqrt(1.0 - share.numpy())[:, None] * np.array((height, width))
    return np.floor(np.floor(sides) / 2.0)


def clipped_boxes(share: Tensor, position: Tensor, height: int, width: int) -> Tensor:
    """The released code's boxes: their centre is a uniform pixel, and what leaves the image is cut off.

    Arguments and result as in `exact_boxes`. Sides are rounded down, and so are their halves. What is left of a box is
    smaller than 1 − λ: on 32×32 with α = 4, backgrounds keep .69 of the image on average instead of .5.
    """
    size = np.array((height, width))
    half = half_sides(share, height, width)
    centre = np.minimum(np.floor(position.numpy() * size), size - 1.0)
    low = np.maximum(centre - half, 0.0)
    high = np.minimum(centre + half, size)
    return torch.from_numpy(np.concatenate((low, high - low), axis=1).astype(np.int64))


@dataclass(frozen=True)
class CutMix:
    """Paste a rectangle of each foreground at the same place of its background.

    λ ~ Beta(α, α) is the background's share. Raises UserError for an alpha that is not above 0.

    Args:
        alpha: the background's share is Beta(alpha, alpha) (OTmix: 4; CutMix's code: 1).
        box: exact, wholly inside and of the share's area (OTmix, eq. 11), or clipped (the released codes).
        per: one box for the whole batch, or one for each image (the released codes: batch).
    """

    alpha: float = 4.0
    box: BoxRule = "exact"
    per: Per = "batch"

    def __post_init__(self) -> None:
        check_settings(self.alpha, self.per)
        if self.box not in get_args(BoxRule):
            raise UserError(f"a CutMix box is 'exact' or 'clipped', not {self.box!r}")

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Boxes for `n` images, int64 on the CPU, `[1,4]` per batch, `[n,4]` per image: top, left, height, width."""
        rows = 1 if self.per == "batch" else n
        share = draw_shares(self.alpha, rows, generator)
        position = torch.rand(rows, 2, generator=generator, dtype=torch.float64)
        return (exact_boxes if self.box == "exact" else clipped_boxes)(share, position, height, width)

    def apply(self, background: Batch, foreground: Batch, drawn: Tensor) -> Mixed:
        """Paste `foreground` onto the `background` it is paired with, in the boxes of `draw`: see `paste`."""
        return paste(background, foreground, drawn)
