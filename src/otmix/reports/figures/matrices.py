"""Matrices over classes or images as heat maps: the transport plan, the confusion, who was paired with whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from otmix.reports.figures.style import INK, as_array, finish, name_ticks, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NUMBERS = 16  # cells a side up to which each is written out
MAX_NAMES = 60  # and up to which classes are named at the axes


def plan_figure(coupling: Any, row_labels: Sequence[str], column_labels: Sequence[str], title: str = "") -> Figure:
    """A transport plan `[f,m]`, rows normalised to 1: Fig. 3 of Gao et al. 2023.

    `row_labels` are the classes of the foregrounds, `column_labels` those of the backgrounds. The largest entry of a
    row, the background that eq. 8 chooses, is bold.
    """
    plan = normalise_rows(as_array(coupling))
    figure = _canvas(plan.shape)
    axes = figure.subplots()
    _heat(
        axes,
        plan,
        row_labels,
        column_labels,
        lambda value: f"{value:.2f}".lstrip("0") if value >= 0.005 else "0",
        bold_maximum=True,
    )
    axes.set_xlabel("background image", fontsize=9)
    axes.set_ylabel("foreground image", fontsize=9)
    _title(axes, title)
    return finish(figure)


def confusion_figure(matrix: Any, names: Sequence[str], title: str = "") -> Figure:
    """Counts or shares `[K,K]`, rows = true class, drawn as % of each row."""
    shares = normalise_rows(as_array(matrix))
    figure = _canvas(shares.shape)
    axes = figure.subplots()
    _heat(axes, shares, names, names, _percent)
    axes.set_xlabel("predicted class", fontsize=9)
    axes.set_ylabel("true class", fontsize=9)
    _title(axes, title or "% of each true class")
    return finish(figure)


def pair_counts_figure(counts_of: Mapping[str, Any], names: Sequence[str]) -> Figure:
    """Which classes were pasted into which, at random and by transport, say: Fig. 9 of Gao et al. 2023.

    `counts_of` has, by title, the pairs of each rule, foreground class × background class `[K,K]`. Unlike the paper's,
    each row is drawn as % of its own pairs, so that the panels can be compared although one rule made more pairs. A
    panel without pairs is left out. Raises ValueError when there is none at all.
    """
    panels = [(name, as_array(counts)) for name, counts in counts_of.items()]
    panels = [(name, counts) for name, counts in panels if counts.sum() > 0]
    if not panels:
        raise ValueError("no pair has been counted, so there is nothing to draw")
    size = panels[0][1].shape
    figure = _canvas(size, len(panels))
    shares = [normalise_rows(counts) for _, counts in panels]
    top = max(float(share.max()) for share in shares)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for place, (axes, (name, counts), share) in enumerate(zip(grid, panels, shares)):
        _heat(axes, share, names if place == 0 or size[0] > MAX_NAMES else None, names, _percent, top=top)
        axes.set_xlabel("background class", fontsize=9)
        if place == 0:
            axes.set_ylabel("foreground class", fontsize=9)
        _title(axes, f"{name}\n{counts.sum():,.0f} pairs, % of each row")
    return finish(figure)


def normalise_rows(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows divided by their sums; an empty row stays zeros."""
    sums = matrix.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(matrix, sums, out=np.zeros_like(matrix), where=sums > 0)
    return shares


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _canvas(shape: tuple[int, ...], panels: int = 1) -> Figure:
    rows, columns = shape
    size = min(7.5, max(3.6, (0.46 if panels == 1 else 0.37) * max(rows, columns) + 1.6))
    return new_figure(size * panels + 0.2, size * max(0.55, rows / max(rows, columns)) + 0.1)


def _title(axes: Axes, title: str) -> None:
    if title:
        axes.set_title(title, fontsize=9.5, loc="left", color=INK)


def _heat(
    axes: Axes,
    values: NDArray[np.float64],
    row_names: Sequence[str] | None,
    column_names: Sequence[str],
    write: Callable[[float], str],
    *,
    top: float | None = None,
    bold_maximum: bool = False,
) -> None:
    """A heat map of values in [0, 1] with names and, while they can be read, numbers.

    `row_names` is None where the panel to the left has them. Colours run from 0 to `top`, by default the largest value.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    rows, columns = values.shape
    top = max(top or float(values.max(initial=0)), 1e-6)
    # a square-root scale: the few per cent that a rare class loses to each other class would be white on a linear one
    norm, colours = PowerNorm(0.5, vmin=0, vmax=top), colormaps["Blues"]
    sharp = max(rows, columns) <= 200
    axes.imshow(values, cmap=colours, norm=norm, interpolation="nearest" if sharp else "antialiased")
    axes.tick_params(length=0, labelsize=8)
    size = 8 if max(rows, columns) <= 20 else 6.5 if max(rows, columns) <= 40 else 5
    if columns <= MAX_NAMES:
        name_ticks(axes.xaxis, column_names, 14, rotation=45 if size == 8 else 90, size=size)
    if row_names is None:
        axes.set_yticks([])
    elif rows <= MAX_NAMES:
        name_ticks(axes.yaxis, row_names, 14, size=size)
    if max(rows, columns) > MAX_NUMBERS:
        return
    for i in range(rows):
        for j in range(columns):
            red, green, blue, _ = colours(norm(values[i, j]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.6  # perceived brightness
            text = write(float(values[i, j]))
            bold = bold_maximum and values[i, j] > 0 and j == values[i].argmax()
            colour = "white" if dark else "#A9B4BE" if text == "0" else INK
            weight = "bold" if bold else "normal"
            axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour, fontweight=weight)
