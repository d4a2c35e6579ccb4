"""The influence-balanced loss (Park et al., ICCV 2021): cross-entropy divided by each image's influence on the decision
boundary.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from otmix.errors import UserError
from otmix.losses.base import Criterion
from otmix.losses.reweighting import effective_number_weights
from otmix.types import ClassCounts, Output

Weights = Literal["inverse", "effective", "none"]


def ib_loss(
    logits: Tensor,
    labels: Tensor,
    features: Tensor,
    weight: Tensor,
    scale: float = 1000.0,
    epsilon: float = 1e-3,
    gamma: float = 0.0,
    detach: bool = False,
) -> Tensor:
    """w_y · scale / (q + ε) · (1 − p_y)^γ · cross-entropy, per image: `[B,K]`, `[B]`, `[B,D]`, `[K]` -> `[B]`.

    The influence is q = ‖softmax(z) − e_y‖₁ · ‖h‖₁ = 2 (1 − p_y) ‖h‖₁, h being the features. With `detach`, no gradient
    passes through it. Differentiable once.
    """
    loss: Tensor = _IB.apply(logits, labels, features, weight, scale, epsilon, gamma, detach)
    return loss


class _IB(torch.autograd.Function):
    """Computes the gradient along with the loss, from the odds d = log((1 − p_y) / p_y): 1 − p_y = σ(d), cross-entropy
    = softplus(d), to the last digits also where p_y rounds to 1. Left to autograd, it takes up to three times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        features: Tensor,
        weight: Tensor,
        scale: float,
        epsilon: float,
        gamma: float,
        detach: bool,
    ) -> Tensor:
        y = labels.unsqueeze(1)
        others = logits.scatter(1, y, torch.finfo(logits.dtype).min)
        total = others.logsumexp(1, keepdim=True)
        odds = (total - logits.gather(1, y)).squeeze(1)
        doubt, entropy = odds.sigmoid(), F.softplus(odds)

        pull = 2 * doubt  # ‖p − e_y‖₁
        influence = pull * features.abs().sum(1)
        damped = influence + epsilon
        factor = weight.index_select(0, labels).mul_(scale).div_(damped)
        if gamma != 0:
            factor.mul_(F.logsigmoid(odds).mul_(gamma).exp_())
        loss = factor * entropy

        # dσ/dd = σ(1 − σ) and d softplus/dd = σ; dd/dz is the softmax over the other classes, and −1 at y
        share = gamma if detach else gamma - influence / damped
        slope = factor * (doubt + (1 - doubt) * entropy * share)
        direction = others.sub_(total).exp_().scatter_(1, y, -1.0)
        by_size = None if detach else loss * pull / damped  # −dL / d‖h‖₁
        ctx.save_for_backward(direction, slope, features, by_size)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        direction, slope, features, by_size = ctx.saved_tensors
        of_logits = direction * (slope * upstream).unsqueeze(1)
        of_features = None if by_size is None else features.sign() * (by_size * -upstream).unsqueeze(1)
        return of_logits, None, of_features, None, None, None, None, None


class IB(Criterion):
    """Plain cross-entropy until `start`, then cross-entropy times w_y · scale / (q + ε), where q = ‖p − e_y‖₁ · ‖h‖₁ is
    the image's influence.

    An image that is classified surely pulls with up to scale / ε = 10⁶ times its small cross-entropy: the learning rate
    comes down with the switch, see `own_steps`. Of a mix, each term has the influence of its own label. In its code,
    the p of IB + Focal is that of the weighted cross-entropy, p^w; here it is p. Raises UserError for settings out of
    range, and for an output without features.

    Args:
        start: share of the run at which it begins (IB's code: 100 of 200 epochs).
        scale: constant factor, which gives the loss its usual size back (IB's code: 1000).
        epsilon: added to the influence (IB's code: 0.001).
        weights: class weights that sum to K: inverse is 1/n, effective is (1-b)/(1-b^n) with b = .9999, none is 1 (IB's
            code: inverse; its IB + CB: effective).
        detach: whether the influence is a constant to the gradient (IB's code: no).
        focal_gamma: exponent of a further factor 1 - p, 0 for none (IB's code: 1 in its IB + Focal, else 0).
    """

    weight: Tensor

    def __init__(
        self,
        counts: ClassCounts,
        start: float = 0.5,
        scale: float = 1000.0,
        epsilon: float = 1e-3,
        weights: Weights = "inverse",
        detach: bool = False,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__(counts)
        if not (0 <= start <= 1 and 0 < scale < math.inf and 0 < epsilon < math.inf and 0 <= focal_gamma < math.inf):
            raise UserError(
                "ib needs a start from 0 to 1, a positive scale and epsilon, and a focal_gamma of at least 0, "
                f"not {start}, {scale}, {epsilon} and {focal_gamma}"
            )
        self.start, self.scale, self.epsilon = start, scale, epsilon
        self.detach, self.focal_gamma = detach, focal_gamma
        # a function of the counts, so no checkpoint needs it
        self.register_buffer("weight", ib_weights(counts, weights).float(), persistent=False)
        self.own_steps = ib_steps(start)

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        logits = output.logits.float()
        if progress < self.start:
            return F.cross_entropy(logits, labels, reduction="none")
        if output.features is None:
            raise UserError("the loss ib needs the features its logits are made from; give Output(logits, features)")
        return ib_loss(
            logits,
            labels,
            output.features.float(),
            self.weight,
            self.scale,
            self.epsilon,
            self.focal_gamma,
            self.detach,
        )


def ib_weights(counts: ClassCounts, weights: Weights = "inverse") -> Tensor:
    """w ∝ 1/n, the effective-number weights, or 1: float64 `[K]`, summing to K. Raises UserError for another name."""
    if weights == "inverse":
        inverse = 1 / counts.counts.double()
        return inverse * (counts.num_classes / inverse.sum())
    if weights == "effective":
        return effective_number_weights(counts)
    if weights == "none":
        return torch.ones(counts.num_classes, dtype=torch.float64)
    raise UserError(f"the weights of ib are inverse, effective or none, not {weights!r}")


def ib_steps(start: float) -> tuple[tuple[float, float], ...]:
    """The learning rate's (share of the run, factor) of IB's code: x .01 from `start`, 1e-4 from 160/200, 1e-6 from
    180/200; before `start` LDAM's schedule, x .01 from 160/200 and 1e-4 from 180/200.
    """
    before = [(share, factor) for share, factor in ((160 / 200, 1e-2), (180 / 200, 1e-4)) if share < start]
    late = [(share, factor) for share, factor in ((160 / 200, 1e-4), (180 / 200, 1e-6)) if share > start]
    at_start = 1e-2 if start < 160 / 200 else 1e-4 if start < 180 / 200 else 1e-6
    return (*before, (start, at_start), *late)
