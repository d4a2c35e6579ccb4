"""UniMix: Mixup whose λ favours the rarer class of a pair, and whose partners are drawn by class (Xu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from otmix.devices import move
from otmix.errors import UserError
from otmix.mixing.mixup import blend
from otmix.mixing.share import check_drawn, check_settings, draw_shares
from otmix.types import Batch, ClassCounts, Mixed


def unimix_law(counts: ClassCounts, tau: float) -> Tensor:
    """Weights n_k^τ of an image of class k as another's partner, float64 `[K]`, for `WithinBatchPairing`.

    τ = 0 is uniform over the batch, τ < 0 favours rare classes (official code: −.5 on CIFAR-10-LT, −.1 on
    CIFAR-100-LT). Raises UserError for a τ whose weights are no numbers above 0.
    """
    law = counts.counts.double() ** tau
    if not bool((torch.isfinite(law) & (law > 0.0)).all()):
        raise UserError(f"tau of UniMix's partners must leave every n^tau a number above 0; {tau} does not")
    return law


@dataclass(frozen=True)
class UniMix:
    """x̃ = λ x_i + (1 − λ) x_j with λ = b + n_j/(n_i + n_j), b ~ Beta(α, α), minus 1 where that is above 1; one for each
    pair.

    i is the background, j the foreground; image and label share λ. With α = 1, λ is uniform whatever the counts, so
    α = 1, τ = 0 is Mixup per image with partners drawn with replacement. A small α favours the rarer class much, the
    official .8 hardly: of a pair 100 : 1 the common image keeps .49 of it on average, .30 with α = .2. τ is for the
    partners within a batch (`WithinBatchPairing(rule.partner_weight)`); with other pairings it does nothing. Raises
    UserError for an alpha that is not above 0, or a τ that makes no law.

    Args:
        counts: training images per class.
        alpha: b ~ Beta(alpha, alpha) is what the rarer class's advantage is added to (UniMix's code: 0.8).
        tau: partners are drawn within the batch by n^tau (UniMix's code: -0.5 on CIFAR-10-LT, -0.1 on CIFAR-100-LT).
    """

    of_partners: ClassVar[tuple[str, ...]] = ("tau",)
    """Settings that only matter where partners are drawn within the batch."""

    counts: ClassCounts
    alpha: float = 0.8
    tau: float = -0.5

    def __post_init__(self) -> None:
        check_settings(self.alpha, "image")
        unimix_law(self.counts, self.tau)

    @property
    def partner_weight(self) -> Tensor:
        """The weight of a class's images as partners, `unimix_law` of τ: float64 `[K]`."""
        return unimix_law(self.counts, self.tau)

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """b ~ Beta(α, α) for `n` images, float64 `[n]` on the CPU."""
        return draw_shares(self.alpha, n, generator)

    def apply(self, background: Batch, foreground: Batch, drawn: Tensor) -> Mixed:
        """Blend `foreground` with the `background` it is paired with, in shares made from `drawn` and their classes.

        The inputs stay as they are. Raises ValueError where the batches are not paired, or `drawn` does not fit.
        """
        check_drawn(background, foreground, len(drawn))
        device = background.images.device
        counts = move(self.counts.counts, device, torch.float32)
        ours, theirs = counts[background.items.labels], counts[foreground.items.labels]
        share = move(drawn, device, torch.float32) + theirs / (ours + theirs)
        return blend(background, foreground, share - (share > 1.0).float())
