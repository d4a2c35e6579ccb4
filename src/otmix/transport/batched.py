"""The solver for other devices: all problems at once in PyTorch, reading no value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otmix.transport.method import BLOCK, HISTORY, LONGEST_LEAP, PATIENCE, far


def solve(
    cost: Tensor, a: Tensor, b: Tensor, valid: Tensor, epsilon: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, ...]:
    """The parts of a `Plan` for problems `[...,f,m]`; those that are not `valid` have an infinite error."""
    precision = torch.finfo(cost.dtype)
    eps, tiny = float(precision.eps), float(precision.tiny)
    # An empty row or column takes part with a mass that is lost in rounding, so that all scalings are positive.
    a_, b_ = torch.clip(a, eps**2, None), torch.clip(b, eps**2, None)
    limit = far(tiny)
    f, g = torch.zeros_like(a), torch.zeros_like(b)  # absorbed potentials, in units of ε
    kernel, f, g, _ = _absorb(cost, epsilon, f, g, a, b)
    kept = v = b_
    scalings = torch.cat([b_[..., None, :]] * (BLOCK + 1), -2)
    done = valid & False
    iterations = idle = rest = penalty = done * 0
    before = least = torch.where(done, 0.0, math.inf)
    for start in range(0, max_iterations, BLOCK):
        end = min(start + BLOCK, max_iterations)
        block = scalings[..., : end - start + 1, :]
        block[..., 0, :] = v
        u = _iterate(kernel, a_, b_, block)
        recent = block[..., -HISTORY - 2 :, :]
        steps = torch.log(recent[..., 1:, :] / recent[..., :-1, :])
        error = (b_ * torch.abs(torch.expm1(steps[..., -1, :]))).sum(-1)
        # a block that has overflowed is undone, and one that is worse when patience is over
        sound = torch.isfinite(error) & ~done & ((idle < PATIENCE) | (error < before))
        improved = sound & (error < least)
        before, least = torch.where(sound, error, math.inf), torch.where(improved, error, least)
        idle = torch.where(improved, 0, idle + 1)
        judged = rest == 0  # a leap, or the start
        penalty = torch.where(judged, torch.where(improved, 0, 2 * penalty + 1), penalty)
        rest = torch.where(judged, penalty, rest - 1)
        iterations = torch.where(done, iterations, end)
        kept = torch.where(sound[..., None], block[..., -1, :], kept)
        done = done | (sound & (error <= 0.9 * tolerance))
        if end == max_iterations:
            break
        f, g = f + torch.log(torch.where(sound[..., None], u / a_, 1.0)), g + torch.log(kept / b_)
        kernel, f, g, shift = _absorb(cost, epsilon, f, g, a, b)
        kept = b_ * torch.exp(torch.clip(shift, -limit, None))
        v = kept * torch.exp(torch.where((sound & ~done & (rest == 0))[..., None], _leap(steps, b_), 0.0))

    v = torch.where(b > 0, kept, 0.0)
    u = a / torch.clip(_product(kernel, v), tiny, None)
    coupling = kernel
    coupling *= u[..., None]
    coupling *= v[..., None, :]
    row_error, column_error = (torch.abs(coupling.sum(axis) - mass).sum(-1) for axis, mass in ((-1, a), (-2, b)))
    error = torch.where(valid, torch.maximum(row_error, column_error), math.inf)
    return coupling, epsilon * (f + torch.log(u)), epsilon * (g + torch.log(v)), iterations, error, error <= tolerance


def _absorb(
    cost: Tensor, epsilon: float, f: Tensor, g: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel exp(−C/ε + f + g) with f and g shifted so that each row and column that has a mass has the maximum 1.

    Then no product with the kernel vanishes, whatever the cost. Returns also the shifted f and g, and by how much g
    was.
    """
    limit = float(torch.finfo(cost.dtype).max) / 8
    logits = torch.clip(cost * (-1 / epsilon), -limit, limit) + f[..., None] + g[..., None, :]
    top = torch.amax(torch.where((b == 0)[..., None, :], -math.inf, logits), -1)
    logits -= top[..., None]
    shift = torch.amax(torch.where((a == 0)[..., None], -math.inf, logits), -2)
    logits -= shift[..., None, :]
    # only in empty rows and columns is anything above 0
    return torch.exp(torch.clip(logits, None, 0.0)), f - top, g - shift, shift


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """`[...,f,m]` times `[...,m]`. PyTorch may multiply batches in TF32, which has 3 digits; this does not."""
    return matrix @ vector if matrix.ndim == 2 else (matrix * vector[..., None, :]).sum(-1)


def _iterate(kernel: Tensor, a: Tensor, b: Tensor, block: Tensor) -> Tensor:
    """Iterations u = a / K v, v = b / Kᵀ u from `block[...,0,:]`, the other rows of which become the v. Returns the
    last u.
    """
    transposed = kernel.swapaxes(-1, -2)
    u = a
    for i in range(block.shape[-2] - 1):
        u = a / _product(kernel, block[..., i, :])
        torch.divide(b, _product(transposed, u), out=block[..., i + 1, :])
    return u


def _leap(steps: Tensor, weight: Tensor) -> Tensor:
    """By how much to change ln v, given its last steps `[...,k+1,m]`, to come to where a linear iteration would rest.

    Reduced rank extrapolation: the combination of the last k positions whose step is the smallest, squares weighted by
    `weight [...,m]`.
    """
    last, steps = steps[..., -1:, :], steps[..., -HISTORY - 1 :, :]
    changes = steps[..., 1:, :] - steps[..., :-1, :]
    weighted = changes * weight[..., None, :]
    sides = torch.cat([changes, last], -2)
    # the normal equations [...,k,k+1]
    system = (weighted[..., None, :] * sides[..., None, :, :]).sum(-1)
    precision = torch.finfo(system.dtype)
    damping = (weighted * changes).sum(-1)[..., None] * (8 * float(precision.eps)) + float(precision.tiny)
    for i in range(HISTORY):  # Gauss-Jordan, as PyTorch's solvers may wait for the device
        row = system[..., i : i + 1, :] / (system[..., i : i + 1, i : i + 1] + damping[..., i : i + 1, :])
        system = system - system[..., i : i + 1] * row
        system[..., i : i + 1, :] = row
    leap = -(system[..., HISTORY:] * steps[..., 1:, :]).sum(-2)
    # A mode that still speeds up seems to come from where it goes: the dual objective, which rises along the steps,
    # tells.
    rises = (leap * last[..., 0, :] * weight).sum(-1)[..., None] >= 0
    leap = torch.where(rises, leap, -leap)
    excess = torch.amax(torch.abs(leap), -1)[..., None] / LONGEST_LEAP
    return torch.where(torch.isfinite(excess), leap / torch.clip(excess, 1.0, None), 0.0)
