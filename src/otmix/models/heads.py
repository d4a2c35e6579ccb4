"""What turns features into logits. A head's `no_weight_decay` names the parameters that an optimiser must not decay."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

HeadName = Literal["linear", "normed", "sigmoid"]
LDAM_SCALE = 30.0


class LinearHead(nn.Linear):
    """W·h + b, `[B,D] → [B,K]`, W by Kaiming's normal rule as in the CIFAR ResNets of LDAM's code."""

    no_weight_decay: frozenset[str] = frozenset()

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__(feature_dim, num_classes)
        nn.init.kaiming_normal_(self.weight)


class SigmoidHead(LinearHead):
    """A linear head whose sigmoids start at the rate 1/K: the bias is −log(K−1) and not decayed (Cui et al. 2019)."""

    no_weight_decay = frozenset({"bias"})

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__(feature_dim, num_classes)
        nn.init.constant_(self.bias, -math.log(num_classes - 1))


class NormedHead(nn.Module):
    """s·cos(w_k, h), `[B,D] → [B,K]`, no bias (Cao et al. 2019, LDAM).

    The scale is applied here, not in the loss as in LDAM's code, so that logits are logits for everyone who reads them.
    Under autocast too the cosines have the precision of the weights: times s, rounded to bfloat16 they would move a
    logit by up to 0.1.
    """

    no_weight_decay: frozenset[str] = frozenset()

    def __init__(self, feature_dim: int, num_classes: int, scale: float = LDAM_SCALE) -> None:
        super().__init__()
        self.scale = scale
        directions = torch.empty(num_classes, feature_dim).uniform_(-1, 1)
        self.weight = nn.Parameter(functional.normalize(directions, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            directions = functional.normalize(features.to(self.weight.dtype), dim=1)
            return self.scale * functional.linear(directions, functional.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        classes, features = self.weight.shape
        return f"in_features={features}, out_features={classes}, scale={self.scale}"


HEADS: dict[HeadName, type[LinearHead] | type[SigmoidHead] | type[NormedHead]] = {
    "linear": LinearHead,
    "normed": NormedHead,
    "sigmoid": SigmoidHead,
}
