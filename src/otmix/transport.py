"""Entropic optimal transport: a cost matrix becomes a plan (eq. 4 of Gao et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise

import torch
from torch import Tensor

from otmix.types import Plan

BLOCK = 8
"""Iterations between two looks at the error, each followed by an extrapolation."""
HISTORY = 4
"""How many differences of residuals an extrapolation combines."""
LONGEST_STEP = 16.0
"""An extrapolation changes the logarithm of no scaling by more than this."""
PROGRESS = 0.9
"""After an extrapolation that left more than this share of the error, the next block does without one."""
WORSE = 2.0
"""A block whose error is this many times that of the block before is undone: on the way down, extrapolations may climb.
"""
PATIENCE = 6
"""After as many blocks without a new least error, a block must not be worse at all: plain iterations always get there.
"""


@torch.no_grad()
def sinkhorn(
    cost: Tensor,
    foreground_mass: Tensor | None = None,
    background_mass: Tensor | None = None,
    *,
    epsilon: float = 0.01,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
) -> Plan:
    """Solve entropic transport between foregrounds and backgrounds (Gao et al. 2023, eq. 4).

        min_T  Σ_ij C_ij T_ij + ε Σ_ij T_ij ln T_ij   with  T ≥ 0,  Σ_j T_ij = a_i,  Σ_i T_ij = b_j

    `cost [...,f,m]` is C, each matrix a problem of its own; `foreground_mass [...,f]` is a and `background_mass
    [...,m]` is b, each summing to 1, zeros allowed, uniform if not given. `epsilon` is in units of the cost. float16
    and bfloat16 costs are solved in float32; the plan has the dtype of the computation and no gradient.

    The rows of the returned coupling sum to a up to rounding, also when the iterations end early, so every foreground
    with a mass has a largest entry. `marginal_error` is measured on the returned coupling, and `converged` says that it
    is at most `tolerance`. In float32 the error has a floor of about 1e-6 on easy and 3e-5 on nearly separable
    problems, in float64 1e-15. Rounding of the cost itself changes T by a factor of about 1 ± 6e-8 · max|C|/ε in
    float32. A potential is −∞ where the mass is zero.

    On the CPU each problem stops at the first block of `BLOCK` iterations that ends converged. Other devices always run
    `max_iterations`, so that nothing waits for them and a CUDA graph can capture the call; a problem that has converged
    keeps its solution.

    Method: Sinkhorn's scaling of a kernel that has absorbed the potentials (Schmitzer 2019), so that neither it nor the
    scalings leave the range of the floats; after each block the scalings are extrapolated from their last residuals
    (reduced rank extrapolation, see Sidi 2017, "Vector Extrapolation Methods"), and a block that makes the error worse
    is undone.

    Raises ValueError for shapes that do not fit, a cost that is not floating or has no entries, an epsilon, iteration
    count or tolerance out of range, and, on the CPU, for a cost that is not finite and for masses that are negative or
    do not sum to 1 (within 1e-3; they are then divided by their sum). Where looking would mean to wait for the device,
    such a problem instead gets the coupling for C = 0 or uniform masses, and `converged` False.
    """
    _check_settings(cost, epsilon, max_iterations, tolerance)
    cost = cost.detach().to(torch.promote_types(cost.dtype, torch.float32))
    if not torch.finfo(cost.dtype).tiny <= epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite in {cost.dtype}, it is {epsilon}")
    finite = cost.isfinite().flatten(-2).all(-1)
    a, a_valid = _mass(foreground_mass, cost[..., 0], "foreground_mass")
    b, b_valid = _mass(background_mass, cost[..., 0, :], "background_mass")
    with torch.autocast(cost.device.type, enabled=False):
        if cost.device.type != "cpu":
            valid = finite & a_valid & b_valid
            return _solve(cost, a, b, valid, epsilon, max_iterations, tolerance)
        if not bool(finite.all()):
            raise ValueError("the cost holds entries that are not finite")
        if finite.numel() <= 1:  # also none at all
            return _solve(cost, a, b, finite, epsilon, max_iterations, tolerance)
        problems = zip(cost.flatten(0, -3), a.flatten(0, -2), b.flatten(0, -2), finite.flatten())
        plans = [_solve(*problem, epsilon, max_iterations, tolerance) for problem in problems]
    stacked = {part.name: torch.stack([getattr(plan, part.name) for plan in plans]) for part in fields(Plan)}
    return Plan(**{name: values.reshape(finite.shape + values.shape[1:]) for name, values in stacked.items()})


def _check_settings(cost: Tensor, epsilon: float, max_iterations: int, tolerance: float) -> None:
    if cost.ndim < 2 or 0 in cost.shape[-2:] or not cost.is_floating_point():
        shape = tuple(cost.shape)
        raise ValueError(f"the cost must be floating point of shape [...,f,m], not {cost.dtype} of shape {shape}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, it is {epsilon}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, it is {max_iterations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, it is {tolerance}")


def _mass(mass: Tensor | None, like: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """A mass of the shape, dtype and device of `like [...,n]` that sums to 1, and which were valid, bool `[...]`."""
    n = like.shape[-1]
    if mass is None:
        return torch.full_like(like, 1 / n), like.new_ones(like.shape[:-1], dtype=torch.bool)
    needed = f"{name} has shape {tuple(mass.shape)}; a cost of this shape needs {tuple(like.shape)}"
    if mass.ndim < 1 or mass.shape[-1] != n or mass.ndim > like.ndim:
        raise ValueError(needed)
    try:
        given = mass.detach().to(like).expand_as(like)
    except RuntimeError as error:
        raise ValueError(needed) from error
    total = given.sum(-1)
    valid = (given >= 0).all(-1) & ((total - 1).abs() <= 1e-3)  # NaN and ∞ are not valid either
    if like.device.type == "cpu" and not bool(valid.all()):
        raise ValueError(f"{name} must not be negative and must sum to 1")
    return torch.where(valid[..., None], given / total[..., None], 1 / n), valid


def _solve(
    cost: Tensor, a: Tensor, b: Tensor, valid: Tensor, epsilon: float, max_iterations: int, tolerance: float
) -> Plan:
    """`sinkhorn` on checked input: on the CPU for one problem, elsewhere for all at once."""
    on_cpu = cost.device.type == "cpu"
    precision = torch.finfo(cost.dtype)
    scaled = (cost * (-1 / epsilon)).clamp_(-precision.max / 8, precision.max / 8)
    if not on_cpu:
        scaled = torch.where(valid[..., None, None], scaled, 0.0)
    # An empty row or column takes part with a mass that is lost in rounding, so that all scalings stay positive.
    a_, b_ = a.clamp_min(precision.eps**2), b.clamp_min(precision.eps**2)
    far = -math.log(precision.tiny) / 4  # while |ln v| is below this, what underflowed in the kernel is nothing in T
    f, g = torch.zeros_like(a), torch.zeros_like(b)  # what the kernel has absorbed, in units of ε
    kernel, f, g, _ = _absorb(scaled, f, g, a, b)
    kept, v = b_, b_
    before = torch.full(a.shape[:-1], math.inf, dtype=a.dtype, device=a.device)
    done = torch.zeros_like(before, dtype=torch.bool)
    least, idle, leapt = before, torch.zeros_like(before), done
    iterations = torch.zeros_like(before, dtype=torch.int64)
    buffer = a.new_empty(*a.shape[:-1], BLOCK + 1, b.shape[-1])
    for start in range(0, max_iterations, BLOCK):
        count = min(BLOCK, max_iterations - start)
        scalings = buffer[..., : count + 1, :]
        scalings[..., 0, :] = v
        u = _iterate(kernel, a_, b_, scalings)
        recent = scalings[..., -HISTORY - 2 :, :]
        residuals = (recent[..., 1:, :] / recent[..., :-1, :]).log()
        error = (b_ * residuals[..., -1, :].expm1().abs()).sum(-1)
        better = (error < torch.where(idle < PATIENCE, WORSE * before, before)) & ~done  # never true of NaN and ∞
        improved = better & (error < least)
        least, idle = torch.where(improved, error, least), torch.where(improved, 0.0, idle + 1.0)
        iterations = torch.where(done, iterations, start + count)
        kept = torch.where(better[..., None], scalings[..., -1, :], kept)
        done = done | (better & (error <= 0.9 * tolerance))
        if start + count == max_iterations or (on_cpu and bool(done)):
            break
        leap = better & ~done & ((error < PROGRESS * before) | ~leapt)
        before = torch.where(better, error, math.inf)
        if not on_cpu or not bool(better) or _strays(kept / b_, far):
            f, g = f + torch.where(better[..., None], u / a_, 1.0).log(), g + (kept / b_).log()
            kernel, f, g, shift = _absorb(scaled, f, g, a, b)
            kept = b_ * shift.clamp_min(-far).exp()
        v = kept * torch.where(leap[..., None], _extrapolate(residuals, b_), 0.0).exp()
        leapt = leap

    v = torch.where(b > 0, kept, 0.0)
    u = a / _product(kernel, v).clamp_min(precision.tiny)
    coupling = u[..., None] * kernel * v[..., None, :]
    row_error = (coupling.sum(-1) - a).abs().sum(-1)
    column_error = (coupling.sum(-2) - b).abs().sum(-1)
    error = torch.where(valid, torch.maximum(row_error, column_error), math.inf)
    return Plan(coupling, epsilon * (f + u.log()), epsilon * (g + v.log()), iterations, error, error <= tolerance)


def _absorb(scaled: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A kernel exp(−C/ε + f + g), f and g shifted so that every row and every column with a mass has the maximum 1;
    then f, g and the shift of g.

    Where the masses are not zero no product with the kernel can vanish, whatever the cost is.
    """
    logits = scaled + f[..., None]
    logits += g[..., None, :]
    some_empty = a.device.type != "cpu" or not bool(a.all()) or not bool(b.all())
    top = (logits.masked_fill((b == 0)[..., None, :], -math.inf) if some_empty else logits).amax(-1)
    logits -= top[..., None]
    shift = (logits.masked_fill((a == 0)[..., None], -math.inf) if some_empty else logits).amax(-2)
    logits -= shift[..., None, :]
    if some_empty:
        logits.clamp_(max=0.0)  # only entries of empty rows and columns are above
    return logits.exp_(), f - top, g - shift, shift


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """`[...,f,m]` times `[...,m]` in full float32: unlike `mv`, batched products may be done in TF32."""
    return torch.mv(matrix, vector) if matrix.ndim == 2 else (matrix * vector[..., None, :]).sum(-1)


def _iterate(kernel: Tensor, a: Tensor, b: Tensor, scalings: Tensor) -> Tensor:
    """Plain iterations u = a / K v, v = b / Kᵀ u from `scalings[...,0,:]`; fills the other rows with the v, and returns
    the last u.
    """
    v = scalings.unbind(-2)
    u = a
    for before, after in pairwise(v):
        u = a / _product(kernel, before)
        torch.div(b, _product(kernel.mT, u), out=after)
    return u


def _extrapolate(residuals: Tensor, weight: Tensor) -> Tensor:
    """The step from the last iterate to where its residual would vanish, were the iterations linear (reduced rank
    extrapolation).

    `residuals [...,k+1,m]` are the last steps of ln v. Combines them by least squares, weighted by `weight [...,m]`.
    """
    last, steps = residuals[..., -1:, :], residuals[..., 1:, :]
    if steps.shape[-2] < HISTORY:
        return torch.zeros_like(last[..., 0, :])
    changes = residuals.diff(dim=-2)
    sides = torch.cat([changes, last], dim=-2)
    # [...,k,k+1], not as a matrix product, which might be done in TF32
    system = ((changes * weight[..., None, :])[..., None, :] * sides[..., None, :, :]).sum(-1)
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    precision = torch.finfo(system.dtype)
    diagonal += 8 * precision.eps * diagonal.sum(-1, keepdim=True) + precision.tiny
    unit = torch.eye(HISTORY, dtype=system.dtype, device=system.device)
    for k in range(HISTORY):  # Gauss-Jordan: the library's solvers wait for the device
        row = system[..., k : k + 1, :] / system[..., k : k + 1, k : k + 1]
        system = system - (system[..., :, k : k + 1] - unit[:, k : k + 1]) * row
    step = -(system[..., -1:] * steps).sum(-2)
    longest = step.abs().amax(-1, keepdim=True)
    return (step * (LONGEST_STEP / longest.clamp_min(LONGEST_STEP))).nan_to_num(0.0, 0.0, 0.0)


def _strays(scaling: Tensor, far: float) -> bool:
    """Whether a logarithm is further than `far` from 0 (reads values: CPU only)."""
    low, high = scaling.aminmax()
    return float(low) < math.exp(-far) or float(high) > math.exp(far)
