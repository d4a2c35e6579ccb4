"""A run over its epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from otmix.reports.figures.style import GREY, INK, PALETTE, finish, log_scale, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ERRORS = {
    "train_error": "training, as mixed",
    "probe_error": "some training images, unmixed",
    "validation_error": "validation",
    "test_error": "test",
}
_PANELS: tuple[tuple[str, dict[str, str], float], ...] = (
    ("training loss", {"loss": "loss"}, 1.0),
    ("error in %", _ERRORS, 100.0),
    ("learning rate", {"lr": "learning rate"}, 1.0),
    ("images in %", {"mixed_share": "mixed", "transport_share": "paired by transport"}, 100.0),
)


def curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, errors, learning rate, and the shares of images that were mixed and paired by transport, epoch by epoch.

    `history` is the lines of metrics.jsonl in order. What no line has gets no panel, and an epoch without a value no
    point. Raises ValueError where there is nothing to draw.
    """
    from matplotlib.ticker import MaxNLocator

    panels = []
    for name, labels, scale in _PANELS:
        lines = {label: scale * _series(history, key) for key, label in labels.items()}
        lines = {label: values for label, values in lines.items() if np.isfinite(values).any()}
        if lines:
            panels.append((name, lines))
    if not panels:
        raise ValueError("the history has no epoch with a value, so there is nothing to draw")
    stages = [line.get("stage") for line in history]
    starts = [place for place in range(1, len(stages)) if stages[place] != stages[place - 1]]
    epochs = np.arange(1, len(history) + 1)
    rows = (len(panels) + 1) // 2
    figure = new_figure(9.5, 2.6 * rows)
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, lines) in zip(grid, panels):
        plain(axes)
        axes.set_xlim(0, len(epochs) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        stepped = name == "learning rate" and _is_stepped(next(iter(lines.values())))
        for (label, values), colour in zip(lines.items(), PALETTE):
            known = np.isfinite(values)
            style = {"marker": "." if known.sum() <= 30 else None, "drawstyle": "steps-mid" if stepped else "default"}
            axes.plot(epochs[known], values[known], color=colour, linewidth=1.4, label=label, **style)
        for start in starts:
            axes.axvline(start + 0.5, color=GREY, linestyle=":", linewidth=1)
        axes.set_title(name, fontsize=9.5, loc="left", color=INK)
        axes.set_xlabel("epoch (dotted: a new stage begins)" if starts else "epoch", fontsize=8)
        if len(lines) > 1 or name == "error in %":
            axes.legend(fontsize=8, frameon=False)
        if stepped:
            log_scale(axes)
        else:
            axes.set_ylim(bottom=0)
    return finish(figure)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    return np.array([np.nan if line.get(key) is None else float(line[key]) for line in history], dtype=np.float64)


def _is_stepped(rates: NDArray[np.float64]) -> bool:
    """Whether a learning rate stays for many epochs and then drops by a factor, unlike a smooth decay towards 0."""
    stays = np.diff(rates) == 0
    return bool(stays.mean() > 0.5 and rates.min() > 0 and rates.max() > 5 * rates.min()) if len(stays) else False
