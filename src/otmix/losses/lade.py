"""LADE: label distribution disentangling (Hong et al., CVPR 2021)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from otmix.errors import UserError
from otmix.losses.balanced_softmax import balanced_softmax
from otmix.losses.base import Criterion, Reduction
from otmix.types import ClassCounts, Output, Target


def lader(logits: Tensor, target: Target, prior: Tensor, regulariser: float = 0.01) -> Tensor:
    """LADE's regulariser of a batch, a scalar: −Σ_c π_c (A_c − B_c − λ B_c²), from `logits [B,K]` and `prior [K]`.

    A_c is the mean of z_c over the items of class c, 0 where there is none; B_c = log mean_i exp(z_c(x_i) − log(K π_c))
    over all items. The constant is that of the column, as in LADE's code; to weigh the items as if all classes were
    equally frequent, it would have to be that of the item's own label.

    Of mixes, each label of an image is an item that weighs its share: A_c = Σ share · z_c / Σ share over the labels c.
    An image's shares sum to 1, so B_c remains the mean over images, and a share of 0 is an item that is not there.
    """
    loss: Tensor = _Lader.apply(logits, target.labels, target.shares.to(logits.dtype), prior, regulariser)
    return loss


class _Lader(torch.autograd.Function):
    """Left to autograd, it takes up to twice as long."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shares: Tensor, prior: Tensor, regulariser: float) -> Tensor:
        item, share = labels.flatten(), shares.flatten()
        mass = torch.full_like(prior, torch.finfo(prior.dtype).tiny).index_add_(0, item, share)
        of_item = (prior / mass).index_select(0, item).mul_(share)
        a = of_item.dot(logits.gather(1, labels).flatten())  # Σ_c π_c A_c; no matmul, which autocast would round
        total = logits[0] - logits.log_softmax(0)[0]  # is logsumexp(0), in a third of the time
        b = total - (prior * logits.numel()).log()
        of_class = torch.addcmul(prior, prior, b, value=2 * regulariser)
        ctx.save_for_backward(logits, labels, of_item, of_class)
        return prior.dot(torch.addcmul(b, b, b, value=regulariser)) - a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, labels, of_item, of_class = ctx.saved_tensors
        gradient = logits.softmax(0).mul_(of_class * upstream)
        gradient.scatter_add_(1, labels, (of_item * -upstream).view_as(labels))
        return gradient, None, None, None, None


class LADE(Criterion):
    """Cross-entropy of z + log π_c plus strength · LADER, which draws z_c towards the log ratio of class c's density to
    that of all images; at test time, on classes equally frequent, plain z.

    LADER is of the whole batch: no class weight reaches it, and it is added after the reduction, whichever it is. A
    batch spread over devices has one LADER for each. Raises UserError for a negative strength or regulariser.

    Args:
        strength: factor on LADER (LADE's README for CIFAR-100 at imbalance 100: 0.1; ImageNet-LT, iNaturalist: 0.05).
        regulariser: lambda of LADER's squared term (LADE's README for CIFAR-100 at imbalance 100: 0.01, its file of
            settings 0.1; ImageNet-LT, iNaturalist: 0.5).
    """

    prior: Tensor
    log_prior: Tensor

    def __init__(self, counts: ClassCounts, strength: float = 0.1, regulariser: float = 0.01) -> None:
        super().__init__(counts)
        if not (0 <= strength < math.inf and 0 <= regulariser < math.inf):
            raise UserError(f"lade needs strength and regulariser of at least 0, not {strength} and {regulariser}")
        self.strength, self.regulariser = strength, regulariser
        # functions of the counts, so no checkpoint needs them
        self.register_buffer("prior", counts.prior.float(), persistent=False)
        self.register_buffer("log_prior", counts.prior.log().float(), persistent=False)

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        """The cross-entropy of z + log π alone: LADER is no sum over images."""
        return balanced_softmax(output.logits.float(), labels, self.log_prior)

    def forward(
        self,
        output: Output,
        target: Target,
        class_weight: Tensor | None = None,
        progress: float = 0.0,
        reduction: Reduction = "mean",
    ) -> Tensor:
        loss = super().forward(output, target, class_weight, progress, reduction)
        of_batch = lader(output.logits.float(), target, self.prior, self.regulariser)
        return torch.add(loss, of_batch, alpha=self.strength)
