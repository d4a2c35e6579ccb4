"""What seeds allow to be said about two methods: paired differences, and a test where there are enough of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SEEDS_FOR_A_TEST = 5
ROUNDING = 1e-9
"""Shares of images that are equal may differ by this, as floats: no share of a real test set is so small."""


@dataclass(frozen=True)
class PairedDifference:
    """`method` minus `against`, seed by seed, in one measure (a share in [0, 1]).

    `std` is the sample standard deviation of the differences. `p_value` is that of a two-sided paired t-test; None with
    fewer than five seeds, and where all differences are equal.
    """

    method: str
    against: str
    measure: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    std: float
    better: int
    p_value: float | None

    def in_words(self, title: str, against: str, measure: str, comparisons: int = 1) -> str:
        """One sentence, in percentage points. `comparisons`: how many such sentences there are (p is not corrected)."""
        n = len(self.values)
        text = (
            f"{title} against {against}, {measure}: {_points(self.mean)} points on average over {n} paired seeds "
            f"(sample std of the differences {100 * self.std:.2f}); {self.better} of {n} seeds better"
        )
        if self.p_value is None:
            return text + "."
        caveat = f", not corrected for {comparisons} comparisons" if comparisons > 1 else ""
        return f"{text}; paired t-test, two-sided: p = {self.p_value:.2g}{caveat}."


def paired_difference(
    method: str,
    values: Mapping[int, float],
    against: str,
    reference: Mapping[int, float],
    measure: str,
    lower_is_better: bool = True,
) -> PairedDifference | None:
    """Compare two methods on the seeds (keys) that both have; None with fewer than two, from which nothing follows."""
    seeds = tuple(sorted(values.keys() & reference.keys()))
    if len(seeds) < 2:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    better = sum((step < -ROUNDING) if lower_is_better else (step > ROUNDING) for step in differences)
    mean, std = statistics.fmean(differences), statistics.stdev(differences)
    p_value = _p_value(differences) if len(seeds) >= SEEDS_FOR_A_TEST and std > ROUNDING else None
    return PairedDifference(method, against, measure, seeds, tuple(differences), mean, std, better, p_value)


def _p_value(differences: Sequence[float]) -> float:
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)  # of differences: the paired t-test


def _points(value: float) -> str:
    text = f"{100 * value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")
