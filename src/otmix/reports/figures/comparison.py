"""Several methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from otmix.reports.figures.style import INK, PALETTE, finish, new_figure, plain, shorten
from otmix.reports.statistics import mean_std, seed_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GROUPS = (("top1_error", "all classes"), ("many", "many-shot"), ("medium", "medium-shot"), ("few", "few-shot"))


def comparison_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Error of each method: mean, sample standard deviation, and a dot for each seed.

    Rows as `otmix.reports.tables.compare_table` takes them. Shot groups that no method has are left out.
    Raises ValueError when nothing has been measured.
    """
    groups = [(key, name) for key, name in _GROUPS if any(seed_values(row.get(key)) is not None for row in rows)]
    if not groups:
        raise ValueError("no method has a measured error, so there is nothing to draw")
    figure = new_figure(min(14.0, max(5.0, 1.2 + len(groups) * (0.7 + 0.42 * len(rows)))), 3.9)
    axes = figure.subplots()
    plain(axes)
    width = 0.8 / len(rows)
    for which, row in enumerate(rows):
        colour = PALETTE[which % len(PALETTE)]
        title, hatch = shorten(row.get("title") or row["method"], 34), None if which < len(PALETTE) else "//"
        label: str | None = title
        for place, (key, _) in enumerate(groups):
            values = seed_values(row.get(key))
            if values is None:
                continue
            x = place + (which - (len(rows) - 1) / 2) * width
            mean, std = mean_std(values)
            axes.bar(x, 100 * mean, width * 0.92, color=colour, alpha=0.75, hatch=hatch, label=label)
            label = None  # once in the legend
            if std is not None:
                axes.errorbar(x, 100 * mean, 100 * std, color=INK, capsize=3, linewidth=1.1, zorder=3)
            spread = np.linspace(-0.2, 0.2, len(values)) * width if len(values) > 1 else [0.0]
            axes.scatter(
                [x + step for step in spread],
                [100 * value for value in values],
                s=9,
                color="white",
                edgecolors=INK,
                linewidths=0.7,
                zorder=4,
            )
            top = 100 * max(*values, mean + (std or 0))
            axes.text(x, top + 0.6, f"{100 * mean:.1f}", ha="center", va="bottom", fontsize=7, color=INK)
    axes.set_xticks(range(len(groups)), [name for _, name in groups])
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    axes.set_ylabel("error in % (lower is better)", fontsize=9)
    axes.tick_params(axis="x", length=0)
    figure.legend(loc="outside upper left", ncols=len(rows) if len(rows) <= 4 else 3, fontsize=8, frameon=False)
    return finish(figure)
