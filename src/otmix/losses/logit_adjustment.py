"""The logit-adjusted cross-entropy (Menon et al., ICLR 2021): balanced softmax with a strength."""

from __future__ import annotations

import math

from torch import Tensor

from otmix.errors import UserError
from otmix.losses.balanced_softmax import balanced_softmax
from otmix.losses.base import Criterion
from otmix.types import ClassCounts, Output


class LogitAdjustment(Criterion):
    """Cross-entropy of z + τ log π_c in training, with π_c = n_c / N; at test time plain z.

    τ = 1 is balanced softmax, τ = 0 plain cross-entropy. Raises UserError for a τ that is not finite.
    """

    shift: Tensor

    def __init__(self, counts: ClassCounts, tau: float = 1.0) -> None:
        super().__init__(counts)
        if not math.isfinite(tau):
            raise UserError(f"the tau of logit adjustment must be a finite number, it is {tau}")
        self.register_buffer("shift", (tau * counts.prior.log()).float(), persistent=False)

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        return balanced_softmax(output.logits.float(), labels, self.shift)
