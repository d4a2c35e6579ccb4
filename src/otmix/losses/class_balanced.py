"""The class-balanced losses (Cui et al., CVPR 2019): softmax, sigmoid and focal, weighted by effective numbers.

The weight of the true class, w_y ∝ (1 − β) / (1 − β^n_y) with Σ_k w_k = K, multiplies the loss from the first epoch on.
With `-drw` it is applied twice from the deferred epoch on.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from otmix.errors import UserError
from otmix.losses.base import Criterion, Head
from otmix.losses.reweighting import effective_number_weights
from otmix.types import ClassCounts, Output

# log1p, which softplus is made of, ends in its AVX-512 build with a masked load of -0.0. As long as nothing has asked
# for the page of memory where that lies, the processor stumbles over it in every call, and takes 20 times as long.
torch.log1p(torch.full((16,), -0.0))


def weighted_sigmoid_focal(logits: Tensor, labels: Tensor, weight: Tensor, gamma: float = 1.0) -> Tensor:
    """Binary cross-entropy of each class against all others, each times (1 − p_t)^γ, p_t being the probability given to
    the truth about that class, summed over the classes, and times `weight [K]` of the label: `[B,K]`, `[B]` -> `[B]`.

    w_y · Σ_k σ(t_k)^γ softplus(t_k), where t is z with the true class's sign turned. Differentiable once.
    """
    loss: Tensor = _WeightedSigmoidFocal.apply(logits, labels, weight, gamma)
    return loss


class _WeightedSigmoidFocal(torch.autograd.Function):
    """Computes the gradient along with the loss, from the same σ and softplus. Left to autograd, the loss takes two to
    four times as long with thousands of classes, and twice the memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weight: Tensor, gamma: float) -> Tensor:
        y, w = labels.unsqueeze(1), weight.index_select(0, labels)
        turned = logits.scatter(1, y, -1.0, reduce="multiply")
        terms = F.softplus(turned)
        doubt = turned.sigmoid_()
        if gamma == 0:
            loss, slope = terms.sum(1), doubt
        else:
            modulator = doubt if gamma == 1 else doubt**gamma
            loss = terms.mul_(modulator).sum(1)
            # with L = σ^γ softplus(t), dL/dt = γL + σ (σ^γ − γL): no negative power of σ, so never 0/0
            slope = (terms if gamma == 1 else terms.mul_(gamma)).lerp_(modulator, doubt)
        ctx.save_for_backward(slope.scatter_(1, y, -1.0, reduce="multiply"), w)
        return loss.mul_(w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        slope, w = ctx.saved_tensors
        return slope * (w * upstream).unsqueeze(1), None, None, None


class _ClassBalanced(Criterion):
    weight: Tensor

    def __init__(self, counts: ClassCounts, beta: float = 0.9999) -> None:
        super().__init__(counts)
        # a function of the counts, so no checkpoint needs it
        self.register_buffer("weight", effective_number_weights(counts, beta).float(), persistent=False)


class ClassBalancedSoftmax(_ClassBalanced):
    """w_y · (−log softmax(z)[y]).

    A batch's loss is divided by the number of its images, as in the paper's code, not by the sum of its weights. Raises
    UserError for a β outside [0, 1).

    Args:
        beta: of the effective number (1 - b^n) / (1 - b) of a class's images (Cui et al.'s script: 0.9999).
    """

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        return F.cross_entropy(output.logits.float(), labels, self.weight, reduction="none")


class ClassBalancedSigmoid(_ClassBalanced):
    """w_y · Σ_k BCE(σ(z_k), [k = y]), on a head whose bias begins at −log(K−1) and is not decayed.

    Raises UserError for a β outside [0, 1).

    Args:
        beta: of the effective number (1 - b^n) / (1 - b) of a class's images (Cui et al.'s script: 0.9999).
    """

    head: ClassVar[Head] = "sigmoid"
    gamma = 0.0

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        return weighted_sigmoid_focal(output.logits.float(), labels, self.weight, self.gamma)

    def probabilities(self, output: Output) -> Tensor:
        """σ(z_k) / Σ_l σ(z_l), `[B,K]`.

        The K sigmoids are independent and need not sum to 1; but an image has one class, and what reads these numbers
        (likelihood, calibration, the confusion's soft counts) takes an image's sum for 1. The order of the classes is
        that of the logits, except that several above 17 are all as certain as float32 can tell.
        """
        return F.logsigmoid(output.logits.float()).softmax(1)


class ClassBalancedFocal(ClassBalancedSigmoid):
    """w_y · Σ_k (1 − p_t)^γ BCE(σ(z_k), [k = y]): the sigmoid form, unlike `focal`; γ = 1 as in the paper's script.

    Raises UserError for a β outside [0, 1) or a negative γ.

    Args:
        beta: of the effective number (1 - b^n) / (1 - b) of a class's images (Cui et al.'s script: 0.9999).
        gamma: exponent of 1 - p of each binary term's truth (Cui et al.'s script: 1).
    """

    def __init__(self, counts: ClassCounts, beta: float = 0.9999, gamma: float = 1.0) -> None:
        super().__init__(counts, beta)
        if not 0 <= gamma < math.inf:
            raise UserError(f"gamma of the class-balanced focal loss must be at least 0, it is {gamma}")
        self.gamma = gamma
