"""The solver for CUDA: a whole problem in one kernel, its matrix in the registers of one block of threads.

`batched` would need thousands of launches for what takes less time than launching them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from otmix.transport.method import BLOCK, HISTORY, LONGEST_LEAP, PATIENCE, far

LARGEST = 256 * 256
"""Entries of a matrix, its sides rounded up to powers of two, that the registers hold (the larger spill)."""

assert (BLOCK, HISTORY) == (6, 4), "the kernel is written out for these"


def fits(cost: Tensor) -> bool:
    """Whether these problems `[...,f,m]` are for this solver."""
    return cost.dtype == torch.float32 and math.prod(map(triton.next_power_of_2, cost.shape[-2:])) <= LARGEST


def solve(
    cost: Tensor, a: Tensor, b: Tensor, valid: Tensor, epsilon: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, ...]:
    """The parts of a `Plan` for problems `[...,f,m]`; those that are not `valid` have an infinite error. A problem ends
    with the first block that has converged, and nothing waits for it.
    """
    problems, (f, m) = cost.shape[:-2], cost.shape[-2:]
    cost, a, b = cost.contiguous(), a.contiguous(), b.contiguous()
    coupling, potential_f, potential_g = torch.empty_like(cost), torch.empty_like(a), torch.empty_like(b)
    iterations = torch.empty(problems, dtype=torch.int64, device=cost.device)
    error = torch.empty(problems, dtype=cost.dtype, device=cost.device)
    rows, columns = (max(16, triton.next_power_of_2(n)) for n in (f, m))
    precision = torch.finfo(cost.dtype)
    _solve[(max(1, math.prod(problems)),)](
        cost,
        a,
        b,
        coupling,
        potential_f,
        potential_g,
        iterations,
        error,
        f,
        m,
        epsilon,
        tolerance,
        max_iterations,
        FAR=far(float(precision.tiny)),
        EPS=float(precision.eps),
        TINY=float(precision.tiny),
        HUGE=float(precision.max) / 8,
        LEAP=LONGEST_LEAP,
        PATIENT=PATIENCE,
        F=rows,
        M=columns,
        num_warps=min(32, max(4, rows * columns // 1024)),
    )
    error = torch.where(valid, error, math.inf)
    return coupling, potential_f, potential_g, iterations, error, error <= tolerance


@triton.jit
def _absorb(cost, f, g, a_there, b_there, inside, epsilon, HUGE: tl.constexpr):
    """As in `batched`: the kernel with f and g shifted so that each row and column with a mass has the maximum 1."""
    logits = tl.minimum(tl.maximum(-cost / epsilon, -HUGE), HUGE) + f[:, None] + g[None, :]
    top = tl.max(tl.where(b_there[None, :], logits, -float("inf")), 1)
    logits -= top[:, None]
    shift = tl.max(tl.where(a_there[:, None], logits, -float("inf")), 0)
    logits -= shift[None, :]
    return tl.where(inside, tl.exp(tl.minimum(logits, 0.0)), 0.0), f - top, g - shift, shift


@triton.jit
def _leap(s1, s2, s3, s4, s5, weight, EPS: tl.constexpr, TINY: tl.constexpr, LEAP: tl.constexpr):
    """As in `batched`: reduced rank extrapolation of the last five steps of ln v."""
    c1, c2, c3, c4 = s2 - s1, s3 - s2, s4 - s3, s5 - s4
    w1, w2, w3, w4 = c1 * weight, c2 * weight, c3 * weight, c4 * weight
    damp: tl.constexpr = 1.0 + 8.0 * EPS
    # the normal equations, and their triangle
    g11 = tl.sum(w1 * c1, 0) * damp + TINY
    g12, g13, g14, r1 = tl.sum(w1 * c2, 0), tl.sum(w1 * c3, 0), tl.sum(w1 * c4, 0), tl.sum(w1 * s5, 0)
    q12, q13, q14 = g12 / g11, g13 / g11, g14 / g11
    g22 = tl.sum(w2 * c2, 0) * damp + TINY - q12 * g12
    g23, g24 = tl.sum(w2 * c3, 0) - q12 * g13, tl.sum(w2 * c4, 0) - q12 * g14
    r2 = tl.sum(w2 * s5, 0) - q12 * r1
    q23, q24 = g23 / g22, g24 / g22
    g33 = tl.sum(w3 * c3, 0) * damp + TINY - q13 * g13 - q23 * g23
    g34 = tl.sum(w3 * c4, 0) - q13 * g14 - q23 * g24
    r3 = tl.sum(w3 * s5, 0) - q13 * r1 - q23 * r2
    q34 = g34 / g33
    g44 = tl.sum(w4 * c4, 0) * damp + TINY - q14 * g14 - q24 * g24 - q34 * g34
    r4 = tl.sum(w4 * s5, 0) - q14 * r1 - q24 * r2 - q34 * r3
    x4 = r4 / g44
    x3 = (r3 - g34 * x4) / g33
    x2 = (r2 - g23 * x3 - g24 * x4) / g22
    x1 = (r1 - g12 * x2 - g13 * x3 - g14 * x4) / g11
    leap = -(x1 * s2 + x2 * s3 + x3 * s4 + x4 * s5)
    # a mode that still speeds up seems to come from where it goes: the dual objective, which rises, tells
    leap = tl.where(tl.sum(leap * s5 * weight, 0) < 0.0, -leap, leap)
    excess = tl.max(tl.abs(leap), 0) / LEAP
    sound = excess < float("inf")
    return tl.where(sound, leap / tl.maximum(tl.where(sound, excess, 1.0), 1.0), 0.0)


@triton.jit
def _iterate(kernel, a, b, v, there_f, there_m):
    """u = a / K v, v = b / Kᵀ u; what only fills up the matrix keeps its mass."""
    u = a / tl.where(there_f, tl.sum(kernel * v[None, :], 1), 1.0)
    return u, b / tl.where(there_m, tl.sum(kernel * u[:, None], 0), 1.0)


@triton.jit
def _solve(
    cost_at,
    a_at,
    b_at,
    coupling_at,
    f_at,
    g_at,
    iterations_at,
    error_at,
    f_size,
    m_size,
    epsilon,
    tolerance,
    max_iterations,
    FAR: tl.constexpr,
    EPS: tl.constexpr,
    TINY: tl.constexpr,
    HUGE: tl.constexpr,
    LEAP: tl.constexpr,
    PATIENT: tl.constexpr,
    F: tl.constexpr,
    M: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, F), tl.arange(0, M)
    there_f, there_m = i < f_size, j < m_size
    inside = there_f[:, None] & there_m[None, :]
    places = cost_at + problem * f_size * m_size + i[:, None] * m_size + j[None, :]
    a = tl.load(a_at + problem * f_size + i, mask=there_f, other=0.0)
    b = tl.load(b_at + problem * m_size + j, mask=there_m, other=0.0)
    a_there, b_there = a > 0.0, b > 0.0
    # an empty row or column takes part with a mass that is lost in rounding, so that all scalings are positive
    a_, b_ = tl.maximum(a, EPS * EPS), tl.maximum(b, EPS * EPS)
    cost = tl.load(places, mask=inside, other=0.0)
    kernel, f, g, shift = _absorb(cost, a * 0.0, b * 0.0, a_there, b_there, inside, epsilon, HUGE)
    v, kept = b_, b_
    iterations = 0
    idle = 0
    rest = 0
    penalty = 0
    before = float("inf")
    least = float("inf")
    going = True
    while going:
        u, v1 = _iterate(kernel, a_, b_, v, there_f, there_m)
        last, step = v1, tl.log(v1 / v)
        iterations += 1
        s1, s2, s3, s4, s5 = step, step, step, step, step
        for k in tl.static_range(1, 6):
            if iterations < max_iterations:
                u, following = _iterate(kernel, a_, b_, last, there_f, there_m)
                step = tl.log(following / last)
                last = following
                iterations += 1
            if k == 1:
                s1 = step
            elif k == 2:
                s2 = step
            elif k == 3:
                s3 = step
            elif k == 4:
                s4 = step
            else:
                s5 = step
        error = tl.sum(b_ * tl.abs(tl.exp(step) - 1.0), 0)
        # a block that has overflowed is undone, and one that is worse when patience is over
        sound = (error < float("inf")) & ((idle < PATIENT) | (error < before))
        improved = sound & (error < least)
        before = tl.where(sound, error, float("inf"))
        least = tl.where(improved, error, least)
        idle = tl.where(improved, 0, idle + 1)
        judged = rest == 0  # a leap, or the start
        penalty = tl.where(judged, tl.where(improved, 0, 2 * penalty + 1), penalty)
        rest = tl.where(judged, penalty, rest - 1)
        kept = tl.where(sound, last, kept)
        done = sound & (error <= 0.9 * tolerance)
        going = (done == 0) & (iterations < max_iterations)
        if going:
            f += tl.log(tl.where(sound, u / a_, 1.0))
            g += tl.log(kept / b_)
            cost = tl.load(places, mask=inside, other=0.0)
            kernel, f, g, shift = _absorb(cost, f, g, a_there, b_there, inside, epsilon, HUGE)
            kept = b_ * tl.exp(tl.maximum(shift, -FAR))
            leap = _leap(s1, s2, s3, s4, s5, b_, EPS, TINY, LEAP)
            v = kept * tl.exp(tl.where(sound & (rest == 0), leap, 0.0))

    v = tl.where(b_there, kept, 0.0)
    u = tl.where(a_there, a / tl.maximum(tl.sum(kernel * v[None, :], 1), TINY), 0.0)
    coupling = kernel * u[:, None] * v[None, :]
    row_error = tl.sum(tl.abs(tl.sum(coupling, 1) - a), 0)
    column_error = tl.sum(tl.abs(tl.sum(coupling, 0) - b), 0)
    tl.store(coupling_at + problem * f_size * m_size + i[:, None] * m_size + j[None, :], coupling, mask=inside)
    tl.store(f_at + problem * f_size + i, epsilon * (f + tl.log(u)), mask=there_f)
    tl.store(g_at + problem * m_size + j, epsilon * (g + tl.log(v)), mask=there_m)
    tl.store(iterations_at + problem, iterations)
    tl.store(error_at + problem, tl.maximum(row_error, column_error))
