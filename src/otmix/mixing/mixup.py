"""Mixup: foreground and background are blended, pixel by pixel (Zhang et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otmix.devices import move
from otmix.mixing.share import Per, check_drawn, check_settings, draw_shares, mix_of_two
from otmix.types import Batch, Mixed


def blend(background: Batch, foreground: Batch, share: Tensor, label_share: Tensor | None = None) -> Mixed:
    """`share` of each background plus the rest of its foreground; the labels in the same shares, or in `label_share`.

    Both float32 `[1]` for all images or `[B]`, on the device of the images. The inputs stay as they are. Raises
    ValueError where the batches are not paired, or there are not as many shares.
    """
    check_drawn(background, foreground, len(share))
    images = background.images
    blended = torch.lerp(foreground.images, images, share.to(images.dtype)[:, None, None, None])
    return mix_of_two(blended, background, foreground, share, label_share)


@dataclass(frozen=True)
class Mixup:
    """x̃ = λ x_background + (1 − λ) x_foreground, with λ ~ Beta(α, α), one for the whole batch or one for each image.

    Raises UserError for an alpha that is not above 0.

    Args:
        alpha: the background's share is Beta(alpha, alpha) (Mixup's code: 1 on CIFAR).
        per: one share for the whole batch, or one for each image (Mixup's code: batch).
    """

    alpha: float = 1.0
    per: Per = "batch"

    def __post_init__(self) -> None:
        check_settings(self.alpha, self.per)

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """The backgrounds' shares λ for `n` images, float64 on the CPU: `[1]` per batch, `[n]` per image."""
        return draw_shares(self.alpha, 1 if self.per == "batch" else n, generator)

    def apply(self, background: Batch, foreground: Batch, drawn: Tensor) -> Mixed:
        """Blend `foreground` with the `background` it is paired with, in the shares of `draw`.

        The inputs stay as they are. Raises ValueError where the batches are not paired, or `drawn` does not fit.
        """
        return blend(background, foreground, move(drawn, background.images.device, torch.float32))
