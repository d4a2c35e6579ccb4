"""Entropic optimal transport: a cost matrix becomes a plan (eq. 4 of Gao et al. 2023)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otmix.types import Plan

BLOCK = 6
"""Iterations between two looks at the error, each followed by an extrapolation."""
HISTORY = 4
"""How many differences of steps an extrapolation combines."""
LONGEST_LEAP = 16.0
"""An extrapolation changes the logarithm of no scaling by more than this."""
PATIENCE = 6
"""After as many blocks without a new least error a block may not be worse than the one before, else it is undone: leaps
can go round in circles for ever, plain iterations cannot."""

Array = Any
"""What `_solve` and the functions below it work on. They are written once for two libraries that name their functions
alike, given as `xp`: NumPy on the CPU, where it takes half the time of PyTorch for matrices of this size, and PyTorch
on other devices.
"""


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
    device of the computation and no gradient.

    The coupling's rows sum to a up to rounding, also when the iterations run out, so every foreground with a mass has a
    partner. `marginal_error` is measured on the returned coupling, and `converged` says whether it is at most
    `tolerance`. Its floor in float32 is about 1e-6 on most and 3e-5 on nearly separable problems, in float64 1e-14. At
    1e-3 the largest entry of each row is settled, at 1e-4 the objective is right to about 1e-4 of its value; float32
    also rounds C, which changes T by a factor of 1 ± 6e-8 · max|C|/ε. A potential is −∞ where the mass is zero.

    On the CPU a problem ends with the first block of `BLOCK` iterations that has converged. Other devices run all
    `max_iterations`, the converged problems unchanged, so that nothing waits for the device and a CUDA graph can
    capture the call.

    Method: Sinkhorn's scaling of a kernel that absorbs the scalings when they grow (Schmitzer 2019, SIAM J. Sci.
    Comput. 41, algorithm 2), so neither leaves the range of the floats. After each block ln v is extrapolated from its
    last steps (reduced rank extrapolation, Sidi 2017), which saves most of the iterations where they would converge
    slowly.

    Raises ValueError for a cost that is not floating point or lacks entries, shapes that do not fit, and an epsilon,
    iteration count or tolerance out of range; on the CPU also for a cost that is not finite and for masses that are
    negative or do not sum to 1 within 1e-3 (they are then divided by their sum). Elsewhere, looking at values would
    mean to wait: there such a problem has the error ∞, is not converged, and its coupling, finite all the same, is that
    of C = 0 or of a uniform mass.
    """
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
            return Plan(*_solve(torch, cost, a, b, valid, epsilon, max_iterations, tolerance))
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(cost)):
        raise ValueError("the cost must be finite; it has entries that are NaN or infinite")
    each = [x.numpy().reshape(-1, *x.shape[len(problems) :]) for x in (cost, a, b)]
    with np.errstate(all="ignore"):  # ln 0 of an empty mass; overflows are looked for
        plans = [_solve(np, c, x, y, np.True_, epsilon, max_iterations, tolerance) for c, x, y in zip(*each)]
    parts = (np.stack(part) if len(part) > 1 else np.asarray(part[0])[None] for part in zip(*plans))
    return Plan(*(torch.from_numpy(part.reshape(problems + part.shape[1:])) for part in parts))


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


def _solve(
    xp: Any, cost: Array, a: Array, b: Array, valid: Array, epsilon: float, max_iterations: int, tolerance: float
) -> tuple[Array, ...]:
    """The parts of a `Plan`. NumPy: for one problem, until converged. PyTorch: for all at once, reading no value."""
    precision = xp.finfo(cost.dtype)
    eps, tiny = float(precision.eps), float(precision.tiny)
    # An empty row or column takes part with a mass that is lost in rounding, so that all scalings are positive.
    a_, b_ = xp.clip(a, eps**2, None), xp.clip(b, eps**2, None)
    far = -math.log(tiny) / 4  # while |ln v| is below this, what underflowed in the kernel is nothing in the coupling
    f, g = xp.zeros_like(a), xp.zeros_like(b)  # absorbed potentials, in units of ε
    kernel, f, g, _ = _absorb(xp, cost, epsilon, f, g, a, b)
    kept = v = b_
    scalings = xp.concatenate([b_[..., None, :]] * (BLOCK + 1), -2)
    done = valid & False
    iterations = idle = done * 0
    before = least = xp.where(done, 0.0, math.inf)
    for start in range(0, max_iterations, BLOCK):
        end = min(start + BLOCK, max_iterations)
        block = scalings[..., : end - start + 1, :]
        block[..., 0, :] = v
        u = _iterate(xp, kernel, a_, b_, block)
        recent = block[..., -HISTORY - 2 :, :]
        steps = xp.log(recent[..., 1:, :] / recent[..., :-1, :])
        error = (b_ * xp.abs(xp.expm1(steps[..., -1, :]))).sum(-1)
        # a block that has overflowed is undone, and one that is worse when patience is over
        sound = xp.isfinite(error) & ~done & ((idle < PATIENCE) | (error < before))
        improved = sound & (error < least)
        before, least = xp.where(sound, error, math.inf), xp.where(improved, error, least)
        idle = xp.where(improved, 0, idle + 1)
        iterations = xp.where(done, iterations, end)
        kept = xp.where(sound[..., None], block[..., -1, :], kept)
        done = done | (sound & (error <= 0.9 * tolerance))
        if end == max_iterations or (xp is np and done):
            break
        if xp is not np or not sound or _strays(kept / b_, far):
            f, g = f + xp.log(xp.where(sound[..., None], u / a_, 1.0)), g + xp.log(kept / b_)
            kernel, f, g, shift = _absorb(xp, cost, epsilon, f, g, a, b)
            kept = b_ * xp.exp(xp.clip(shift, -far, None))
        v = kept * xp.exp(xp.where((sound & ~done)[..., None], _leap(xp, steps, b_), 0.0))

    v = xp.where(b > 0, kept, 0.0)
    u = a / xp.clip(_product(xp, kernel, v), tiny, None)
    coupling = kernel
    coupling *= u[..., None]
    coupling *= v[..., None, :]
    row_error, column_error = (xp.abs(coupling.sum(axis) - mass).sum(-1) for axis, mass in ((-1, a), (-2, b)))
    error = xp.where(valid, xp.maximum(row_error, column_error), math.inf)
    return coupling, epsilon * (f + xp.log(u)), epsilon * (g + xp.log(v)), iterations, error, error <= tolerance


def _absorb(
    xp: Any, cost: Array, epsilon: float, f: Array, g: Array, a: Array, b: Array
) -> tuple[Array, Array, Array, Array]:
    """The kernel exp(−C/ε + f + g) with f and g shifted so that each row and column that has a mass has the maximum 1.

    Then no product with the kernel vanishes, whatever the cost. Returns also the shifted f and g, and by how much g
    was.
    """
    some_empty = xp is not np or not (a.all() and b.all())
    limit = float(xp.finfo(cost.dtype).max) / 8
    logits = cost * (-1 / epsilon)
    logits = xp.clip(logits, -limit, limit, out=logits)
    logits += f[..., None]
    logits += g[..., None, :]
    top = xp.amax(xp.where((b == 0)[..., None, :], -math.inf, logits) if some_empty else logits, -1)
    logits -= top[..., None]
    shift = xp.amax(xp.where((a == 0)[..., None], -math.inf, logits) if some_empty else logits, -2)
    logits -= shift[..., None, :]
    if some_empty:
        logits = xp.clip(logits, None, 0.0)  # only in empty rows and columns is anything above
    return xp.exp(logits, out=logits), f - top, g - shift, shift


def _product(xp: Any, matrix: Array, vector: Array) -> Array:
    """`[...,f,m]` times `[...,m]`. PyTorch may multiply batches in TF32, which has 3 digits; this does not."""
    return xp.matmul(matrix, vector) if matrix.ndim == 2 else (matrix * vector[..., None, :]).sum(-1)


def _iterate(xp: Any, kernel: Array, a: Array, b: Array, block: Array) -> Array:
    """Iterations u = a / K v, v = b / Kᵀ u from `block[...,0,:]`, the other rows of which become the v. Returns the
    last u.
    """
    transposed = kernel.swapaxes(-1, -2)
    u = a
    for i in range(block.shape[-2] - 1):
        u = a / _product(xp, kernel, block[..., i, :])
        xp.divide(b, _product(xp, transposed, u), out=block[..., i + 1, :])
    return u


def _leap(xp: Any, steps: Array, weight: Array) -> Array:
    """By how much to change ln v, given its last steps `[...,k+1,m]`, to come to where a linear iteration would rest.

    Reduced rank extrapolation: the combination of the last k positions whose step is the smallest, squares weighted by
    `weight [...,m]`.
    """
    last, steps = steps[..., -1:, :], steps[..., -HISTORY - 1 :, :]
    changes = steps[..., 1:, :] - steps[..., :-1, :]
    weighted = changes * weight[..., None, :]
    sides = xp.concatenate([changes, last], -2)
    # the normal equations [...,k,k+1]
    system = weighted @ sides.T if xp is np else (weighted[..., None, :] * sides[..., None, :, :]).sum(-1)
    precision = xp.finfo(system.dtype)
    damping = (weighted * changes).sum(-1)[..., None] * (8 * float(precision.eps)) + float(precision.tiny)
    for i in range(HISTORY):  # Gauss-Jordan, as PyTorch's solvers may wait for the device
        row = system[..., i : i + 1, :] / (system[..., i : i + 1, i : i + 1] + damping[..., i : i + 1, :])
        system = system - system[..., i : i + 1] * row
        system[..., i : i + 1, :] = row
    leap = -(system[..., HISTORY:] * steps[..., 1:, :]).sum(-2)
    # A mode that still speeds up seems to come from where it goes: the dual objective, which rises along the steps,
    # tells.
    rises = (leap * last[..., 0, :] * weight).sum(-1)[..., None] >= 0
    leap = xp.where(rises, leap, -leap)
    excess = xp.amax(xp.abs(leap), -1)[..., None] / LONGEST_LEAP
    return xp.where(xp.isfinite(excess), leap / xp.clip(excess, 1.0, None), 0.0)


def _strays(scaling: Array, far: float) -> bool:
    """Whether a logarithm is further than `far` from 0."""
    return bool(scaling.min() < math.exp(-far) or scaling.max() > math.exp(far))
