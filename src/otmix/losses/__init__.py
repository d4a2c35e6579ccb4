"""Losses, one paper per file. `LOSSES` names them for configurations; `register_loss` adds anyone's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from otmix.losses.base import Criterion, Head, Reduction
from otmix.losses.cross_entropy import CrossEntropy
from otmix.losses.reweighting import DeferredReweighting, effective_number_weights

LOSSES: dict[str, type[Criterion]] = {"ce": CrossEntropy}

_C = TypeVar("_C", bound=type[Criterion])


def register_loss(name: str) -> Callable[[_C], _C]:
    """Class decorator: make a `Criterion` known under `name` in methods' names (`name`, `name+otmix`, …)."""

    def add(criterion: _C) -> _C:
        if name in LOSSES:
            raise ValueError(f"there is already a loss named {name!r}")
        LOSSES[name] = criterion
        return criterion

    return add


__all__ = [
    "LOSSES",
    "Criterion",
    "CrossEntropy",
    "DeferredReweighting",
    "Head",
    "Reduction",
    "effective_number_weights",
    "register_loss",
]
