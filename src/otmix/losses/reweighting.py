"""Deferred re-weighting (DRW): class weights that switch on late (Cao et al. 2019, with the weights of Cui et al.
2019).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from otmix.errors import UserError
from otmix.sampling import effective_number
from otmix.types import ClassCounts


def effective_number_weights(counts: ClassCounts, beta: float = 0.9999) -> Tensor:
    """w_k = (1 − β) / (1 − β^{n_k}), scaled so that Σ w_k = K: float64 `[K]` (Cui et al. 2019, eq. 2 and section 4)."""
    return effective_number(counts, beta) * counts.num_classes


@dataclass(frozen=True)
class DeferredReweighting:
    """Weights of 1 until `start` (a fraction of the run's epochs), effective-number weights from there.

    Stateless: a function of the progress.

    Args:
        beta: of the effective numbers (LDAM's code: 0.9999).
        start: share of the run from which they hold, by --schedule: 160 of 240 epochs, 160 of 200 with ldam and bbn, 80
            of 200 with imagenet-lt, 160 of 210 with inaturalist (OTmix's and LDAM's code; of bbn none says).
    """

    counts: ClassCounts
    beta: float = 0.9999
    start: float = 160 / 240

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1:
            raise UserError(f"the start of re-weighting is a share of the run, in [0, 1]; it is {self.start}")
        effective_number_weights(self.counts, self.beta)  # raises for a beta out of range: now, not late in the run

    def class_weight(self, progress: float) -> Tensor | None:
        """float32 `[K]` on the CPU, or None while all weights are 1."""
        return effective_number_weights(self.counts, self.beta).float() if progress >= self.start else None
