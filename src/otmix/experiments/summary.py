"""What the runs of a comparison say together: rows for a table, differences, and notes; written to a
comparison-….json of their own, the rows to a .csv beside it too.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from otmix.config import RunConfig
from otmix.experiments.differences import SEEDS_FOR_A_TEST, PairedDifference, paired_difference
from otmix.files import write_json, write_text
from otmix.methods import Method
from otmix.reports.statistics import mean_std, seed_values
from otmix.training.records import read_data
from otmix.types import SHOT_GROUPS

_ABOUT = ("method", "title", "protocol", "looks_at_test", "split", "seeds", "n_seeds")
_NUMBERS = ("top1_error", *SHOT_GROUPS, "balanced_accuracy", "calibration_error", "seconds_per_epoch")
_MEASURES = {"top1_error": "top-1 error", "balanced_accuracy": "balanced accuracy"}


@dataclass(frozen=True)
class Outcome:
    """What became of one run of a comparison; `result` is its result.json, `error` the sentence that stopped it."""

    method: str
    seed: int
    run_dir: Path
    status: Literal["reused", "trained", "failed"]
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Methods side by side: `rows` as `otmix.reports.tables.compare_table` takes them, in the order asked for, and in
    `notes` what they allow to be said. A method without a finished run has no row. `path` is the file that holds all
    of it."""

    rows: tuple[dict[str, Any], ...]
    differences: tuple[PairedDifference, ...]
    notes: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    path: Path

    @property
    def table(self) -> Path:
        """The rows as CSV, beside `path`."""
        return self.path.with_suffix(".csv")

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")


def comparison_path(folder: Path, run_dirs: Sequence[Path]) -> Path:
    """`<folder>/comparison-<hash>.json`: the same for the same runs, so that one comparison leaves another's alone."""
    names = "\n".join(run_dir.name for run_dir in run_dirs)
    return folder / f"comparison-{hashlib.blake2b(names.encode(), digest_size=4).hexdigest()}.json"


def summarise(base: RunConfig, chosen: Sequence[Method], outcomes: Sequence[Outcome], folder: Path) -> Comparison:
    """Put together what is known of all runs, and write it to `folder`, as JSON and its rows as CSV."""
    rows, by_method = [], {}
    for method in chosen:
        done = [outcome for outcome in outcomes if outcome.method == method.name and outcome.status != "failed"]
        if done:
            rows.append(_row(method, done))
            by_method[method.name] = {outcome.seed: outcome.result["evaluation"] for outcome in done}
    differences = _differences(by_method)
    titles = {method.name: method.title for method in chosen}
    comparison = Comparison(
        tuple(rows),
        tuple(differences),
        tuple(_notes(rows, differences, titles, outcomes)),
        tuple(outcomes),
        comparison_path(folder, [outcome.run_dir for outcome in outcomes]),
    )
    runs = [{**asdict(outcome), "run_dir": outcome.run_dir.name} for outcome in outcomes]
    for run in runs:
        run["hash"] = run.pop("result").get("hash")
    content = {
        "settings": {key: value for key, value in base.identity.items() if key not in ("method", "seed")},
        "rows": rows,
        "differences": [asdict(difference) for difference in differences],
        "notes": comparison.notes,
        "runs": runs,
    }
    write_json(comparison.path, content)
    write_text(comparison.table, _as_csv(rows))
    return comparison


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each method: what holds for all of its seeds; then of each number the mean and the sample standard
    deviation, and the seeds' values in their order, divided by spaces. Empty is what there is none of.
    """
    text = io.StringIO()
    columns = [f"{name}{end}" for name in _NUMBERS for end in ("", "_std", "_seeds")]
    writer = csv.DictWriter(text, [*_ABOUT, *columns], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        line = {**row, "seeds": " ".join(map(str, row["seeds"]))}
        for name in _NUMBERS:
            values = seed_values(row[name])
            line[name], line[f"{name}_std"] = (None, None) if values is None else mean_std(values)
            line[f"{name}_seeds"] = " ".join("" if value is None else str(value) for value in row[name] or [])
        writer.writerow(line)
    return text.getvalue()


def _row(method: Method, done: Sequence[Outcome]) -> dict[str, Any]:
    results = [outcome.result for outcome in done]
    found = [result["evaluation"] for result in results]
    groups: dict[str, list[float | None]] = {
        name: [one["group_error"].get(name) for one in found] for name in SHOT_GROUPS
    }
    return {
        "method": method.name,
        "title": method.title,
        "protocol": results[0]["protocol"],
        "looks_at_test": any(result["looks_at_test"] for result in results),
        "split": results[0]["split"],
        "seeds": [outcome.seed for outcome in done],
        "n_seeds": len(done),
        "top1_error": [one["top1_error"] for one in found],
        **{name: None if all(value is None for value in values) else values for name, values in groups.items()},
        "balanced_accuracy": [one["balanced_accuracy"] for one in found],
        "calibration_error": [one["calibration_error"] for one in found],
        "seconds_per_epoch": [result["seconds_per_epoch"] for result in results],
        "reused": sum(outcome.status == "reused" for outcome in done),
        "trained": sum(outcome.status == "trained" for outcome in done),
    }


def _differences(found: dict[str, dict[int, dict[str, Any]]]) -> list[PairedDifference]:
    """Each method against the first, in top-1 error, and in balanced accuracy where that does not say the same."""
    if not found:
        return []
    first, *others = found
    measures = [("top1_error", True)]
    unequal = (
        abs(1 - one["top1_error"] - one["balanced_accuracy"]) > 1e-9
        for seeds in found.values()
        for one in seeds.values()
    )
    if any(unequal):
        measures.append(("balanced_accuracy", False))
    differences = []
    for name in others:
        for measure, lower in measures:
            values, reference = ({seed: one[measure] for seed, one in found[which].items()} for which in (name, first))
            difference = paired_difference(name, values, first, reference, measure, lower)
            differences += [] if difference is None else [difference]
    return differences


def _notes(
    rows: Sequence[dict[str, Any]],
    differences: Sequence[PairedDifference],
    titles: dict[str, str],
    outcomes: Sequence[Outcome],
) -> list[str]:
    notes = [
        difference.in_words(
            titles[difference.method], titles[difference.against], _MEASURES[difference.measure], len(differences)
        )
        for difference in differences
    ]
    if len(rows) > 1 and any(row["n_seeds"] == 1 for row in rows):
        notes.append("No ranking is stated from one seed: another one can turn the order around.")
    if any(len(difference.seeds) < SEEDS_FOR_A_TEST for difference in differences):
        notes.append(f"No p-value is given from fewer than {SEEDS_FOR_A_TEST} seeds.")
    if rows and (splits := {row["split"] for row in rows}) != {"test"}:
        notes.append(f"Measured on the {' and '.join(sorted(splits))} split.")
    if changed := _with_other_images(outcomes):
        listed = ", ".join(f"{titles[outcome.method]} with seed {outcome.seed}" for outcome in changed)
        notes.append(
            f"NOT COMPARABLE: {listed} did not see the same images as the first run: the data changed between them."
        )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    return notes + [f"{titles[outcome.method]} with seed {outcome.seed} failed: {outcome.error}" for outcome in failed]


def _with_other_images(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Runs that were not trained and measured on the images of the first: these are the same for all seeds."""
    done = [outcome for outcome in outcomes if outcome.status != "failed"]
    splits = [read_data(outcome.run_dir)["splits"] for outcome in done]
    return [outcome for outcome, seen in zip(done, splits) if seen != splits[0]]
