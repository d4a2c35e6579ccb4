"""Entropic optimal transport: a cost matrix becomes a plan (eq. 4 of Gao et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from otmix.transport import batched, single
from otmix.types import Plan

__all__ = ["NotFinite", "sinkhorn"]


class NotFinite(ValueError):
    """A cost with entries that are NaN or infinite: what a model says whose weights have run away."""


@torch.no_grad()
def sinkhorn(
    cost: Tensor,
    foreground_mass: Tensor | None = None,
    background_mass: Tensor | None = None,
    *,
    epsilon: float = 0.01,
    max_iterations: int = 120,
    tolerance: float = 1e-4,
) -> Plan:
    """Solve entropic transport between foregrounds and backgrounds (Gao et al. 2023, eq. 4).

        min_T  Σ_ij C_ij T_ij + ε Σ_ij T_ij ln T_ij   with  T ≥ 0,  Σ_j T_ij = a_i,  Σ_i T_ij = b_j

    `cost [...,f,m]` is C, each matrix a problem of its own; `foreground_mass [...,f]` is a and `background_mass
    [...,m]` is b, each summing to 1, zeros allowed, uniform if not given, shared where they lack leading dimensions.
    `epsilon` is in units of the cost. float16 and bfloat16 costs are solved in float32; the plan has the dtype and
    device of the computation and no gradient. NumPy arrays and lists are taken as tensors on the CPU.

    The coupling's rows sum to a up to rounding, also when the iterations run out, so every foreground with a mass has a
    partner. `marginal_error` is measured on the returned coupling, and `converged` says whether it is at most
    `tolerance`. Its floor in float32 is about 1e-6 on most and 3e-5 on nearly separable problems, in float64 1e-14. At
    1e-3 the largest entry of each row is settled; at 1e-4 the objective plus the constant ε ln(f m) is right to about
    1e-4 of its value (the objective alone can be nearly 0, and is then right to less of its own; at 1e-6 to 1e-4 in
    every problem of our tests). float32 also rounds C, which changes T by a factor of 1 ± 6e-8 · max|C|/ε.
    A potential is −∞ where the mass is zero.

    On the CPU a problem ends with the first block of `BLOCK` iterations that has converged; so does, within one kernel,
    a float32 problem of up to 256 × 256 on CUDA. Other devices and problems run all `max_iterations`, the converged
    ones unchanged. Nothing waits for the device, and a CUDA graph can capture the call.

    Method: Sinkhorn's scaling of a kernel that absorbs the scalings when they grow (Schmitzer 2019, SIAM J. Sci.
    Comput. 41, algorithm 2), so neither leaves the range of the floats. After each block ln v is extrapolated from its
    last steps (reduced rank extrapolation, Sidi 2017), which saves most of the iterations where they would converge
    slowly.

    Raises ValueError for a cost that is not floating point or lacks entries, shapes that do not fit, and an epsilon,
    iteration count or tolerance out of range; on the CPU also for a cost that is not finite (`NotFinite`) and for
    masses that are negative or do not sum to 1 within 1e-3 (they are then divided by their sum). Elsewhere, looking at
    values would mean to wait: there such a problem has the error ∞, is not converged, and its coupling, finite all the
    same, is that of C = 0 or of a uniform mass.
    """
    cost = torch.as_tensor(cost)
    _check_settings(cost, epsilon, max_iterations, tolerance)
    cost = cost.detach().to(torch.promote_types(cost.dtype, torch.float32))
    if not torch.finfo(cost.dtype).tiny <= epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite in {cost.dtype}, it is {epsilon}")
    a, a_valid = _mass(foreground_mass, cost[..., 0], "foreground_mass")
    b, b_valid = _mass(background_mass, cost[..., 0, :], "background_mass")
    problems = cost.shape[:-2]
    if cost.device.type != "cpu" or 0 in problems:
        with torch.autocast(cost.device.type, enabled=False):
            valid = cost.isfinite().flatten(-2).all(-1) & a_valid & b_valid
            cost = torch.where(valid[..., None, None], cost, 0.0)
            return Plan(*_solver(cost)(cost, a, b, valid, epsilon, max_iterations, tolerance))
    # by NumPy: PyTorch's threads would still be spinning for work when BLAS wants their cores
    numbers = cost.numpy()
    low, high = float(numbers.min()), float(numbers.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NotFinite("the cost must be finite; it has entries that are NaN or infinite")
    largest = max(abs(low), abs(high))
    with np.errstate(all="ignore"):  # ln 0 of an empty mass; overflows are looked for
        if not problems:
            alone = single.solve(numbers, a.numpy(), b.numpy(), largest, epsilon, max_iterations, tolerance)
            return _typed(Plan(*(torch.as_tensor(part) for part in alone)), cost.dtype)
        each = [x.numpy().reshape(-1, *x.shape[len(problems) :]) for x in (cost, a, b)]
        plans = [single.solve(c, x, y, largest, epsilon, max_iterations, tolerance) for c, x, y in zip(*each)]
    stacked = (np.stack([np.asarray(one) for one in part]) for part in zip(*plans))
    return _typed(Plan(*(torch.from_numpy(part.reshape(problems + part.shape[1:])) for part in stacked)), cost.dtype)


def _typed(plan: Plan, dtype: torch.dtype) -> Plan:
    """The error, a number of Python's until then, in the type of the rest."""
    return replace(plan, marginal_error=plan.marginal_error.to(dtype))


def _solver(cost: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """The fastest solver for problems on this device."""
    if cost.device.type == "cuda" and cost.numel() and _has_triton():
        from otmix.transport import fused

        if fused.fits(cost):
            return fused.solve
    return batched.solve


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None  # PyTorch brings it along on Linux


def _check_settings(cost: Tensor, epsilon: float, max_iterations: int, tolerance: float) -> None:
    if cost.ndim < 2 or 0 in cost.shape[-2:] or not cost.is_floating_point():
        raise ValueError(f"the cost must be floating point [...,f,m] with entries, not {cost.dtype} {list(cost.shape)}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, it is {epsilon}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, it is {max_iterations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, it is {tolerance}")


def _mass(mass: Tensor | None, like: Tensor, name: str) -> tuple[Tensor, Tensor | bool]:
    """A mass like `like [...,n]`, summing to 1, and which were valid, bool `[...]`. Raises ValueError where looking
    costs nothing.
    """
    n = like.shape[-1]
    if mass is None:
        return torch.full_like(like, 1 / n), True
    mass = torch.as_tensor(mass)
    if mass.ndim < 1 or mass.shape[-1] != n:
        raise ValueError(f"{name} must have the shape {list(like.shape)} or {[n]}, not {list(mass.shape)}")
    try:
        mass = mass.detach().to(like).expand_as(like)
    except RuntimeError as error:
        raise ValueError(f"{name} must have the shape {list(like.shape)} or {[n]}, not {list(mass.shape)}") from error
    total = mass.sum(-1)
    valid = (mass >= 0).all(-1) & ((total - 1).abs() <= 1e-3)  # false of NaN too
    if like.device.type == "cpu" and not bool(valid.all()):
        raise ValueError(f"{name} must not be negative and must sum to 1")
    return torch.where(valid[..., None], mass / total[..., None], 1 / n), valid
