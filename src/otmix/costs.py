"""How far apart a foreground and a background are (eq. 5, 6, 7 of Gao et al. 2023).

A cost maps two embedded batches to a matrix `[f,m]`, row i = foreground, column j = background.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from otmix.errors import UserError
from otmix.types import Confusion, Embedded

Metric = Literal["cosine", "euclidean"]


def _check_metric(metric: str) -> None:
    if metric not in get_args(Metric):
        raise UserError(f"features are compared by 'cosine' or 'euclidean', not by {metric!r}")


class Cost(Protocol):
    """`(foreground [f], background [m]) -> [f,m]`, float32. Where `by_class_alone` is there and true, all images of a
    class cost the same, and transport chooses among them at random.
    """

    def __call__(self, foreground: Embedded, background: Embedded, /) -> Tensor: ...


@dataclass(frozen=True)
class FeatureCost:
    """Eq. 5: 1 − cos(z_i, z_j), in [0, 2]; or the euclidean distance of Table 4, unscaled."""

    metric: Metric = "cosine"

    def __post_init__(self) -> None:
        _check_metric(self.metric)

    def __call__(self, foreground: Embedded, background: Embedded) -> Tensor:
        z_f, z_b = foreground.features.float(), background.features.float()
        if self.metric == "euclidean":
            return torch.cdist(z_f, z_b)
        return 1.0 - F.normalize(z_f, dim=1) @ F.normalize(z_b, dim=1).T


@dataclass(frozen=True)
class ConfusionCost:
    """Eq. 6: 1 − F̂[y_i, y_j], y_i the foreground's class, y_j the background's, rows of F being the true class, F̂ its
    diagonal zeroed.

    This is the order of the released code; eq. 6, read with the indices of eq. 4, has the transpose. Without an
    estimate of F yet the cost is 1. `keep_diagonal` is Table 4's "keeping same category".
    """

    confusion: Confusion | None = None
    keep_diagonal: bool = False
    by_class_alone = True

    def __call__(self, foreground: Embedded, background: Embedded) -> Tensor:
        y_f, y_b = foreground.items.labels, background.items.labels
        if self.confusion is None:
            return torch.ones(len(foreground), len(background), device=foreground.features.device)
        return 1.0 - self.confusion.lookup(y_f, y_b, keep_diagonal=self.keep_diagonal)


@dataclass(frozen=True)
class CombinedCost:
    """Eq. 7: ω · feature cost + (1 − ω) · confusion cost. ω = 1 and ω = 0 are Table 4's sample-level and class-level
    costs alone.
    """

    confusion: Confusion | None = None
    omega: float = 0.05
    metric: Metric = "cosine"
    keep_diagonal: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.omega <= 1.0:
            raise ValueError(f"omega must lie in [0, 1], not be {self.omega}")
        _check_metric(self.metric)

    @property
    def by_class_alone(self) -> bool:
        return self.omega == 0.0

    def __call__(self, foreground: Embedded, background: Embedded) -> Tensor:
        by_class = ConfusionCost(self.confusion, self.keep_diagonal)(foreground, background)
        if self.omega == 0.0:
            return by_class
        by_feature = FeatureCost(self.metric)(foreground, background)
        return by_feature if self.omega == 1.0 else self.omega * by_feature + (1.0 - self.omega) * by_class
