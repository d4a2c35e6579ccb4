"""LDAM: the label-distribution-aware margin loss (Cao et al., NeurIPS 2019)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from otmix.errors import UserError
from otmix.losses.base import Criterion, Head
from otmix.types import ClassCounts, Output

HEAD_SCALE = 30.0
"""s of the normed head, which this loss is defined on."""


def ldam_margins(counts: ClassCounts, max_margin: float = 0.5) -> Tensor:
    """m_c = max_margin · (n_c / n_min)^(−1/4), float64 `[K]`, in units of the cosine."""
    n = counts.counts.double()
    return max_margin * (n / n.min()) ** -0.25


def ldam_loss(logits: Tensor, labels: Tensor, margin: Tensor) -> Tensor:
    """−log softmax(z − margin[y] on the true class)[y], per image: `[B,K]`, `[B]` -> `[B]`. `margin [K]` is in units of
    the logits.
    """
    lowered = logits.scatter_add(1, labels.unsqueeze(1), -margin.index_select(0, labels).unsqueeze(1))
    return F.cross_entropy(lowered, labels, reduction="none")


class LDAM(Criterion):
    """Cross-entropy of s·(cos − m_y on the true class), on a normed head.

    The head gives s·cos, so the margin here is s·m_c. (In LDAM's code the scale is in the loss and evaluation sees
    cosines; the numbers are the same.) Of a mix, each term has the margin of its own label. Raises UserError for a
    margin that is not positive.

    Args:
        max_margin: margin of the rarest class, in units of the cosine (LDAM's code: 0.5).
    """

    head: ClassVar[Head] = "normed"
    margin: Tensor

    def __init__(self, counts: ClassCounts, max_margin: float = 0.5) -> None:
        super().__init__(counts)
        if not 0 < max_margin < math.inf:
            raise UserError(f"LDAM's max_margin must be a positive number, it is {max_margin}")
        # a function of the counts, so no checkpoint needs it
        self.register_buffer("margin", (HEAD_SCALE * ldam_margins(counts, max_margin)).float(), persistent=False)

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        return ldam_loss(output.logits.float(), labels, self.margin)
