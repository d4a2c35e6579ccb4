"""From unit files to a picture: what CMO and OTmix make of each loss, a dot for each seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from otmix.errors import UserError
from otmix.experiments.unit_tables import Unit, changed_settings, heading, setting_of
from otmix.methods import parse_method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from otmix.reports.figures import Panel

SEEDS = 3
"""Of a setting with one loss so many are drawn, not fewer."""
_SERIES = {None: "alone", "cmo": "CMO", "otmix": "OTmix"}


def results_picture(units: Iterable[Unit]) -> Figure:
    """The losses that were trained alone and with CMO or OTmix, in a panel for each setting that has several of them,
    or one of which all three are there, `SEEDS` times each.

    Runs that changed a setting of their method, and protocols other than clean, are left to the tables. The label says
    how many runs there are, with a hash of their errors. Raises UserError where nothing is left.
    """
    from otmix.reports.figures import seed_dots

    settings: dict[str, list[Unit]] = {}
    for unit in units:
        if unit["config"]["protocol"] == "clean" and not changed_settings(unit):
            settings.setdefault(setting_of(unit), []).append(unit)
    ordered = sorted(settings.values(), key=lambda same: (heading(same[0]), json.dumps(same[0]["config"])))
    panels = [panel for same in ordered if _worth_drawing(panel := _panel(same))]
    if not panels:
        raise UserError(
            "there is nothing to draw: no setting has two losses that were trained alone and with CMO or OTmix, or one "
            f"that was trained alone and with both, {SEEDS} times each"
        )
    figure = seed_dots(panels)
    runs = sum(len(errors) for panel in panels for series in panel.groups.values() for errors in series.values())
    digest = hashlib.blake2b(json.dumps([asdict(panel) for panel in panels]).encode(), digest_size=6).hexdigest()
    figure.set_label(f"{runs} runs, {digest}")
    return figure


def _worth_drawing(panel: Panel) -> bool:
    repeated = (
        len(series) == len(_SERIES) and min(map(len, series.values())) >= SEEDS for series in panel.groups.values()
    )
    return len(panel.groups) > 1 or any(repeated)


def _panel(units: Sequence[Unit]) -> Panel:
    from otmix.reports.figures import Panel

    found: dict[str, dict[str, list[float]]] = {}
    for unit in sorted((unit for unit in units if _known(unit)), key=lambda unit: (*_place(unit), unit["seed"])):
        method = parse_method(unit["method"])
        if method.mixer in _SERIES:
            group = found.setdefault(method.title.partition(" + ")[0], {})
            group.setdefault(_SERIES[method.mixer], []).append(unit["evaluation"]["top1_error"])
    groups = {loss: series for loss, series in found.items() if "alone" in series and len(series) > 1}
    return Panel(heading(units[0]), groups)


def _known(unit: Unit) -> bool:
    """Not of somebody's own loss or mixer, which this program has not loaded."""
    try:
        parse_method(unit["method"])
    except UserError:
        return False
    return True


def _place(unit: Unit) -> tuple[bool, bool, bool, str, int]:
    """Plain losses, then rebalanced ones, then experts, cross-entropy first; alone, with CMO, with OTmix."""
    method = parse_method(unit["method"])
    place = list(_SERIES).index(method.mixer) if method.mixer in _SERIES else len(_SERIES)
    return method.architecture != "plain", method.rebalancing is not None, method.loss != "ce", method.loss, place
