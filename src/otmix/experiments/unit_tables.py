"""From unit files to Markdown: a table for each setting, a line for each method and protocol, mean ± std over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from otmix.errors import UserError
from otmix.methods import parse_method
from otmix.training.schedules import Schedule
from otmix.types import SHOT_GROUPS
from otmix.wording import counted

Unit = dict[str, Any]

_LINE = ("method", "protocol", "set", "seed")  # what tells lines (and seeds) of one table apart
_RECIPE = (
    "batch_size",
    "optimizer",
    "lr",
    "weight_decay",
    "nesterov",
    "schedule",
    "warmup",
    "precision",
    "pretrained",
    "weights",
    "max_per_class",
    "compile",
    "devices",
    "num_nodes",
    "many_above",
    "few_below",
)
_COLUMNS = (
    "method",
    "protocol",
    "seeds",
    "error %",
    "many %",
    "medium %",
    "few %",
    "balanced acc. %",
    "ECE %",
    "s/epoch",
)


def results_table(units: Iterable[Unit], defaults_only: bool = False) -> str:
    """All units as Markdown, or those that changed no setting of their method: the same text for them in any order.

    Raises UserError where two units of a table have the same seed but not the same images, or are the same run twice.
    """
    tables: dict[str, list[Unit]] = {}
    for unit in units:
        if not defaults_only or not changed_settings(unit):
            tables.setdefault(setting_of(unit), []).append(unit)
    if not tables:
        return "No results yet.\n"
    return "\n".join(_table(tables[key]) for key in sorted(tables, key=lambda key: (heading(tables[key][0]), key)))


def setting_of(unit: Unit) -> str:
    """What is equal within a table."""
    same = {key: value for key, value in unit["config"].items() if key not in _LINE}
    return json.dumps({**same, "data": unit["data"]["title"], "split": unit["split"]}, sort_keys=True)


def heading(unit: Unit) -> str:
    config, data = unit["config"], unit["data"]
    parts = [
        f"{data['title']}, imbalance {data['imbalance']:.4g}",
        config["backbone"],
        f"{config['image_size']} px",
        counted(config["epochs"], "epoch"),
    ]
    return ", ".join(parts) + ("" if unit["split"] == "test" else f", measured on the {unit['split']} split")


def _table(units: Sequence[Unit]) -> str:
    _check(units)
    lines: dict[tuple[Any, ...], list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: (_order(unit), unit["seed"])):
        lines.setdefault(_order(unit), []).append(unit)
    rule = ["---", "---", *["---:"] * (len(_COLUMNS) - 2)]
    table = [_row(_COLUMNS), _row(rule), *(_row(_cells(seeds)) for seeds in lines.values())]
    return "\n\n".join([f"### {heading(units[0])}", "\n".join(table), *_notes(units, list(lines.values()))]) + "\n"


def _check(units: Sequence[Unit]) -> None:
    images: dict[int, tuple[str, str]] = {}
    runs = set()
    for unit in units:
        name = f"{unit['method']}, seed {unit['seed']}"
        first, known = images.setdefault(unit["seed"], (name, unit["data"]["hash"]))
        if known != unit["data"]["hash"]:
            raise UserError(
                f"{heading(unit)}: the runs {first} and {name} did not see the same images (data {known} and "
                f"{unit['data']['hash']}); remove the unit file of one, or give its data another title (--data-title)"
            )
        if (run := (*_order(unit), unit["seed"])) in runs:
            raise UserError(f"{heading(unit)}: there are two unit files of {name}; remove one")
        runs.add(run)


def _order(unit: Unit) -> tuple[Any, ...]:
    """Baselines first; the released code's protocol, which looks at the test set, last; a method's defaults before what
    was changed.
    """
    method = unit["method"]
    protocol = ("clean", "paper", "official").index(unit["config"]["protocol"])
    settings = json.dumps(unit["settings"], sort_keys=True)
    return "+" in method, "-drw" in method, method, protocol, changed_settings(unit), settings


def _cells(seeds: Sequence[Unit]) -> list[str]:
    first = seeds[0]
    found = [unit["evaluation"] for unit in seeds]
    marks = (" †" if len(seeds) == 1 else "") + (" ‡" if any(unit["looks_at_test"] for unit in seeds) else "")
    changed = changed_settings(first)
    return [
        first["title"] + marks,
        first["config"]["protocol"] + (f"; {changed}" if changed else ""),
        str(len(seeds)),
        _spread([one["top1_error"] for one in found]),
        *(_spread([one["group_error"].get(group) for one in found]) for group in SHOT_GROUPS),
        _spread([one["balanced_accuracy"] for one in found]),
        _spread([one["calibration_error"] for one in found]),
        _seconds(seeds),
    ]


def changed_settings(unit: Unit) -> str:
    """The settings of a run that are not today's defaults of its protocol, then or not: "alpha 1.0, box clipped"."""
    config = unit["config"]
    try:
        deferred = Schedule.named(config["schedule"]).deferred
        usual = parse_method(unit["method"]).effective(config["protocol"], deferred=deferred)
    except UserError:  # a method registered by an import that is not made here
        usual = {key: value for key, value in unit["settings"].items() if key not in config["set"]}
    return ", ".join(f"{key} {value}" for key, value in sorted(unit["settings"].items()) if value != usual.get(key))


def _notes(units: Sequence[Unit], lines: Sequence[Sequence[Unit]]) -> list[str]:
    notes = [
        "Mean ± sample standard deviation over seeds; many, medium and few are errors of the shot groups; – : no such "
        "class. Seconds were taken on machines in use: they are no benchmark."
    ]
    if any(len(seeds) == 1 for seeds in lines):
        notes.append("† one seed: it carries no ranking.")
    if any(unit["looks_at_test"] for unit in units):
        notes.append(
            "‡ looks at the test set while training or choosing its epoch: this is no estimate for new images."
        )
    config, splits = units[0]["config"], units[0]["data"]["splits"]
    recipe = [f"{key} {config[key]}" for key in _RECIPE if config.get(key) not in (None, False, 0.0)]
    images = ", ".join(f"{split} {found['images']:,}" for split, found in splits.items())
    hashes = sorted({unit["data"]["hash"] for unit in units})
    subset = f"data {hashes[0]}" if len(hashes) == 1 else f"each seed has its own split, data {', '.join(hashes)}"
    sources = {unit.get(key, unit["commit"]) for unit in units for key in ("commit", "finished_commit")}
    commits = sorted(commit or "an installed package" for commit in sources)
    devices = sorted(_devices(units))
    where = f"Device: {', '.join(devices)}. Source: {', '.join(commits)}."
    return [*notes, f"Images: {images} ({subset}). Recipe: {', '.join(recipe)}. {where}"]


def _spread(values: Sequence[float | None]) -> str:
    """Shares per seed as "mean ± std" in per cent; – where not every seed has one."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    mean = f"{100 * statistics.fmean(known):.2f}"
    return mean if len(known) == 1 else f"{mean} ± {100 * statistics.stdev(known):.2f}"


def _seconds(units: Sequence[Unit]) -> str:
    """The mean; – where the runs were not made on one kind of device."""
    if len(_devices(units)) > 1:
        return "–"
    value = statistics.fmean(unit["seconds_per_epoch"] for unit in units)
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _devices(units: Sequence[Unit]) -> set[str]:
    """Where the runs began, and where those that moved ended."""
    return {str(unit.get(key, unit["device"])) for unit in units for key in ("device", "finished_device")}


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
