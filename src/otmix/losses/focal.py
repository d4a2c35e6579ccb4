"""The focal loss in its softmax form (Lin et al., ICCV 2017, as in the code of LDAM)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from otmix.errors import UserError
from otmix.losses.base import Criterion
from otmix.types import ClassCounts, Output


def focal_loss(logits: Tensor, labels: Tensor, gamma: float = 1.0) -> Tensor:
    """−(1 − p_y)^γ · log p_y with p = softmax(z), per image: `[B,K]`, `[B]` -> `[B]`."""
    loss = F.cross_entropy(logits, labels, reduction="none")
    doubt = -torch.expm1(-loss)  # 1 − p_y without forming the difference
    if gamma != 1:
        # not 0, where the slope of x^γ is infinite for γ < 1 and would turn the gradient 0 into NaN
        doubt = doubt.clamp_min(torch.finfo(doubt.dtype).tiny) ** gamma
    return doubt * loss


class Focal(Criterion):
    """factor · (1 − p_y)^γ · cross-entropy.

    γ = 1 is the default of LDAM's code; `factor` is 10 in the copies of this loss in the codes of CMO, IB and OTmix.
    Class weights multiply the finished loss: in LDAM's code they stand inside p_y = exp(−loss), which makes it p_y^w.
    Raises UserError for a negative γ or a factor that is not positive.

    Args:
        gamma: exponent of 1 - p of the true class (LDAM's code: 1).
        factor: constant factor of the loss (LDAM's code: 1; the codes of CMO, IB and OTmix: 10).
    """

    def __init__(self, counts: ClassCounts, gamma: float = 1.0, factor: float = 1.0) -> None:
        super().__init__(counts)
        if not (0 <= gamma < math.inf and 0 < factor < math.inf):
            raise UserError(f"focal loss needs gamma of at least 0 and a positive factor, not {gamma} and {factor}")
        self.gamma, self.factor = gamma, factor

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        loss = focal_loss(output.logits.float(), labels, self.gamma)
        return loss if self.factor == 1 else self.factor * loss
