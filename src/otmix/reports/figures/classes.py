"""Accuracy of each class beside its number of training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from otmix.reports.figures.style import (
    BLUE,
    GREY,
    INK,
    LIGHT,
    ORANGE,
    as_array,
    finish,
    log_scale,
    name_ticks,
    new_figure,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BARS = 50


@dataclass(frozen=True, eq=False)
class _Run:
    label: str
    percents: NDArray[np.float64]
    colour: str


def per_class_bars(
    class_names: Sequence[str],
    counts: Sequence[int] | Any,
    accuracy: Sequence[float | None],
    other: Sequence[float | None] | None = None,
    *,
    labels: tuple[str, str] = ("this run", "baseline"),
) -> Figure:
    """Training images of each class above (logarithmic), its accuracy below, from the largest class to the smallest.

    Above 50 classes, moving averages over the classes in that order take the place of the bars.

    Args:
        counts: training images per class `[K]`.
        accuracy: `[K]` in [0, 1]; None where none was measured.
        other: accuracies of another run on the same classes, drawn beside.
        labels: names of this run and of the other.
    """
    sizes = as_array(counts)
    order = np.argsort(-sizes, kind="stable")
    runs = [_Run(labels[0], _percents(accuracy)[order], BLUE)]
    if other is not None:
        runs.append(_Run(labels[1], _percents(other)[order], ORANGE))
    number = len(order)
    width = min(10.5, max(5.0, 1.6 + 0.52 * number)) if number <= MAX_BARS else 9.0
    figure = new_figure(width, 4.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.6))
    assert below is not None
    for axes in (above, below):
        plain(axes)
    log_scale(above)
    above.set_ylabel("training\nimages", fontsize=8.5)
    above.tick_params(axis="x", length=0)
    below.set_ylabel("accuracy in %", fontsize=8.5)
    if number <= MAX_BARS:
        _bars(above, below, [class_names[k] for k in order], sizes[order], runs)
    else:
        _ranks(above, below, sizes[order], runs)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return finish(figure)


def _bars(above: Axes, below: Axes, names: list[str], sizes: NDArray[np.float64], runs: list[_Run]) -> None:
    number = len(names)
    places, width = np.arange(number), 0.76 / len(runs)
    numbers = number * len(runs) <= 32  # more would overlap
    above.bar(places, sizes, 0.76, color=LIGHT)
    above.set_ylim(max(0.5, sizes.min() / 3), sizes.max() * 3)
    if numbers:
        for place, size in zip(places, sizes):
            above.text(float(place), size * 1.12, f"{size:,.0f}", ha="center", va="bottom", fontsize=7, color=GREY)
    for which, run in enumerate(runs):
        x = places + (which - (len(runs) - 1) / 2) * width
        below.bar(x, np.nan_to_num(run.percents), width, color=run.colour, label=run.label)
        for at, value in zip(x, run.percents):
            if numbers or np.isnan(value):
                text = "–" if np.isnan(value) else f"{value:.0f}"
                below.text(at, np.nan_to_num(value) + 1, text, ha="center", va="bottom", fontsize=7, color=INK)
    below.set_ylim(0, 108)
    below.set_yticks(range(0, 101, 20))
    below.set_xlim(-0.6, number - 0.4)
    few = number <= 25
    name_ticks(below.xaxis, names, 18, rotation=40 if few else 90, size=8 if few else 7)


def _ranks(above: Axes, below: Axes, sizes: NDArray[np.float64], runs: list[_Run]) -> None:
    number = len(sizes)
    window = max(5, number // 12)
    ranks = np.arange(1, number + 1)
    above.fill_between(ranks, np.full(number, max(0.5, sizes.min() / 3)), sizes, color=LIGHT, linewidth=0)
    above.set_ylim(max(0.5, sizes.min() / 3), sizes.max() * 1.5)
    for run in runs:
        below.scatter(ranks, run.percents, s=7 if number <= 300 else 2, color=run.colour, alpha=0.3, linewidths=0)
        label = f"{run.label} (line: mean of {window} classes)"
        below.plot(ranks, _smooth(run.percents, window), color=run.colour, linewidth=2, label=label)
    below.set_ylim(-2, 104)
    below.set_xlim(0, number + 1)
    below.set_xlabel("class, from the most to the fewest training images", fontsize=8.5)


def _smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred moving average over the classes that were measured; at the ends, over those that are there."""
    kernel = np.ones(window)
    total = np.convolve(np.nan_to_num(values), kernel, "same")
    known = np.convolve(np.isfinite(values).astype(np.float64), kernel, "same")
    smooth: NDArray[np.float64] = np.divide(total, known, out=np.full_like(total, np.nan), where=known > 0)
    return smooth


def _percents(accuracy: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else 100 * float(value) for value in accuracy], dtype=np.float64)
