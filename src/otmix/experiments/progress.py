"""A bar for trainings that run in other processes: it looks at how long their logs have grown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from otmix import training
from otmix.config import RunConfig
from otmix.errors import UserError
from otmix.streams import lasting
from otmix.training.records import read_config


class ProcessProgress:
    """Shows how much of `configs` is done, on stderr. `update` reads the state of the run directories."""

    def __init__(self, configs: Sequence[RunConfig]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.run_dirs = [training.run_dir_of(config) for config in configs]
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(
            *columns,
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=lasting(sys.stderr)),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # lines that are piped somewhere stay in their pipe
        )
        self.task = self.progress.add_task(f"{len(configs)} runs", total=len(configs))

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self) -> None:
        self.progress.update(self.task, completed=sum(share_done(run_dir) for run_dir in self.run_dirs))


def share_done(run_dir: Path) -> float:
    """The part of a run's epochs that is in its log, in [0, 1]; 1 for a finished run, 0 for one that has not begun."""
    if training.is_finished(run_dir):
        return 1.0
    try:
        with (run_dir / "metrics.jsonl").open("rb") as stream:
            lines = sum(1 for _ in stream)
        return min(1.0, lines / (read_config(run_dir).epochs or 1))
    except (OSError, UserError):
        return 0.0
