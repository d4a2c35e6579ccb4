"""Tables: the same cells for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from otmix.reports.statistics import MISSING, mean_std, percent, seed_values
from otmix.wording import counted

if TYPE_CHECKING:
    from rich.console import Group

SELECTED_ON_TEST = (
    "selected on the test set: the run looked at test images while training or choosing its epoch, "
    "so this is no estimate for new images"
)
ONE_SEED = "one seed: it carries no ranking"


@dataclass(frozen=True)
class Table:
    """Cells as text, row by row; the columns `left` are aligned to the left, all others to the right; `notes` below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    left: frozenset[int] = frozenset({0})

    def rich(self) -> Group:
        """For a terminal; print it with `rich.console.Console().print`."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for place, name in enumerate(self.columns):
            table.add_column(Text(name), justify="left" if place in self.left else "right")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))  # Text, so that a class called [red] is a name and no style
        title = [Text(self.title, style="bold")] if self.title else []
        return Group(*title, table, *(Text(note, style="dim") for note in self.notes))

    def markdown(self) -> str:
        """GitHub's Markdown, a blank line after the title and before the notes."""
        rule = ["---" if place in self.left else "---:" for place in range(len(self.columns))]
        lines = [
            "| " + " | ".join(_markdown_cell(cell) for cell in cells) + " |" for cells in (self.columns, *self.rows)
        ]
        lines.insert(1, "| " + " | ".join(rule) + " |")
        parts = [f"**{self.title}**"] if self.title else []
        parts.append("\n".join(lines))
        parts += [_markdown_cell(note) for note in self.notes]
        return "\n\n".join(parts) + "\n"


def result_table(result: Mapping[str, Any]) -> Table:
    """What a run is worth, from its result.json. A shot group without classes is –."""
    found: Mapping[str, Any] = result["evaluation"]
    groups: Mapping[str, float | None] = found.get("group_error") or {}
    error = found.get("top1_error")
    rows = (
        ("top-1 accuracy", percent(None if error is None else 1 - error)),
        ("top-1 error", percent(error)),
        ("balanced accuracy", percent(found.get("balanced_accuracy"))),
        *((f"{group}-shot error", percent(groups.get(group))) for group in ("many", "medium", "few")),
        ("calibration error (ECE)", percent(found.get("calibration_error"))),
    )
    split = result.get("split") or "?"
    title = f"{result.get('title') or result.get('method')}: {split} split" + (
        f", {counted(found['n'], 'image')}" if found.get("n") is not None else ""
    )
    return Table(title, ("measure", "%"), rows, (SELECTED_ON_TEST,) if looks_at_test(result) else ())


def compare_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Methods side by side: mean ± sample standard deviation over seeds.

    A row has `method`, `title`, `n_seeds`, the numbers of runs `reused` and `trained`, and as lists over seeds (or a
    single number, or None) `top1_error`, `many`, `medium`, `few`, `balanced_accuracy`, `calibration_error`, all shares
    in [0, 1], and `seconds_per_epoch`. What not every seed has is –. One seed is marked: no ranking is stated from it.
    """
    single = any(_seeds(row) == 1 for row in rows)
    leaking = any(looks_at_test(row) for row in rows)
    cells = []
    for row in rows:
        mark = ("†" if _seeds(row) == 1 else "") + ("‡" if looks_at_test(row) else "")
        cells.append(
            (
                str(row.get("title") or row["method"]) + (f" {mark}" if mark else ""),
                str(_seeds(row)),
                *(
                    spread(row.get(key))
                    for key in ("top1_error", "many", "medium", "few", "balanced_accuracy", "calibration_error")
                ),
                _seconds(row.get("seconds_per_epoch")),
                _reused(row),
            )
        )
    columns = ("method", "seeds", "error", "many", "medium", "few", "bal. acc.", "ECE", "s/epoch", "reused")
    notes = [
        "in %: mean ± sample standard deviation over seeds; many, medium, few: error of each shot group; – : none such"
    ]
    notes += [f"† {ONE_SEED}"] * single + [f"‡ {SELECTED_ON_TEST}"] * leaking
    return Table("", columns, tuple(cells), tuple(notes))


def looks_at_test(record: Mapping[str, Any]) -> bool:
    """Whether a result or a row was chosen with the test set: its `looks_at_test`, else whether it ran `official`."""
    return bool(record.get("looks_at_test", record.get("protocol") == "official"))


def spread(values: Any, decimals: int = 2) -> str:
    """Shares per seed as "mean ± std" in per cent; the value alone for one seed."""
    each = seed_values(values)
    if each is None:
        return MISSING
    mean, std = mean_std(each)
    return percent(mean, decimals) + ("" if std is None else f" ± {percent(std, decimals)}")


def _seconds(values: Any) -> str:
    each = seed_values(values)
    if each is None:
        return MISSING
    mean, _ = mean_std(each)  # a spread over machines in use says nothing about the method
    return f"{mean:.2f}" if mean < 10 else f"{mean:.1f}"


def _seeds(row: Mapping[str, Any]) -> int:
    return int(row["n_seeds"]) if row.get("n_seeds") is not None else len(seed_values(row.get("top1_error")) or [])


def _reused(row: Mapping[str, Any]) -> str:
    """How many of the runs were there before; the others were trained for this table."""
    reused, trained = row.get("reused"), row.get("trained")
    return MISSING if reused is None or trained is None else f"{reused} of {reused + trained}"


def _markdown_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
