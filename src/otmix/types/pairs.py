"""Who is pasted into whom, and the transport plan behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """A solution of the entropic transport problem, eq. 4, with its evidence. Leading dimensions are batches of
    problems.

    `coupling [...,f,m]` sums to 1; `foreground_potential [...,f]` and `background_potential [...,m]` are the dual
    potentials (in units of the cost, the coupling being exp((u_i + v_j − C_ij)/ε)); `iterations [...]`; `marginal_error
    [...]`, the larger of the two L1 distances between a marginal of the coupling and its mass; `converged [...]` bool:
    error ≤ tolerance.
    """

    coupling: Tensor
    foreground_potential: Tensor
    background_potential: Tensor
    iterations: Tensor
    marginal_error: Tensor
    converged: Tensor

    @property
    def favourites(self) -> Tensor:
        """Eq. 8: for each foreground the background with the largest T_ij, int64 `[...,f]`."""
        if self.coupling.device.type == "cpu":  # NumPy's takes a tenth of the time here
            return torch.from_numpy(self.coupling.numpy().argmax(-1))
        return self.coupling.argmax(-1)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Who is pasted into whom: positions `foreground [B]` and `background [B]` in the two batches of candidates.

    `by` names the rule that chose them ("index", "within-batch", "confusion", "transport", or one's own); `plan` is
    there when transport did.
    """

    foreground: Tensor
    background: Tensor
    by: str
    plan: Plan | None = None

    def __len__(self) -> int:
        return int(self.foreground.shape[0])
