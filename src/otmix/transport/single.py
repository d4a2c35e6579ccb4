"""The solver for the CPU: one problem in NumPy, until it has converged."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from otmix.transport.method import BLOCK, HISTORY, LONGEST_LEAP, PATIENCE, far

Floats = NDArray[np.floating]


def solve(
    cost: Floats, a: Floats, b: Floats, largest: float, epsilon: float, max_iterations: int, tolerance: float
) -> tuple[Floats, Floats, Floats, int, float, bool]:
    """The parts of a `Plan` for one problem `[f,m]`, whose costs are of size `largest` at most."""
    precision = np.finfo(cost.dtype)
    eps, tiny = float(precision.eps), float(precision.tiny)
    everywhere = bool(a.all() and b.all())
    # An empty row or column takes part with a mass that is lost in rounding, so that all scalings are positive.
    a_, b_ = (a, b) if everywhere else (np.maximum(a, eps**2), np.maximum(b, eps**2))
    masses = None if everywhere else (a, b)
    # absorbed potentials, in units of ε
    kernel, f, g, _ = _absorb(cost, epsilon, None, None, masses, largest, np.empty_like(cost))
    limit = far(tiny)
    block = np.empty((BLOCK + 1, len(b)), cost.dtype)
    u = np.empty_like(a)
    kept = v = b_
    iterations = idle = rest = penalty = 0
    before = least = math.inf
    for start in range(0, max_iterations, BLOCK):
        size = min(BLOCK, max_iterations - start)
        block[0] = v
        _iterate(kernel, a_, b_, u, block[: size + 1])
        iterations += size
        recent = block[max(0, size - HISTORY - 1) : size + 1]
        steps = np.log(recent[1:] / recent[:-1])
        error = float(np.dot(b_, np.abs(np.expm1(steps[-1]))))
        # a block that has overflowed is undone, and one that is worse when patience is over
        sound = math.isfinite(error) and (idle < PATIENCE or error < before)
        improved = sound and error < least
        before, least = error if sound else math.inf, error if improved else least
        idle = 0 if improved else idle + 1
        if rest:
            rest -= 1
        else:  # a leap has been judged
            penalty = 0 if improved else 2 * penalty + 1
            rest = penalty
        if sound:
            kept = block[size].copy()
            if error <= 0.9 * tolerance:
                break
        if iterations == max_iterations:
            break
        if not sound or _strays(kept / b_, limit):
            f, g = f + np.log(u / a_) if sound else f, g + np.log(kept / b_)
            kernel, f, g, shift = _absorb(cost, epsilon, f, g, masses, largest, kernel)
            kept = b_ * np.exp(np.maximum(shift, -limit))
        v = kept * np.exp(_leap(steps, b_)) if sound and not rest else kept

    if not everywhere:
        kept = np.where(b > 0, kept, 0.0).astype(cost.dtype)
    u = a / np.maximum(np.dot(kernel, kept), tiny)
    kernel *= u[:, None]
    kernel *= kept
    row_error = float(np.abs(np.dot(kernel, np.ones_like(b)) - a).sum())
    column_error = float(np.abs(np.dot(np.ones_like(a), kernel) - b).sum())
    error = max(row_error, column_error)
    return kernel, epsilon * (f + np.log(u)), epsilon * (g + np.log(kept)), iterations, error, error <= tolerance


def _absorb(
    cost: Floats,
    epsilon: float,
    f: Floats | None,
    g: Floats | None,
    masses: tuple[Floats, Floats] | None,
    largest: float,
    out: Floats,
) -> tuple[Floats, Floats, Floats, Floats]:
    """The kernel exp(−C/ε + f + g) with f and g shifted so that each row and column that has a mass has the maximum 1.

    Then no product with the kernel vanishes, whatever the cost. `f` and `g` are 0 where they are None; `masses` is
    given where some are 0; the kernel is written into `out`. Returns also the shifted f and g, and by how much g was.
    """
    logits = np.multiply(cost, cost.dtype.type(-1 / epsilon), out=out)
    limit = float(np.finfo(cost.dtype).max) / 8
    if largest / epsilon > limit:
        np.clip(logits, -limit, limit, out=logits)
    if f is not None:
        logits += f[:, None]
    if g is not None:
        logits += g
    seen = logits if masses is None else np.where(masses[1] == 0, -math.inf, logits)
    top = seen[np.arange(len(seen)), seen.argmax(1)]  # five times as fast as max(1)
    logits -= top[:, None]
    seen = logits if masses is None else np.where((masses[0] == 0)[:, None], -math.inf, logits)
    shift = seen.max(0)
    logits -= shift
    if masses is not None:
        np.minimum(logits, 0.0, out=logits)  # only in empty rows and columns is anything above
    return np.exp(logits, out=logits), -top if f is None else f - top, -shift if g is None else g - shift, shift


def _iterate(kernel: Floats, a: Floats, b: Floats, u: Floats, block: Floats) -> None:
    """Iterations u = a / K v, v = b / Kᵀ u from `block[0]`; the other rows become the v, and `u` the last u."""
    transposed = kernel.T
    for i in range(len(block) - 1):
        np.divide(a, np.dot(kernel, block[i], out=u), out=u)
        following = block[i + 1]
        np.divide(b, np.dot(transposed, u, out=following), out=following)


def _leap(steps: Floats, weight: Floats) -> Floats:
    """By how much to change ln v, given its last steps `[k+1,m]`, to come to where a linear iteration would rest.

    Reduced rank extrapolation: the combination of the last k positions whose step is the smallest, squares weighted by
    `weight [m]`.
    """
    last = steps[-1]
    changes = steps[1:] - steps[:-1]
    weighted = changes * weight
    system = np.dot(weighted, changes.T)  # the normal equations
    precision = np.finfo(system.dtype)
    diagonal = system.diagonal()
    system[np.diag_indices_from(system)] = diagonal * (1 + 8 * precision.eps) + precision.tiny
    leap: Floats
    try:
        leap = -np.dot(np.linalg.solve(system, np.dot(weighted, last)), steps[1:])
    except np.linalg.LinAlgError:
        return np.zeros_like(last)
    # A mode that still speeds up seems to come from where it goes: the dual objective, which rises along the steps,
    # tells.
    if np.dot(leap * last, weight) < 0:
        leap = -leap
    excess = float(np.abs(leap).max()) / LONGEST_LEAP
    if not math.isfinite(excess):
        return np.zeros_like(last)
    return leap / excess if excess > 1 else leap


def _strays(scaling: Floats, limit: float) -> bool:
    """Whether a logarithm is further than `limit` from 0."""
    return bool(scaling.min() < math.exp(-limit) or scaling.max() > math.exp(limit))
