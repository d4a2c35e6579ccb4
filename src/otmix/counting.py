"""A class-by-class table of counts that is added to during training without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SPARSE_ABOVE = 1000
"""With more classes than this, a table is kept sparse: at K = 8142 a dense one is 265 MB."""


class CountTable:
    """Counts `[K,K]` in float32 (exact to 16.7 million a cell), dense, or sparse COO when K > `SPARSE_ABOVE`."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.device = torch.device(device)
        self.sparse = num_classes > SPARSE_ABOVE
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._table = self._empty()

    def _empty(self) -> Tensor:
        shape = (self.num_classes, self.num_classes)
        if self.sparse:
            return torch.sparse_coo_tensor(
                torch.empty(2, 0, dtype=torch.int64), torch.empty(0), shape, device=self.device, check_invariants=True
            ).coalesce()
        return torch.zeros(shape, device=self.device)

    def add(self, rows: Tensor, columns: Tensor, values: Tensor | None = None) -> None:
        """Add `values [n]` (default 1) in the cells `rows [n]`, `columns [n]`."""
        if values is None:
            values = torch.ones(rows.shape[0], device=self.device)
        if self.sparse:
            self._pending.append((torch.stack([rows, columns]), values))
        else:
            self._table.view(-1).index_add_(0, rows * self.num_classes + columns, values)

    def add_rows(self, rows: Tensor, values: Tensor) -> None:
        """Add whole rows `values [n,K]` to `rows [n]`; for dense tables."""
        self._table.index_add_(0, rows, values)

    @property
    def value(self) -> Tensor:
        """The table so far, dense or coalesced sparse."""
        if self._pending:
            cells = torch.cat([self._table.indices(), *(cells for cells, _ in self._pending)], dim=1)
            values = torch.cat([self._table.values(), *(values for _, values in self._pending)])
            self._table = _added_up(cells, values, self.num_classes)
            self._pending.clear()
        return self._table

    @value.setter
    def value(self, table: Tensor) -> None:
        if tuple(table.shape) != (self.num_classes, self.num_classes):
            raise ValueError(f"a table of {self.num_classes} classes cannot take counts of shape {tuple(table.shape)}")
        self._pending.clear()
        table = table.to(self.device)
        if self.sparse:
            self._table = (table if table.is_sparse else table.to_sparse()).coalesce()
        else:
            self._table = (table.to_dense() if table.is_sparse else table).clone()

    def scale(self, factor: float) -> None:
        """Multiply all counts; 0 empties the table."""
        self.value = self._empty() if factor == 0.0 else self.value * factor

    def gathered(self, add_up: Callable[[Tensor], Tensor] | None) -> Tensor:
        """The table summed over all processes by `add_up`, a sum of dense tensors; this process's own where that is
        None.
        """
        if add_up is None:
            return self.value
        total = add_up(self.value.to_dense().clone())
        return total.to_sparse().coalesce() if self.sparse else total


def _added_up(cells: Tensor, values: Tensor, num_classes: int) -> Tensor:
    """Coalesced counts `[K,K]` of `values [n]` in `cells [2,n]`, those of a cell added up in their order.

    `coalesce` adds them up in any order, so that the sum depends on when, and how often, the table was read.
    """
    rows, columns = cells
    keys, order = (rows * num_classes + columns).sort(stable=True)
    known, place = keys.unique_consecutive(return_inverse=True)
    sums = torch.zeros(len(known), device=values.device).index_add_(0, place, values[order])
    return torch.sparse_coo_tensor(
        torch.stack([known // num_classes, known % num_classes]),
        sums,
        (num_classes, num_classes),
        check_invariants=True,
        is_coalesced=True,
    )


def normalise_rows(counts: Tensor) -> Tensor:
    """Each row divided by its sum; an empty row stays zeros. Dense or sparse COO `[K,K]`."""
    tiny = torch.finfo(torch.float32).tiny
    if counts.is_sparse:
        counts = counts.coalesce()
        rows, values = counts.indices()[0], counts.values()
        sums = torch.zeros(counts.shape[0], device=counts.device).index_add_(0, rows, values)
        return torch.sparse_coo_tensor(
            counts.indices(), values / sums[rows].clamp_min(tiny), counts.shape, check_invariants=True
        ).coalesce()
    return counts / counts.sum(1, keepdim=True).clamp_min(tiny)
