"""Entropic optimal transport: a cost matrix becomes a plan (eq. 4 of Gao et al. 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otmix.types import Plan


def sinkhorn(cost: Tensor, *, epsilon: float = 0.01, max_iterations: int = 200, tolerance: float = 1e-3) -> Plan:
    """Sinkhorn's iterations in the log domain for uniform masses; `cost [f,m]`."""
    f, m = cost.shape[-2:]
    scaled = cost.float() / -epsilon
    u, v = scaled.new_zeros(f), scaled.new_zeros(m)
    for _ in range(max_iterations):
        u = -math.log(f) - torch.logsumexp(scaled + v, dim=-1)
        v = -math.log(m) - torch.logsumexp(scaled + u[:, None], dim=-2)
    coupling = (scaled + u[:, None] + v).exp()
    error = (coupling.sum(-1) - 1 / f).abs().sum()
    return Plan(coupling, epsilon * u, epsilon * v, torch.tensor(max_iterations), error, error <= tolerance)
