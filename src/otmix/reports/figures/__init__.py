"""The pictures. Each function takes plain values and returns a matplotlib `Figure` of its own; `save` writes it."""

from __future__ import annotations

from otmix.reports.figures.classes import per_class_bars
from otmix.reports.figures.comparison import comparison_bars
from otmix.reports.figures.curves import curves
from otmix.reports.figures.dots import Panel, seed_dots
from otmix.reports.figures.grids import mixed_grid, preview_grid
from otmix.reports.figures.matrices import confusion_figure, pair_counts_figure, plan_figure
from otmix.reports.figures.style import png_bytes, save

__all__ = [
    "Panel",
    "comparison_bars",
    "confusion_figure",
    "curves",
    "mixed_grid",
    "pair_counts_figure",
    "per_class_bars",
    "plan_figure",
    "png_bytes",
    "preview_grid",
    "save",
    "seed_dots",
]
