"""Logit adjustment (Menon et al., ICLR 2021): log priors added in training, or subtracted after it."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from otmix.errors import UserError
from otmix.losses.balanced_softmax import balanced_softmax
from otmix.losses.base import Criterion
from otmix.types import ClassCounts, Output


class LogitAdjustment(Criterion):
    """Cross-entropy of z + τ log π_c in training, with π_c = n_c / N, and at test time plain z; or post hoc: plain
    cross-entropy in training, and at test time z − τ log π_c.

    τ = 1 is balanced softmax, τ = 0 plain cross-entropy. Raises UserError for a τ that is not finite.

    Args:
        tau: strength of the adjustment (Menon et al.: 1 is the one that is consistent for the balanced error).
        post_hoc: adjust the logits of a plainly trained model at test time, and not the loss (Menon et al. give both).
    """

    shift: Tensor

    def __init__(self, counts: ClassCounts, tau: float = 1.0, post_hoc: bool = False) -> None:
        super().__init__(counts)
        if not math.isfinite(tau):
            raise UserError(f"the tau of logit adjustment must be a finite number, it is {tau}")
        self.post_hoc = post_hoc
        # a function of the counts, so no checkpoint needs it
        self.register_buffer("shift", (tau * counts.prior.log()).float(), persistent=False)

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        logits = output.logits.float()
        if self.post_hoc:
            return F.cross_entropy(logits, labels, reduction="none")
        return balanced_softmax(logits, labels, self.shift)

    def probabilities(self, output: Output) -> Tensor:
        logits = output.logits.float()
        return (logits - self.shift if self.post_hoc else logits).softmax(1)
