"""Unit files: the facts of one finished run each, small enough to be committed. Every published number comes from them.

    python -m otmix.experiments.units RESULTS_DIR [--add RUN_DIR ...] [--readme FILE ...] [--picture PNG]

adds finished runs to RESULTS_DIR/units and fills the part of each FILE between the two marks with tables: of all runs,
or, after the mark that ends in "defaults", of those that changed no setting of their method. PNG shows what CMO and
OTmix make of each loss.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from otmix.config import RunConfig
from otmix.errors import UserError
from otmix.experiments.unit_picture import results_picture
from otmix.experiments.unit_tables import results_table
from otmix.extensions import import_files
from otmix.files import read_json, read_object, write_text
from otmix.protocols import Overrides
from otmix.reports.figures import save
from otmix.training import is_finished
from otmix.training.records import read_config, read_data, read_environment, read_result, read_settings
from otmix.training.setup import effective_settings

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
BEGIN_DEFAULTS = "<!-- results:begin defaults -->"
_CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}
_PATHS = ("root", "weights")  # of the machine that trained; what they held is in hashes
_KEPT = (
    "n",
    "top1_error",
    "balanced_accuracy",
    "per_class_accuracy",
    "group_error",
    "calibration_error",
    "negative_log_likelihood",
)


def write_unit(run_dir: Path, results_dir: Path, *, data_title: str | None = None) -> Path:
    """Copy the facts of a finished run to `<results_dir>/units/<data>/<setting>/<method>-<hash>-seed<k>.json`; that
    path. The hash is that of the method's settings.

    The name depends on nothing but what was run, so the unit of a repeated run replaces the old one. `data_title` is
    how tables call the data. Raises UserError where the run is not finished, or would replace one on other images.
    """
    unit = unit_of(run_dir, data_title)
    config = unit["config"]
    parts = [f"{config['backbone']}", f"{config['image_size']}px", f"if{unit['data']['imbalance']:.4g}"]
    setting = "-".join([*parts, f"{config['epochs']}ep", config["protocol"], unit["setting_hash"]])
    folder = results_dir / "units" / _slug(unit["data"]["title"]) / _slug(setting)
    path = folder / f"{_slug(unit['method'])}-{_digest(unit['settings'], 6)}-seed{unit['seed']}.json"
    there = read_object(path, {"data": {"hash": str}})["data"]["hash"] if path.exists() else None
    here = unit["data"]["hash"]
    if there not in (None, here):
        raise UserError(
            f"{path} holds a run on other images than {run_dir} (data {there} there, {here} here); give its data "
            "another title with --data-title, or remove the file"
        )
    text = json.dumps(unit, indent=1, ensure_ascii=False)
    text = re.sub(
        r"\[[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text
    )  # a list of numbers is one line
    write_text(path, text + "\n")
    return path


def unit_of(run_dir: Path, data_title: str | None = None) -> dict[str, Any]:
    """The facts of a finished run as plain values, without anything that names the machine's folders."""
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    if not is_finished(run_dir):
        raise UserError(
            f"the run {run_dir} is not finished, so it has no result to keep; finish it with --resume first"
        )
    result, data, environment = read_result(run_dir), read_data(run_dir), read_environment(run_dir, whole=True)
    title = data_title or _data_title(config, data)
    settings = read_settings(run_dir)
    if (teacher := settings.get("confusion_run")) is not None:
        # the run that a fixed F comes from is named by what it was, not by where it lies on this machine
        settings["confusion_run"] = Path(teacher).name
        config = replace(config, set=replace(config.set, confusion_run=Path(teacher).name))
    identity = {key: value for key, value in config.identity.items() if key not in _PATHS}
    if config.weights is not None:
        identity["weights"] = (environment.get("inputs") or {}).get("weights", "unknown")
    setting = {key: value for key, value in identity.items() if key not in ("method", "seed", "set")}
    return {
        "method": result["method"],
        "title": result["title"],
        "seed": result["seed"],
        "split": result["split"],
        "looks_at_test": result["looks_at_test"],
        "command": _command(config, settings),
        "config": identity,
        "settings": settings,
        "config_hash": result["hash"],
        "setting_hash": _digest({**setting, "data": title}, 6),
        "data": {
            "title": title,
            "counts": data["counts"],
            "imbalance": max(data["counts"]) / min(data["counts"]),
            "splits": data["splits"],
            "hash": _digest({"classes": data["class_names"], "splits": data["splits"]}, 10),
        },
        "evaluation": {key: result["evaluation"][key] for key in _KEPT},
        "class_names": data["class_names"],
        "seconds_per_epoch": result["seconds_per_epoch"],
        "device": environment["device"],
        "finished_device": result["device"],
        "commit": environment["commit"],
        "finished_commit": result["commit"],  # another one where the run was resumed after a change
        "environment": {key: environment[key] for key in ("python", "system", "threads", "packages")},
    }


def read_units(results_dir: Path) -> list[dict[str, Any]]:
    """All units below `results_dir`, in the order of their paths. Raises UserError for a file that is none."""
    units = []
    for path in sorted((results_dir / "units").rglob("*.json")):
        unit = read_json(path)
        needed = {"method", "seed", "config", "settings", "data", "evaluation"}
        if not isinstance(unit, dict) or not needed <= unit.keys():
            raise UserError(f"{path} is not a unit file; remove it, or write it anew with --add RUN_DIR")
        units.append(unit)
    return units


def fill_tables(text: str, units: Sequence[dict[str, Any]], name: str = "the file") -> str:
    """`text` with the tables of `units` between its marks, which also say of which of them."""
    if BEGIN_DEFAULTS in text:
        return fill_region(text, results_table(units, defaults_only=True), name, BEGIN_DEFAULTS)
    return fill_region(text, results_table(units), name)


def fill_region(text: str, content: str, name: str = "the file", begin: str = BEGIN) -> str:
    """`text` with `content` between the two marks. Raises UserError unless each mark is there once, in order."""
    if text.count(begin) != 1 or text.count(END) != 1 or text.index(begin) > text.index(END):
        raise UserError(
            f"{name} must have the lines {begin} and {END} once each, in this order; the tables go between them"
        )
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content.strip()}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m otmix.experiments.units",
        description="Keep the facts of finished runs, and make tables of them.",
    )
    parser.add_argument("results", type=Path, metavar="RESULTS_DIR", help="folder that holds units/")
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="RUN_DIR", help="finished runs to keep")
    parser.add_argument("--data-title", help="how the data of the runs that are added are called")
    parser.add_argument(
        "--readme", type=Path, nargs="+", default=[], metavar="FILE", help=f"Markdown files with {BEGIN} and {END}"
    )
    parser.add_argument(
        *("--import", "-i"), type=Path, action="append", default=[], dest="imports", metavar="FILE",
        help="Python file with losses and mixers of your own, which the runs have",
    )  # fmt: skip
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw each loss alone, with CMO and with OTmix")
    options = parser.parse_args(arguments)
    try:
        import_files(options.imports)
        for run_dir in options.add:
            sys.stdout.write(f"{write_unit(run_dir, options.results, data_title=options.data_title)}\n")
        units = read_units(options.results)
        for path in options.readme:
            if not path.is_file():
                raise UserError(f"there is no file {path}; create it with the lines {BEGIN} and {END}")
            write_text(path, fill_tables(path.read_text(encoding="utf-8"), units, str(path)))
        if options.picture is not None:
            save(results_picture(units), options.picture)
        if not options.add and not options.readme and not options.picture:
            sys.stdout.write(results_table(units))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _data_title(config: RunConfig, data: dict[str, Any]) -> str:
    """The name that the loader recorded, which marks the JPEG copy of CIFAR-10. A folder with CIFAR-10's classes is
    taken for that copy too: its numbers never stand unmarked beside those of the original.
    """
    copied = config.data == "folder" and set(data["class_names"]) == _CIFAR10
    return "CIFAR-10 (JPEG copy)" if copied else str(data["name"])


def _command(config: RunConfig, settings: dict[str, Any]) -> str:
    """What makes this run again under today's defaults; DIR and FILE stand for places on a disk."""
    today = effective_settings(config)
    past = {key: value for key, value in settings.items() if value != today.get(key, value)}
    config = replace(config, set=Overrides.from_dict(config.set.to_dict() | past))
    defaults, places = RunConfig().to_dict(), {"root": "DIR", "weights": "FILE"}
    parts = ["otmix", "train"]
    for key, value in config.identity.items():
        flag = key.replace("_", "-")
        if key == "set":
            parts += [part for name, setting in value.items() for part in (f"--set.{name}", str(setting))]
        elif value == defaults[key] and key not in ("data", "method", "seed"):
            continue
        elif isinstance(value, bool):
            parts.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            parts += [f"--{flag}", places.get(key, str(value))]
    return shlex.join(parts)


def _digest(value: Any, digits: int) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()[:digits]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.+-]+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    raise SystemExit(main())
