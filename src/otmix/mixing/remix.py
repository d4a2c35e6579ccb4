"""Remix: mixed as Mixup, but a rare class may get the whole label (Chou et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from otmix.devices import move
from otmix.errors import UserError
from otmix.mixing.mixup import blend
from otmix.mixing.share import Per, check_drawn, check_settings, draw_shares
from otmix.types import Batch, ClassCounts, Mixed


@dataclass(frozen=True)
class Remix:
    """x̃ = λ x_i + (1 − λ) x_j with λ ~ Beta(α, α); i is the background, j the foreground.

    The label's share of i is 0 if n_i/n_j ≥ κ and λ < τ; 1 if n_i/n_j ≤ 1/κ and 1 − λ < τ; else λ: a class at least κ
    times as rare gets the whole label where less than τ of the image is the other's. `image_share` stays λ. κ = inf is
    Mixup. There is no official code; the rule is as imbalanced-DL and BagofTricks-LT state it, kept per image (the
    latter averages the label shares over the batch). Raises UserError for a κ below 1, a τ outside [0, 1], or an alpha
    that is not above 0.

    Args:
        counts: training images per class.
        alpha: the background's share of the image is Beta(alpha, alpha) (imbalanced-DL's re-implementation: 1).
        per: one share for the whole batch, or one for each image (batch, as Mixup).
        kappa: how many times as rare a class must be to get the whole label; inf: none does (Remix: 3).
        tau: it gets it where the other class has less than this share of the image (Remix: 0.5).
    """

    counts: ClassCounts
    alpha: float = 1.0
    per: Per = "batch"
    kappa: float = 3.0
    tau: float = 0.5

    def __post_init__(self) -> None:
        check_settings(self.alpha, self.per)
        if not self.kappa >= 1.0:
            raise UserError(f"kappa of Remix, a ratio of class sizes, must be at least 1, it is {self.kappa}")
        if not 0.0 <= self.tau <= 1.0:
            raise UserError(f"tau of Remix, a share of the image, must lie in [0, 1], it is {self.tau}")

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """The backgrounds' shares λ for `n` images, float64 on the CPU: `[1]` per batch, `[n]` per image."""
        return draw_shares(self.alpha, 1 if self.per == "batch" else n, generator)

    def apply(self, background: Batch, foreground: Batch, drawn: Tensor) -> Mixed:
        """Blend `foreground` with the `background` it is paired with, in the shares of `draw`, and set the labels'.

        The inputs stay as they are. Raises ValueError where the batches are not paired, or `drawn` does not fit.
        """
        check_drawn(background, foreground, len(drawn))
        device = background.images.device
        share = move(drawn, device, torch.float32)
        if math.isinf(self.kappa):
            return blend(background, foreground, share)
        counts = move(self.counts.counts, device, torch.float32)
        ours, theirs = counts[background.items.labels], counts[foreground.items.labels]
        none = (ours >= self.kappa * theirs) & (share < self.tau)
        whole = (theirs >= self.kappa * ours) & (1.0 - share < self.tau)
        return blend(background, foreground, share, label_share=torch.where(none, 0.0, torch.where(whole, 1.0, share)))
