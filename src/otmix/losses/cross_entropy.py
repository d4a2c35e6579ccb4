"""Cross-entropy: empirical risk minimisation, the plain baseline ("ERM" in the tables)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from otmix.losses.base import Criterion
from otmix.types import Output


class CrossEntropy(Criterion):
    """−log softmax(z)[y], per image."""

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        return F.cross_entropy(output.logits.float(), labels, reduction="none")
