"""Seeds to a mean and a spread, numbers to text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MISSING = "–"


def seed_values(values: Any) -> list[float] | None:
    """One value per seed, from a list or a single number; None where not every seed has one (an absent shot group)."""
    if values is None:
        return None
    each = [values] if isinstance(values, int | float) else list(values)
    if not each or any(value is None or not math.isfinite(value) for value in each):
        return None
    return [float(value) for value in each]


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1); None for the latter of a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def percent(value: float | None, decimals: int = 1, unit: str = "") -> str:
    """A share in [0, 1] as per cent: 0.2734 → "27.3"; – for None and NaN, never 0."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.{decimals}f}{unit}"


def points(difference: float | None, decimals: int = 1) -> str:
    """A difference of shares in percentage points with its sign: 0.0213 → "+2.1"; – for None and NaN."""
    if difference is None or not math.isfinite(difference):
        return MISSING
    text = f"{100 * difference:+.{decimals}f}"
    return f"{0:.{decimals}f}" if float(text) == 0 else text.replace("-", "−")


def mean_known(values: Sequence[float | None]) -> float | None:
    """Mean of those that were measured; None where none was."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def difference(new: float | None, old: float | None) -> float | None:
    """new − old; None where one of them was not measured."""
    return None if new is None or old is None else new - old
