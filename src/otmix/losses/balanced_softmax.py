"""Balanced softmax (Ren et al., NeurIPS 2020), which the paper's tables print as "BALMS"."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from otmix.losses.base import Criterion
from otmix.types import ClassCounts, Output


def balanced_softmax(logits: Tensor, labels: Tensor, log_counts: Tensor) -> Tensor:
    """−log softmax(z + log n)[y], per image: `[B,K]`, `[B]` -> `[B]`. A constant added to `log_counts [K]` changes
    nothing.
    """
    return F.cross_entropy(logits + log_counts, labels, reduction="none")


class BalancedSoftmax(Criterion):
    """Cross-entropy of z + log n_c in training; at test time, on classes equally frequent, plain z.

    The loss alone, without the meta sampler of its paper: so do the codes of CMO and OTmix, and so the tables' numbers.
    The shift does not depend on the label, so two hard labels with shares are one soft label.
    """

    log_counts: Tensor

    def __init__(self, counts: ClassCounts) -> None:
        super().__init__(counts)
        self.register_buffer("log_counts", counts.counts.double().log().float(), persistent=False)

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        return balanced_softmax(output.logits.float(), labels, self.log_counts)
