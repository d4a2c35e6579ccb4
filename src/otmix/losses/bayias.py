"""Bayias (Xu et al., NeurIPS 2021), the loss of UniMix: logits compensated for the change of the prior."""

from __future__ import annotations

import math

from torch import Tensor

from otmix.losses.balanced_softmax import balanced_softmax
from otmix.losses.base import Criterion
from otmix.types import ClassCounts, Output


def bayes_bias(counts: ClassCounts) -> Tensor:
    """log π_c − log π'_c, float64 `[K]`: π the prior of the training set, π' = 1/K that of the test."""
    return counts.prior.log() + math.log(counts.num_classes)


class Bayias(Criterion):
    """Cross-entropy of z + log π_c − log π'_c in training; at test time, on classes equally frequent, plain z.

    The bias is that of balanced softmax but for a constant, so the loss is the same: its paper comes to it as Bayes'
    correction, and combines it with UniMix.
    """

    bias: Tensor

    def __init__(self, counts: ClassCounts) -> None:
        super().__init__(counts)
        # a function of the counts, so no checkpoint needs it
        self.register_buffer("bias", bayes_bias(counts).float(), persistent=False)

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        return balanced_softmax(output.logits.float(), labels, self.bias)
