"""How a model confuses the classes, and on what data that was seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConfusionOrigin:
    """The data that a confusion matrix was estimated from.

    `split` × `items` (all; a balanced subset of `per_class` images a class; or streamed: the background batches that
    training embeds anyway) × `soft` (class probabilities) or hard counts (argmax) × `adaptive` (re-estimated during the
    run) or fixed (from a finished run). `perturbed`: made wrong on purpose afterwards (`otmix.confusion.perturb`).
    """

    split: Literal["train", "validation", "test"] = "train"
    items: Literal["all", "balanced", "streamed"] = "streamed"
    per_class: int | None = None
    soft: bool = True
    adaptive: bool = True
    perturbed: bool = False

    def __str__(self) -> str:
        which = (
            f"{self.per_class} a class of"
            if self.items == "balanced"
            else "batches streamed from"
            if self.items == "streamed"
            else "all of"
        )
        kind, state = "soft" if self.soft else "hard", "adaptive" if self.adaptive else "fixed"
        wrong = ", made wrong on purpose" if self.perturbed else ""
        return f"{kind} counts on {which} {self.split}, {state}{wrong}"


@dataclass(frozen=True, eq=False)
class Confusion:
    """How a model confuses the classes: `matrix [K,K]`, dense or sparse COO (kept coalesced), row = true class, rows
    sum to 1, an unseen class's row is zeros.

    Gao et al. 2023, section 4 ("Cost Function"), with the diagonal kept: the cost zeroes it (F̂).
    """

    matrix: Tensor
    origin: ConfusionOrigin

    def __post_init__(self) -> None:
        if self.matrix.is_sparse:  # once, here: in a lookup it would be each step's work, and a wait for CUDA
            object.__setattr__(self, "matrix", self.matrix.coalesce())

    @property
    def num_classes(self) -> int:
        return int(self.matrix.shape[0])

    def lookup(self, rows: Tensor, columns: Tensor, *, keep_diagonal: bool = False) -> Tensor:
        """F̂[rows[i], columns[j]] as a dense `[f,m]`, the diagonal zeroed unless `keep_diagonal`."""
        if self.matrix.is_sparse:
            values = self._found(rows[:, None] * self.num_classes + columns[None, :])
        else:
            values = self.matrix[rows[:, None], columns[None, :]]
        return values if keep_diagonal else values.masked_fill(rows[:, None] == columns[None, :], 0.0)

    def _found(self, places: Tensor) -> Tensor:
        """The entries of a sparse matrix at row · K + column. A search, as selecting rows of it would wait for CUDA."""
        values, (rows, columns) = self.matrix.values(), self.matrix.indices()
        if not len(values):
            return torch.zeros_like(places, dtype=values.dtype)
        known = rows * self.num_classes + columns  # ascending
        at = torch.searchsorted(known, places).clamp_max_(len(known) - 1)
        return torch.where(known[at] == places, values[at], 0.0)
