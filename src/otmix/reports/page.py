"""The page of a run, and of a comparison: one HTML file that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from otmix.errors import UserError
from otmix.files import write_text
from otmix.reports import words
from otmix.reports.classes import changes_table, class_table, rare_story
from otmix.reports.pictures import Picture, class_pictures, curve_pictures, mixing_pictures
from otmix.reports.record import RunRecord, read_run
from otmix.reports.tables import compare_table, looks_at_test, result_table

MAX_OPEN_ROWS = 60  # a longer table of classes is folded


def write_page(run_dir: Path | str, baseline: Path | str | None = None) -> Path:
    """Write `report.html` into a run directory and return its path.

    Needs result.json and config.yaml; every other file of the run (data.json, environment.json, metrics.jsonl,
    pairs.npz, figures/mixed.png, figures/plan.png) adds its part where it is there. With `baseline`, the directory of
    another run on the same classes, the page shows what changed against it, the rare classes first.

    Raises UserError where a file is missing or damaged, or the two runs have other classes or another split.
    """
    record = read_run(Path(run_dir))
    other = None if baseline is None else read_run(Path(baseline))
    if other is not None:
        _check_comparable(record, other)
    values = {
        "heading": f"{record.title} on {record.data_name}",
        "lead": words.lead(record),
        "leak": f"This run {words.LEAK}" if looks_at_test(record.result) else None,
        "tiles": words.tiles(record, other),
        "measured": words.measured(record),
        "cautions": words.cautions(record, other),
        "story": rare_story(record, other),
        "changes": None if other is None else changes_table(record, other),
        "result": result_table(record.result),
        "classes": class_table(record, other),
        "fold": len(record.class_names) > MAX_OPEN_ROWS,
        "class_pictures": list(class_pictures(record, other)),
        "mixing_pictures": list(mixing_pictures(record)),
        "curve_pictures": list(curve_pictures(record)),
        "method": words.method_parts(record),
        "sizes": {name: split["images"] for name, split in (record.data.get("splits") or {}).items()},
        "notes": record.data.get("notes") or [],
        "commands": words.commands(record),
        "config": words.named_lines(record.config),
        "environment": words.named_lines(record.environment),
    }
    path = record.directory / "report.html"
    write_text(path, _render("page.html.j2", values))
    return path


def write_comparison_page(
    path: Path | str,
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    *,
    runs: Sequence[Path] = (),
    command: str | None = None,
) -> Path:
    """Write the page of `otmix compare` to `path` and return it.

    Rows as `compare_table` takes them; each note is a paragraph. Of the finished `runs` the page says on what and how
    they were trained, and has links to their own pages. Raises ValueError when nothing has been measured.
    """
    from otmix.reports.figures import comparison_bars

    caption = "Mean error over the seeds. A whisker is one sample standard deviation, a dot is one run."
    leaking = any(looks_at_test(row) for row in rows)
    table = compare_table(rows)
    values = {
        "heading": "Comparison: " + ", ".join(str(row.get("title") or row["method"]) for row in rows),
        "leak": f"A run marked ‡ {words.LEAK}" if leaking else None,
        "table": table,
        "pictures": [Picture.of(comparison_bars(rows), caption, wide=True)],
        "notes": list(notes),
        "markdown": table.markdown(),
        "lead": words.lead(read_run(runs[0]), seed=False) if runs else None,
        "links": [(run.name, _link(run / "report.html", Path(path).parent)) for run in runs],
        "commands": [command] if command else [],
    }
    write_text(Path(path), _render("comparison.html.j2", values))
    return Path(path)


def _link(page: Path, folder: Path) -> str:
    """How a page in `folder` calls another one."""
    try:
        return Path(os.path.relpath(page, folder)).as_posix()
    except ValueError:  # it is on another drive of Windows
        return page.resolve().as_uri()


def _render(name: str, values: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("otmix.reports")
    environment = Environment(
        loader=FunctionLoader(lambda template: folder.joinpath(template).read_text("utf-8")),
        autoescape=True,  # class names, paths and notes are the user's own
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)


def _check_comparable(record: RunRecord, other: RunRecord) -> None:
    if record.class_names != other.class_names:
        raise UserError(
            f"{other.directory} was trained on other classes than {record.directory}, so it cannot be its baseline; "
            "choose a run on the same data"
        )
    if record.split != other.split:
        raise UserError(
            f"{other.directory} was measured on the {other.split} split, {record.directory} on the {record.split} "
            "split; train both with the same --final-split"
        )
