"""Errors of several methods, a dot for each seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from otmix.reports.figures.style import BLUE, GREY, INK, ORANGE, PALETTE, finish, new_figure, plain
from otmix.reports.statistics import mean_std

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (GREY, ORANGE, BLUE, *PALETTE[2:])


@dataclass(frozen=True)
class Panel:
    """One setting: of each group (a loss, say) the errors of each series (alone, with a mixer), a value per seed in
    [0, 1]; a group may lack a series.
    """

    title: str
    groups: Mapping[str, Mapping[str, Sequence[float]]]


def seed_dots(panels: Sequence[Panel]) -> Figure:
    """One panel below the other: a dot for each seed, a line for the mean, and its value. The axes do not begin at 0.

    A series has one colour in all panels. Raises ValueError where there is nothing to draw.
    """
    series = list(dict.fromkeys(name for panel in panels for found in panel.groups.values() for name in found))
    if not series:
        raise ValueError("no group has a measured error, so there is nothing to draw")
    widest = max(len(panel.groups) for panel in panels)
    figure = new_figure(min(14.0, max(6.0, 1.0 + 1.15 * widest)), 0.4 + 2.9 * len(panels))
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels):
        _draw(axes, panel, series)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(series), fontsize=8.5, frameon=False)
    return finish(figure)


def _draw(axes: Axes, panel: Panel, series: Sequence[str]) -> None:
    plain(axes)
    step = 0.8 / len(series)
    for which, name in enumerate(series):
        colour = _COLOURS[which % len(_COLOURS)]
        axes.scatter([], [], s=22, color=colour, label=name)
        for place, found in enumerate(panel.groups.values()):
            if name not in found:
                continue
            values = [100 * value for value in found[name]]
            x = place + (which - (len(series) - 1) / 2) * step
            spread = np.linspace(-0.22, 0.22, len(values)) * step if len(values) > 1 else [0.0]
            axes.scatter([x + aside for aside in spread], values, s=14, color=colour, alpha=0.75, linewidths=0)
            mean, _ = mean_std(values)
            axes.plot([x - 0.36 * step, x + 0.36 * step], [mean, mean], color=INK, linewidth=1.4)
            axes.annotate(
                f"{mean:.1f}",
                (x, max(values)),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
                color=INK,
            )
    for place in range(1, len(panel.groups)):
        axes.axvline(place - 0.5, color="#EEEEEE", linewidth=1, zorder=0)
    axes.set_title(panel.title, loc="left", fontsize=9)
    axes.set_xticks(range(len(panel.groups)), list(panel.groups))
    axes.set_xlim(-0.5, len(panel.groups) - 0.5)
    axes.margins(y=0.14)
    axes.set_ylabel("error in %", fontsize=9)
    axes.tick_params(axis="x", length=0)
