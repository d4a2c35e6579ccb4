"""What a run tells whoever watches it. The loop calls a `Reporter` on rank 0; the terminal display is one, tests use
others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunInfo:
    """What is about to be trained, for a headline."""

    run_dir: Path
    title: str
    protocol: str
    data: str
    images: int
    classes: int
    imbalance: float
    backbone: str
    parameters: int
    epochs: int
    steps_per_epoch: int
    device: str
    precision: str
    notes: tuple[str, ...] = ()
    resumed_at_epoch: int | None = None


@dataclass(frozen=True)
class Progress:
    """The state of a run within an epoch; `epoch` counts from 0, shares and errors lie in [0, 1]. Counts are since the
    epoch began.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    error: float
    images_per_second: float
    transport_share: float


class Reporter(Protocol):
    """Receives the story of a run. `epoch`'s row is the line of metrics.jsonl."""

    def start(self, info: RunInfo) -> None: ...

    def loading(self, done: int, total: int) -> None: ...

    def looking(self, done: int, total: int) -> None:
        """How many images the model has looked at outside training, to be judged or for F."""
        ...

    def step(self, progress: Progress) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...

    def finish(self, result: dict[str, Any], run_dir: Path) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Says nothing."""

    def start(self, info: RunInfo) -> None:
        pass

    def loading(self, done: int, total: int) -> None:
        pass

    def looking(self, done: int, total: int) -> None:
        pass

    def step(self, progress: Progress) -> None:
        pass

    def epoch(self, row: dict[str, Any]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def finish(self, result: dict[str, Any], run_dir: Path) -> None:
        pass

    def close(self) -> None:
        pass
